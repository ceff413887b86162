"""Sizes that do not fit are explained before any process is waited for."""

import pytest
import torch.distributed as dist
from distributed_zoo import ATTENTION, DELTA, MODELS, layer, spec

from treadle.errors import ConfigError
from treadle.parallel.config import Layout, ParallelConfig, check_layout
from treadle.parallel.mesh import Mesh, World, find_device


def check(
    world: int,
    model: str = "plain",
    batch_size: int = 8,
    length: int | None = None,
    rows: int = 1,
    **sizes: object,
) -> Layout:
    return check_layout(ParallelConfig(**sizes), world, MODELS[model], batch_size, length, rows=rows)


def test_what_is_left_is_sharded():
    assert check(8).shard == 8
    assert check(8, replicate=2).shard == 4
    assert check(1) == Layout()
    assert check(8, replicate=8).data == 8
    assert check(8, context=2, length=16).data == 4
    assert check(2, context=2, length=6, context_order="contiguous", context_method="ring").context_method == "ring"


@pytest.mark.parametrize(
    ("world", "options", "message"),
    [
        (8, {"replicate": 3}, r"replicate=3 x shard=2 is 6, but there are 8 processes; use a multiple of 3"),
        (8, {"shard": 3}, r"shard=3 is 3, but there are 8 processes; set parallel\.shard: 8 \(or null\)"),
        (1, {"replicate": 2}, r"replicate=2 is 2, but there are 1 processes"),
        (3, {}, r"training\.batch_size: 8 rows cannot be shared out equally to replicate x shard = 3; try 6, 9"),
        (3, {"tensor": 3}, r"parallel\.tensor: 3 does not divide layers\.0\.mixer\.heads=4; .* fits 1, 2, 4$"),
        (2, {"tensor": 2, "model": "odd"}, r"parallel\.tensor: 2 does not divide vocab_size=61; .* fits 1$"),
        (1, {"async_tensor": True}, r"parallel\.async_tensor: there is nothing to be sent"),
        (4, {"expert": 4, "model": "moe"}, r"parallel\.expert: 4 does not divide experts=6; try 1, 2"),
        (2, {"expert": 6, "model": "moe"}, r"parallel\.expert: 6 does not divide shard x context = 2; try 1, 2"),
        (
            8,
            {"expert": 2, "shard": 4, "tensor": 2, "model": "moe"},
            r"expert: with 2, 2 processes share 3 experts that parallel\.tensor=2 has cut, not equally; try 1$",
        ),
        (4, {"pipeline": 4}, r"parallel\.pipeline: 4 is more than the model's 2 layers"),
        (2, {"pipeline": 2, "schedule": "zbv"}, r"pipeline: 2 x 2 stages of schedule=zbv is more than .* 2 layers$"),
        (4, {"pipeline": 4, "schedule": "zbv", "model": "deep"}, r"4 x 2 stages .* model's 5 layers; try 2"),
        (2, {"pipeline": 2, "stages_per_process": 2}, r"stages_per_process: 2, but schedule=1f1b has 1; try interl"),
        (2, {"pipeline": 2, "schedule": "zbv", "stages_per_process": 1}, r"1, but schedule=zbv has 2; leave it out"),
        (2, {"pipeline": 2, "stage_layers": [1, 2]}, r"stage_layers: \[1, 2\] should be 2 numbers that add up to 2"),
        (
            2,
            {"pipeline": 2, "rows": 8},
            r"micro_batch_size: 8 cuts the 8 rows of a process into 1 micro-batches; schedule=1f1b needs equal "
            r"ones and at least 2: try 1, 2, 4",
        ),
        (2, {"pipeline": 2, "rows": 3}, r"micro_batch_size: 3 cuts .* into 3 micro-batches; .* try 1, 2, 4"),
        (2, {"pipeline": 2, "batch_size": 1}, r"at least 2: raise training\.batch_size"),
        (
            2,
            {"pipeline": 2, "schedule": "interleaved_1f1b", "model": "deep", "batch_size": 5},
            r"into 5 micro-batches; schedule=interleaved_1f1b needs equal ones, in rounds of 2 or more .* try 5",
        ),
        (
            2,
            {"pipeline": 2, "schedule": "dualpipev", "model": "deep", "rows": 4},
            r"into 2 micro-batches; schedule=dualpipev needs equal ones and at least 4: try 1, 2",
        ),
        (1, {"cpu_offload": True}, r"parallel\.cpu_offload: it needs at least two processes"),
        (2, {"context": 2, "model": "delta"}, r"parallel\.context: 2, but gated_delta needs whole rows; set it to 1"),
        (4, {"context": 4, "length": 20}, r"training\.sequence_length: zigzag .*20 is no multiple of 8; try 16 or 24"),
        (4, {"context": 4, "length": 3, "context_order": "contiguous"}, r"3 is no multiple of 4; try 4$"),
        (4, {"context": 4, "context_method": "ulysses"}, r"4 ranks, which does not divide kv_heads=2; try 1, 2, or"),
        (3, {"context": 3, "context_method": "ulysses"}, r"3 ranks, which does not divide heads=4; try 1, 2, 4, or"),
        (
            4,
            {"context": 2, "tensor": 2, "context_method": "ulysses"},
            r"2 ranks, which does not divide kv_heads=2 / parallel\.tensor=2; try 1, or",
        ),
        (4, {"context": 2, "tensor": 2, "length": 18}, r"zigzag .*18 is no multiple of 4; try 16 or 20"),
        (
            4,
            {"context": 2, "tensor": 2, "length": 18, "context_order": "contiguous"},
            r"parallel\.tensor=2 shares the 9 tokens .*18 is no multiple of 4; try 16 or 20",
        ),
        (2, {"tensor": 2, "length": 5}, r"parallel\.tensor=2 shares the 5 tokens .*5 is no multiple of 2; try 4 or 6"),
    ],
)
def test_what_does_not_fit(world, options, message):
    with pytest.raises(ConfigError, match=message):
        check(world, **options)
    assert not dist.is_initialized()


