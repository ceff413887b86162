"""Text in, text out: prompts are encoded, tokens sampled, and decoded up to the end of the document."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from pydantic import Field, PositiveInt

from treadle.config import Config
from treadle.data.tokenizer import NO_TOKENIZER, Tokenizer
from treadle.errors import DataError
from treadle.inference import generate as sampling
from treadle.inference.text_stream import TextStream
from treadle.nn.transformer import Transformer
from treadle.parallel.mesh import Mesh
from treadle.parallel.pipeline import pipeline_of


class SampleConfig(Config):
    """Text sampled from the model while it trains."""

    every: PositiveInt | None = Field(None, description="steps between samples; null: only at the end")
    prompt: str = Field("", description="what the sample continues; empty: the start of a document")
    max_new_tokens: PositiveInt = Field(128, description="length of the sample")
    temperature: float = Field(0.8, ge=0, description="0 is greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="keep the likeliest tokens that make up this probability")

    def draw(self, model: Transformer, tokenizer: Tokenizer, seed: int, mesh: Mesh | None = None) -> str:
        """One continuation of the prompt; all processes that share the model draw it together."""
        options: dict[str, Any] = self.model_dump(include={"max_new_tokens", "temperature", "top_p"})
        pipeline = pipeline_of(model)
        options["agree"] = partial((mesh or Mesh()).same, source=0 if pipeline is None else pipeline.end_rank)
        return generate(model, tokenizer, self.prompt, seed=seed, **options)[0]


def generate(
    model: Transformer, tokenizer: Tokenizer | None, prompt: str = "", *, samples: int = 1, **options: Any
) -> list[str]:
    """Continuations of a prompt, each up to its end-of-text token. Options: see `treadle.inference.generate.stream`.

    Raises DataError for a model without tokenizer.
    """
    tokenizer = _needed(tokenizer)
    options.setdefault("max_new_tokens", 256)
    tokens: list[list[int]] = [[] for _ in range(samples)]
    ended = [False] * samples
    for step in sampling.stream(model, encode_prompt(tokenizer, prompt), samples=samples, **options):
        for row, token in enumerate(step):
            ended[row] = ended[row] or token == tokenizer.eos_id
            if not ended[row]:
                tokens[row].append(token)
        if all(ended):
            break
    return [tokenizer.decode(row) for row in tokens]


def stream(model: Transformer, tokenizer: Tokenizer | None, prompt: str = "", **options: Any) -> Iterator[str]:
    """One continuation, piece by piece as it is made; characters are never split. Raises as `generate` does."""
    tokenizer = _needed(tokenizer)
    options.setdefault("max_new_tokens", 256)
    shown = TextStream(tokenizer)
    for (token,) in sampling.stream(model, encode_prompt(tokenizer, prompt), **options):
        if token == tokenizer.eos_id:
            break
        if piece := shown.push(token):
            yield piece
    if piece := shown.end():
        yield piece


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt after what the model expects before a text; where both are nothing, a document's end."""
    return [*tokenizer.opening, *tokenizer.encode(prompt)] or [tokenizer.eos_id]


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise DataError(f"the model has no tokenizer: {NO_TOKENIZER.format(folder='its folder/tokenizer')}")
    return tokenizer
