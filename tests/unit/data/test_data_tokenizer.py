"""Tokenizers: any text comes back, special tokens cannot be smuggled in, and transformers reads what is written."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import decoders, models, normalizers

from treadle.data.tokenizer import END_OF_TEXT, Tokenizer, TokenizerConfig
from treadle.errors import DataError

CODE = (
    "def f(x):\n    return x + 12345  # naïve 你好\n\n\nclass A:\n\tpass\n" * 20
    + "don't we're it's the theory of other things " * 50
)
# Text as hypothesis makes it, and text with what tokenizers stumble over.
TEXT = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            ["<|endoftext|>", "<|reserved_0|>", " ", "\n", "\t", "\r\n", "123", "é", "e\u0301", "\ufeff", "\x00"]
        )
    ).map("".join),
)


def build(kind: str, **options: object) -> Tokenizer:
    return TokenizerConfig.model_validate({"kind": kind, **options}).build([CODE])


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return build("train", vocab_size=300, reserved=2, special_tokens=[END_OF_TEXT, "<|user|>"])


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return build("bytes")


@given(text=TEXT)
def test_any_text_comes_back(trained: Tokenizer, plain: Tokenizer, text: str) -> None:
    for tokenizer in (trained, plain):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text, text]) == [ids, ids]
        assert tokenizer.eos_id not in ids
        assert all(i < tokenizer.vocab_size for i in ids)


@given(text=st.text())
def test_bytes_are_bytes(plain: Tokenizer, text: str) -> None:
    assert plain.encode(text) == list(text.encode())
    assert plain.encode(text, special=True) == list(text.encode()) or END_OF_TEXT in text


@given(text=st.text())
def test_token_bytes_add_up_to_the_text(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.token_bytes()[ids].sum() == len(text.encode())
    assert b"".join(trained.token(i) for i in ids) == text.encode()


def test_ids_are_bytes_then_merges_then_special_tokens(trained: Tokenizer, plain: Tokenizer) -> None:
    assert (trained.vocab_size, trained.eos_id) == (300, 296)
    assert trained.encode("<|user|><|reserved_1|>", special=True) == [297, 299]
    assert (plain.vocab_size, plain.eos_id) == (257, 256)
    assert trained.token_bytes()[296:].tolist() == [0, 0, 0, 0]


def test_a_document_cannot_make_a_special_token(trained: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    assert trained.eos_id not in trained.encode(text)
    assert trained.encode(text, special=True).count(trained.eos_id) == 1
    assert trained.decode(trained.encode(text, special=True)) == text
    assert trained.decode(trained.encode(text, special=True), special=False) == "ab"


def test_merges_keep_within_three_digits_and_within_words() -> None:
    config = TokenizerConfig.model_validate({"kind": "train", "vocab_size": 273})
    tokenizer = config.build(["1234567890 the theory of the other " * 500])
    learned = [tokenizer.token(i) for i in range(256, 272)]
    assert {b"123", b" the", b" other"} <= set(learned)
    for token in learned:
        assert not token.isdigit() or len(token) <= 3
        assert b" " not in token[1:]
    assert [tokenizer.token(i) for i in tokenizer.encode("1234567")] == [b"123", b"456", b"7"]


def test_training_repeats_itself(trained: Tokenizer) -> None:
    again = build("train", vocab_size=300, reserved=2, special_tokens=[END_OF_TEXT, "<|user|>"])
    assert again.fingerprint == trained.fingerprint != build("train", vocab_size=301).fingerprint


def test_saved_and_loaded_is_the_same(trained: Tokenizer, tmp_path: Path) -> None:
    folder = trained.save(tmp_path / "t")
    for path in (folder, folder / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == trained.fingerprint
        assert loaded.encode(CODE) == trained.encode(CODE)
    assert TokenizerConfig.model_validate({"kind": "file", "path": folder}).build().eos_id == trained.eos_id


def test_transformers_reads_the_folder(trained: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(trained.save(tmp_path / "t"))
    assert theirs.encode(CODE) == trained.encode(CODE)
    assert theirs.decode(theirs.encode(CODE)) == CODE
    assert (theirs.eos_token, theirs.eos_token_id) == (END_OF_TEXT, trained.eos_id)
    assert len(theirs) == trained.vocab_size


def test_a_folder_says_how_its_documents_end(trained: Tokenizer, tmp_path: Path) -> None:
    folder = trained.save(tmp_path / "t")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({"eos_token": {"content": "<|user|>"}}))
    assert Tokenizer.load(folder).eos_id == 297
    assert Tokenizer.load(folder, eos="<|reserved_0|>").eos_id == 298
    with pytest.raises(DataError, match=r"no token '<s>'.*<\|endoftext\|>"):
        Tokenizer.load(folder, eos="<s>")
    file.write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not a JSON object"):
        Tokenizer.load(folder)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_more_tokens_than_the_text_has_are_refused() -> None:
    with pytest.raises(DataError, match=r"vocab_size: the text yields only \d+ tokens, 9000"):
        build("train", vocab_size=9000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "train", "vocab_size": 256}, "set at least 257"),
        ({"kind": "bytes", "special_tokens": []}, "at least 1"),
        ({"kind": "bytes", "special_tokens": ["a", "a"]}, "twice"),
        ({"kind": "bytes", "special_tokens": ["<|reserved_0|>"], "reserved": 1}, "twice"),
    ],
)
def test_impossible_tokenizers_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokenizerConfig.model_validate(options)


def llama_like() -> Tokenizer:
    """SentencePiece as converted for Llama: words with the space before them, bytes for what is in no word."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "▁t", "▁th", "▁the", "he"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("h", "e")]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, "</s>")


@pytest.mark.parametrize("text", ["the the", "the", "he the he", "thé the", " the  the"])
def test_token_bytes_add_up_where_words_carry_the_space_before_them(text: str) -> None:
    tokenizer = llama_like()
    first, *rest = tokenizer.encode(text)
    total = tokenizer.token_bytes(opening=True)[first] + tokenizer.token_bytes()[rest].sum()
    assert total == len(text.encode())
    assert tokenizer.decode([first, *rest]) == text
