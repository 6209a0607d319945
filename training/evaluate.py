"""Trained MNIST members and the test images -> a table: accuracy and calibration of each and of the ensemble.

python -m training.evaluate --members training/members/mnist
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error
from tqdm import tqdm

from training.mnist import MEMBER_DIR, open_data, positive, predict_log_probabilities
from training.mnist_data import DataError, Digits
from vmap_ensemble.errors import EnsembleError
from vmap_ensemble.members import read_state_dict
from vmap_ensemble.mnist_net import MnistNet

CALIBRATION_BINS = 15
SUFFIXES = (".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Score:
    """How good and how honest one classifier is on the test images.

    Attributes:
        name: of the member, or "ensemble".
        accuracy: share it gets right, 0 to 1.
        nll: mean negative log-likelihood of the right label, in nats.
        ece: expected calibration error in 15 bins, 0 to 1.
        brier: mean over images of the squared distance between probabilities and the right label, 0 to 2.
    """

    name: str
    accuracy: float
    nll: float
    ece: float
    brier: float


@dataclass(frozen=True)
class Disagreement:
    """What the members' disagreement says about the ensemble's answers.

    Attributes:
        mutual_information: mean over the test images, in nats.
        mutual_information_right: the same over images that the ensemble gets right.
        mutual_information_wrong: the same over those it gets wrong; None where there are none.
        agreement: mean share of members whose label is the ensemble's, 0 to 1.
    """

    mutual_information: float
    mutual_information_right: float | None
    mutual_information_wrong: float | None
    agreement: float


def score(name: str, log_probabilities: Tensor, labels: Tensor) -> Score:
    """Judge one classifier.

    Args:
        name: what to call it in the table.
        log_probabilities: (N, C) float.
        labels: (N,) int64.

    Source: Guo et al., On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599 (ECE)
    """
    classes = log_probabilities.shape[1]
    probabilities = log_probabilities.exp()
    distance = (probabilities - F.one_hot(labels, classes)).square().sum(1)
    return Score(
        name=name,
        accuracy=multiclass_accuracy(probabilities, labels, classes, average="micro").item(),
        nll=F.nll_loss(log_probabilities, labels).item(),
        ece=multiclass_calibration_error(probabilities, labels, classes, n_bins=CALIBRATION_BINS).item(),
        brier=distance.mean().item(),
    )


def combine_mean(log_probabilities: Tensor) -> Tensor:
    """Average members' probabilities: (M, N, C) log-probabilities -> (N, C) log-probabilities."""
    return log_probabilities.logsumexp(0) - torch.tensor(float(len(log_probabilities))).log()


def measure_disagreement(log_probabilities: Tensor, labels: Tensor) -> Disagreement:
    """Relate the members' disagreement to the ensemble's errors.

    Args:
        log_probabilities: (M, N, C) of the members.
        labels: (N,) int64.

    Source: Lakshminarayanan et al., Deep Ensembles, https://arxiv.org/abs/1612.01474;
        mutual information = H[mean p] - mean H[p], https://arxiv.org/abs/1112.5745
    """
    combined = combine_mean(log_probabilities)
    information = _entropy(combined) - _entropy(log_probabilities).mean(0)
    predicted = combined.argmax(1)
    right = predicted == labels
    return Disagreement(
        mutual_information=information.mean().item(),
        mutual_information_right=information[right].mean().item() if right.any() else None,
        mutual_information_wrong=information[~right].mean().item() if (~right).any() else None,
        agreement=(log_probabilities.argmax(2) == predicted).float().mean().item(),
    )


def _entropy(log_probabilities: Tensor) -> Tensor:
    # clamp: exp(-inf) * -inf is nan, while p log p goes to 0
    return -(log_probabilities.exp() * log_probabilities.clamp(min=-1e4)).sum(-1)


def find_members(paths: list[Path]) -> list[Path]:
    """Resolve files and folders to checkpoint files, folders in the order of their names.

    Raises:
        DataError: a path does not exist, or a folder holds no checkpoint.
    """
    files = []
    for path in paths:
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise DataError(
                f"{path}: expected a checkpoint or a folder of them ({', '.join(SUFFIXES)}); "
                "`python -m training.mnist --save-model` trains some"
            )
        files += found
    return files


def predict_members(files: list[Path], digits: Digits) -> Tensor:
    """Run each member over a split, one after another; returns (M, N, 10) log-probabilities."""
    outputs = []
    for file in tqdm(files, desc="members", unit="member"):
        model = MnistNet()
        model.load_state_dict(read_state_dict(file))
        outputs.append(predict_log_probabilities(model.eval(), digits))
    return torch.stack(outputs)


def format_rows(scores: list[Score]) -> list[list[str]]:
    """Turn scores into cells, in the order of the columns that column_titles gives."""
    return [[s.name, f"{s.accuracy:.2%}", f"{s.nll:.4f}", f"{s.ece:.2%}", f"{s.brier:.4f}"] for s in scores]


def column_titles() -> list[str]:
    """Titles of the table's columns: the fields of Score."""
    titles = {
        "name": "member",
        "nll": "NLL (nats)",
        "ece": f"ECE ({CALIBRATION_BINS} bins)",
        "brier": "Brier",
    }
    return [titles.get(field.name, field.name) for field in fields(Score)]


def describe_disagreement(found: Disagreement) -> str:
    """One line on how the members' disagreement tells right answers from wrong ones."""
    parts = [f"mutual information {found.mutual_information:.4f} nats on average"]
    if found.mutual_information_right is not None:
        parts.append(f"{found.mutual_information_right:.4f} where the ensemble is right")
    if found.mutual_information_wrong is not None:
        parts.append(f"{found.mutual_information_wrong:.4f} where it is wrong")
    return ", ".join(parts) + f"; members agree with the ensemble on {found.agreement:.2%}"


def format_markdown(scores: list[Score], found: Disagreement) -> str:
    """The table as Markdown, with the line on disagreement below."""
    rows = [column_titles(), ["---"] + ["---:"] * (len(column_titles()) - 1), *format_rows(scores)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    line = describe_disagreement(found)
    return f"{table}\n\n{line[0].upper()}{line[1:]}."


def print_table(scores: list[Score], found: Disagreement) -> None:
    """Print the table for people."""
    table = Table()
    for position, title in enumerate(column_titles()):
        table.add_column(title, justify="right" if position else "left")
    for row, of in zip(format_rows(scores), scores, strict=True):
        table.add_row(*row, style="bold" if of.name == "ensemble" else None)
    Console().print(table)
    print(describe_disagreement(found))


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--members", type=Path, nargs="+", default=[MEMBER_DIR], help="checkpoints, or folders of them")
    add("--data-dir", type=Path, help="folder with MNIST's files, or the word sample; as in training.mnist")
    add("--download", action="store_true", help="fetch the full set through torchvision first")
    add("--threads", type=positive(int), help="threads of torch")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    add("--markdown", action="store_true", help="print the table as Markdown")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        files = find_members(options.members)
        _, _, test = open_data(options.data_dir, options.download)
        outputs = predict_members(files, test)
    except (DataError, EnsembleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    scores = [score(file.stem, output, test.labels) for file, output in zip(files, outputs, strict=True)]
    scores.append(score("ensemble", combine_mean(outputs), test.labels))
    found = measure_disagreement(outputs, test.labels)
    if options.markdown:
        print(format_markdown(scores, found))
    else:
        print_table(scores, found)
    if options.json:
        figures = {"scores": [asdict(s) for s in scores], "disagreement": asdict(found), "images": len(test)}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
