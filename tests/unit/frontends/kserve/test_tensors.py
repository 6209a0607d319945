"""The SDK's tensors as JSON of KServe v2: values of each datatype, pictures in base64, and what can't be read."""

from __future__ import annotations

import base64

import numpy as np
import pytest

pytest.importorskip("kserve")

from kserve import InferInput, InferRequest

from vmap_ensemble.errors import RequestError
from vmap_ensemble.frontends.kserve.tensors import read_tensors

PICTURE = b"\x89PNG\r\n"


def read(data, datatype="BYTES", shape=None, **parameters):
    tensor = InferInput("x", shape or [len(data)], datatype, data, parameters)
    (found,) = read_tensors(InferRequest("ens", [tensor]))["inputs"]
    return found["data"], found["parameters"]


def test_bytes_are_text_or_base64():
    assert read(["größe"]) == (["größe"], {})
    assert read(["größe".encode()]) == (["größe"], {})
    encoded = [base64.b64encode(value).decode() for value in (PICTURE, b"text")]
    assert read([PICTURE, b"text"]) == (encoded, {"content_type": "base64"})
    assert read([encoded[0].encode()], content_type="base64") == ([encoded[0]], {"content_type": "base64"})
    with pytest.raises(RequestError, match=r"inputs\.x\.data: expected text"):
        read([PICTURE], content_type="str")


@pytest.mark.parametrize(
    ("datatype", "values"),
    [("FP16", [0.5, 1]), ("FP32", [0.25, 2]), ("INT64", [-1, 2]), ("UINT8", [0, 255]), ("BOOL", [True, False])],
)
def test_raw_contents_are_the_values(datatype, values):
    kinds = {"FP16": "f2", "FP32": "f4", "INT64": "i8", "UINT8": "u1", "BOOL": "?"}
    raw = np.array(values, dtype=kinds[datatype]).tobytes()
    tensors = [InferInput("x", [2, 1], datatype, [])]
    (found,) = read_tensors(InferRequest("ens", tensors, raw_inputs=[raw]))["inputs"]
    assert found == {"name": "x", "shape": [2, 1], "datatype": datatype, "data": values, "parameters": {}}


@pytest.mark.parametrize("datatype", ["FP32", "BYTES", "BF16"])
def test_raw_contents_that_dont_fit(datatype):
    request = InferRequest("ens", [InferInput("x", [2], datatype, [])], raw_inputs=[b"\x09\x00\x00\x00a"])
    with pytest.raises(RequestError, match=r"inputs\.x: the data isn't of its datatype and shape"):
        read_tensors(request)


def test_id_and_parameters_come_along():
    request = InferRequest("ens", [InferInput("x", [1], "BYTES", ["a"])], "7", parameters={"top_k": 2})
    body = read_tensors(request)
    assert (body["id"], body["parameters"]) == ("7", {"top_k": 2})
