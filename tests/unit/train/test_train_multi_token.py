"""The loss of multi-token prediction: against a computation by loops, and through everything that a step does."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from train_zoo import (
    EOS,
    VOCABULARY,
    copied,
    dataset,
    documents,
    gradients,
    make_loader,
    make_model,
    make_state,
    spec,
    training_config,
)

from treadle.attention import AttentionContext
from treadle.config import resolve, to_dict
from treadle.data.loader import Batch, Loader
from treadle.errors import CheckpointError, ConfigError
from treadle.nn.transformer import Transformer
from treadle.parallel.compile import compile_layers
from treadle.recipes.pretrain import RecipeConfig
from treadle.train.checkpoint import Checkpointer
from treadle.train.config import CheckpointConfig
from treadle.train.forward_backward import StepResult, forward_backward
from treadle.train.loop import Callback, Loop, StepRecord
from treadle.train.losses import cross_entropy
from treadle.train.optimizers import AdamWConfig, MuonConfig
from treadle.train.resume import check_resume
from treadle.train.schedules import ConstantConfig

DEPTH, WEIGHT = 2, 0.4
PART = {"kind": "sequential", "depth": DEPTH, "weight": WEIGHT}


def double(**changes: Any) -> Transformer:
    model = make_model(**{"multi_token": PART, "init": {"kind": "normal", "std": 0.3}, **changes}).double()
    model.dtype = torch.float64
    return model


def step(model: Transformer, batches: list[Batch], **options: Any) -> tuple[StepResult, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    result = forward_backward(model, batches, cross_entropy, **options)
    return result, gradients(model)


class ByHand:
    """The model of `train_zoo.spec` (without positions) in numpy, position by position, from the paper's equations."""

    def __init__(self, model: Transformer):
        self.weights = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + 1e-5) * self.weights[f"{name}.weight"]

    def layer(self, name: str, rows: list[np.ndarray]) -> list[np.ndarray]:
        """Pre-norm; two query heads of 16 share one key and value head; gated feed-forward of 64."""
        w = self.weights
        qkv = [w[f"{name}.mixer.qkv.weight"] @ self.norm(f"{name}.mixer_norm", x) for x in rows]
        out = []
        for i, x in enumerate(rows):
            heads = []
            for head in range(2):
                query = qkv[i][16 * head : 16 * head + 16]
                scores = np.array([query @ qkv[j][32:48] / 4 for j in range(i + 1)])
                shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
                heads.append(sum(share * qkv[j][48:] for j, share in enumerate(shares)))
            x = x + w[f"{name}.mixer.out.weight"] @ np.concatenate(heads)
            gate_up = w[f"{name}.feedforward.gate_up.weight"] @ self.norm(f"{name}.feedforward_norm", x)
            gate, up = gate_up[:64], gate_up[64:]
            out.append(x + w[f"{name}.feedforward.down.weight"] @ (gate / (1 + np.exp(-gate)) * up))
        return out

    def losses(self, tokens: list[int]) -> list[float]:
        """Of one document, its first token given: summed cross entropies of the next token, then of each module's."""
        w, count = self.weights, len(tokens) - 1
        head = w.get("head.weight", w["embedding.weight"])
        rows = [w["embedding.weight"][token] for token in tokens[:count]]
        for number in range(2):
            rows = self.layer(f"layers.{number}", rows)
        rows = [self.norm("norm", x) for x in rows]
        sums = [0.0]
        for i in range(count):
            sums[0] += self.surprise(head @ rows[i], tokens[i + 1])
        for k in range(1, DEPTH + 1):
            name = f"multi_token.layers.{k}"
            joined = []
            for i in range(count - k):
                embedded = self.norm(f"{name}.embedding_norm", w["embedding.weight"][tokens[i + k]])
                both = np.concatenate([embedded, self.norm(f"{name}.hidden_norm", rows[i])])
                joined.append(w[f"{name}.project.weight"] @ both)
            rows = [self.norm(f"{name}.norm", x) for x in self.layer(f"{name}.layer", joined)]
            sums.append(sum(self.surprise(head @ rows[i], tokens[i + k + 1]) for i in range(count - k)))
        return sums

    @staticmethod
    def surprise(logits: np.ndarray, target: int) -> float:
        return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])


