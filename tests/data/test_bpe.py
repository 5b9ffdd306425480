"""BPE training: a small reference trainer, the folder read by transformers, and text that spells special tokens."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from pyengine.data.bpe import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    encode_documents,
    measure_tokenizer,
    save_tokenizer,
    train_bpe,
)
from pyengine.errors import ArgumentError
from pyengine.ledger import content_id

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog; the dog sleeps, the fox runs.",
    "2024 was a year with 366 days, and 1999 had 365.",
    "Grüße aus Köln, 東京 and naïve café.",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 330)


def reference_merges(words: Counter[tuple[str, ...]], order: dict[str, int], count: int) -> list[tuple[str, str]]:
    """Textbook BPE: the most frequent pair first; of equals the one with the smaller ids."""
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        best = min(pairs, key=lambda pair: (-pairs[pair], order[pair[0]], order[pair[1]]))
        if pairs[best] < 2:
            break
        merges.append(best)
        order.setdefault("".join(best), len(order))
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            out: list[str] = []
            at = 0
            while at < len(word):
                if word[at : at + 2] == best:
                    out.append("".join(best))
                    at += 2
                else:
                    out.append(word[at])
                    at += 1
            merged[tuple(out)] += times
        words = merged
    return merges


def test_merges_are_those_of_a_plain_trainer(tokenizer: Tokenizer) -> None:
    splitter = tokenizer.pre_tokenizer
    words = Counter(tuple(word) for text in TEXTS for word, _ in splitter.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    order = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    expected = reference_merges(words, order, 330 - 256 - 3)
    assert merges == expected
    assert model["vocab"] == order


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = encode_documents(tokenizer, [text])
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_come_first_and_text_cannot_spell_them(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    text = "a<|endoftext|>b<|im_start|>"
    (ids,) = encode_documents(tokenizer, [text])
    assert min(ids) > 2
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert 0 in tokenizer.encode(text).ids


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    trained = train_bpe(["2024 2024 2024"] * 10, 300)
    assert [trained.id_to_token(token) for token in trained.encode("2024").ids] == list("2024")


def test_training_is_the_same_in_any_process() -> None:
    code = "import json, sys; from pyengine.data.bpe import train_bpe; "
    code += "print(train_bpe(json.load(sys.stdin), 330).to_str())"
    outputs = set()
    for threads in ("1", "2"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", code]
        result = subprocess.run(
            command, input=json.dumps(TEXTS), capture_output=True, text=True, check=True, env=environment
        )
        outputs.add(result.stdout)
    assert len(outputs) == 1


def test_folder_is_what_transformers_reads(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    files = save_tokenizer(tokenizer, tmp_path / "t", max_length=512)
    assert files.content_id == content_id(tmp_path / "t" / "tokenizer.json")
    assert files.vocab_size == 330
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "t"))
    text = TEXTS[3]
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert (loaded.eos_token, loaded.bos_token, loaded.model_max_length) == ("<|endoftext|>", "<|endoftext|>", 512)
    assert {"<|im_start|>", "<|im_end|>"} <= set(loaded.all_special_tokens)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    assert loaded.apply_chat_template(messages, tokenize=False) == expected
    prompt = loaded.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert jinja2.Template(CHAT_TEMPLATE).render(messages=messages) == expected


def test_measure(tokenizer: Tokenizer) -> None:
    measure = measure_tokenizer(tokenizer, iter(TEXTS))
    assert measure.documents == len(TEXTS)
    assert measure.bytes == sum(len(text.encode()) for text in TEXTS)
    assert measure.tokens == sum(len(tokenizer.encode(text).ids) for text in TEXTS)
    assert measure.bytes_per_token == measure.bytes / measure.tokens
    assert measure.bytes_per_token > 1.2


def test_fewer_pairs_than_asked_and_bad_arguments() -> None:
    assert train_bpe(["aa aa"], 10_000).get_vocab_size() < 300
    with pytest.raises(ArgumentError, match="vocab_size: expected at least 259"):
        train_bpe(TEXTS, 258)
    with pytest.raises(ArgumentError, match="special_tokens"):
        train_bpe(TEXTS, 400, special_tokens=["a", "a"])
