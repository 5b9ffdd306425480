"""`SamplingParams` in the terms of the native sampler."""

from __future__ import annotations

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.infer.sampling_params import SamplingParams
from pyengine.tokenizer import Tokenizer


def make_sample_state(
    prompt_token_ids: list[int],
    params: SamplingParams,
    index: int,
    end: list[int],
    bad_words: list[list[int]],
    vocab_size: int,
) -> _C.SampleState:
    """Settings and history of one sequence; `end` are the tokens that end it, `index` is the counter of its draws.

    Raises ArgumentError for an id that the logits do not have.
    """
    biases = dict(params.logit_bias)
    for name, ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("logit_bias", biases),
    ):
        for token in ids:
            if token >= vocab_size:
                raise ArgumentError(f"{name}: expected ids below {vocab_size}, got {token}")
    return _C.SampleState(
        vocab_size,
        temperature=params.temperature,
        top_k=min(params.top_k, 2**31 - 1),
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        seed=params.seed,
        sequence=index,
        prompt_ids=prompt_token_ids,
        bias_ids=list(biases),
        biases=[float(bias) for bias in biases.values()],
        allowed_ids=list(params.allowed_token_ids or ()),
        end_ids=end,
        min_tokens=params.min_tokens,
        bad_words=bad_words,
    )


def encode_bad_words(words: tuple[str, ...], tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of every word at the beginning of a text and after a space."""
    encodings = [
        tokenizer.encode(prefix + word.lstrip(" "), add_special_tokens=False) for word in words for prefix in ("", " ")
    ]
    return sorted({tuple(ids): ids for ids in encodings if ids}.values())
