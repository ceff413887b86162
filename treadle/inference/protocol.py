"""OpenAI's completions API as data: what a body may say, and what is answered."""

import base64
import codecs
import json
import re
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from treadle.config.base import nearest
from treadle.data.tokenizer import Tokenizer
from treadle.errors import ConfigError
from treadle.inference.request import Constraint, Logprob, Sampling
from treadle.inference.text import encode_prompt


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str | None = None  # unused
    description: str | None = None  # unused
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # the schema is followed in any case


class ResponseFormat(BaseModel):
    """What the text has to be. `regex` and `grammar` are not OpenAI's."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _has_what_it_names(self) -> Self:
        for key in ("json_schema", "regex", "grammar"):
            if (getattr(self, key) is None) == (self.type == key):
                raise ValueError(f"type '{self.type}' goes {'with' if self.type == key else 'without'} '{key}'")
        return self

    @property
    def constraint(self) -> Constraint | None:
        if self.type == "text":
            return None
        if self.type in ("json_object", "json_schema"):
            schema = {"type": "object"} if self.json_schema is None else self.json_schema.schema_
            return Constraint(form="json_schema", source=json.dumps(schema))
        form: Literal["regex", "grammar"] = "regex" if self.regex is not None else "grammar"
        return Constraint(form=form, source=self.regex or self.grammar or "")


class Body(BaseModel):
    """What all requests share. Keys that are not here are refused; those marked so are unused."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    user: str | None = None  # unused

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None or key not in cls.model_fields}

    @property
    def stops(self) -> list[str]:
        return []


class EmbeddingBody(Body):
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)

    def encoded(self, vector_D: Tensor) -> list[float] | str:
        """base64: of float32, the lowest byte first."""
        numbers = vector_D.numpy().astype("<f4")
        return numbers.tolist() if self.encoding_format == "float" else base64.b64encode(numbers.tobytes()).decode()


class DrawnBody(Body):
    """What is asked of tokens that are drawn."""

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    stop: str | list[str] | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, float] | None = None
    response_format: ResponseFormat | None = None
    seed: int | None = None
    metadata: dict[str, Any] | None = None  # unused
    # Not OpenAI's, but common.
    top_k: int | None = Field(None, ge=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    min_tokens: int = Field(0, ge=0)
    stop_token_ids: list[int] = []
    ignore_eos: bool = False

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def usage_wanted(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, index: int, *, max_tokens: int, logprobs: int | None, prompt_logprobs: bool = False) -> Sampling:
        """Of the choice with this index: each draws for itself."""
        same = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        values: dict[str, Any] = {name: getattr(self, name) for name in (*same, "min_tokens", "ignore_eos")}
        values |= {"max_tokens": max_tokens, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        values |= {"logit_bias": self.logit_bias or {}, "stop_tokens": tuple(self.stop_token_ids)}
        values["constraint"] = None if self.response_format is None else self.response_format.constraint
        return Sampling(**values, seed=None if self.seed is None else self.seed + index)


class CompletionBody(DrawnBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=128)


class ChatBody(DrawnBody):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: dict[str, Any] = {}


def encoded_prompts(given: Any, tokenizer: Tokenizer | None) -> list[list[int]]:
    """The prompts of a body as token ids. Raises ConfigError for none, and for text where there is no tokenizer."""
    if given == []:
        raise ConfigError("prompt: the list is empty; give a text, token ids, or a list of such")
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    return [encode(tokenizer, each) if isinstance(each, str) else list(each) for each in given]


def encode(tokenizer: Tokenizer | None, text: str) -> list[int]:
    if tokenizer is None:
        raise ConfigError("prompt: the model has no tokenizer; give token ids")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError("prompt: half of a surrogate pair is no text; send UTF-8") from None
    return encode_prompt(tokenizer, text)


def problem(errors: Sequence[Any], body: type[BaseModel]) -> tuple[str, str]:
    """(key, message) of the first thing that pydantic found wrong."""
    first = errors[0]
    broken = first["type"] == "json_invalid"  # its place is one in the text
    path = [] if broken else [str(part) for part in first["loc"] if part not in ("body",)]
    key = ".".join(path) or "body"
    if first["type"] == "extra_forbidden":
        return key, f"{key}: not known here.{nearest(path[0], body.model_fields)}"
    given = "" if broken or first["type"] == "missing" else f" (got {str(first.get('input'))[:80]!r})"
    return key, f"{key}: {first['msg']}{given}"


# Where the engine calls a key of the body by another name.
ENGINES_NAMES = {
    "stop_tokens": ("stop_token_ids",),
    "constraint": ("response_format",),
    "prompt": ("messages", "input"),
}


def blamed(message: str, body: type[BaseModel]) -> tuple[str | None, str]:
    """(key of the body, message) of an error, which begins with the key that it is about; None: about no key."""
    found = re.match(r"(\w+)[\w.\[\]]*: ", message)
    said = found[1] if found else ""
    key = next((name for name in (said, *ENGINES_NAMES.get(said, ())) if name in body.model_fields), None)
    return key, message if key is None else key + message[len(said) :]


def bytes_of(tokenizer: Tokenizer | None, token: int) -> bytes:
    """A token's text; nothing where it has none, as those that only fill up a model's vocabulary."""
    return b"" if tokenizer is None or token >= tokenizer.vocab_size else tokenizer.token(token)


def text_of(tokenizer: Tokenizer | None, token: int) -> str:
    return bytes_of(tokenizer, token).decode(errors="replace") or f"token_id:{token}"


class Offsets:
    """Where in a text its tokens begin, in characters; where one is split, that is the place of the character."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer, self._characters = tokenizer, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def next(self, token: int) -> int:
        before = self._characters
        self._characters += len(self._decoder.decode(bytes_of(self._tokenizer, token)))
        return before


def completion_logprobs(
    tokenizer: Tokenizer | None, found: Sequence[Logprob | None], tokens: Sequence[int], offsets: Offsets
) -> Any:
    """Of a completion: lists of the same length. found: None for a prompt's first token."""
    return {
        "tokens": [text_of(tokenizer, token) for token in tokens],
        "token_logprobs": [None if each is None else each.logprob for each in found],
        "top_logprobs": [
            None if each is None else {text_of(tokenizer, token): value for token, value in each.top.items()}
            for each in found
        ],
        "text_offset": [offsets.next(token) for token in tokens],
    }


def chat_logprobs(tokenizer: Tokenizer | None, found: Sequence[Logprob]) -> Any:
    """Of a chat's answer: an entry for each token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": text_of(tokenizer, token), "logprob": logprob, "bytes": list(bytes_of(tokenizer, token))}

    return {
        "content": [
            {**entry(each.token, each.logprob), "top_logprobs": [entry(*pair) for pair in each.top.items()]}
            for each in found
        ]
    }
