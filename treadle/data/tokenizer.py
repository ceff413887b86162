"""Text to token ids and back: byte-level BPE, trained here or read from a file, or plain bytes.

Every text is representable, and decode(encode(text)) == text. A special token's name in a text is ordinary text: only
the caller can make a special token (`special=True`), never a document.
"""

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from pydantic import Field, PositiveInt, model_validator
from tokenizers import decoders, models, pre_tokenizers, trainers

from treadle.config import Kind
from treadle.errors import DataError

# GPT-4's and Llama 3's: contractions, words with the space before them, digits by three, runs of line ends and indents.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG_FILE = "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"
NO_TOKENIZER = (
    "there is no tokenizer.json (a SentencePiece model alone is not read); write one with transformers' "
    "AutoTokenizer.from_pretrained(...).save_pretrained('{folder}')"
)
BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # how SentencePiece names the tokens of single bytes


class Tokenizer:
    """Text to token ids and back.

    `eos_id` is the token that ends each document; `fingerprint` (sha256) changes with anything that changes the ids.
    `opening` are the ids that a published model saw before each text in its training, and that its prompts begin with.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos: str = END_OF_TEXT, opening: Sequence[int] = ()):
        eos_id = backend.token_to_id(eos)
        if eos_id is None:
            known = ", ".join(sorted(token.content for token in backend.get_added_tokens_decoder().values())) or "none"
            raise DataError(
                f"the tokenizer has no token '{eos}' to end a document with; its special tokens: {known}. Declare the "
                'one that does in the tokenizer_config.json beside it, as {"eos_token": "..."}, or by hf-import --eos'
            )
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self.backend = backend
        self.eos = eos
        self.eos_id: int = eos_id
        self.opening = list(opening)
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The token ids of `text`. With `special`, names of special tokens in it become those tokens."""
        if self._is_bytes and not special:
            return list(text.encode())
        backend = self._with_special if special else self.backend
        return backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, by all cores (TOKENIZERS_PARALLELISM=false: by one)."""
        if self._is_bytes:
            return [list(text.encode()) for text in texts]
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD. With special=False, special tokens vanish."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def token(self, i: int) -> bytes:
        """The bytes of text that token `i` stands for after another one; a special token's are its name's."""
        name = self.backend.id_to_token(i)
        if name is None:
            raise DataError(f"token id {i} is outside of the vocabulary of {self.vocab_size}")
        if i in self.backend.get_added_tokens_decoder():
            return name.encode()
        if isinstance(self.backend.decoder, decoders.ByteLevel):
            return bytes(byte_of()[character] for character in name)
        if byte := BYTE_FALLBACK.fullmatch(name):
            return bytes([int(byte[1], 16)])
        # By itself, a word loses the space before it: '▁the' is ' the' in a text, and 'the' where the text begins.
        before, anchor = self._anchor
        return self.backend.decode([*anchor, i]).removeprefix(before).encode()

    def token_bytes(self, *, opening: bool = False) -> np.ndarray:
        """int32 [vocab_size]: how many bytes of text each token stands for; 0 for special tokens.

        opening: at the beginning of a document. It differs only where a word is written with the space before it.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        byte_level = isinstance(self.backend.decoder, decoders.ByteLevel)
        added = self.backend.get_added_tokens_decoder()
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i in added:
                lengths[i] = 0 if added[i].special else len(token.encode())
            elif byte_level:  # whose alphabet writes each byte as one character
                lengths[i] = len(token)
            elif opening and not BYTE_FALLBACK.fullmatch(token):
                lengths[i] = len(self.backend.decode([i]).encode())
            else:
                lengths[i] = len(self.token(i))
        return lengths

    @cached_property
    def _anchor(self) -> tuple[str, list[int]]:
        """A text of one token, and the token, to see what another one adds to it; nothing if there is none."""
        added = self.backend.get_added_tokens_decoder()
        for i in sorted(self.backend.get_vocab(with_added_tokens=False).values()):
            text = self.backend.decode([i])
            if i not in added and text.isascii() and text.isalnum():
                return text, [i]
        return "", []

    @cached_property
    def fingerprint(self) -> str:
        content = json.dumps([json.loads(self.backend.to_str()), self.eos], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def _is_bytes(self) -> bool:
        """Whether id = byte and there are no merges, so that nothing has to be looked up."""
        plain = self.backend.normalizer is None and self.backend.get_vocab_size(with_added_tokens=False) == 256
        return plain and self.backend.get_vocab(with_added_tokens=False) == byte_of()

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.backend.to_str())

    def save(self, folder: Path | str) -> Path:
        """Write tokenizer.json and tokenizer_config.json, as transformers.AutoTokenizer reads them; the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos,
            "clean_up_tokenization_spaces": False,
            "add_bos_token": False,
            "add_eos_token": False,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, path: Path | str, eos: str | None = None) -> "Tokenizer":
        """From a tokenizer.json, or a folder with one. `eos` overrides the folder's own. Raises DataError."""
        path = Path(path).expanduser()
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"{file}: no such file; {NO_TOKENIZER.format(folder=file.parent)}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{file}: not a tokenizer.json that the tokenizers library reads: {error}") from error
        return cls(backend, eos or declared(file.parent, "eos_token") or END_OF_TEXT, opening(backend, file.parent))


