"""From prompts to token ids, checked."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyengine.errors import ArgumentError
from pyengine.spec import ModelSpec
from pyengine.tokenizer import Tokenizer

Prompt = str | SequenceOf[int]


@dataclass(frozen=True)
class PromptEncoder:
    """Errors name the argument that a prompt came by."""

    tokenizer: Tokenizer
    spec: ModelSpec
    max_context: int

    def encode(self, prompt: Prompt, name: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, or those that are given; perhaps none."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        ids = [int(i) for i in prompt]
        for position, token in enumerate(ids):
            if not 0 <= token < self.spec.vocab_size:
                raise ArgumentError(
                    f"{name}: expected token ids from 0 to {self.spec.vocab_size - 1}, got {token} at {position}"
                )
        return ids

    def encode_some(self, prompt: Prompt, name: str) -> list[int]:
        """The same; an empty prompt becomes the token that texts start with."""
        ids = self.encode(prompt, name)
        if ids:
            return ids
        if self.spec.bos_token_id is None:
            raise ArgumentError(f"{name}: expected at least one token, got none, and the model has no bos token")
        return [self.spec.bos_token_id]

    def check_length(self, num_tokens: int, name: str, unit: str = "tokens") -> None:
        if num_tokens > self.max_context:
            raise ArgumentError(f"{name}: expected at most {self.max_context} {unit}, got {num_tokens}")


def prompt_list(prompts: Prompt | SequenceOf[Prompt]) -> list[Prompt]:
    """One prompt, text or ids, or several."""
    if isinstance(prompts, str):
        return [prompts]
    items: Iterable[Any] = prompts
    out = list(items)
    if out and all(isinstance(item, (int, np.integer)) for item in out):
        return [out]
    return out


def check_pair(pair: tuple[Prompt, Prompt], name: str) -> tuple[Prompt, Prompt]:
    """A prompt and a completion."""
    if isinstance(pair, str) or not isinstance(pair, SequenceOf) or len(pair) != 2:
        raise ArgumentError(f"{name}: expected a prompt and a completion, got {pair!r:.60}")
    return pair[0], pair[1]
