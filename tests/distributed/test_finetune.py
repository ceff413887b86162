"""Fine-tuning under every kind of parallelism: loss and every gradient are those of one process, in fp32.

Weights come from a folder, and updates have values of their own, so that what they add is seen.
"""

from functools import partial
from typing import Any

import pytest
import torch
from distributed_zoo import MODELS, assert_same_step, loader, together, training, whole
from harness import meshed, run

from treadle.config import resolve
from treadle.finetune import FinetuneConfig, begin, settle
from treadle.finetune.attach import saved_parameters
from treadle.nn.store import load_model, save_model
from treadle.parallel.config import ParallelConfig
from treadle.parallel.gradients import gradient_norm
from treadle.parallel.mesh import Mesh
from treadle.parallel.pipeline import own_parameters
from treadle.parallel.shards import copy_whole, parts_of
from treadle.train.adapters import AdapterFacts, save_adapter
from treadle.train.forward_backward import forward_backward
from treadle.train.losses import cross_entropy
from treadle.train.setup import build_model
from treadle.train.weights import load_weights

LORA, DORA = {"method": "lora", "rank": 4}, {"method": "dora", "rank": 4}
FULL, SELECTIVE = {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}
IA3 = {"method": "ia3", "targets": ["layers.*.mixer.qkv", "layers.*.feedforward.down"]}
SOME = {"targets": {"layers.*.mixer.qkv.q": 4, "layers.*.feedforward.**": 2}}

# name: model, finetune, sizes of the mesh, rows of a micro-batch, further keys of training
CASES: dict[str, tuple[str, Any, dict[str, Any], int, dict[str, Any]]] = {
    "fsdp": ("experts", {**LORA, "trainable": ["**norm", "embedding"]}, {}, 2, FULL),
    "fsdp-mora": ("plain", {"method": "mora", "rank": 4}, {}, 2, SELECTIVE),
    "fsdp-pissa": ("plain", {**LORA, "init": "pissa"}, {}, 2, {}),
    "tp": ("heads", LORA, {"tensor": 2}, 2, SELECTIVE),
    "tp-shared": ("mqa", DORA, {"tensor": 2}, 2, {}),
    "tp-experts": ("experts", LORA, {"tensor": 2}, 2, {}),
    "tp-pissa": ("plain", {**LORA, "init": "pissa"}, {"tensor": 2}, 2, {}),
    "tp-ia3": ("heads", IA3, {"tensor": 2}, 2, {}),
    "tp-houlsby": ("moe", {"method": "adapter", "rank": 4}, {"tensor": 2}, 2, {}),
    "ep": ("experts", LORA, {"expert": 2}, 2, {}),
    "cp": ("plain", SOME, {"context": 2}, 4, {}),
    "pp": ("deep", DORA, {"pipeline": 2, "schedule": "1f1b"}, 2, FULL),
    "pp-v": ("deep", LORA, {"pipeline": 2, "schedule": "zbv"}, 2, {}),
}  # fmt: skip


def step(name: str, folder: Any, mesh: Mesh, parallel: ParallelConfig | None) -> dict[str, Any]:
    model, finetune, _, rows, changes = CASES[name]
    tune, config = resolve(FinetuneConfig, finetune), training(**(changes if parallel else {}))
    built = build_model(MODELS[model], config, seed=5, mesh=mesh, parallel=parallel, finetune=tune)
    load_weights(built, folder / model)
    begin(built)
    settle(built)
    parts = parts_of(built)
    for path, parameter in saved_parameters(built):
        if "0." not in path.rpartition("updates.")[2]:
            values = whole(parameter, parts.get(path, ()))
            generator = torch.Generator().manual_seed(sum(map(ord, path)))
            copy_whole(parameter, values + 0.1 * torch.randn(values.shape, generator=generator), parts.get(path, ()))
    initial = {n: whole(p, parts.get(n, ())) for n, p in built.named_parameters()}
    result = forward_backward(
        built, loader(mesh).micro_batches(0, rows), partial(cross_entropy, z_loss=1e-3), mesh=mesh
    )
    norm = gradient_norm(own_parameters(built), mesh)
    gradients = {n: whole(p.grad, parts.get(n, ())) for n, p in built.named_parameters() if p.grad is not None}
    facts = AdapterFacts(base=folder / model, fingerprint="", finetune=tune)
    save_adapter(built, folder / f"{name}-{'alone' if parallel is None else 'together'}", facts, mesh)
    return {
        "loss": result.loss.item(),
        "tokens": result.tokens,
        "norm": norm.item(),
        "metrics": {},
        "loads": {},
        "gradients": gradients,
        "initial": initial,
    }


def on_ranks(folder: Any) -> dict[str, Any]:
    found = {}
    with meshed():
        for name, (_, _, sizes, _, _) in CASES.items():
            try:
                with meshed(**sizes) as mesh:
                    found[name] = step(name, folder, mesh, ParallelConfig(**sizes))
            except Exception as error:
                error.add_note(f"in case {name}")
                raise
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for model in {case[0] for case in CASES.values()}:
        source = MODELS[model].build().initialise(3)
        with torch.no_grad():
            for name, parameter in source.named_parameters():
                parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * ("bias" in name))
        save_model(source, folder / model)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return run(on_ranks, 2, folder, seconds=60 + 10 * len(CASES))


@pytest.mark.parametrize("name", CASES)
def test_one_step_is_that_of_one_process(name, folder, found):
    expected = step(name, folder, Mesh(), None)
    steps = [rank[name] for rank in found]
    assert_same_step(together(steps), expected, 3e-6)
    base = {n for n, _ in load_model(folder / CASES[name][0]).named_parameters()}
    learned = set(expected["gradients"]) - base
    assert learned
    assert all(expected["gradients"][n].abs().max() > 0 for n in learned)
    alone, joined = (folder / f"{name}-{which}" / "adapter.safetensors" for which in ("alone", "together"))
    assert alone.read_bytes() == joined.read_bytes()
