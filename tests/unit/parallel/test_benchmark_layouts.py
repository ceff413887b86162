"""The benchmark of layouts, as far as one process can tell: sizes fit, all read the same tokens, what idle means."""

import pytest
import torch
from measure import idle_share, random_batches
from processes import reason
from train_parallel import compared, configuration, layouts

from treadle.errors import ConfigError
from treadle.parallel.config import Layout, check_layout
from treadle.parallel.mesh import Mesh, World


@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_every_layout_fits(gpus, tiny):
    refused = {}
    for name, run in layouts(gpus).items():
        config = configuration(run, tiny)
        training = config.training
        try:
            sizes = (config.model, training.batch_size, training.sequence_length)
            check_layout(config.parallel, run.gpus, *sizes, rows=training.rows)
        except ConfigError as error:
            refused[name] = str(error)
    assert refused.keys() <= {"t1-tensor-zbv", "t1-tensor-dualpipev"}, refused


def test_every_layout_reads_the_same_tokens():
    config = configuration(layouts(4)["t1-fsdp"], tiny=True)
    whole = [torch.cat([b.tokens_BS for b in step]) for step in random_batches(config, Mesh(), 2, document=9)]
    parts = [
        list(random_batches(config, Mesh(World(rank, 4), Layout(shard=2, tensor=2)), 2, document=9))
        for rank in range(4)
    ]
    assert not torch.equal(*whole)
    for step, tokens_BS in enumerate(whole):
        seen = [torch.cat([batch.tokens_BS for batch in part[step]]) for part in parts]
        assert torch.equal(torch.cat([seen[0], seen[2]]), tokens_BS)
        assert torch.equal(seen[0], seen[1])


def test_idle_is_what_no_computation_covers():
    events = [("matmul", 0, 30), ("ncclDevKernel_SendRecv", 10, 60), ("add", 20, 40), ("matmul", 80, 100)]
    made = [{"name": name, "ts": start, "dur": stop - start} for name, start, stop in events]
    assert idle_share(made[::-1]) == pytest.approx(0.4)


def test_the_table_compares_with_one_gpu_of_the_same_shape():
    found = {"peak_gib": 3.0, "mfu": 0.5, "idle": [0.1, 0.3], "device": "H"}
    results = {
        "t1-one": {**found, "tokens_per_second": 100.0, "gpus": 1, "losses": [9.0, 5.0]},
        "t1-fsdp": {**found, "tokens_per_second": 150.0, "gpus": 2, "losses": [9.0, 5.5]},
        "moe-fsdp": {**found, "tokens_per_second": 7.0, "gpus": 2, "losses": [9.0, 4.0]},
        "t1-zbv": {"failed": "out of memory"},
    }
    rows = {row[0]: row for row in compared(layouts(2), results)}
    assert rows["t1-fsdp"][2:5] == ("150", "75", "0.75")
    assert rows["t1-fsdp"][-3:] == ("20.0% (30.0%)", "5.5000", "+5.0e-01")
    assert rows["moe-fsdp"][4] == "-"
    assert rows["t1-zbv"][2] == "out of memory"


def test_the_reason_is_the_errors_own_line():
    log = "Traceback (most recent call last):\n  raise X\ntorch.OutOfMemoryError: CUDA out of memory.\n[rank0]:[W1] x\n"
    assert reason(log) == "torch.OutOfMemoryError: CUDA out of memory."
    assert reason("") == "it said nothing"
