"""Every command tells its options and refuses wrong ones without what takes seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastertransformer.trace
import training.bert
from benchmarks import options
from benchmarks.measuring.networks import NETWORKS
from benchmarks.measuring.rivals import Rivals
from benchmarks.runs.batching_rules import BATCHES
from benchmarks.runs.seeds import SETTINGS
from benchmarks.serve.archives import SUBJECTS
from benchmarks.serve.rivals import RIVALS
from fastertransformer.modules import HEADS
from training.runs.bert import EPOCHS
from vmap_ensemble.process.device import DTYPES

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("archiver", "benchmarks", "fastertransformer", "optimise", "quality", "scripts", "training")
# Started by another process, which tells them what to do in another way than by options.
NO_COMMANDS = {"archiver.checking.check_child", "benchmarks.serve.client", "scripts.private_ray"}

ASK_EACH = """
import io, json, runpy, sys
from contextlib import redirect_stderr, redirect_stdout

for name in ("torch", "torchvision", "torchmetrics", "transformers", "ray", "onnxruntime", "matplotlib"):
    sys.modules[name] = None  # an import of it fails
said = {}
for module in sys.argv[1:]:
    for option in ("--help", "--no-such-option"):
        out, err = io.StringIO(), io.StringIO()
        sys.argv[1:] = [option]
        try:
            with redirect_stdout(out), redirect_stderr(err):
                runpy.run_module(module, run_name="__main__")
            code = "went on"
        except SystemExit as end:
            code = end.code
        except ImportError as error:
            code = f"imports: {error}"
        said[f"{module} {option}"] = (code, out.getvalue(), err.getvalue())
print(json.dumps(said))
"""


def find_commands() -> list[str]:
    """Modules that `python -m` runs, of the tools and of the package."""
    found = []
    for root, folders in ((ROOT, FOLDERS), (ROOT / "handlers", ("vmap_ensemble",))):
        for path in (path for folder in folders for path in (root / folder).rglob("*.py")):
            if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8"):
                found.append(".".join(path.relative_to(root).with_suffix("").parts))
    return sorted(set(found) - NO_COMMANDS)


@pytest.fixture(scope="module")
def said() -> dict[str, tuple[int, str, str]]:
    """Command and option -> exit code, output and errors, where torch and its like can't be imported."""
    done = subprocess.run(
        [sys.executable, "-c", ASK_EACH, *find_commands()],
        env={"PYTHONPATH": f"{ROOT / 'handlers'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", find_commands())
def test_help_and_wrong_usage_import_nothing_slow(command, said):
    code, out, _ = said[f"{command} --help"]
    assert (code, out[:6]) == (0, "usage:")
    code, _, err = said[f"{command} --no-such-option"]
    assert code == 2
    assert "usage:" in err


@pytest.mark.parametrize(
    ("named", "there"),
    [
        (options.NETWORKS, NETWORKS),
        (options.DTYPES, DTYPES),
        (options.SEEDS, SETTINGS),
        (options.TEXTS, BATCHES),
        (options.SERVED, SUBJECTS),
        (options.SERVED_RIVALS, RIVALS),
        (fastertransformer.trace.MODES, HEADS),
        (fastertransformer.trace.DTYPES, DTYPES),
        (training.bert.TRAIN, EPOCHS),
    ],
)
def test_options_offer_what_there_is(named, there):
    assert sorted(named) == sorted(there)


def test_options_offer_every_engine():
    pytest.importorskip("ray")
    from benchmarks.runs.engines import Engines

    assert {name for name in vars(Engines) if not name.startswith("_")} == set(options.ENGINES)


def test_options_offer_every_rival_that_can_be_built():
    assert {name for name in vars(Rivals) if not name.startswith("_")} == set(options.RIVALS)
