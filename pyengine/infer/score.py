"""Readings that score: completions after their prompts, and prompts themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pyengine import _C
from pyengine.infer.driver import Driver
from pyengine.infer.outputs import TokenLogprobs
from pyengine.infer.prompts import Prompt, PromptEncoder, check_pair
from pyengine.infer.reading import RankReading, TargetReading
from pyengine.infer.scheduler import check_priority, check_salt


def score_readings(
    encoder: PromptEncoder,
    pairs: Iterable[tuple[Prompt, Prompt]],
    adapters: Iterable[_C.Adapter | None],
    *,
    priority: int,
    cache_salt: str,
) -> Iterator[TargetReading]:
    """One for each pair of prompt and completion, made as it is asked for; `adapters` has one for each."""
    check_priority(priority)
    check_salt(cache_salt)

    def reading(index: int, pair: tuple[Prompt, Prompt], adapter: _C.Adapter | None) -> TargetReading:
        prompt, completion = check_pair(pair, f"pairs[{index}]")
        prompt_ids = encoder.encode_some(prompt, f"prompts[{index}]")
        ids = encoder.encode(completion, f"completions[{index}]", add_special_tokens=False)
        if ids:
            encoder.check_length(len(prompt_ids) + len(ids), f"prompts[{index}]", "tokens with the answer")
        return TargetReading(
            token_ids=(prompt_ids + ids)[:-1],
            first=len(prompt_ids) - 1,
            targets=ids,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
        )

    each = zip(pairs, adapters, strict=False)
    return (reading(index, pair, adapter) for index, (pair, adapter) in enumerate(each))


def prompt_logprobs(
    driver: Driver, ids: list[int], num_top: int, *, priority: int, cache_salt: str, adapter: _C.Adapter | None
) -> list[TokenLogprobs | None]:
    """Log-probability of every token of a prompt after those before it, and the `num_top` likeliest tokens in its
    place; None for the first. Leaves the prompt in the cache for who goes on from it."""
    inputs, targets = ids[:-1], ids[1:]
    if num_top == 0:
        plain = TargetReading(
            token_ids=inputs, first=0, targets=targets, priority=priority, cache_salt=cache_salt, adapter=adapter
        )
        (plain,) = driver.read([plain])
        return [None, *map(TokenLogprobs, targets, plain.logprobs)]
    ranks = RankReading(
        token_ids=inputs,
        first=0,
        targets=targets,
        num_top=num_top,
        priority=priority,
        cache_salt=cache_salt,
        adapter=adapter,
    )
    (ranks,) = driver.read([ranks])
    return [None, *ranks.entries]
