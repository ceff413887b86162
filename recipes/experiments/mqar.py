"""Multi-query associative recall: accuracy against the number of key-value pairs, by mixer and model dim.

    python recipes/experiments/mqar.py                     # on a GPU; or --quick
    python recipes/experiments/mqar.py --redraw

Each curve is one model of two layers, trained on rows of all numbers of pairs and asked held-out rows of each (after
fig. 2 of Arora et al. 2023, arXiv:2312.04927).
"""

import argparse
from pathlib import Path
from typing import Any

from experiment import Variant, arguments, carry_out, markdown, train_all

from treadle.tracking.plot import COLORS, INK, drawn
from treadle.tracking.read import load_config, load_status

LABELS = {"attention": "attention", "gated-delta": "gated delta net", "window": "attention, window of 16"}
RECIPES = {"attention": "mqar.yaml", "gated-delta": "mqar-gated-delta.yaml", "window": "mqar-window.yaml"}
DIMS, QUICK_DIMS = (32, 64, 128), (16, 32)
QUICK = (
    "task={kind: mqar, vocab_size: 32, pairs: [2, 4, 8]}",
    "training.steps=200",
    "training.sequence_length=32",
    "training.precision=fp32",
    "training.log_every=50",
    "evaluate.samples=256",
)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    dims = QUICK_DIMS if asked.quick else DIMS
    names = {(mixer, dim): f"{mixer}-dim-{dim}" for dim in dims for mixer in asked.only}
    folders = train_all([variant(name, *point, asked) for point, name in names.items()], asked.runs, asked.jobs)
    config = load_config(folders[names[asked.only[0], dims[0]]])
    pairs = config["task"]["pairs"]

    def accuracies(mixer: str, dim: int) -> list[float]:
        summary = load_status(folders[names[mixer, dim]])["summary"]
        return [float(summary[f"{count}_pairs_accuracy"]) for count in pairs]

    return {
        "quick": asked.quick,
        "length": config["training"]["sequence_length"],
        "steps": config["training"]["steps"],
        "vocab_size": config["task"]["vocab_size"],
        "dims": dims,
        "pairs": pairs,
        "accuracy": {mixer: [accuracies(mixer, dim) for dim in dims] for mixer in asked.only},
    }


def variant(name: str, mixer: str, dim: int, asked: argparse.Namespace) -> Variant:
    sizes = (f"model.dim={dim}", f"model.layers.0.feedforward.dim={2 * dim}")
    return Variant(name, RECIPES[mixer], (*sizes, *(QUICK if asked.quick else ()), *asked.overrides))


def draw(result: dict[str, Any], path: Path) -> None:
    with drawn(path, width=3.6 * len(result["dims"]), height=3.6) as figure:
        panels = figure.subplots(1, len(result["dims"]), sharey=True, squeeze=False)[0]
        for column, (panel, dim) in enumerate(zip(panels, result["dims"], strict=True)):
            for (name, label), color in zip(LABELS.items(), COLORS, strict=False):
                if name in result["accuracy"]:
                    values = [100 * value for value in result["accuracy"][name][column]]
                    panel.plot(result["pairs"], values, "o-", color=color, label=label, markersize=4, clip_on=False)
            panel.set_xscale("log", base=2)
            panel.set_xticks(result["pairs"], result["pairs"])
            panel.set_ylim(0, 100)
            panel.set_xlabel(f"pairs in {result['length']} tokens")
            panel.set_title(f"model dim {dim}", color=INK)
        panels[0].set_ylabel("right answers (%)")
        panels[0].legend(loc="best")


def table(result: dict[str, Any]) -> str:
    rows = [
        [LABELS[name], dim, *(f"{value:.1%}" for value in values)]
        for name, by_dim in result["accuracy"].items()
        for dim, values in zip(result["dims"], by_dim, strict=True)
    ]
    return markdown(["mixer", "dim", *(f"{pairs} pairs" for pairs in result["pairs"])], rows)


if __name__ == "__main__":
    parser = arguments(__doc__, runs="mqar", jobs=9)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="mixers")
    asked = parser.parse_args()
    carry_out(asked, "mqar", measure, draw, table)
