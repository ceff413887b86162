"""Loss and every gradient of FSDP, HSDP and DDP against one process, in fp32."""

import gc

import pytest
import torch
from distributed_zoo import MODELS, Case, alone, assert_same_step, loader, steps, training
from harness import meshed, run

from treadle.train.forward_backward import forward_backward
from treadle.train.losses import cross_entropy
from treadle.train.setup import build_model

DDP = {"replicate": 2}
CASES = {
    "fsdp": Case("plain", 2, {}, 4),
    "fsdp-never": Case("plain", 2, {}, 4, {"reshard": "never"}),
    "ddp": Case("plain", 2, DDP, 4),
    "hsdp": Case("plain", 4, DDP),
    "accumulate": Case("plain", 2, {}, 1),
    "ddp-accumulate": Case("plain", 2, DDP),
    "hsdp-accumulate": Case("plain", 4, DDP, 1),
    "hsdp-tensor-accumulate": Case("plain", 4, {**DDP, "tensor": 2}, 1),
    "hsdp-expert-accumulate": Case("moe", 4, {**DDP, "expert": 2}, 1),
    "tied": Case("tied", 2, {}),
    "moe": Case("moe", 2, {}),
    "delta": Case("delta", 2, {}, 4),
    "latent": Case("latent", 2, {}, 4),
    "further": Case("further", 2, {}),
    "uneven": Case("odd", 4, {}),
    "offload": Case("plain", 2, {}, 4, {"cpu_offload": True}),
    "recompute": Case("plain", 2, {}, 4, training={"activation_checkpointing": "full"}),
}
found_in = steps(CASES)


@pytest.mark.parametrize("name", CASES)
def test_one_step_is_that_of_one_process(name):
    case, found = CASES[name], found_in(name)
    assert len({step["here"] for step in found}) > 1, "ranks should have different numbers of targets"
    for step in found:
        assert_same_step(step, alone(case.model, case.rows))


def held_between(sizes: dict[str, int]) -> tuple[int, int]:
    """Bytes in floating-point tensors that the first backward has left, and those of all parameters."""
    with meshed(**sizes) as mesh:
        built = build_model(MODELS["plain"], training(), seed=0, mesh=mesh)
        found: list[int] = []

        def watched(model, batch):
            tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.is_floating_point()]
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
            found.append(sum(storages.values()))
            return cross_entropy(model, batch)

        forward_backward(built, loader(mesh).micro_batches(0, 1), watched, mesh=mesh)
        return found[1] - found[0], sum(4 * p.numel() for p in built.parameters())


@pytest.mark.parametrize(("sizes", "shards"), [({}, 4), ({"replicate": 2}, 2)])
def test_gradients_are_held_as_shards_between_micro_batches(sizes, shards):
    for held, whole in run(held_between, 4, sizes):
        assert 0.9 / shards < held / whole < 1.2 / shards
