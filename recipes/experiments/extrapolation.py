"""Train short, test long: bits per byte against the length of evaluation, by kind of position.

    python recipes/experiments/extrapolation.py            # on a GPU; or --quick
    python recipes/experiments/extrapolation.py --redraw

ALiBi, rotary and sinusoidal positions are trained at 256 tokens and evaluated in windows of up to 4,096 (fig. 1 of
Press et al. 2021, arXiv:2108.12409). LongRoPE (arXiv:2402.13753) is the rotary model, not trained further, under the
divisors that a search on its training text finds for each length.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from experiment import REPOSITORY, Variant, arguments, carry_out, markdown, say, train_all

from treadle.data.loader import Loader
from treadle.data.prepare import Prepared
from treadle.evaluate.lengths import data_of, evaluate_lengths
from treadle.evaluate.longrope import search_divisors, with_scaling
from treadle.evaluate.perplexity import Perplexity
from treadle.inference.load import load
from treadle.nn.transformer import Transformer
from treadle.parallel.mesh import find_device
from treadle.tracking.plot import COLORS, INK, drawn
from treadle.tracking.read import load_config

LABELS = {"alibi": "ALiBi", "rope": "RoPE", "longrope": "LongRoPE, not trained further", "sinusoidal": "sinusoidal"}
RECIPES = {
    "alibi": "extrapolation-alibi.yaml",
    "rope": "extrapolation.yaml",
    "sinusoidal": "extrapolation-sinusoidal.yaml",
}
LENGTHS = 256, 512, 1024, 2048, 4096
BATCH_TOKENS, SEARCH_TOKENS = 16384, 32768
# The mask of ALiBi is formed in float32 here, and no length has to be compiled for.
ATTENTION = "sdpa"
QUICK = (
    f"data.sources=[{{kind: text, paths: {REPOSITORY}/docs/*.md}}]",
    "data.tokenizer={kind: train, vocab_size: 512}",
    "data.held_out=0.2",
    "model.dim=64",
    "model.layers.0.repeat=2",
    "model.layers.0.mixer.heads=4",
    "model.layers.0.feedforward.dim=128",
    "training.steps=60",
    "training.sequence_length=64",
    "training.batch_size=8",
    "training.precision=fp32",
    "training.compile=false",
)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    overrides = (*(QUICK if asked.quick else ()), *asked.overrides)
    folders = train_all([Variant(name, file, overrides) for name, file in RECIPES.items()], asked.runs, asked.jobs)
    trained_at = load_config(folders["rope"])["training"]["sequence_length"]
    lengths = [trained_at * length // LENGTHS[0] for length in LENGTHS]
    scores: dict[str, dict[int, Perplexity]] = {}
    for name, folder in folders.items():
        model, data = open_run(folder)
        scores[name] = score(name, model, data, lengths)
        if name == "rope":
            divisors = longrope_divisors(model, data, trained_at, lengths, 2048 if asked.quick else SEARCH_TOKENS)
            scores["longrope"] = {trained_at: scores["rope"][trained_at]}
            for length, scaling in divisors.items():
                scores["longrope"] |= score("longrope", with_scaling(model, scaling), data, [length])
    some = scores["rope"][trained_at]
    return {
        "quick": asked.quick,
        "trained_at": trained_at,
        "lengths": lengths,
        "tokens": some.tokens,
        "bytes": some.bytes,
        "bits_per_byte": {name: [scores[name][length].bits_per_byte for length in lengths] for name in LABELS},
        "perplexity": {name: [scores[name][length].perplexity for length in lengths] for name in LABELS},
        "longrope_divisors": {str(length): scaling.long_factor for length, scaling in divisors.items()},
    }


def open_run(folder: Path) -> tuple[Transformer, Prepared]:
    """The model, computing as it did in training."""
    device = find_device("auto")
    model, _ = load(folder, device=device, dtype=torch.float32)
    if load_config(folder)["training"]["precision"] == "bf16":
        model.dtype = torch.bfloat16
    return model, data_of(folder)


def score(name: str, model: Transformer, data: Prepared, lengths: list[int]) -> dict[int, Perplexity]:
    (scores,) = evaluate_lengths(model, data, lengths, batch_tokens=BATCH_TOKENS, attention=ATTENTION).values()
    for length, result in scores.items():
        say(name, f"windows of {length}: {result.bits_per_byte:.4f} bits per byte")
    return scores


def longrope_divisors(
    model: Transformer, data: Prepared, trained_at: int, lengths: list[int], tokens: int
) -> dict[int, Any]:
    """The scaling for each longer length, searched on training text."""
    found = {}
    for length in lengths:
        if length > trained_at:
            rows = max(1, tokens // length)
            text = Loader(
                data.train, data.weights, sequence_length=length, batch_size=rows, seed=1, isolate_documents=False
            )
            batches = text.micro_batches(0, max(1, BATCH_TOKENS // length))
            found[length] = search_divisors(model, batches, original_length=trained_at, attention=ATTENTION)
            say("longrope", f"windows of {length}: divisors {found[length].long_factor}")
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    with drawn(path, width=7, height=4.4) as figure:
        panel = figure.subplots()
        for (name, label), color in zip(LABELS.items(), COLORS, strict=False):
            panel.plot(result["lengths"], result["bits_per_byte"][name], "o-", color=color, label=label, markersize=4)
        panel.axvline(result["trained_at"], color=INK, linewidth=0.8, linestyle=":")
        panel.set_xscale("log", base=2)
        panel.set_xticks(result["lengths"], [f"{length:,}" for length in result["lengths"]])
        panel.set_xlabel(f"tokens in an evaluation window (trained at {result['trained_at']:,})")
        panel.set_title("held-out bits per byte", color=INK)
        panel.legend(loc="best")


def table(result: dict[str, Any]) -> str:
    head = ["bits per byte at", *(f"{length:,}" for length in result["lengths"])]
    rows = [[LABELS[name], *(f"{bits:.3f}" for bits in values)] for name, values in result["bits_per_byte"].items()]
    return markdown(head, rows)


if __name__ == "__main__":
    asked = arguments(__doc__, runs="extrapolation", jobs=3).parse_args()
    carry_out(asked, "extrapolation", measure, draw, table)
