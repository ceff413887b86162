"""What layers share of a context: found once, right after any change to the model, and made once a step."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from treadle.attention import AttentionContext, AttentionFacts, dispatch, flex
from treadle.config import resolve
from treadle.data.packing import Batch
from treadle.nn.position import Rope, RopeConfig
from treadle.nn.transformer import Transformer, TransformerConfig
from treadle.train.losses import cross_entropy

CONTEXT = AttentionContext.causal(1, 6)
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9]])


def layer(theta: float = 10_000.0) -> dict[str, Any]:
    mixer = {"kind": "attention", "heads": 2, "position": {"kind": "rope", "theta": theta}}
    return {"kind": "pre_norm", "mixer": mixer, "feedforward": {"kind": "dense", "dim": 8}}


def build(*layers: dict[str, Any], **changes: Any) -> Transformer:
    spec = {"dim": 16, "vocab_size": 16, "max_length": 32, "layers": list(layers), **changes}
    return resolve(TransformerConfig, spec).build().initialise(0).eval()


def thetas(model: Transformer) -> set[str]:
    return {key.split()[1] for key in model.with_tables(CONTEXT).tables}


class Asked(nn.Module):
    """Counts the questions for attributes that it does not have."""

    questions = 0

    def __getattr__(self, name: str) -> Any:
        if name in ("tables", "facts"):
            type(self).questions += 1
        return super().__getattr__(name)


def test_modules_are_asked_once() -> None:
    model = build(layer(), layer())
    model.layers["0"].feedforward = nn.Sequential(Asked())
    for _ in range(3):
        model.with_tables(CONTEXT)
    assert Asked.questions == 2
    model.layers["1"].feedforward = nn.Identity()
    model.with_tables(CONTEXT)
    assert Asked.questions == 4


def test_what_is_shared_follows_the_model() -> None:
    model = build(layer(10.0), layer(20.0))
    assert thetas(model) == {"theta=10.0", "theta=20.0"}
    model.layers["0"].mixer.position = RopeConfig(theta=30.0).build(8, 32)
    assert thetas(model) == {"theta=30.0", "theta=20.0"}
    del model.layers["1"]
    assert thetas(model) == {"theta=30.0"}
    model.layers["0"].mixer.position = None
    assert thetas(model) == set()
    model.layers["5"] = build(layer(40.0)).layers["0"]
    assert thetas(model) == {"theta=40.0"}


def test_a_copy_has_modules_of_its_own() -> None:
    model = build(layer(10.0), layer(20.0))
    model.with_tables(CONTEXT)
    twin = copy.deepcopy(model)
    twin.layers["0"].mixer.position.key = "rope theta=50.0"
    assert thetas(twin) == {"theta=50.0", "theta=20.0"}
    assert thetas(model) == {"theta=10.0", "theta=20.0"}


def test_what_the_context_has_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    original = Rope.tables

    def counted(self: Rope, context: AttentionContext) -> tuple[Tensor, Tensor]:
        made.append(self.key)
        return original(self, context)

    monkeypatch.setattr(Rope, "tables", counted)
    model = build(layer(10.0), layer(20.0), multi_token={"kind": "sequential", "depth": 2, "layer": layer(30.0)})
    targets = TOKENS.roll(-1, 1)
    cross_entropy(model, Batch(TOKENS, targets, CONTEXT, 6, TOKENS[:, 0], TOKENS[:, 0]))
    assert len(made) == len(set(made)) == 3
    some = build(layer(20.0)).with_tables(CONTEXT)
    assert model.with_tables(some).tables.keys() > some.tables.keys()
    assert len(some.tables) == 1


PLAIN, WINDOW = AttentionFacts(), AttentionFacts(window=4)
CASES = [
    (PLAIN, (64, 64), torch.bfloat16, True, "auto", False),
    (WINDOW, (192, 128), torch.float16, False, "auto", False),
    (PLAIN, (64, 64), torch.float32, True, "auto", True),
    (PLAIN, (320, 64), torch.bfloat16, True, "auto", True),
    (PLAIN, (64, 320), torch.bfloat16, True, "auto", True),
    (WINDOW, (64, 64), torch.float32, False, "auto", True),
    (AttentionFacts(softcap=5.0), (64, 64), torch.bfloat16, False, "auto", True),
    (AttentionFacts(alibi=1.0), (64, 64), torch.bfloat16, True, "auto", True),
    (AttentionFacts(sinks=True), (64, 64), torch.bfloat16, False, "auto", True),
    (PLAIN, (64, 64), torch.float32, False, "auto", False),
    (PLAIN, (64, 64), torch.bfloat16, True, "flex", True),
    (PLAIN, (64, 64), torch.bfloat16, False, "flex", True),
    (AttentionFacts(softcap=5.0), (64, 64), torch.bfloat16, True, "reference", False),
]


@pytest.mark.parametrize(("facts", "head_dims", "dtype", "packed", "backend", "wanted"), CASES)
def test_chunks_are_listed_exactly_where_flex_computes(
    facts: AttentionFacts,
    head_dims: tuple[int, int],
    dtype: torch.dtype,
    packed: bool,
    backend: str,
    wanted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU that is not there: tensors without values, of which no list can be made."""
    monkeypatch.setattr(flex, "tables", lambda *_: ("listed",))
    with FakeTensorMode():
        positions, documents = (torch.empty(2, 300, dtype=torch.int32, device="cuda") for _ in range(2))
        lengths = torch.empty(9, dtype=torch.int32, device="cuda")
        context = AttentionContext(positions, max_length=300, backend=backend)
        if packed:
            context = replace(context, documents_BS=documents, cumulative_lengths_N=lengths)
        q_BSHK = torch.empty(2, 300, 4, head_dims[0], dtype=dtype, device="cuda")
        tables = dispatch.tables(facts, head_dims, dtype, context)
        assert (dispatch.choose(q_BSHK, facts, context, head_dims[1]) == "flex") == wanted
        assert tables == ({flex.key(facts): ("listed",)} if wanted else {})
        assert dispatch.tables(facts, head_dims, dtype, replace(context, tables=tables)) == {}


@pytest.mark.parametrize(("dtype", "keys"), [(torch.bfloat16, []), (torch.float32, ["chunks window=None"])])
def test_packed_rows_in_bf16_need_no_chunks(
    dtype: torch.dtype, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "tables", lambda *_: ("listed",))
    latent = {"kind": "latent_attention", "heads": 2, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
    mixers = [{"kind": "attention", "heads": 2, "position": None}, {**latent, "position": None}]
    model = build(*({**layer(), "mixer": mixer} for mixer in mixers))
    model.dtype = dtype
    with FakeTensorMode():
        rows = (torch.empty(2, 300, dtype=torch.int32, device="cuda") for _ in range(2))
        context = AttentionContext(*rows, torch.empty(9, dtype=torch.int32, device="cuda"), 300)
        assert list(model.with_tables(context).tables) == keys