def test_everything_at_once():
    with pytest.raises(ConfigError) as caught:
        check(6, tensor=3, batch_size=7)
    assert "parallel.tensor" in str(caught.value)
    assert "training.batch_size" in str(caught.value)


def test_more_rows_than_needed_are_named_once():
    with pytest.raises(ConfigError, match=r"try 4$"):
        check(4, batch_size=2)


def test_ranks_of_data(monkeypatch):
    layout = Layout(pipeline=2, replicate=2, shard=2, context=2, tensor=2)
    ranks = [Mesh(World(rank, 32), layout).data_rank for rank in range(32)]
    assert ranks == 2 * [r for r in range(4) for _ in range(4)]


def test_a_device_for_each_process():
    assert find_device("cpu", World(1, 2, 1, 2)).type == "cpu"
    with pytest.raises(ConfigError, match="sees no GPU"):
        find_device("cuda", World(0, 2))


def test_fewer_key_value_heads_than_processes_are_shared():
    assert check(4, tensor=4).tensor == 4
    narrow = spec([layer({**ATTENTION, "heads": 8, "kv_heads": 4}, {"kind": "gated", "dim": 20})])
    with pytest.raises(ConfigError, match=r"feedforward\.gate_up\.weight gate=20; the whole model fits 1, 2, 4$"):
        check_layout(ParallelConfig(tensor=8), 8, narrow, 8)


def test_length():
    with pytest.raises(ConfigError, match=r"sequence_length: .*tensor=2 shares the 15 tokens .*; try 14 or 16"):
        check_layout(ParallelConfig(tensor=2), 2, MODELS["plain"], 8, 15)


def test_sizes_are_found_in_every_layer():
    with pytest.raises(ConfigError, match=r"3 neither divides nor is a multiple of layers\.2\.mixer\.heads=2"):
        check_layout(
            ParallelConfig(tensor=3),
            3,
            spec([layer({**ATTENTION, "heads": 6, "kv_heads": 6, "head_dim": 8}), layer(DELTA)]),
            8,
        )
