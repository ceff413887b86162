"""Attention to pages in Triton's interpreter, in a process of its own: python paged_cases.py numbers|invariance|engine

Numbers are held against a loop over requests, tokens and heads in float64, which knows no pages.
"""

import sys
from typing import Any

import interpreter  # noqa: F401  before triton
import torch

import treadle
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Sampling
from treadle.kernels import paged_attention_triton as kernels
from treadle.kernels import use

DECODE = {"counts": [1, 1, 1, 1, 1], "lengths": [1, 17, 0, 150, 64]}
CHUNKS = {"counts": [9, 20, 2], "lengths": [9, 83, 100]}
MIXED = {"counts": [1, 5, 1, 0, 40, 1], "lengths": [90, 70, 1, 30, 40, 0]}
CASES: list[dict[str, Any]] = [
    {**DECODE, "heads": (4, 4), "dim": 64, "page": 16},
    {**DECODE, "heads": (4, 2), "dim": 80, "page": 64},
    {**DECODE, "heads": (4, 1), "dim": 128, "page": 16, "window": 40, "sinks": True},
    {**DECODE, "heads": (8, 1), "dim": 256, "page": 64, "alibi": True},
    {**DECODE, "heads": (6, 2), "dim": 64, "page": 64, "softcap": 3.0, "sinks": True},
    {**DECODE, "heads": (80, 1), "dim": 40, "value_dim": 32, "page": 64, "latent": True},
    {**CHUNKS, "heads": (2, 2), "dim": 64, "page": 64, "softcap": 3.0},
    {**CHUNKS, "heads": (8, 1), "dim": 128, "page": 16, "window": 30},
    {**CHUNKS, "heads": (4, 1), "dim": 80, "value_dim": 64, "page": 16, "latent": True, "window": 50},
    {**MIXED, "heads": (4, 2), "dim": 128, "page": 64},
    {**MIXED, "heads": (2, 2), "dim": 80, "page": 16, "sinks": True, "window": 33},
    {**MIXED, "heads": (4, 1), "dim": 256, "page": 16, "softcap": 3.0, "alibi": True},
    {**MIXED, "heads": (8, 1), "dim": 64, "page": 5, "alibi": True, "sinks": True, "window": 64},
    {**MIXED, "heads": (16, 1), "dim": 72, "value_dim": 64, "page": 64, "latent": True},
]