@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_the_papers_by_hand(tied: bool) -> None:
    """Rows of several documents, each opened by the end-of-text token of the one before it."""
    mixer = {"kind": "attention", "heads": 2, "kv_heads": 1, "position": None}
    layer = {"kind": "pre_norm", "repeat": 2, "mixer": mixer, "feedforward": {"kind": "gated", "dim": 64}}
    model = double(tied=tied, layers=[layer])
    texts = documents([5, 1, 2, 6, 4, 7, 1, 3])
    stream = np.concatenate(texts)
    loader = Loader([dataset(texts)], sequence_length=12, batch_size=2)
    batch = loader.batch(0)
    by_hand, sums = ByHand(model), np.zeros(DEPTH + 1)
    for row in batch.tokens_BS.tolist():
        (start,) = [i for i in range(0, len(stream) - 12, 12) if stream[i : i + 12].tolist() == row]
        first = start
        for end in range(start + 1, start + 13):
            if stream[end] == EOS or end == start + 12:
                sums += by_hand.losses(stream[first : end + 1].tolist())
                first = end
    extra = WEIGHT / DEPTH * sums[1:].sum()
    loss = cross_entropy(model, batch)
    assert loss.total.item() == pytest.approx(sums[0] + extra, rel=1e-12)
    assert loss.penalties["multi_token_loss"].item() == pytest.approx(extra, rel=1e-12)
    result, _ = step(model, [batch])
    assert batch.valid_tokens == 24
    assert result.loss.item() == pytest.approx(sums[0] / 24, rel=1e-6)
    assert result.metrics["multi_token_loss"].item() == pytest.approx(extra / 24, rel=1e-6)


def alone(batch: Batch) -> list[Batch]:
    """Each document of each row as a batch of its own."""
    assert batch.context.documents_BS is not None
    found = []
    for tokens, targets, numbers in zip(batch.tokens_BS, batch.targets_BS, batch.context.documents_BS, strict=True):
        for number in numbers.unique():
            pieces = tokens[numbers == number][None], targets[numbers == number][None]
            # Filled up to the depth: a row has to be longer than it.
            wanted = max(0, DEPTH + 1 - pieces[0].shape[1])
            filled = [torch.nn.functional.pad(p, (0, wanted), value=v) for p, v in zip(pieces, (0, -100), strict=True)]
            valid = int((pieces[1] != -100).sum())
            context = AttentionContext.causal(*filled[0].shape)
            found.append(replace(batch, tokens_BS=filled[0], targets_BS=filled[1], context=context, valid_tokens=valid))
    return found


