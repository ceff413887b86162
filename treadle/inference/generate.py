"""Sampling text from a model, one token at a time with a key-value cache.

B rows (samples of one prompt), S prompt length, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from treadle.attention import AttentionContext
from treadle.nn.transformer import Transformer
from treadle.parallel.data import without_gradients
from treadle.parallel.pipeline import at_the_end


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    samples: int = 1,
    seed: int = 0,
    backend: str = "auto",
    agree: Callable[[Tensor], Tensor] = lambda chosen_B: chosen_B,
) -> Iterator[list[int]]:
    """Yield the next token of each of `samples` continuations of `prompt`, `max_new_tokens` times.

    temperature 0 is greedy. top_k and top_p keep the likeliest tokens only. The caller decides when to stop.
    agree: makes the choice the same on all processes that share the model. Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt has no token; begin with the end-of-text token to sample from nothing")
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    cache = model.make_cache(samples, len(prompt) + max_new_tokens)
    tokens_BS = torch.tensor([list(prompt)], device=device).expand(samples, -1)
    position = 0
    for _ in range(max_new_tokens):
        positions_BS = torch.arange(position, position + tokens_BS.shape[1], device=device).expand(samples, -1)
        context = AttentionContext(positions_BS, backend=backend, cache=cache)
        # Compiled layers are for fixed shapes, and the cache grows with each token: run them eagerly. The guards are
        # entered for each token anew, so that they do not leak into the caller between two yields.
        with without_gradients(model), torch.compiler.set_stance("force_eager"):
            logits_BV = at_the_end(model, partial(_last_logits, tokens_BS=tokens_BS, context=context))
            if logits_BV is None:  # the end of the model is another process's, and so is the choice
                chosen_B = tokens_BS.new_zeros(samples)
            else:
                chosen_B = choose(logits_BV.float(), temperature, top_k, top_p, generator)
            chosen_B = agree(chosen_B)
        position += tokens_BS.shape[1]
        tokens_BS = chosen_B[:, None]
        yield chosen_B.tolist()


def _last_logits(model: Transformer, tokens_BS: Tensor, context: AttentionContext) -> Tensor:
    logits_BV: Tensor = model.head(model.hidden(tokens_BS, context)[:, -1])
    return logits_BV


def choose(
    logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """Draw one token per row.  logits_BV -> tokens_B"""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kept = logits_BV.topk(top_k, dim=-1)
        logits_BV = torch.full_like(logits_BV, float("-inf")).scatter(1, kept.indices, kept.values)
    if top_p is not None and top_p < 1:
        sorted_BV, order_BV = logits_BV.softmax(-1).sort(dim=-1, descending=True)
        # A token stays while those before it have less than top_p together; the likeliest always stays.
        dropped_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
        dropped_BV[:, 0] = False
        logits_BV = logits_BV.masked_fill(dropped_BV.scatter(1, order_BV, dropped_BV), float("-inf"))
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
