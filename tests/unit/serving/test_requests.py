"""What a request asks of each of its items: options per item, unknown keys, parts of one name, byte order marks."""

from __future__ import annotations

import json

import pytest

from vmap_ensemble.errors import RequestError
from vmap_ensemble.serving.requests import SeveralParts, read_request

KEYS = ("text", "data")


def read(body, headers=None, keys=KEYS, lists=True):
    return read_request({"body": body}, headers or {}, keys, lists)


def subsets(request):
    return [options.subset for options in request.options]


@pytest.mark.parametrize("form", ["instances", "list"])
def test_each_item_has_its_own_options(form):
    items = [{"text": "a", "subset": ["hooli"]}, {"text": "b", "top_k": 2}, {"text": "c"}]
    body = {"instances": items, "subset": "acme"} if form == "instances" else items
    request = read(body, {"X-Ensemble-Subset": "acme"})
    assert [item["text"] for item in request.items] == ["a", "b", "c"]
    assert all(set(item) == {"text"} for item in request.items)
    assert subsets(request) == [("hooli",), ("acme",), ("acme",)]
    assert [options.top_k for options in request.options] == [None, 2, None]


def test_the_narrower_option_wins():
    headers = {"x-ensemble-top-k": "1", "x-ensemble-detail": "members"}
    body = {"instances": [{"text": "a"}, {"text": "b", "top_k": 4}], "parameters": {"top_k": 2}, "top_k": 3}
    request = read(body, headers)
    assert [options.top_k for options in request.options] == [3, 4]
    assert all(options.detail for options in request.options)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text": "x", "subsets": ["a"]}, "unknown key 'subsets'; did you mean 'subset'?"),
        ({"text": "x", "member": "a"}, "unknown key 'member'; known keys: text, data, detail, subset"),
        ({"instances": ["x"], "sub_set": ["a"]}, "unknown key 'sub_set'; did you mean 'subset'?"),
        ({"instances": ["x"], "tenant": 1}, "unknown key 'tenant'; known keys: instances"),
        (
            {"instances": ["x", {"text": "y", "subsets": "a"}]},
            "item 1: unknown key 'subsets'; did you mean 'subset'?",
        ),
        ([{"text": "x"}, {"text": "y", "top-k": 1}], "item 1: unknown key 'top-k'; did you mean 'top_k'?"),
        ([{"text": "x"}, {"text": "y", "top_k": 0}], "item 1: top_k: expected a whole number"),
        ({"inputs": [{"name": "x", "data": ["a"]}], "parameters": {"subsets": "a"}}, "parameters: unknown key"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(body, message):
    with pytest.raises(RequestError) as caught:
        read(body)
    assert caught.value.status == 400
    assert message in str(caught.value)


def test_other_peoples_parameters_and_keys_of_own_tasks_pass():
    request = read({"inputs": [{"name": "x", "data": ["a"]}], "parameters": {"binary_data_output": False}})
    assert request.items == ("a",)
    own = read({"rooms": 3, "parameters": 1, "subset": "m1"}, keys=None)
    assert (own.items, subsets(own)) == (({"rooms": 3, "parameters": 1},), [("m1",)])
    with pytest.raises(RequestError, match="unknown key 'subsets'; did you mean 'subset'"):
        read({"rooms": 3, "subsets": "m1"}, keys=None)


def test_long_keys_are_cut():
    with pytest.raises(RequestError) as caught:
        read({"x" * 5000: 1})
    assert len(str(caught.value)) < 400


def test_lists_of_numbers_are_tensors_and_lists_of_texts_batches():
    assert read([[1.0, 2.0]], lists=False).items == ([[1.0, 2.0]],)
    assert read([1, 2], lists=False).envelope == "single"
    assert read(["aGk=", {"data": "aGk="}], lists=False).envelope == "list"
    assert read([1, 2], lists=True).items == (1, 2)


@pytest.mark.parametrize(
    "row",
    [
        {"data": SeveralParts([b"a", b"b"])},
        {"data": b"\x89PNG\xff", "image": b"\x89PNG\xfe"},
        {"one": b"\x89PNG\xff", "two": b"\x89PNG\xfe"},
        {"data": b"a text", "body": b"another"},
    ],
)
def test_two_files_are_refused(row):
    with pytest.raises(RequestError) as caught:
        read_request(row, {}, ("data", "image", "b64"))
    assert caught.value.status == 400


def test_parts_of_a_record_and_options_beside_a_file():
    request = read_request({"question": b"what ?", "context": b"this"}, {}, ("question", "context"))
    assert request.items == ({"question": "what ?", "context": "this"},)
    request = read_request({"data": b"\x89PNG\xff", "subset": b"a,b"}, {}, ("data",))
    assert (request.items, subsets(request)) == ((b"\x89PNG\xff",), [("a", "b")])


@pytest.mark.parametrize("headers", [{}, {"content-type": "application/json"}])
def test_json_may_begin_with_a_byte_order_mark(headers):
    body = b"\xef\xbb\xbf" + json.dumps({"text": "x"}).encode()
    assert read(body, headers).items == ({"text": "x"},)
    assert read(b'\xef\xbb\xbf["a", "b"]').items == ("a", "b")
    assert read(b"\xef\xbb\xbfno json").items == (b"\xef\xbb\xbfno json",)


@pytest.mark.parametrize("kind", ["text/json", "text/json; charset=utf-8", "text/x-json"])
def test_json_that_came_as_text_is_json(kind):
    """TorchServe decodes bodies of type text/...: their JSON was answered as a text with its brackets."""
    for headers in ({"Content-Type": kind}, {"body": {"content-type": kind}}):
        assert read('{"text": "x", "subset": "m1"}', headers).items == ({"text": "x"},)
        with pytest.raises(RequestError, match="not valid JSON"):
            read('{"text": ', headers)


def test_a_text_is_what_it_says_but_for_its_byte_order_mark():
    plain = {"Content-Type": "text/plain"}
    assert read("\ufeffa text", plain).items == ("a text",)
    assert read('{"text": "x"}', plain).items == ('{"text": "x"}',)
    # TorchServe has parsed this one: positions in an answer are those in the client's string.
    assert read("\ufeff{a}", {"Content-Type": "application/json"}).items == ("\ufeff{a}",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subset": ["m0"]}, r"inputs\[0\]: unknown key 'subset'; known keys: name, shape.*body"),
        ({"dtype": "FP32"}, r"inputs\[0\]: unknown key 'dtype'; did you mean 'datatype'"),
        ({"parameters": {"subset": "m0"}}, r"inputs\[0\].parameters: unexpected 'subset'; options stand in the body"),
        ({"parameters": {"sub_set": "m0", "content_type": "str"}}, r"inputs\[0\].parameters: unexpected 'sub_set'"),
    ],
)
def test_options_within_an_input_of_kserve_are_refused(change, message):
    """Ignored, they had all members answer what one tenant's were asked."""
    with pytest.raises(RequestError, match=message) as caught:
        read({"inputs": [{"name": "text", "data": ["a"], **change}]})
    assert caught.value.status == 400
    others = {"parameters": {"content_type": "str", "pandas": 1}}
    assert read({"inputs": [{"name": "text", "data": ["a"], **others}]}).items == ("a",)


