"""Keys in the files of results -> names that a person reads, and what each rival is."""

from __future__ import annotations

AUTO = "ours_auto"
# Key of a rival -> name, and what it does; in the order of a reader's questions. `benchmarks.forward` and `seeds`:
FORWARD = {
    "loop": ("loop", "the members one after another in eager PyTorch; every ratio is its time over the rival's"),
    "loop_compiled": ("compiled loop", "`torch.compile` of that loop as one module with frozen weights"),
    "loop_graph": ("loop in a graph", "the loop recorded as one CUDA graph, its inputs in place; on a GPU"),
    "loop_reduce_overhead": ("compiled loop in a graph", "`torch.compile`, reduce-overhead, of the loop; on a GPU"),
    "onnxruntime_per_member": ("ONNX Runtime, per member", "a session of ONNX Runtime for each member"),
    "onnxruntime_one_graph": ("ONNX Runtime, one graph", "all members exported as one ONNX graph, in one session"),
    "openvino": ("OpenVINO", "the same graph of all members in OpenVINO, tuned for latency, in float32"),
    "stock_vmap": ("stock vmap", "`torch.func.vmap` over the stacked members as it comes, nothing of ours"),
    "ours_eager": ("ours: eager", "one vmapped call with our batching rules"),
    "ours_prepared": ("ours: prepared", "weights packed for the CPU once, layers fused"),
    "ours_compiled": ("ours: compiled", "Inductor's code for all members, compiled at load"),
    "ours_ahead_of_time": ("ours: native code", "the same, compiled by `./archive.sh --compile`"),
    "ours_cudagraph": ("ours: cudagraph", "the vmapped call, recorded once as a CUDA graph"),
    "ours_cudagraph_fused": ("ours: fused steps", "an encoder's fused steps with kernels for few rows, recorded"),
    "ours_branches": ("ours: branches", "members side by side on streams, recorded as one CUDA graph"),
    "ours_compiled_branches": ("ours: compiled branches", "the same, a member compiled once for all of them"),
    "ours_auto_onnx": ("ours: auto, --onnx", "the same on an archive that `./archive.sh --onnx` built"),
    AUTO: ("ours: auto", "**what an archive serves by default**: the fastest of ours and the loop, measured at load"),
}
# `benchmarks.bert_vmap`:
TEXTS = {
    "loop, padded to max_length": ("loop, padded to max_length", "each text as long as the longest that is allowed"),
    "loop, padded to longest": ("loop, padded to longest", "each text as long as the longest of its batch"),
    "torch.compile of the loop": ("compiled loop, padded", "`torch.compile` of that loop"),
    "ONNX Runtime": ("ONNX Runtime, padded", "the members exported to ONNX Runtime"),
    "vmap, our rules": ("ours: eager, padded", "one vmapped call with our batching rules"),
    "vmap, our rules, packed": ("ours: eager, no padding", "the same without the padding's tokens"),
    "prepared: a graph, member by member": (
        "ours: prepared, no padding",
        "packed weights on a flat graph, as served",
    ),
}
# `benchmarks.serve`; what they are stands in its files.
SERVED = {
    "separate": "separate models",
    "ours": "ours",
    "loop": "looping handler",
    "workflow": "TorchServe workflow",
    "ours_reference": "ours, plain loop",
    "ours_two_workers": "ours, two workers",
}
# `benchmarks.uncertainty`:
SCORES = {
    "mutual_information": ("mutual information", "of the ensemble: what its members disagree about"),
    "predictive_entropy": ("predictive entropy", "of the ensemble's probabilities: all that is unsure"),
    "ensemble_probability": ("1 - probability, ensemble", "one minus the ensemble's largest probability"),
    "member_probability": ("1 - probability, one member", "the same of a single member; the mean over members"),
}
NETWORKS = {"mnist": "MNIST", "resnet18": "ResNet-18", "resnet50": "ResNet-50"}


def name_rival(key: str) -> str:
    """What a rival is called; one that isn't known here keeps its key, in words."""
    known = FORWARD.get(key) or TEXTS.get(key)
    return known[0] if known else key.replace("_", " ")


def is_ours(key: str) -> bool:
    """Whether a rival of the forward is this project's."""
    return name_rival(key).startswith("ours") or key.endswith(", ours")


def name_network(title: str) -> str:
    """A network's title or handler with its name as its paper writes it: resnet18, 224x224 -> ResNet-18, 224x224."""
    name, comma, rest = title.partition(",")
    return NETWORKS.get(name, name) + comma + rest


def rivals_table(served: dict[str, str]) -> str:
    """All rivals of all tables, and the scores of uncertainty.

    Args:
        served: key -> what it is, from the files of `benchmarks.serve`.
    """
    rows = [
        *(("forward, seeds", *row) for row in FORWARD.values()),
        *(("bert", *row) for row in TEXTS.values()),
        *(("serve", SERVED.get(key, key), text) for key, text in served.items()),
        *(("uncertainty", *row) for row in SCORES.values()),
    ]
    lines = ["| table | name | what it is |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {table} | {name} | {text} |" for table, name, text in rows)])
