"""The closed form against the real training step on tensors without memory."""

from typing import Any

import pytest

from treadle.config import resolve
from treadle.memory.analytic import WORKSPACE
from treadle.memory.predict import Planned, predict

dry_run = pytest.importorskip("treadle.memory.dry_run").dry_run

MODEL: dict[str, Any] = {
    "dim": 1024,
    "vocab_size": 32768,
    "max_length": 4096,
    "layers": [
        {
            "kind": "pre_norm",
            "repeat": 8,
            "mixer": {"kind": "attention", "heads": 16, "kv_heads": 4},
            "feedforward": {"kind": "gated", "dim": 4096},
        }
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "rows", "training", "parallel"),
    [
        (4, 4, {}, {}),
        (8, 16, {"activation_checkpointing": "selective"}, {}),
        (4, 4, {}, {"tensor": 2}),
        (2, 8, {"micro_batch_size": 1}, {"pipeline": 2}),
    ],
)
def test_they_agree(world, rows, training, parallel):
    loop = {"steps": 1, "sequence_length": 4096, "batch_size": rows, "compile": False, **training}
    config = resolve(Planned, {"model": MODEL, "training": loop, "parallel": parallel})
    for closed, dry in zip(predict(config, world, "h200").footprints, dry_run(config, world), strict=True):
        found = dry.footprint
        # Constants of a device (its context, cuBLAS' workspace) are the closed form's alone.
        own = closed.total - closed.overhead - WORKSPACE
        assert own == pytest.approx(found.total - found.overhead, rel=0.04)
        assert closed.parameters == pytest.approx(found.parameters, rel=0.01)
        assert closed.optimizer == pytest.approx(found.optimizer, rel=0.01)
