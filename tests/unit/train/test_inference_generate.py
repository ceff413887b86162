"""Sampling against the full forward, brute force, and the definition of each filter."""

import itertools

import pytest
import torch
from train_zoo import VOCABULARY, make_model

import treadle
from treadle.data.tokenizer import BytesTokenizerConfig
from treadle.inference.generate import choose, stream
from treadle.parallel.compile import compile_layers

PROMPT = [5, 9, 2, 33, 7]


def wild(**changes):
    """Weights large enough that the model's choices differ from place to place."""
    return make_model(init={"kind": "normal", "std": 0.3}, **changes).eval()


def flat(steps):
    return [token for (token,) in steps]


@pytest.mark.parametrize("prompt", [PROMPT, [1]])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_greedy_with_a_cache_is_the_argmax_of_the_whole_forward(prompt, backend):
    model = wild()
    found = flat(stream(model, prompt, max_new_tokens=20, temperature=0, backend=backend))
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(20):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert found == tokens[len(prompt) :]
    assert len(set(found)) > 3


def test_a_window_is_kept_in_generation():
    layer = wild().config.layers[0]
    mixer = layer.mixer.model_copy(update={"window": 4})  # type: ignore[attr-defined]
    model = wild(layers=[layer.model_copy(update={"mixer": mixer})])
    found = flat(stream(model, PROMPT, max_new_tokens=12, temperature=0))
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert found == tokens[len(PROMPT) :]


def test_compiled_layers_generate_the_same():
    expected = flat(stream(wild(), PROMPT, max_new_tokens=5, temperature=0))
    model = wild()
    compile_layers(model.layers, backend="aot_eager")
    assert flat(stream(model, PROMPT, max_new_tokens=5, temperature=0)) == expected


