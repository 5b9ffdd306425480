"""Which tokens of a conversation the assistant wrote: the loss mask of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyengine.tokenizer.template import ChatTemplate, TemplateError
from pyengine.tokenizer.tokenizer import Tokenizer


def assistant_mask(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> tuple[list[int], list[int]]:
    """(ids, mask) of the whole conversation: mask[i] is 1 where ids[i] is the assistant's, its end-of-turn token
    included.

    A turn is what the conversation up to and with the message has more than the conversation before it with the
    generation prompt. Both must be beginnings of the whole: a template that rewrites earlier turns raises TemplateError
    "prefix". White space after the end-of-turn token is not the assistant's, and neither is a token that begins before
    the turn. `variables` go to `ChatTemplate.render`.
    """
    text = template.render(messages, **variables)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = template.render(messages[:index], add_generation_prompt=True, **variables)
        through = template.render(messages[: index + 1], **variables)
        if not text.startswith(through) or not through.startswith(before):
            raise TemplateError(
                "prefix", f"expected every turn to keep the text before it, got a change at message {index}"
            )
        spans.append((len(before), len(through)))
    ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    mask = [0] * len(ids)
    position = 0
    for start, end in spans:
        while position < len(ids) and offsets[position][0] < start:
            position += 1
        first = position
        while position < len(ids) and offsets[position][1] <= end:
            position += 1
        last = position
        while (
            last > first and ids[last - 1] not in tokenizer.special_ids and not text[slice(*offsets[last - 1])].strip()
        ):
            last -= 1
        if last == first or ids[last - 1] not in tokenizer.special_ids:
            last = position
        mask[first:last] = [1] * (last - first)
    return ids, mask
