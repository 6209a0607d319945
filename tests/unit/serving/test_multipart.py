"""Bodies become the fields that TorchServe's workers get; forms are httpx's, which we did not write."""

from __future__ import annotations

import httpx
import pytest

from vmap_ensemble.errors import RequestError
from vmap_ensemble.serving.multipart import MOST_PARTS, read_fields
from vmap_ensemble.serving.requests import SeveralParts

BINARY = bytes(range(256)) * 3 + b"\r\n--\r\n\n"


def read(**sent):
    request = httpx.Request("POST", "http://x/", **sent)
    return read_fields(request.read(), dict(request.headers))


def test_a_body_is_one_field():
    assert read(content=BINARY)[0] == {"body": BINARY}
    assert read(json={"a": [1]})[0] == {"body": {"a": [1]}}
    assert read(content="größe", headers={"Content-Type": "text/plain"})[0] == {"body": "größe"}
    assert read(content=b"\xff", headers={"Content-Type": "text/plain"})[0] == {"body": b"\xff"}
    assert read(content=b"{", headers={"Content-Type": "application/json"})[0] == {"body": b"{"}
    assert read(content=b"")[0] == {"body": b""}


def test_the_parts_of_a_form():
    fields, headers = read(
        files={
            "data": ("ä.png", BINARY, "image/png"),
            "json": ("a.json", b'{"a": 1}', "application/json"),
            "größe": (None, b"5"),
            "empty": ("e", b""),
        }
    )
    assert fields == {"data": BINARY, "json": {"a": 1}, "größe": b"5", "empty": b""}
    assert headers["data"] == {"content-type": "image/png"}
    assert headers["größe"] == {"content-type": ""}
    assert headers["content-type"].startswith("multipart/form-data")


def test_parts_of_one_name_stay_several():
    fields, _ = read(files=[("data", b"1"), ("data", b"2"), ("data", b"3")])
    assert isinstance(fields["data"], SeveralParts)
    assert fields["data"] == [b"1", b"2", b"3"]


GOOD = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
FORM = {"content-type": "multipart/form-data; boundary=x"}


def test_what_surrounds_the_parts_is_left_out():
    assert read_fields(b"before\r\n" + GOOD + b"--x--\r\nbehind", FORM)[0] == {"a": b"1"}
    quoted = {"content-type": 'Multipart/Form-Data; charset=utf-8; boundary="x"'}
    assert read_fields(GOOD.replace(b"--x", b"--x \t", 1) + b"--x--", quoted)[0] == {"a": b"1"}


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"", 400, "doesn't end"),
        (GOOD, 400, "doesn't end"),  # an option may be missing
        (GOOD + b"--x", 400, "doesn't end"),
        (b"--x\r\n\r\n1\r\n--x--", 400, "without headers"),
        (b"--x\r\n" + b"a" * 5000 + b"\r\n\r\n1\r\n--x--", 400, "without headers"),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--", 400, "a name for each part"),
        (b'--x\r\nContent-Disposition: attachment; name="a"\r\n\r\n1\r\n--x--', 400, "a name for each part"),
        (GOOD * (MOST_PARTS + 1) + b"--x--", 413, f"at most {MOST_PARTS} parts"),
    ],
)
def test_a_broken_form_is_refused(body, status, told):
    with pytest.raises(RequestError, match=told) as refused:
        read_fields(body, FORM)
    assert refused.value.status == status


def test_a_form_without_a_boundary():
    with pytest.raises(RequestError, match="boundary"):
        read_fields(GOOD, {"content-type": "multipart/form-data"})


def test_as_many_parts_as_are_allowed():
    body = b"".join(GOOD.replace(b'"a"', b'"%d"' % number) for number in range(MOST_PARTS)) + b"--x--"
    assert len(read_fields(body, FORM)[0]) == MOST_PARTS