def declared(folder: Path, key: str) -> str | None:
    """The special token, such as `eos_token`, that a Hugging Face folder declares."""
    for name in (CONFIG_FILE, "special_tokens_map.json"):
        token = _json(folder / name).get(key)
        if token:
            return str(token["content"]) if isinstance(token, dict) else str(token)
    return None


def declare_eos(folder: Path, eos: str) -> None:
    """Have a Hugging Face folder say which token ends a document."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**_json(folder / CONFIG_FILE), "eos_token": eos}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def opening(backend: tokenizers.Tokenizer, folder: Path) -> list[int]:
    """The ids that a Hugging Face folder has before each text: by `add_bos_token`, else by the post-processor."""
    asked = _json(folder / CONFIG_FILE).get("add_bos_token")
    if asked is None:
        encoding = backend.encode("a", add_special_tokens=True)
        added = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return [i for i, _ in takewhile(lambda token: token[1], added)]
    bos = backend.token_to_id(declared(folder, "bos_token") or "") if asked else None
    return [] if bos is None else [bos]


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; nothing if there is none. Raises DataError."""
    try:
        value = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}: not a JSON object")
    return value


class TokenizerConfig(Kind):
    """How text becomes tokens."""

    @abstractmethod
    def build(self, documents: Iterable[str] = ()) -> Tokenizer:
        """The tokenizer. Only `train` reads the documents, all of them. Raises DataError."""


class FileTokenizerConfig(TokenizerConfig):
    """An existing tokenizer.json, or a Hugging Face folder."""

    kind: Literal["file"] = "file"
    path: Path = Field(description="tokenizer.json, or a folder that holds one")
    eos: str | None = Field(None, description="the token that ends a document; none: what the folder declares")

    def build(self, documents: Iterable[str] = ()) -> Tokenizer:
        return Tokenizer.load(self.path, self.eos)


class SpecialTokensConfig(TokenizerConfig):
    """Base of the tokenizers made here: special tokens take the ids after the bytes and merges."""

    special_tokens: list[str] = Field([END_OF_TEXT], min_length=1, description="the first one ends each document")
    reserved: int = Field(0, ge=0, description="spare special tokens, <|reserved_0|> and on, to be named later")

    @property
    def specials(self) -> list[str]:
        return [*self.special_tokens, *(f"<|reserved_{i}|>" for i in range(self.reserved))]

    @model_validator(mode="after")
    def _special_tokens_differ(self) -> "SpecialTokensConfig":
        if len(set(self.specials)) < len(self.specials):
            raise ValueError(f"special_tokens: {self.special_tokens} names a token twice; each name may stand once")
        return self


class BytesTokenizerConfig(SpecialTokensConfig):
    """The 256 bytes, id = byte, then the special tokens. Nothing to train."""

    kind: Literal["bytes"] = "bytes"

    def build(self, documents: Iterable[str] = ()) -> Tokenizer:
        return finished(byte_level(models.BPE(dict(byte_of()), []), words=False), self.specials)


class TrainTokenizerConfig(SpecialTokensConfig):
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909), trained on the training documents of the sources."""

    kind: Literal["train"] = "train"
    vocab_size: PositiveInt = Field(8192, description="number of tokens: bytes, merges, special and reserved tokens")
    max_bytes: PositiveInt = Field(256 << 20, description="how many bytes of text to learn from, at most")

    @model_validator(mode="after")
    def _room_for_bytes(self) -> "TrainTokenizerConfig":
        least = 256 + len(self.specials)
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size: {self.vocab_size} has no room for 256 bytes and {len(self.specials)} special tokens; "
                f"set at least {least}"
            )
        return self

    def build(self, documents: Iterable[str] = ()) -> Tokenizer:
        learned = self.vocab_size - len(self.specials)
        trainer = trainers.BpeTrainer(
            vocab_size=learned, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        backend = byte_level(models.BPE())
        backend.train_from_iterator(documents, trainer)
        found = backend.get_vocab_size()
        if found < learned:
            raise DataError(
                f"tokenizer.vocab_size: the text yields only {found + len(self.specials)} tokens, {self.vocab_size} "
                f"were asked for; lower vocab_size, or train on more text"
            )
        return finished(backend, self.specials)


def byte_level(model: models.Model, *, words: bool = True) -> tokenizers.Tokenizer:
    """A tokenizer over bytes, that looks for merges within words only (or, without `words`, anywhere)."""
    backend = tokenizers.Tokenizer(model)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes]) if words else as_bytes
    backend.decoder = decoders.ByteLevel()
    return backend


def finished(backend: tokenizers.Tokenizer, specials: Sequence[str]) -> Tokenizer:
    """With the special tokens after the bytes and merges; the first one ends a document."""
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in specials])
    return Tokenizer(backend, specials[0])


def byte_characters() -> list[str]:
    """The character by which byte-level BPE writes each byte (GPT-2's table: printable bytes are themselves)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


@cache
def byte_of() -> dict[str, int]:
    """The byte of each character of the byte-level alphabet."""
    return {character: byte for byte, character in enumerate(byte_characters())}
