"""Texts under a constraint: what they must be, checked by `json` and `re`; what they are, against a search by hand."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import treadle
from treadle.data.tokenizer import BytesTokenizerConfig, Tokenizer, TrainTokenizerConfig
from treadle.errors import ConfigError
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.request import Constraint, Request, Sampling
from treadle.nn.transformer import Transformer

BYTES = BytesTokenizerConfig().build()
WORDS = TrainTokenizerConfig(vocab_size=280).build(['{"name": "ab", "age": 12, "tags": ["a", "b"]} true false '] * 50)
CONFIG = EngineConfig(slots=4, page=8, cache_tokens=1024)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "ok"],
    "additionalProperties": False,
}


def tiny(vocabulary: int) -> Transformer:
    layer = {"kind": "pre_norm", "mixer": {"kind": "attention", "heads": 2}, "feedforward": {"kind": "gated", "dim": 8}}
    model = treadle.build({"dim": 8, "vocab_size": vocabulary, "max_length": 256, "layers": [layer]}, seed=2)
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # so that it would much rather say something else
    return model


MODEL = tiny(330)  # more than either tokenizer has


def engine(tokenizer: Tokenizer = BYTES, **keys: Any) -> Engine:
    pytest.importorskip("llguidance")
    return Engine(MODEL, EngineConfig(**{**CONFIG.model_dump(), **keys}), tokenizer=tokenizer)


def asked(form: Any, source: str, **keys: Any) -> Sampling:
    return Sampling(constraint=Constraint(form=form, source=source), **{"max_tokens": 120, **keys})


def text(tokenizer: Tokenizer, request: Request) -> str:
    assert request.finish == "stop", request.outputs
    assert request.outputs[-1] == tokenizer.eos_id
    return tokenizer.decode(request.outputs[:-1])


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_text_is_of_the_schema(tokenizer: Tokenizer, temperature: float) -> None:
    served = engine(tokenizer)
    same = [asked("json_schema", json.dumps(SCHEMA), temperature=temperature, seed=seed) for seed in range(6)]
    for request in served.generate([[1, 2, 3]] * 6, same):
        found = json.loads(text(tokenizer, request))
        assert list(found) == ["name", "age", "tags", "ok"]
        assert len(found["name"]) <= 5
        assert 0 <= found["age"] <= 99
        assert set(found["tags"]) <= {"a", "b"}
        assert len(found["tags"]) <= 2
        assert found["ok"] in (True, False)


@pytest.mark.parametrize("ahead", [True, False])
def test_greedy_is_the_likeliest_token_of_those_that_lead_to_the_language(ahead: bool) -> None:
    words = ["cat", "car", "cards", "dog", "do", "élan"]
    served = engine(ahead=ahead)
    request = served.generate([[7, 8]], asked("regex", "|".join(words), temperature=0))[0]
    tokens = [7, 8]
    language = [[*word.encode(), BYTES.eos_id] for word in words]
    while tokens[-1] != BYTES.eos_id:
        so_far = tokens[2:]
        with torch.no_grad():
            scores = MODEL(torch.tensor([tokens]))[0, -1]
        allowed = {word[len(so_far)] for word in language if word[: len(so_far)] == so_far}
        tokens.append(max(allowed, key=lambda token: scores[token].item()))
    assert request.outputs == tokens[2:]
    assert text(BYTES, request) in words


def test_company_changes_nothing_and_what_has_no_constraint_is_left_alone() -> None:
    """Also when pages run out and requests are computed again."""
    free = Sampling(max_tokens=30, seed=5, temperature=1.3)
    bound = [asked("regex", r"[a-z]{20,30}\d", seed=seed) for seed in range(5)]
    grammar = asked("grammar", 'start: "x" (A | B)+ "y"\nA: "ab"\nB: /[0-9]{2}/', seed=1, max_tokens=150)
    each = [*bound, free, grammar]
    prompts = [[number] * 9 for number in range(len(each))]
    alone = [engine().generate([prompt], one)[0].outputs for prompt, one in zip(prompts, each, strict=True)]
    for keys in ({}, {"cache_tokens": 160, "slots": 7}, {"policy": "latency", "budget": 5, "speculate": 3}):
        served = engine(**keys)
        done = served.generate(prompts, each)
        assert [request.outputs for request in done] == alone
        assert "cache_tokens" not in keys or served.scheduler.preemptions
    for request in done[:5]:
        assert re.fullmatch(r"[a-z]{20,30}\d", text(BYTES, request))
    assert re.fullmatch(r"x(ab|\d\d)+y", text(BYTES, done[-1]))
    assert len({*map(tuple, alone[:5])}) > 1
    plain = Engine(MODEL, CONFIG).generate([prompts[5]], free)[0]
    assert alone[5] == plain.outputs


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        (asked("regex", "(a"), "constraint: no regex that can be followed: .*unclosed group"),
        (asked("json_schema", '{"type": "nothing"}'), "constraint: no json_schema .*Invalid type: nothing"),
        (asked("json_schema", '{"type": "object", "not": {}}'), r'Unimplemented keys: \["not"\]'),
        (asked("grammar", "start: nope"), 'unknown name: "nope"'),
        (asked("json_schema", "[1"), "constraint: "),
        (asked("json_schema", '{"$ref": "#"}'), "no json_schema that can be followed: NoExtension"),
        (asked("regex", "a", ignore_eos=True), "ignore_eos: not with a constraint"),
        (asked("regex", "a", min_tokens=3), "min_tokens: not with a constraint"),
    ],
)
def test_what_cannot_be_followed_is_refused(sampling: Sampling, said: str) -> None:
    served = engine()
    with pytest.raises(ConfigError, match=re.compile(said, re.DOTALL)):
        served.add([1], sampling)
    assert not served.busy


def test_a_text_that_cannot_go_on_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """llguidance has limits, which a text may meet on its way: what there is by then is not of the form."""
    library = pytest.importorskip("llguidance")
    LLMatcher, LLParserLimits = library.LLMatcher, library.LLParserLimits
    small = LLParserLimits(step_max_items=20)
    monkeypatch.setattr("llguidance.LLMatcher", lambda *given, **options: LLMatcher(*given, **options, limits=small))
    for name in ("grammar_from_json_schema", "grammar_from_regex", "grammar_from_lark"):
        monkeypatch.setattr(f"llguidance.LLMatcher.{name}", getattr(LLMatcher, name), raising=False)
    served = engine()
    (done,) = served.generate([[1]], asked("grammar", 'start: "a" | "a" x x x x x x\nx: "a" | x x', temperature=0))
    assert done.finish == "abort"
    assert not served.busy


def test_without_a_tokenizer_or_the_library_the_error_says_what_to_do() -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(ConfigError, match="the model has no tokenizer"):
        Engine(MODEL, CONFIG).add([1], asked("regex", "a"))
    program = """
import sys
sys.modules["llguidance"] = None
from treadle.data.tokenizer import BytesTokenizerConfig
from treadle.errors import ConfigError
from treadle.inference.constrained import Grammars
from treadle.inference.request import Constraint
try:
    Grammars(BytesTokenizerConfig().build(), 300).matcher(Constraint(form="regex", source="a"))
except ConfigError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "pip install 'treadle[constrained]'" in said


def test_a_constraint_is_compiled_once() -> None:
    served = engine()
    served.generate([[1], [2], [3]], asked("regex", "[ab]{4}", seed=1))
    facts = served._grammars._compiled.cache_info()
    assert (facts.misses, facts.hits) == (1, 2)