@pytest.mark.parametrize("asked", [{"subset": ["m0"]}, {"parameters": {"Subset": "m0"}}])
def test_options_within_an_output_of_kserve_are_refused(asked):
    inputs = [{"name": "text", "data": ["a"]}]
    with pytest.raises(RequestError, match=r"outputs\[0\](.parameters)?: unexpected '[Ss]ubset'"):
        read({"inputs": inputs, "outputs": [{"name": "answers", **asked}]})
    assert read({"inputs": inputs, "outputs": [{"name": "answers", "parameters": {"binary": False}}]}).items == ("a",)


@pytest.mark.parametrize("parameters", ["subset=m0", [{"subset": "m0"}], 1, False])
def test_parameters_that_are_no_object_are_refused(parameters):
    for body in ({"text": "a"}, {"instances": ["a"]}, {"inputs": [{"name": "text", "data": ["a"]}]}):
        with pytest.raises(RequestError, match="parameters: expected an object"):
            read({**body, "parameters": parameters})
        assert read({**body, "parameters": None}).options[0].subset is None


def test_parameters_are_few():
    """Each is compared with the options' names."""
    many = {f"k{number}": 0 for number in range(257)}
    for body in ({"parameters": many}, {"inputs": [{"name": "x", "data": ["a"], "parameters": many}]}):
        with pytest.raises(RequestError, match="parameters: expected at most 256 keys, got 257"):
            read({"instances": ["a"], **body} if "inputs" not in body else body)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("X-Ensemble-Subsets", "header: unknown key 'x-ensemble-subsets'; did you mean 'x-ensemble-subset'"),
        ("x-ensemble-tenant", "header: unknown key 'x-ensemble-tenant'"),
    ],
)
def test_unknown_headers_of_ours_are_refused(header, message):
    with pytest.raises(RequestError, match=message):
        read({"text": "a"}, {header: "m0"})
    assert subsets(read({"text": "a"}, {"X-Request-Id": "m0", "X-ENSEMBLE-SUBSET": "m0"})) == [("m0",)]
