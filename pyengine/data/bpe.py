"""Trains a byte-level BPE tokenizer and writes it as the tokenizer part of a Hugging Face folder.

Text is split as SmolLM does (single digits, then the GPT-2 pattern), so GGUF readers know the same rule as the
pre-tokenizer `smollm`. Every byte is in the vocabulary: any text encodes, and decodes to itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from pyengine.data.files import replacing
from pyengine.errors import ArgumentError
from pyengine.ledger import content_id

END_OF_TEXT = "<|endoftext|>"
MESSAGE_START = "<|im_start|>"
MESSAGE_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_BATCH = 256
_NUM_BYTES = 256


class TokenizerFiles(msgspec.Struct, frozen=True):
    """What `save_tokenizer` wrote; `content_id` is that of `tokenizer.json` and names the tokenizer everywhere."""

    folder: str
    content_id: str
    vocab_size: int


class TokenizerMeasure(msgspec.Struct, frozen=True):
    """How well a tokenizer compresses a text."""

    documents: int
    bytes: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token; NaN for no tokens."""
        return self.bytes / self.tokens if self.tokens else float("nan")


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = SPECIAL_TOKENS, min_frequency: int = 2
) -> Tokenizer:
    """Train on texts. The result depends on the texts and arguments alone.

    Args:
        texts: documents; the order does not matter to the merges.
        vocab_size: entries, bytes and special tokens included. Fewer come out if the texts have too few pairs.
        special_tokens: get the first ids, in order.
        min_frequency: a pair seen less often is not merged.

    Raises:
        ArgumentError: `vocab_size` cannot hold all bytes and special tokens, or a special token is empty or repeated.
    """
    special_tokens = list(special_tokens)
    if len(set(special_tokens)) != len(special_tokens) or "" in special_tokens:
        raise ArgumentError(f"special_tokens: expected different texts that are not empty, got {special_tokens}")
    smallest = _NUM_BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise ArgumentError(f"vocab_size: expected at least {smallest} (bytes and special tokens), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str], *, max_length: int = 2048) -> TokenizerFiles:
    """Write `tokenizer.json`, `tokenizer_config.json` and, if the message tokens exist, `chat_template.jinja`.

    Args:
        tokenizer: from `train_bpe`.
        folder: made if it is not there.
        max_length: `model_max_length` of the configuration, in tokens.
    """
    folder = Path(folder)
    data = tokenizer.to_str(pretty=True).encode()
    specials = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special]
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if END_OF_TEXT in specials:
        config |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    others = [token for token in specials if token != END_OF_TEXT]
    if others:
        config["extra_special_tokens"] = others
    with replacing(folder / "tokenizer.json") as file:
        file.write(data)
    with replacing(folder / "tokenizer_config.json") as file:
        file.write(json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")
    if {MESSAGE_START, MESSAGE_END} <= set(specials):
        with replacing(folder / "chat_template.jinja") as file:
            file.write(CHAT_TEMPLATE.encode())
    return TokenizerFiles(str(folder), content_id(data), tokenizer.get_vocab_size())


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """Ids of each text, in order. Text that spells a special token is encoded as plain text, so a document cannot end
    itself or open a message."""
    previous = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        iterator = iter(texts)
        while batch := list(islice(iterator, _BATCH)):
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield encoding.ids
    finally:
        tokenizer.encode_special_tokens = previous


def measure_tokenizer(tokenizer: Tokenizer, texts: Iterable[str]) -> TokenizerMeasure:
    """Documents, bytes and tokens of texts, without special tokens."""
    documents = size = tokens = 0

    def counted() -> Iterator[str]:
        nonlocal documents, size
        for text in texts:
            documents += 1
            size += len(text.encode())
            yield text

    for ids in encode_documents(tokenizer, counted()):
        tokens += len(ids)
    return TokenizerMeasure(documents, size, tokens)