class Batch:
    """Requests with keys and values of their own, and the same in pages: in any order, the rest not a number."""

    def __init__(self, case: dict[str, Any], dtype: torch.dtype):
        (self.H, self.G), K, page = case["heads"], case["dim"], case["page"]
        self.V, self.page, self.latent = case.get("value_dim", K), page, case.get("latent", False)
        self.counts, self.lengths = case["counts"], case["lengths"]
        self.window, self.softcap, self.scale = case.get("window"), case.get("softcap"), 1.7 * K**-0.5
        self.slopes = torch.rand(self.H) if case.get("alibi") else None
        self.sinks = torch.randn(self.H) + 1 if case.get("sinks") else None
        self.q = [torch.randn(count, self.H, K, dtype=dtype) for count in self.counts]
        self.k = [torch.randn(length, self.G, K, dtype=dtype) for length in self.lengths]
        self.v = [torch.randn(length, self.G, self.V, dtype=dtype) for length in self.lengths]
        if self.latent:
            self.v = [k[..., : self.V] for k in self.k]
        self.width = max(1, *(-(-length // page) for length in self.lengths))
        pages = len(self.lengths) * self.width + 1
        self.tables = 1 + torch.randperm(pages - 1).view(-1, self.width).int()
        self.k_pages, self.v_pages = (
            torch.full((pages, page, self.G, size), float("nan"), dtype=dtype) for size in (K, self.V)
        )
        for row, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            for j in range(len(k)):
                place = self.tables[row, j // page], j % page
                self.k_pages[place], self.v_pages[place] = k[j], v[j]

    def computed(self, rows: list[int] | None = None, wider: int = 0) -> list[torch.Tensor]:
        """Of these requests, in this order; with a table that is so much wider than needed."""
        rows = list(range(len(self.counts))) if rows is None else rows
        counts = torch.tensor([0] + [self.counts[row] for row in rows])
        width = max(-(-self.lengths[row] // self.page) for row in rows)
        tables = torch.nn.functional.pad(self.tables[rows, :width], (0, wider))
        out = kernels.paged_attention(
            *(torch.cat([self.q[row] for row in rows]), self.k_pages, None if self.latent else self.v_pages),
            *(tables, torch.tensor(self.lengths)[rows].int(), counts.cumsum(0).int(), int(counts.max()) <= 1),
            *(self.V, self.window, self.scale, self.softcap, self.slopes, self.sinks),
        )
        return list(out.split([self.counts[row] for row in rows]))

    def exact(self, row: int) -> torch.Tensor:
        q, k, v = (x[row].double() for x in (self.q, self.k, self.v))
        out = torch.zeros(len(q), self.H, self.V, dtype=torch.float64)
        for i in range(len(q)):
            last = len(k) - len(q) + i
            seen = range(0 if self.window is None else max(0, last - self.window + 1), last + 1)
            for h in range(self.H if len(seen) else 0):
                g = h // (self.H // self.G)
                scores = k[seen.start : seen.stop, g] @ q[i, h] * self.scale
                if self.softcap is not None:
                    scores = self.softcap * (scores / self.softcap).tanh()
                if self.slopes is not None:
                    scores = scores - self.slopes[h].double() * (last - torch.arange(seen.start, seen.stop))
                weights = scores.exp()
                total = weights.sum() + (0 if self.sinks is None else self.sinks[h].double().exp())
                out[i, h] = (weights / total) @ v[seen.start : seen.stop, g]
        return out


def numbers() -> None:
    for dtype, most in ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
        for case in CASES:
            batch = Batch(case, dtype)
            exact = torch.cat([batch.exact(row) for row in range(len(batch.counts))])
            found = torch.cat(batch.computed()).double()
            error = float(((found - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-6)).max())  # of any head
            print("ok" if error < most else "WRONG", error, dtype, case)


def invariance() -> None:
    """Each request bitwise the same: in the batch, alone, among others, with a wider table."""
    for case in CASES:
        batch = Batch(case, torch.bfloat16)
        whole, wide = batch.computed(), batch.computed(wider=70)
        backwards = batch.computed(list(range(len(batch.counts)))[::-1])[::-1]
        for row, count in enumerate(batch.counts):
            alone = batch.computed([row])[0] if count else whole[row]
            same = all(torch.equal(whole[row], other) for other in (alone, wide[row], backwards[row]))
            print("ok" if same else "WRONG", row, case)


MIXERS: list[dict[str, Any]] = [
    {"kind": "attention", "heads": 4, "kv_heads": 1, "head_dim": 16, "window": 6, "sinks": True},
    {"kind": "attention", "heads": 6, "kv_heads": 2, "head_dim": 16, "softcap": 5.0, "position": {"kind": "alibi"}},
    {"kind": "latent_attention", "heads": 2, "kv_rank": 16, "nope_dim": 16, "rope_dim": 16, "value_dim": 16},
]


def engine() -> None:
    """Texts through the kernels are those of gathered pages, with prompts in chunks beside what is generated."""
    layers = [{"kind": "pre_norm", "mixer": mixer, "feedforward": {"kind": "gated", "dim": 32}} for mixer in MIXERS]
    model = treadle.build({"dim": 32, "vocab_size": 61, "max_length": 96, "layers": layers}, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that texts differ
    prompts = [[(7 * i + j) % 61 for j in range(3 + 13 * i)] for i in range(3)]
    for page in (5, 16):
        texts = []
        for backend in ("torch", "triton"):
            config = EngineConfig(slots=3, budget=12, page=page, cache_tokens=256, policy="latency")
            with use(paged_attention=backend):
                done = Engine(model, config).generate(prompts, Sampling(max_tokens=6, temperature=0))
            texts.append([request.outputs for request in done])
        print("ok" if texts[0] == texts[1] and len(texts[0][2]) == 6 else "WRONG", page, texts)


if __name__ == "__main__":
    torch.manual_seed(0)
    kernels.SPLIT = 64  # so that short texts come in parts, and some of these are longer
    kernels.PARTS_BYTES = 2 * 4 * 128 * 4
    {"numbers": numbers, "invariance": invariance, "engine": engine}[sys.argv[1]]()
