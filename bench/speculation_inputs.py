"""Real texts to summarise, to edit and to copy from: documentation and functions of Python's standard library."""

from __future__ import annotations

import heapq
import inspect
import statistics
import textwrap
from collections.abc import Callable

Messages = list[dict[str, str]]

# Most characters of a text: a prompt of at most about 900 tokens.
_MOST_CHARACTERS = 2600


def _user(request: str, text: str) -> Messages:
    return [{"role": "user", "content": f"{request}\n\n{text[:_MOST_CHARACTERS]}"}]


def _code(function: Callable[..., object]) -> str:
    return f"```python\n{textwrap.dedent(inspect.getsource(function))[:_MOST_CHARACTERS]}\n```"


# Workload -> conversations whose answers are measured, in turn.
CONVERSATIONS: dict[str, list[Messages]] = {
    "summarise": [
        _user("Summarise this text in a few sentences, in its own words:", inspect.cleandoc(text or ""))
        for text in (heapq.__about__, textwrap.TextWrapper.__doc__, statistics.__doc__, inspect.signature.__doc__)
    ],
    "edit": [
        _user("Rewrite this function with type hints. Change nothing else, and give the whole function:", _code(f))
        for f in (textwrap.TextWrapper._wrap_chunks, heapq.merge, statistics.quantiles, inspect.getblock)
    ],
    "code": [
        _user("Write a test for this function that calls it with three inputs:", _code(f))
        for f in (textwrap.indent, heapq.nsmallest, statistics.fmean, inspect.cleandoc)
    ],
    # No text to copy from.
    "poem": [_user(f"Write a poem about {topic}.", "") for topic in ("the sea", "winter", "a clock", "bread")],
}