def test_a_seed_reproduces_its_samples():
    model = wild()
    options = {"max_new_tokens": 20, "temperature": 1.5, "samples": 3}
    first, again, other = (list(stream(model, PROMPT, seed=seed, **options)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    rows = list(zip(*first, strict=True))
    assert len(set(rows)) == 3, "samples of one call differ"


def test_each_sample_follows_its_own_past():
    """The cache keeps rows apart: greedy continuations of a row's own tokens, whatever its neighbours drew."""
    model = wild()
    rows = list(
        zip(*stream(model, PROMPT, max_new_tokens=10, temperature=1.0, top_k=2, samples=4, seed=3), strict=True)
    )
    with torch.no_grad():
        for row in rows:
            tokens = list(PROMPT)
            for token in row:
                likeliest = model(torch.tensor([tokens]))[0, -1].topk(2).indices.tolist()
                assert token in likeliest
                tokens.append(token)


def test_top_k_of_one_is_greedy():
    model = wild()
    greedy = flat(stream(model, PROMPT, max_new_tokens=20, temperature=0))
    assert flat(stream(model, PROMPT, max_new_tokens=20, temperature=1.0, top_k=1)) == greedy
    assert flat(stream(model, PROMPT, max_new_tokens=20, temperature=1.0, top_p=0.0)) == greedy


def drawn(logits, *, temperature=1.0, top_k=None, top_p=None, draws=4000):
    """The tokens that are drawn at all, with their frequencies."""
    rows = logits.expand(draws, -1)
    tokens = choose(rows, temperature, top_k, top_p, torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_has_the_mass(seed, top_p):
    logits = 1.5 * torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probabilities = logits.softmax(-1)
    subsets = [s for size in range(1, 7) for s in itertools.combinations(range(6), size)]
    enough = [s for s in subsets if probabilities[list(s)].sum() >= top_p]
    smallest = min(enough, key=lambda s: (len(s), -probabilities[list(s)].sum()))
    frequencies = drawn(logits, top_p=top_p)
    expected = torch.zeros(6, dtype=torch.float64)
    expected[list(smallest)] = probabilities[list(smallest)] / probabilities[list(smallest)].sum()
    assert set(frequencies.nonzero().flatten().tolist()) <= set(smallest)
    torch.testing.assert_close(frequencies.double(), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("top_k", [1, 2, 5, 100])
def test_top_k_keeps_k(top_k):
    logits = torch.tensor([0.1, 0.5, -0.3, 0.4, 0.0])
    kept = set(drawn(logits, top_k=top_k).nonzero().flatten().tolist())
    assert kept == set(logits.topk(min(top_k, 5)).indices.tolist())


def test_equal_logits_do_not_add_to_top_k():
    assert int((drawn(torch.zeros(8), top_k=3) > 0).sum()) == 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature):
    logits = torch.tensor([0.1, 1.5, -0.3, 0.4])
    expected = (logits / temperature).softmax(-1)
    torch.testing.assert_close(drawn(logits, temperature=temperature), expected, rtol=0, atol=0.03)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="the prompt has no token"):
        next(stream(make_model(), [], max_new_tokens=1))


def test_the_callers_gradients_and_guards_are_left_alone():
    model = wild()
    for _ in stream(model, PROMPT, max_new_tokens=2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    model(torch.tensor([PROMPT])).sum().backward()


class Scripted:
    """Stands for `stream`: tokens as written, whatever the model is."""

    def __init__(self, *rows):
        self.rows = rows
        self.asked = []

    def __call__(self, model, prompt, *, max_new_tokens, samples=1, **options):
        self.asked.append((list(prompt), options))
        for step in list(itertools.zip_longest(*self.rows, fillvalue=0))[:max_new_tokens]:
            yield list(step)


@pytest.fixture
def scripted(monkeypatch):
    def _script(*rows):
        script = Scripted(*rows)
        monkeypatch.setattr("treadle.inference.generate.stream", script)
        return script

    return _script


TOKENIZER = BytesTokenizerConfig().build()
EOS = TOKENIZER.eos_id


def test_generation_stops_at_the_end_of_text(scripted):
    scripted([*b"ab", EOS, *b"cd"], [*b"abcd", EOS])
    model = make_model()
    assert treadle.generate(model, TOKENIZER, "x", samples=2) == ["ab", "abcd"]
    assert treadle.generate(model, TOKENIZER, "x", samples=2, max_new_tokens=3) == ["ab", "abc"]
    scripted([*b"ab", EOS, *b"cd"])
    assert "".join(treadle.stream(model, TOKENIZER, "x")) == "ab"


def test_generation_ends_once_every_sample_has(scripted):
    scripted([EOS, *b"x" * 10], [*b"a", EOS, *b"y" * 9])
    assert treadle.generate(make_model(), TOKENIZER, samples=2) == ["", "a"]


def test_an_empty_text_begins_a_document(scripted):
    script = scripted([*b"ab"])
    treadle.generate(make_model(), TOKENIZER, "")
    assert script.asked[0][0] == [EOS]
    model = make_model(vocab_size=TOKENIZER.vocab_size)
    assert len("".join(treadle.stream(model, TOKENIZER, max_new_tokens=4))) <= 4


@pytest.mark.parametrize("text", ["Grüße 日本語 🙂 née", "🙂🙃", "ascii", "é"])
def test_streams_never_split_a_character(scripted, text):
    scripted([*text.encode(), EOS])
    pieces = list(treadle.stream(make_model(), TOKENIZER, "x"))
    assert pieces == list(text)


def test_a_stream_that_ends_inside_a_character_leaves_it_out(scripted):
    scripted([*"aé🙂".encode()])
    for length in range(1, 8):
        pieces = "".join(treadle.stream(make_model(), TOKENIZER, "x", max_new_tokens=length))
        assert "\ufffd" not in pieces
        assert "aé🙂".startswith(pieces)


def test_bytes_that_are_no_text_show_as_such_and_what_follows_is_kept(scripted):
    scripted([*b"a\xff\xe2b\x80c", EOS])
    pieces = list(treadle.stream(make_model(), TOKENIZER, "x"))
    assert "".join(pieces) == b"a\xff\xe2b\x80c".decode(errors="replace")


def test_streamed_and_generated_text_agree():
    model = make_model(vocab_size=TOKENIZER.vocab_size).eval()
    for seed in range(5):
        options = {"max_new_tokens": 40, "seed": seed, "temperature": 1.0}
        (whole,) = treadle.generate(model, TOKENIZER, "x", **options)
        streamed = "".join(treadle.stream(model, TOKENIZER, "x", **options))
        assert whole.startswith(streamed)
        assert set(whole[len(streamed) :]) <= {"\ufffd"}


def test_the_vocabulary_of_the_model_bounds_the_tokens():
    assert max(flat(stream(wild(), PROMPT, max_new_tokens=50, temperature=5.0))) < VOCABULARY
