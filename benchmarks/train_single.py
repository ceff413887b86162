"""Training speed on one GPU: the real loop on random tokens of a Llama-shaped model of 1.5 B parameters (T1).

    python benchmarks/train_single.py --batch 4 --steps 30 [key=value ...]

Prints one table: batch, tokens/s (median and spread over steps), peak memory, MFU, where the time goes.
Overrides change the `training` section (training.compile=false) or the model (model.layers.0.repeat=2).
"""

import argparse
import json
from pathlib import Path

from measure import Benchmark, measure

from treadle.config import read_yaml, resolve
from treadle.parallel.mesh import Mesh, find_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "recipes/models/llama-1.5b.yaml")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--document", type=int, help="pack rows with documents of about this length")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print the kernels that take the most time")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    parser.add_argument("overrides", nargs="*")
    a = parser.parse_args()
    training = {"batch_size": a.batch, "sequence_length": a.length, "steps": a.steps + a.warmup}
    config = resolve(Benchmark, {"model": read_yaml(a.model), "training": training}, a.overrides)
    mesh = Mesh(device=find_device("auto"))
    r = measure(config, mesh, warmup=a.warmup, document=a.document, profile=a.profile, show=a.profile)
    if a.json:
        with a.json.open("a") as file:
            file.write(json.dumps(r) + "\n")
    memory = f"{r['peak_gib']:.1f} GiB (reserved {r['reserved_gib']:.1f})" if r["peak_gib"] else "-"
    mfu = f"{r['mfu']:.1%}" if r["mfu"] else "-"
    phases = ", ".join(f"{name} {ms:.1f}" for name, ms in r["phases_ms"].items())
    print(
        f"| {r['device']} | torch {r['torch']} | batch {r['batch']} | document {r['document']} | "
        f"{r['tokens_per_second']:,.0f} tokens/s | spread {r['spread']:.1%} | {memory} | MFU {mfu} | ms: {phases} | "
        f"loss {r['losses'][0]:.3f} -> {r['losses'][-1]:.3f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
