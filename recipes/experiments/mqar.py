"""Multi-query associative recall: accuracy against model dim, by mixer and number of key-value pairs.

    python recipes/experiments/mqar.py                     # on a GPU; or --quick
    python recipes/experiments/mqar.py --redraw

Each point is a model of two layers trained on the task and asked held-out rows (fig. 2 of Arora et al. 2023,
arXiv:2312.04927).
"""

import argparse
from pathlib import Path
from typing import Any

from experiment import Variant, arguments, carry_out, markdown, train_all

from treadle.tracking.plot import COLORS, INK, house_style, new_figure, save_figure
from treadle.tracking.read import load_config, load_status

LABELS = {"attention": "attention", "gated-delta": "gated delta net", "window": "attention, window of 16"}
RECIPES = {"attention": "mqar.yaml", "gated-delta": "mqar-gated-delta.yaml", "window": "mqar-window.yaml"}
DIMS, PAIRS = (32, 64, 128), (16, 64)
QUICK_DIMS, QUICK_PAIRS = (16, 32), (2, 4)
QUICK = (
    "task.vocab_size=32",
    "training.steps=150",
    "training.sequence_length=32",
    "training.precision=fp32",
    "training.log_every=50",
    "evaluate.samples=256",
)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    dims, all_pairs = (QUICK_DIMS, QUICK_PAIRS) if asked.quick else (DIMS, PAIRS)
    points = [(mixer, pairs, dim) for pairs in all_pairs for dim in dims for mixer in asked.only]
    names = {point: "{}-{}-pairs-dim-{}".format(*point) for point in points}
    folders = train_all([variant(names[point], *point, asked) for point in points], asked.runs, asked.jobs)
    training = load_config(folders[names[points[0]]])["training"]

    def accuracy(mixer: str, pairs: int, dim: int) -> float:
        return float(load_status(folders[names[mixer, pairs, dim]])["summary"]["accuracy"])

    return {
        "quick": asked.quick,
        "length": training["sequence_length"],
        "steps": training["steps"],
        "dims": dims,
        "pairs": all_pairs,
        "accuracy": {mixer: [[accuracy(mixer, p, dim) for dim in dims] for p in all_pairs] for mixer in asked.only},
    }


def variant(name: str, mixer: str, pairs: int, dim: int, asked: argparse.Namespace) -> Variant:
    sizes = (f"task.pairs={pairs}", f"model.dim={dim}", f"model.layers.0.feedforward.dim={2 * dim}")
    return Variant(name, RECIPES[mixer], (*sizes, *(QUICK if asked.quick else ()), *asked.overrides))


def draw(result: dict[str, Any], path: Path) -> None:
    with house_style():
        figure = new_figure(width=4.2 * len(result["pairs"]), height=3.8)
        panels = figure.subplots(1, len(result["pairs"]), sharey=True, squeeze=False)[0]
        for column, (panel, pairs) in enumerate(zip(panels, result["pairs"], strict=True)):
            for (name, label), color in zip(LABELS.items(), COLORS, strict=False):
                if name in result["accuracy"]:
                    values = [100 * value for value in result["accuracy"][name][column]]
                    panel.plot(result["dims"], values, "o-", color=color, label=label, markersize=4, clip_on=False)
            panel.set_xscale("log", base=2)
            panel.set_xticks(result["dims"], result["dims"])
            panel.set_ylim(0, 100)
            panel.set_xlabel("model dim")
            panel.set_title(f"{pairs} pairs in {result['length']} tokens", color=INK)
        panels[0].set_ylabel("answers that are right (%)")
        panels[-1].legend(loc="center right")
        save_figure(figure, path)


def table(result: dict[str, Any]) -> str:
    head = ["mixer", *(f"{pairs} pairs, dim {dim}" for pairs in result["pairs"] for dim in result["dims"])]
    rows = [
        [LABELS[name], *(f"{value:.1%}" for values in by_pairs for value in values)]
        for name, by_pairs in result["accuracy"].items()
    ]
    return markdown(head, rows)


if __name__ == "__main__":
    parser = arguments(__doc__, runs="mqar", jobs=9)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="mixers")
    asked = parser.parse_args()
    carry_out(asked, "mqar", measure, draw, table)
