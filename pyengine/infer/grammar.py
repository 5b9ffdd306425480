"""Masks of the tokens that a grammar allows next, by llguidance (an optional dependency)."""

from __future__ import annotations

import importlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError, BackendUnavailable
from pyengine.infer.structured_outputs import StructuredOutputs
from pyengine.tokenizer import Tokenizer
from pyengine.tokenizer.worker_process import WorkerProcess, frame

Int32 = npt.NDArray[np.int32]

MAX_CACHED_GRAMMARS = 64


@dataclass(frozen=True, kw_only=True)
class GrammarLimits:
    """What the compilation of one grammar may cost, beside the steps that llguidance itself bounds.

    Wall time is the net under CPU time.
    """

    memory_bytes: int = 1 << 30
    cpu_seconds: int = 2
    wall_seconds: float = 30.0


class StructuredOutputError(ArgumentError):
    """A grammar cannot be used.

    reason: "syntax" (or a part that cannot be enforced), "complexity" (too many steps), or the limit that its
    compilation met: "memory", "time", "crash".
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        self.message = message
        super().__init__(f"structured_outputs: {reason}: {message}")


class Grammar:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: Any, plain: Int32 | None, end: Int32) -> None:
        """`plain`: masks of the tokens that are text, `end` of those that end a text; None lets special tokens in."""
        self._matcher = matcher
        self._plain = plain
        self._end = end

    def mask(self) -> Int32:
        """Tokens that may come next, as bits; all 0 after an error."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: len(self._end)]
        if self._matcher.is_error():
            return np.zeros_like(self._end)
        if self._plain is None:
            return words
        # Text that must come is written with the tokens of its encoding, where a special token may stand for its name.
        words = words & self._plain
        return words | self._end if self._matcher.is_accepting() else words

    def masks(self, token_ids: SequenceOf[int]) -> Int32:
        """[1 + n, words]: the masks now and after each of the first n tokens, all that it lets through and goes on
        behind."""
        ahead = Grammar(self._matcher.deep_copy(), self._plain, self._end)
        masks = [ahead.mask().copy()]
        for token in token_ids:
            if not masks[-1][token // 32] >> (token % 32) & 1 or ahead.accept(token):
                break
            mask = ahead.mask().copy()
            if ahead.error() is not None:
                break
            masks.append(mask)
        return np.stack(masks)

    def accept(self, token_id: int) -> bool:
        """Go on by a token; True when nothing can follow."""
        self._matcher.consume_token(token_id)
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def error(self) -> StructuredOutputError | None:
        """Why it has stopped working, if it has."""
        if not self._matcher.is_error():
            return None
        return StructuredOutputError("complexity", str(self._matcher.get_error())[:2000])


class GrammarCompiler:
    """Grammars for one model. Compiles in a worker process first, and here only what has passed there.

    Safe to use from several threads.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...], limits: GrammarLimits | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._limits = limits or GrammarLimits()
        special = [token for token in tokenizer.special_ids if token < vocab_size]
        self._plain = ~_bits(special, vocab_size)
        self._end = _bits(eos_token_ids, vocab_size)
        self._lock = threading.Lock()  # of the grammars that are kept, which wait for no compilation
        self._compile_lock = threading.Lock()
        self._worker: _GrammarProcess | None = None
        self._library: Any = None
        self._ll_tokenizer: Any = None
        self._compiled: OrderedDict[StructuredOutputs, Any] = OrderedDict()

    def compile(self, structured_outputs: StructuredOutputs) -> Grammar:
        """Raises StructuredOutputError for a grammar that is wrong or costs too much, BackendUnavailable without
        llguidance."""
        with self._lock:
            matcher = self._compiled.get(structured_outputs)
        if matcher is None:
            with self._compile_lock:
                self._prepare()
                matcher = self._compile(self._source(structured_outputs))
        with self._lock:
            self._compiled[structured_outputs] = matcher
            self._compiled.move_to_end(structured_outputs)
            if len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
            plain = self._plain if structured_outputs.grammar is None else None
            return Grammar(matcher.deep_copy(), plain, self._end)

    def close(self) -> None:
        """Ends the worker process. It starts again when needed."""
        if self._worker is not None:
            self._worker.close()

    def _source(self, outputs: StructuredOutputs) -> str:
        """The grammar in the JSON form of llguidance; only rewrites text."""
        library = self._library.LLMatcher
        if outputs.regex is not None:
            return str(library.grammar_from_regex(outputs.regex))
        if outputs.choice is not None:
            texts = (json.dumps(text, ensure_ascii=False) for text in outputs.choice)
            return str(library.grammar_from_lark("start: " + " | ".join(texts)))
        if outputs.grammar is not None:
            return str(library.grammar_from_lark(outputs.grammar))
        # The option of the schema itself could turn parts that cannot be enforced into parts that are ignored.
        schema = {"type": "object"} if outputs.json_object else json.loads(str(outputs.json))
        schema["x-guidance"] = {"whitespace_flexible": not outputs.disable_any_whitespace}
        return json.dumps({"grammars": [{"json_schema": schema}]}, ensure_ascii=False)

    def _compile(self, source: str) -> Any:
        assert self._worker is not None
        reply = self._worker.check(source)
        if "text" not in reply:
            raise StructuredOutputError(reply["reason"], reply["message"])
        matcher = self._library.LLMatcher(self._ll_tokenizer, source, log_level=0)
        if matcher.is_error():
            raise StructuredOutputError("syntax", str(matcher.get_error())[:2000])
        # Its copies share what the first mask finds out.
        matcher.compute_bitmask()
        return matcher

    def _prepare(self) -> None:
        if self._worker is not None:
            return
        try:
            self._library = importlib.import_module("llguidance")
        except ImportError as error:
            raise BackendUnavailable(
                "structured_outputs: expected the package llguidance, got none; pip install 'pyengine[structured]'"
            ) from error
        if not self._eos_token_ids:
            raise ArgumentError("structured_outputs: expected a model with an end token, got none")
        description = self._tokenizer.to_json()
        worker = _GrammarProcess(description, self._vocab_size, self._eos_token_ids, self._limits)
        reply = worker.start()
        if "text" not in reply:
            raise BackendUnavailable(f"structured_outputs: llguidance cannot read the tokenizer: {reply['message']}")
        self._ll_tokenizer = self._library.LLTokenizer(
            description, n_vocab=self._vocab_size, eos_token=self._eos_token_ids
        )
        self._worker = worker


def _bits(token_ids: Iterable[int], vocab_size: int) -> Int32:
    """Token i is bit i % 32 of word i / 32."""
    words = np.zeros(-(-vocab_size // 32), np.uint32)
    for token in token_ids:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.view(np.int32)


class _GrammarProcess(WorkerProcess):
    """The parent's side of `grammar_worker`."""

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: list[int], limits: GrammarLimits) -> None:
        super().__init__(
            "structured_outputs",
            Path(__file__).with_name("grammar_worker.py"),
            "llguidance",
            [limits.memory_bytes, limits.cpu_seconds],
            memory_bytes=limits.memory_bytes,
            cpu_seconds=limits.cpu_seconds,
            wall_seconds=limits.wall_seconds,
            # Its threads would reserve more address space than the limit.
            environment={"RAYON_NUM_THREADS": "1"},
        )
        request = {"tokenizer": tokenizer, "vocab_size": vocab_size, "eos_token_ids": eos_token_ids}
        self._first = frame(request, "tokenizer", 512 << 20)

    def start(self) -> dict[str, Any]:
        with self._locked():
            return self._start(self._first)

    def check(self, source: str) -> dict[str, Any]:
        """The reply to a grammar. A process that dies is replaced at the next call."""
        request = frame({"grammar": source}, "structured_outputs", 4 << 20)
        with self._locked():
            if self._child is None and "text" not in (reply := self._start(self._first)):
                return reply
            return self._ask(request)
