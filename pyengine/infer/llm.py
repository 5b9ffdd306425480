"""`LLM`: generate, chat and score with one model on the native engine. Never imports torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any, Literal, overload

import numpy as np

from pyengine import _C
from pyengine.errors import ArgumentError, BackendUnavailable
from pyengine.infer.beam_search import BeamSearchParams, beam_search
from pyengine.infer.engine_lock import EngineLock
from pyengine.infer.explain import Explanation, explain
from pyengine.infer.grammar import GrammarCompiler
from pyengine.infer.loader import EngineOptions, LoadedModel, load_model
from pyengine.infer.outputs import Completion, Score, TextPiece
from pyengine.infer.runner import Runner
from pyengine.infer.sample_state import encode_bad_words
from pyengine.infer.sampling_params import SamplingParams
from pyengine.infer.scheduler import Scheduler, check_priority, check_salt
from pyengine.infer.sequence import Sequence
from pyengine.spec import ModelSpec
from pyengine.tokenizer import ChatTemplate, Tokenizer

Prompt = str | SequenceOf[int]


class LLM:
    """A model ready to generate, from a GGUF file or a Hugging Face folder.

    Args:
        model: path of a .gguf file, or of a folder with config.json, tokenizer.json and model.safetensors.
        weights: format in memory: "auto" keeps the file's; "float32", "bfloat16", "q8_0", "q4_1", "q4_0" convert.
        mode: "exact" computes with float activations. Products with weights in blocks may round theirs first: "bf16" to
            bfloat16, "fast" to int8 per 32 values, for integer dot products; attention over a bfloat16 cache rounds
            its queries then. "auto" is "exact".
        threads: size of the native thread pool of this process; None keeps it.
        max_context: most tokens of one sequence; None takes the model's, at most 8192. What is given here chooses the
            factors of LongRoPE, else the model's own.
        cache_tokens: tokens that the key/value cache holds over all sequences; None takes max_context.
        kv_dtype: "float32", "bfloat16" or "int8" keys and values; "auto" is the dtype of the activations, and bfloat16 in
            the modes that round. int8 has one scale per token and head, and holds 3.8 times the tokens of float32 in
            the same memory.
        max_batch_tokens: most tokens of one native step.
        prefix_cache: start a prompt behind the full pages that the cache still holds of it. Changes no bit of a result,
            only its time; requests with different `cache_salt` share nothing.

    `priority` of a request: higher goes first, and takes memory from lower. `cache_salt`: who may notice by the time
    that a prompt takes that another one began alike: give each tenant a salt of its own.

    Safe to call from several threads, and streams may be interleaved: what runs at the same time shares native steps.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        weights: str = "auto",
        mode: str = "auto",
        threads: int | None = None,
        max_context: int | None = None,
        cache_tokens: int | None = None,
        kv_dtype: str = "auto",
        page_size: int = 32,
        max_batch_tokens: int = 512,
        prefix_cache: bool = True,
    ) -> None:
        if threads is not None:
            _C.set_num_threads(threads)
        options = EngineOptions(
            weights=weights,
            mode=mode,
            max_context=max_context,
            cache_tokens=cache_tokens,
            kv_dtype=kv_dtype,
            page_size=page_size,
            max_batch_tokens=max_batch_tokens,
        )
        self._loaded: LoadedModel = load_model(model, options)
        self._runner = Runner(self._loaded.decoder, self._loaded.spec.vocab_size)
        self._prefix_cache = prefix_cache
        self._scheduler = Scheduler(self._runner, prefix_cache=prefix_cache)
        self._grammars = GrammarCompiler(self.tokenizer, self.spec.vocab_size, self.spec.eos_token_ids)
        self._lock = EngineLock()

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], **options: Any) -> LLM:
        """Same as LLM(model, **options)."""
        return cls(model, **options)

    @property
    def spec(self) -> ModelSpec:
        return self._loaded.spec

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """Raises BackendUnavailable if the model comes without one."""
        if self._loaded.chat_template is None:
            raise BackendUnavailable(f"{self._loaded.path}: the model has no chat template; use generate")
        return self._loaded.chat_template

    @property
    def max_context(self) -> int:
        return self._loaded.max_context

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[Completion]:
        """Complete each prompt; prompts run together, and each gets the same bits as alone.

        A prompt is text or token ids. `params` is one for all, or one per prompt. Returns completions in order,
        the n of a prompt side by side.
        """
        groups = self._start(_prompt_list(prompts), params, stream=False, priority=priority, cache_salt=cache_salt)
        self._run([sequence for group in groups for sequence in group])
        return [completion for group in groups for completion in _best(group)]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0, cache_salt: str = ""
    ) -> Iterator[TextPiece]:
        """Complete one prompt piece by piece. Closing the iterator cancels the request.

        The pieces of n completions come mixed; `index` tells which one a piece belongs to.
        """
        if params is not None and params.best_of is not None:
            raise ArgumentError(f"best_of: expected None for a stream, got {params.best_of}")
        (sequences,) = self._start([prompt], params, stream=True, priority=priority, cache_salt=cache_salt)
        return self._stream(sequences)

    @overload
    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        params: SamplingParams | None = ...,
        *,
        stream: Literal[False] = ...,
        **variables: Any,
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        params: SamplingParams | None = ...,
        *,
        stream: Literal[True],
        **variables: Any,
    ) -> Iterator[TextPiece]: ...
    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        **variables: Any,
    ) -> Completion | Iterator[TextPiece]:
        """Answer a conversation, a list of {"role", "content"}, by the model's chat template; the first answer of n.

        `variables` go to the template (tools, documents, enable_thinking, ...).
        """
        prompt = self.chat_prompt(messages, **variables)
        if stream:
            return self.stream(prompt, params)
        return self.generate([prompt], params)[0]

    def chat_prompt(self, messages: SequenceOf[Mapping[str, Any]], **variables: Any) -> list[int]:
        """The token ids that a conversation becomes, with the prompt for the assistant's turn."""
        text = self.chat_template.render(messages, add_generation_prompt=True, **variables)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def beam_search(
        self, prompts: Prompt | SequenceOf[Prompt], params: BeamSearchParams | None = None
    ) -> list[Completion]:
        """The likeliest completions of each prompt, `beam_width` side by side, best first; `index` is the rank.

        Every step computes each beam as a prompt of its own.
        """
        options = params or BeamSearchParams()
        return [
            completion
            for position, prompt in enumerate(_prompt_list(prompts))
            for completion in self._search(self._prompt_ids(prompt, f"prompts[{position}]"), options)
        ]

    def _search(self, prompt_ids: list[int], params: BeamSearchParams) -> list[Completion]:
        end = () if params.ignore_eos else self.spec.eos_token_ids
        num_logprobs = min(params.num_candidates(len(end)), self.spec.vocab_size)

        def next_logprobs(beams: list[list[int]]) -> list[dict[int, float]]:
            one = SamplingParams(max_tokens=1, ignore_eos=True)
            sequences = [
                Sequence.start(prompt_ids + ids, one, self.tokenizer, self.spec, index=0, stream=False) for ids in beams
            ]
            for sequence in sequences:
                sequence.num_logprobs = num_logprobs
            self._run(sequences)
            return [sequence.logprobs[0].top for sequence in sequences]

        params = replace(params, max_tokens=min(params.max_tokens, self.max_context - len(prompt_ids)))
        return [
            Completion(
                prompt_ids,
                beam.token_ids,
                self.tokenizer.decode(beam.token_ids),
                "length" if beam.end_token_id is None else "stop",
                None,
                index=rank,
                cumulative_logprob=beam.logprob,
            )
            for rank, beam in enumerate(beam_search(next_logprobs, end, params))
        ]

    # --- scoring ------------------------------------------------------------------------------------------------------

    def score(
        self, prompts: SequenceOf[Prompt], completions: SequenceOf[Prompt], *, cache_salt: str = ""
    ) -> list[Score]:
        """Log-probability of every token of each completion after its prompt; the same bits as in generation.

        Text is encoded in two parts, prompt and completion. An empty prompt starts from the model's first token (bos or
        eos); without one, the first token of the completion cannot be scored: ArgumentError.
        """
        if len(prompts) != len(completions):
            raise ArgumentError(f"completions: expected {len(prompts)}, one per prompt, got {len(completions)}")
        salt = check_salt(cache_salt) if self._prefix_cache else None
        with self._lock:
            return [self._score(i, p, c, salt) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]

    def _score(self, index: int, prompt: Prompt, completion: Prompt, salt: str | None) -> Score:
        prompt_ids = self._encode(prompt, f"prompts[{index}]")
        ids = self._encode(completion, f"completions[{index}]", add_special_tokens=False)
        if not prompt_ids:
            start = self.spec.bos_token_id
            if start is None:
                raise ArgumentError(
                    f"prompts[{index}]: expected at least one token, got none, and the model has no bos"
                )
            prompt_ids = [start]
        if not ids:
            return Score([], [])
        self._check_length(len(prompt_ids) + len(ids), f"prompts[{index}]")
        inputs = np.array((prompt_ids + ids)[:-1], np.int32)
        targets = np.concatenate([np.zeros(len(prompt_ids) - 1, np.int32), np.array(ids, np.int32)])
        logprobs = self._runner.target_logprobs(inputs, targets, len(prompt_ids) - 1, salt)
        return Score(ids, logprobs.tolist())

    def logits(self, token_ids: SequenceOf[int]) -> np.ndarray:
        """Logits after each token of one sequence: float32 [len(token_ids), vocab_size]."""
        ids = self._encode(token_ids, "token_ids")
        self._check_length(len(ids), "token_ids")
        with self._lock:
            return self._runner.logits(np.array(ids, np.int32))

    def explain(self) -> Explanation:
        """What was chosen and why: ISA level, formats, bytes per token, and where the time of past steps went."""
        return explain(self._loaded, self._scheduler.stats if self._prefix_cache else None)

    # --- shared -------------------------------------------------------------------------------------------------------

    def _run(self, sequences: list[Sequence]) -> None:
        """Steps until all of these sequences have finished. Others that run meanwhile share the steps."""
        with self._submitted(sequences):
            running = sequences
            while running:
                with self._lock:
                    # Another caller's step may have ended the last of them.
                    running = [sequence for sequence in running if not sequence.has_ended]
                    if running:
                        self._scheduler.step()
                for sequence in running:
                    if sequence.failure is not None:
                        raise sequence.failure
            for sequence in sequences:
                if sequence.failure is not None:
                    raise sequence.failure

    def _stream(self, sequences: list[Sequence]) -> Iterator[TextPiece]:
        """The same, piece by piece."""
        with self._submitted(sequences):
            running = sequences
            while running:
                with self._lock:
                    if not any(sequence.inbox or sequence.failure for sequence in running):
                        self._scheduler.step()
                    pieces = [piece for sequence in running for piece in sequence.inbox]
                    for sequence in running:
                        sequence.inbox.clear()
                yield from pieces
                for sequence in running:
                    if sequence.failure is not None:
                        raise sequence.failure
                # Another caller's step may have finished a sequence whose last pieces are still to be taken.
                running = [sequence for sequence in running if sequence.finish_reason is None or sequence.inbox]

    @contextlib.contextmanager
    def _submitted(self, sequences: list[Sequence]) -> Iterator[None]:
        """Queues sequences; takes back what is left of them at the end."""
        with self._lock:
            for sequence in sequences:
                self._scheduler.add(sequence)
        try:
            yield
        finally:
            with self._lock:
                for sequence in sequences:
                    self._scheduler.cancel(sequence)

    def _start(
        self,
        prompts: list[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None,
        *,
        stream: bool,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[list[Sequence]]:
        """The sequences of each prompt, checked; none runs yet."""
        check_priority(priority)
        check_salt(cache_salt)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ArgumentError(f"params: expected one, or {len(prompts)}, one per prompt, got {len(params)}")
        groups = [self._start_prompt(i, p, o, stream) for i, (p, o) in enumerate(zip(prompts, params, strict=True))]
        for group in groups:
            for sequence in group:
                sequence.priority, sequence.cache_salt = priority, cache_salt
        return groups

    def _start_prompt(self, position: int, prompt: Prompt, params: SamplingParams, stream: bool) -> list[Sequence]:
        ids = self._prompt_ids(prompt, f"prompts[{position}]")
        room = self.max_context - len(ids)
        if params.max_tokens > room:
            params = replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
        outputs = params.structured_outputs
        bad_words = encode_bad_words(params.bad_words, self.tokenizer)
        sequences = [
            Sequence.start(
                ids,
                params,
                self.tokenizer,
                self.spec,
                index=index,
                stream=stream,
                bad_words=bad_words,
                grammar=None if outputs is None else self._grammars.compile(outputs),
            )
            for index in range(params.num_drawn)
        ]
        if params.prompt_logprobs is not None:
            with self._lock:
                logprobs = self._runner.prompt_logprobs(np.array(ids, np.int32), params.prompt_logprobs)
            for sequence in sequences:
                sequence.prompt_logprobs = logprobs
        return sequences

    def _prompt_ids(self, prompt: Prompt, name: str) -> list[int]:
        """The tokens of a prompt that leaves room for an answer; at least one."""
        ids = self._encode(prompt, name)
        if not ids:
            start = self.spec.bos_token_id
            if start is None:
                raise ArgumentError(f"{name}: expected at least one token, got none, and the model has no bos token")
            ids = [start]
        self._check_length(len(ids) + 1, name)
        return ids

    def _encode(self, prompt: Prompt, name: str, *, add_special_tokens: bool = True) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        ids = [int(i) for i in prompt]
        for position, token in enumerate(ids):
            if not 0 <= token < self.spec.vocab_size:
                raise ArgumentError(
                    f"{name}: expected token ids from 0 to {self.spec.vocab_size - 1}, got {token} at {position}"
                )
        return ids

    def _check_length(self, num_tokens: int, name: str) -> None:
        if num_tokens > self.max_context:
            raise ArgumentError(f"{name}: expected at most {self.max_context} tokens with the answer, got {num_tokens}")


def _best(sequences: list[Sequence]) -> list[Completion]:
    """The completions of one prompt that its caller gets."""
    params = sequences[0].params
    if params.best_of is not None:
        # Stable: of equals, the first drawn.
        sequences = sorted(sequences, key=lambda sequence: -sequence.rank_by(params.best_of_by))[: params.n]
    return [sequence.completion() for sequence in sequences]


def _prompt_list(prompts: Prompt | SequenceOf[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items: Iterable[Any] = prompts
    out = list(items)
    if out and all(isinstance(item, (int, np.integer)) for item in out):
        return [out]
    return out