def test_packed_documents_are_as_if_alone() -> None:
    model, batch = double(), make_loader().batch(0)
    targets = batch.targets_BS.masked_fill(batch.targets_BS % 7 == 0, -100)  # and some targets that do not count
    batch = replace(batch, targets_BS=targets, valid_tokens=int((targets != -100).sum()))
    whole, expected = step(model, [batch])
    pieces = alone(batch)
    assert len(pieces) > len(batch.tokens_BS)
    result, found = step(model, pieces)
    torch.testing.assert_close(result.loss, whole.loss)
    torch.testing.assert_close(result.metrics, whole.metrics)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_micro_batches_add_up_to_the_whole(rows: int, tied: bool) -> None:
    model, loader = double(tied=tied), make_loader(batch_size=8)
    whole, expected = step(model, [loader.batch(3)])
    result, found = step(model, loader.micro_batches(3, rows))
    torch.testing.assert_close(result.metrics, whole.metrics, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_reported_loss_is_the_models_own() -> None:
    """Nor does the z-loss change what the modules add."""
    options = {"init": {"kind": "normal", "std": 0.3}}
    batches = make_loader().micro_batches(0, 2)
    result, _ = step(make_model(multi_token=PART, **options), batches)
    plain, _ = step(make_model(**options), batches)
    assert result.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert set(result.metrics) == {"multi_token_loss"}
    assert plain.metrics == {}
    both = cross_entropy(make_model(multi_token=PART, **options), batches[0], z_loss=0.1)
    one = cross_entropy(make_model(multi_token=PART, **options), batches[0])
    assert torch.equal(both.penalties["multi_token_loss"], one.penalties["multi_token_loss"])
    torch.testing.assert_close(both.total - both.penalties["z_loss"], one.total)


class Record(Callback):
    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def step(self, loop: Loop, record: StepRecord) -> None:
        self.records.append(record)


@pytest.mark.parametrize("optimizer", [AdamWConfig(lr=5e-3), MuonConfig(lr=1e-2)], ids=lambda o: o.kind)
def test_a_sequence_that_follows_a_rule_is_learned(optimizer: Any) -> None:
    """Each token follows from the one before it, so in the end the further ones are certain too."""
    rule, steps = np.random.default_rng(0).permutation(np.arange(1, 33)), 70
    walk = [1]
    for _ in range(4000):
        walk.append(int(rule[walk[-1] - 1]))
    texts = [np.array([*walk[first : first + 15], EOS]) for first in range(0, 4000, 7)]
    state = make_state(training_config(), optimizer, multi_token=PART)
    record, loader = Record(), Loader([dataset(texts)], sequence_length=16, batch_size=8, isolate_documents=True)
    loop = Loop(state, training_config(steps=steps), ConstantConfig(), cross_entropy, [record])
    loop.run(loader.micro_batches(number, 4) for number in range(steps))
    first, last = record.records[0].metrics["multi_token_loss"], record.records[-1].metrics["multi_token_loss"]
    # At first a guess among all tokens. A row has 15 tokens of a document and then the one that opens the next: 14 of
    # these 16 have a target one further, 13 two further.
    assert first == pytest.approx(WEIGHT * np.log(VOCABULARY) * 13.5 / 16, rel=0.05)
    assert last < 0.2 * first


def test_modules_step_with_muon_and_none_is_left_out() -> None:
    model = make_model(multi_token=PART)
    optimizers = MuonConfig().build(model).optimizers
    muon = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert model.multi_token is not None
    for module in model.multi_token.layers.values():
        assert id(module.project.weight) in muon
        assert id(module.layer.mixer.qkv.weight) in muon


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_recomputation_and_compilation_change_nothing(mode: Any, backend: str | None) -> None:
    torch._dynamo.reset()
    batches = make_loader().micro_batches(0, 2)
    expected = step(make_model(multi_token=PART), batches)
    model = make_model(training_config(activation_checkpointing=mode), multi_token=PART)
    assert model.multi_token is not None
    if backend:
        compile_layers(model.layers, backend=backend)
        compile_layers(model.multi_token.layers, backend=backend)
    calls: list[str] = []
    for module in model.multi_token.layers.values():
        module.hidden_norm.register_forward_hook(lambda *_: calls.append("run"))
    result, found = step(model, batches)
    torch.testing.assert_close(result.loss, expected[0].loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.metrics, expected[0].metrics, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, expected[1], rtol=0, atol=1e-6)
    if backend is None:
        assert len(calls) == len(batches) * DEPTH * (1 if mode == "none" else 2)
    torch._dynamo.reset()


def test_training_compiles_the_modules_too() -> None:
    model = make_model(training_config(compile=True), multi_token=PART)
    assert model.multi_token is not None
    assert all(module._compiled_call_impl is not None for module in model.multi_token.layers.values())
    assert make_model(multi_token=PART).multi_token.layers["1"]._compiled_call_impl is None  # type: ignore[union-attr]


def test_mixtures_of_the_modules_are_observed() -> None:
    mixer = {"kind": "attention", "heads": 2, "kv_heads": 1}
    moe = {"kind": "moe", "experts": 8, "top_k": 2, "dim": 16, "balance_loss": 0.1}
    model = make_model(multi_token=PART, layers=[{"kind": "pre_norm", "mixer": mixer, "feedforward": moe}])
    result, _ = step(model, make_loader().micro_batches(0, 2))
    names = ["layers.0.feedforward", *(f"multi_token.layers.{k}.layer.feedforward" for k in (1, 2))]
    assert sorted(result.loads) == sorted(names)
    assert all(load.counts_E.sum() == 2 * 4 * 16 for load in result.loads.values())


def test_going_on_from_a_checkpoint_is_exact(tmp_path: Any) -> None:
    def go(state: Any, steps: int) -> list[tuple[float, float]]:
        record = Record()
        loop = Loop(state, training_config(steps=steps), ConstantConfig(), cross_entropy, [record])
        loop.run(make_loader().micro_batches(number, 2) for number in range(state.step, steps))
        return [(r.loss, r.metrics["multi_token_loss"]) for r in record.records]

    expected = go(make_state(training_config(), multi_token=PART), 6)
    state = make_state(training_config(), multi_token=PART)
    go(state, 3)
    Checkpointer(tmp_path, CheckpointConfig()).save(state, {}, wait=True)
    fresh = make_state(training_config(), multi_token=PART)
    for parameter in fresh.model.parameters():
        parameter.data.fill_(7.0)
    Checkpointer(tmp_path, CheckpointConfig()).load(fresh, 3)
    torch.testing.assert_close(copied(fresh.model), copied(state.model), rtol=0, atol=0)
    assert go(fresh, 6) == expected[3:]


def test_a_run_may_go_on_with_another_weight_but_not_with_another_depth(tmp_path: Any) -> None:
    state, loader = make_state(training_config(), multi_token=PART), make_loader()
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    facts = {"model": to_dict(state.model.config), "data": loader.state(0)}
    checkpointer.save(state, facts, wait=True)
    assert check_resume(checkpointer, loader, spec(multi_token={**PART, "weight": 0.1}), 10) == 0
    with pytest.raises(CheckpointError, match=r"model.multi_token.depth: 2 -> 1"):
        check_resume(checkpointer, loader, spec(multi_token={**PART, "depth": 1}), 10)
    with pytest.raises(CheckpointError, match=r"model.multi_token"):
        check_resume(checkpointer, loader, spec(), 10)


def test_a_recipe_whose_rows_are_too_short_is_refused() -> None:
    recipe = {
        "model": to_dict(spec(multi_token={**PART, "depth": 16})),
        "data": {"sources": ["python_stdlib"], "tokenizer": "bytes"},
        "training": to_dict(training_config()),
    }
    with pytest.raises(ConfigError, match=r"training.sequence_length.*16 must be more than model.multi_token.depth=16"):
        resolve(RecipeConfig, recipe)
