"""Constrained decoding: before each token, which tokens go on with a text of a given form.

A JSON schema, a regular expression or a grammar is compiled once by llguidance. Each request has a matcher of its own,
which reads the request's tokens and fills a mask with a bit for each token of the vocabulary.

R requests, C requests with a constraint, B bytes of a mask, V vocabulary.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle.data.tokenizer import Tokenizer
from treadle.errors import ConfigError
from treadle.inference.request import Constraint, Request

# Where JSON allows any amount of space, one blank at most: a model that is not sure of itself would never end it.
SPACE = {"whitespace_pattern": "[ ]?"}
COMPILED = 128  # constraints that are remembered


class Grammars:
    """Compiles constraints for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, vocabulary: int):
        """vocabulary: of the model; it may be larger than the tokenizer's."""
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._vocabulary_of_bytes: Any = None  # which takes a second to build
        self._compiled = lru_cache(COMPILED)(self._compile)

    def matcher(self, constraint: Constraint) -> Any:
        """A matcher at the beginning of a text. Raises ConfigError for what is no schema, expression or grammar."""
        return self._compiled(constraint).deep_copy()

    def _compile(self, constraint: Constraint) -> Any:
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            raise ConfigError(
                "constraint: the server needs llguidance; install it there: pip install 'treadle[constrained]'"
            ) from None
        if self._tokenizer is None:
            raise ConfigError("constraint: the model has no tokenizer, so that its tokens have no text")
        try:
            if self._vocabulary_of_bytes is None:
                tokenizer = self._tokenizer
                self._vocabulary_of_bytes = LLTokenizer(
                    tokenizer.backend.to_str(), n_vocab=self._vocabulary, eos_token=tokenizer.eos_id
                )
            if constraint.form == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(constraint.source, defaults=SPACE)
            elif constraint.form == "regex":
                grammar = LLMatcher.grammar_from_regex(constraint.source)
            else:
                grammar = LLMatcher.grammar_from_lark(constraint.source)
            made = LLMatcher(self._vocabulary_of_bytes, grammar, log_level=0)
            made.compute_bitmask()  # finds out whether there is any text at all
        except ValueError as error:
            raise ConfigError(f"constraint: {error}") from None
        if made.is_error():
            said = made.get_error().partition("<state>")[0].strip()
            raise ConfigError(f"constraint: no {constraint.form} that can be followed: {said}")
        return made


def constrained(scores_RV: Tensor, requests: Sequence[Request]) -> Tensor:
    """-inf for tokens that the requests' constraints do not allow; the scores themselves where there is none.

    All tokens of a constrained request are known here: the scheduler lets none of them run ahead.
    """
    rows = [row for row, request in enumerate(requests) if request.matcher is not None]
    if not rows:
        return scores_RV
    V, device = scores_RV.shape[-1], scores_RV.device
    masks_CB = np.zeros((len(rows), -(-V // 32) * 4), dtype=np.uint8)
    for row, mask_B in zip(rows, masks_CB, strict=True):
        requests[row].matcher.unsafe_compute_mask_ptr(mask_B.ctypes.data, mask_B.nbytes)

    def there(values: Any) -> Tensor:
        host = torch.from_numpy(values)
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)

    bits_CV = (there(masks_CB)[..., None] >> torch.arange(8, device=device, dtype=torch.uint8) & 1).flatten(1)[:, :V]
    index = there(np.array(rows))
    return scores_RV.index_put((index,), scores_RV[index].masked_fill(bits_CV == 0, float("-inf")))
