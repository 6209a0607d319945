"""What the settings may say of how a forward is run: the names of the modes, and the budget of `auto`.

The names stand here, below everything that runs a forward, so that a setting is checked without importing any of it.
What a mode does is registered in execution/register.py; `modes.mode_names()` knows those of the package at once, and
others as soon as the file that registers them is imported.
"""

from __future__ import annotations

import difflib

# Chooses among the modes; none itself.
AUTO = "auto"
# Seconds that `auto` may measure at load, wherever nobody says otherwise.
AUTO_BUDGET_S = 10.0
# Folder of an archive with what `auto` chose, a file for each kind of machine that it was measured on.
CHOICES_FOLDER = "choices"
# Mode -> the module whose import registers it: the one line that a new mode of the package needs.
MODULES: dict[str, str] = {
    "eager": "vmap_ensemble.execution.modes",
    "prepared": "vmap_ensemble.execution.cpu.mode",
    "compiled": "vmap_ensemble.execution.compiled.mode",
    "branches": "vmap_ensemble.execution.cuda.mode",
    "compiled_branches": "vmap_ensemble.execution.cuda.mode",
    "cudagraph": "vmap_ensemble.execution.cuda.mode",
    "cudagraph_fused": "vmap_ensemble.execution.cuda.mode",
    "cudagraph_loop": "vmap_ensemble.execution.cuda.mode",
    "onnxruntime": "vmap_ensemble.execution.onnx.mode",
    "openvino": "vmap_ensemble.execution.onnx.mode",
    "reference": "vmap_ensemble.execution.modes",
}


def mode_names() -> list[str]:
    """What the setting `execution` may say."""
    return [AUTO, *MODULES]


def reason_against_name(name: str) -> str | None:
    """What is wrong with a value of `execution`, with the known names and the nearest; None if it's one of them."""
    names = mode_names()
    if name in names:
        return None
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"expected one of {', '.join(names)}, got '{name}'{hint}"
