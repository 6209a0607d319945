"""KServe v2 inputs: what is read, and that what is refused is refused briefly."""

from __future__ import annotations

import base64

import pytest

from vmap_ensemble.errors import ItemError
from vmap_ensemble.serving.kserve import kserve_v2_items


def tensor(data, **keys):
    return {"name": "x", "datatype": "FP32", "shape": [len(data)], "data": data, **keys}


def refusal(*inputs):
    with pytest.raises(ItemError) as caught:
        kserve_v2_items(inputs)
    assert len(caught.value.message) < 300
    return caught.value


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6], [[[1, 2, 3]], [[4, 5, 6]]]])
def test_rows_are_nested_in_the_shape(data):
    assert kserve_v2_items([tensor(data, shape=[2, 1, 3])]) == [[[1, 2, 3]], [[4, 5, 6]]]


def test_several_inputs_are_records():
    question = tensor(["a", "b"], name="question", datatype="BYTES")
    context = tensor(["c", "d"], name="context", datatype="BYTES")
    assert kserve_v2_items([question, context]) == [
        {"question": "a", "context": "c"},
        {"question": "b", "context": "d"},
    ]


GOOD = {
    "BOOL": [True, False],
    "UINT8": [0, 255],
    "INT8": [-128, 127],
    "UINT16": [65535],
    "INT64": [-(2**63)],
    "UINT64": [2**64 - 1],
    "FP16": [1, 0.5],
    "FP32": [1e38],
    "FP64": [-1e300],
    "BYTES": ["text"],
}


@pytest.mark.parametrize("datatype", GOOD)
def test_values_of_their_datatype_are_read(datatype):
    assert kserve_v2_items([tensor(GOOD[datatype], datatype=datatype)]) == GOOD[datatype]


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("BOOL", 1),
        ("UINT8", 256),
        ("UINT8", -1),
        ("INT8", 128),
        ("INT32", 1.5),
        ("INT64", 2**63),
        ("UINT64", -1),
        ("INT16", True),
        ("FP32", "1.0"),
        ("FP64", None),
        ("BYTES", 1),
        ("BYTES", {"b64": "aa"}),
    ],
)
def test_values_of_another_datatype_are_refused(datatype, value):
    error = refusal(tensor([value], datatype=datatype))
    assert (error.status, error.message) == (400, f"inputs.x.data: expected values of datatype {datatype}")


def test_unknown_datatypes_are_refused_with_those_there_are():
    error = refusal(tensor([1], datatype="FP31"))
    assert "inputs.x.datatype: expected one of BOOL, UINT8" in error.message
    assert "got FP31" in error.message
    assert refusal(tensor([1], datatype=["FP32"])).status == 400


def test_content_types():
    encoded = [base64.b64encode(b"\x00image").decode(), base64.encodebytes(b"text" * 40).decode()]
    kind = {"parameters": {"content_type": "base64"}}
    assert kserve_v2_items([tensor(encoded, datatype="BYTES", **kind)]) == [b"\x00image", b"text" * 40]
    assert kserve_v2_items([tensor(["a"], datatype="BYTES", parameters={"content_type": "str"})]) == ["a"]
    assert kserve_v2_items([tensor([1], parameters={"content_type": "np"})]) == [1]
    assert "doesn't go with datatype FP32" in refusal(tensor([1], **kind)).message
    assert "doesn't go with datatype BYTES" in (
        refusal(tensor(["a"], datatype="BYTES", parameters={"content_type": "np"})).message
    )
    assert "expected one of str, base64, np" in refusal(tensor([1], parameters={"content_type": "x" * 999})).message
    assert "inputs.x.data: expected base64" in refusal(tensor(["?"], datatype="BYTES", **kind)).message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"shape": [1] * 5000, "data": [1]}, "at most 16 sizes"),
        ({"shape": [2**70]}, "at most 16 sizes"),
        ({"shape": [0]}, "sizes of at least 1"),
        ({"shape": [True]}, "sizes of at least 1"),
        ({"shape": "2"}, "sizes of at least 1"),
        ({"shape": [2**40, 2**40, 2**40, 2**40, 2**40, 2**40, 2**40, 2**40]}, "2 values don't fill shape"),
        ({"shape": [4], "data": [[1, 2], [3, 4]]}, "lists of other lengths than shape [4]"),
        ({"shape": [2, 2], "data": [[1, 2, 3], [4]]}, "lists of other lengths than shape [2, 2]"),
        ({"shape": [3, 2], "data": [[1, 2, 3], [4, 5, 6]]}, "lists of other lengths"),
        ({"shape": [2, 1], "data": [[1], 2]}, "both side by side"),
        ({"data": "text"}, "expected a list, got str"),
        ({"name": 3}, "inputs[0].name: expected text, got int"),
        ({"name": "n" * 100_000, "shape": [3]}, "n…: 2 values don't fill shape [3]"),
    ],
)
def test_wrong_inputs_are_refused_briefly(keys, words):
    error = refusal({**tensor([1, 2]), **keys})
    assert error.status == 400
    assert words in error.message


def test_deep_data_is_refused():
    data = [1]
    for _ in range(900):
        data = [data]
    assert refusal(tensor(data, shape=[1] * 16)).message == "inputs.x.data: lists are nested deeper than 16"


def test_axes_of_one_may_be_left_out_of_the_nesting():
    assert kserve_v2_items([{"name": "x", "shape": [1, 1, 2, 2], "data": [[1, 2], [3, 4]]}]) == [[[[1, 2], [3, 4]]]]


def test_inputs_are_few_of_one_length_and_named_once():
    assert refusal(tensor([1]), tensor([1])).message == "inputs.x: expected one input of this name, got several"
    assert "the same first size" in refusal(tensor([1]), tensor([1, 2], name="y")).message
    assert refusal(*(tensor([1], name=str(i)) for i in range(65))).status == 413
