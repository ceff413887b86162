"""A checkpoint of any layout goes on in any other: the same state bit by bit, the same next step."""

from concurrent.futures import Future

import pytest
import torch
from distributed_zoo import MODELS, loader, training, whole
from harness import meshed, run

from treadle.errors import CheckpointError
from treadle.parallel.mesh import Mesh
from treadle.train.checkpoint import Checkpointer
from treadle.train.config import CheckpointConfig
from treadle.train.loop import Callback, Loop
from treadle.train.losses import cross_entropy
from treadle.train.optimizers import AdamWConfig, MuonConfig
from treadle.train.schedules import ConstantConfig
from treadle.train.setup import build_model, build_state
from treadle.train.state import TrainState

OPTIMIZERS = {"adamw": AdamWConfig(lr=3e-3), "muon": MuonConfig(lr=3e-3)}


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def step(self, loop, record):
        self.losses.append(record.loss)


def fresh(model: str, optimizer: str, mesh: Mesh, seed: int = 0) -> TrainState:
    config = training()
    return build_state(build_model(MODELS[model], config, seed=seed, mesh=mesh), OPTIMIZERS[optimizer], config)


def train(state: TrainState, mesh: Mesh, steps: int) -> list[float]:
    losses = Losses()
    Loop(state, training(steps=steps), ConstantConfig(), cross_entropy, [losses], mesh=mesh).run(
        loader(mesh).iterate_micro(2, state.step, steps)
    )
    return losses.losses


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    tensors = state.tensors()
    return {f"{part}.{name}": whole(t) for part in tensors for name, t in tensors[part].items()}


def save(model: str, optimizer: str, sizes: dict[str, int], folder: str, asynchronous: bool = True):
    """Two steps, a checkpoint, and what a third step would have been."""
    with meshed(**sizes) as mesh:
        return save_on(mesh, model, optimizer, folder, asynchronous)


def save_on(mesh: Mesh, model: str, optimizer: str, folder, asynchronous: bool = True):
    state = fresh(model, optimizer, mesh)
    train(state, mesh, 2)
    checkpointer = Checkpointer(folder, CheckpointConfig(asynchronous=asynchronous), mesh)
    saved = everything(state)
    checkpointer.save(state, {"note": 1})
    loss = train(state, mesh, 3)  # while it is being written
    checkpointer.finish(strict=True)
    return saved, loss, everything(state)


def load(model: str, optimizer: str, sizes: dict[str, int], folder):
    with meshed(**sizes) as mesh:
        return load_on(mesh, model, optimizer, folder)


def load_on(mesh: Mesh, model: str, optimizer: str, folder):
    state = fresh(model, optimizer, mesh, seed=9)
    Checkpointer(folder, CheckpointConfig(), mesh).load(state, 2)
    loaded = everything(state)
    return loaded, train(state, mesh, 3), everything(state)


@pytest.mark.parametrize(
    ("model", "optimizer", "before", "sizes", "after", "other"),
    [
        ("plain", "adamw", 2, {}, 1, {}),
        ("plain", "adamw", 1, {}, 2, {}),
        ("tied", "adamw", 4, {}, 2, {}),
        ("moe", "adamw", 4, {"replicate": 2}, 2, {}),
        ("plain", "muon", 2, {}, 4, {"replicate": 2}),
        ("moe", "muon", 2, {"replicate": 2}, 1, {}),
    ],
)
def test_any_layout_to_any_other(tmp_path, model, optimizer, before, sizes, after, other):
    arguments = (model, optimizer, tmp_path)
    if before == 1:
        saved, loss, trained = save_on(Mesh(), *arguments)
    else:
        saved, loss, trained = run(save, before, model, optimizer, sizes, tmp_path)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    found = [load_on(Mesh(), *arguments)] if after == 1 else run(load, after, model, optimizer, other, tmp_path)
    for loaded, next_loss, stepped in found:
        assert loaded.keys() == saved.keys()
        for name, values in saved.items():
            assert torch.equal(loaded[name], values), name
        assert next_loss == pytest.approx(loss, abs=1e-6)
        for name, values in trained.items():
            # Muon works in bf16: a last bit of a gradient may become a last bit of bf16 in the direction.
            tolerance = 1e-6 if optimizer == "adamw" else 3e-4
            if name.startswith("model."):
                assert (stepped[name] - values).abs().max() < tolerance, name


def save_where_one_cannot(folder):
    """The second rank's disk is full."""
    with meshed() as mesh:
        state = fresh("plain", "adamw", mesh)
        train(state, mesh, 1)
        checkpointer = Checkpointer(folder, CheckpointConfig(asynchronous=False), mesh)
        checkpointer.save(state, {}, wait=True)
        train(state, mesh, 2)
        if mesh.rank == 1:
            real = checkpointer._write

            def write(state):
                real(state)
                raise_later: Future[None] = Future()
                raise_later.set_exception(OSError("no space left"))
                return raise_later

            checkpointer._write = write
        try:
            checkpointer.save(state, {}, wait=True)
        except CheckpointError as error:
            return str(error), checkpointer.steps()


def test_it_is_visible_only_when_all_have_written(tmp_path):
    for message, steps in run(save_where_one_cannot, 2, tmp_path):
        assert "could not be saved" in message
        assert steps == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
