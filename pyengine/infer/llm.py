"""`LLM`: generate and chat with one model on the native engine. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any, Literal, overload

from pyengine import _C
from pyengine.errors import ArgumentError, BackendUnavailable
from pyengine.infer.adapters import AdapterInfo, AdapterTable
from pyengine.infer.beam_search import BeamSearchParams, beam_search
from pyengine.infer.draft import DraftProposer, load_draft
from pyengine.infer.driver import Driver
from pyengine.infer.engine_lock import EngineLock
from pyengine.infer.explain import Explanation, explain
from pyengine.infer.grammar import GrammarCompiler
from pyengine.infer.loader import EngineOptions, LoadedModel, load_model
from pyengine.infer.outputs import Completion, TextPiece
from pyengine.infer.prompts import Prompt, PromptEncoder, prompt_list
from pyengine.infer.runner import Runner
from pyengine.infer.sample_state import encode_bad_words
from pyengine.infer.sampling_params import SamplingParams
from pyengine.infer.scheduler import Scheduler, check_priority, check_salt
from pyengine.infer.score import prompt_logprobs
from pyengine.infer.sequence import KeptPages, Sequence
from pyengine.infer.speculation import DraftModel, Speculation, parse_speculation
from pyengine.infer.speculation_control import SpeculationControl
from pyengine.infer.speculator import LookupProposer, Proposer, Speculator
from pyengine.infer.text_reader import AdapterNames, TextReader
from pyengine.tokenizer import ChatTemplate


class LLM(TextReader):
    """A model ready to generate, from a GGUF file or a Hugging Face folder.

    Args:
        model: path of a .gguf file, or of a folder with config.json, tokenizer.json and model.safetensors.
        weights: format in memory: "auto" keeps the file's, each matrix in its own, float16 as float32; "float32",
            "bfloat16", "q8_0", "q6_k", "q5_1", "q5_k", "q5_0", "q4_1", "q4_k", "q4_0", "iq4_nl" convert.
        mode: "exact" computes with float activations. "bf16" and "fast" round those that enter a product with weights
            in blocks, to bfloat16 or to int8 per 32 values; attention over a bfloat16 cache rounds its queries then.
            "auto" is "exact".
        threads: size of the native thread pool of this process; None keeps it.
        max_context: most tokens of one sequence; None takes the model's, at most 8192. What is given here chooses the
            factors of LongRoPE, else the model's own.
        cache_tokens: tokens that the key/value cache holds over all sequences; None takes max_context.
        kv_dtype: "float32", "bfloat16" or "int8" keys and values; "auto" is the dtype of the activations, and bfloat16
            in the modes that round. int8 has one scale per token and head, and holds 3.8 times the tokens of float32
            in the same memory.
        page_size: tokens of a page of the cache: 16, 32, 64, 128 or 256.
        max_batch_tokens: most tokens of one native step.
        prefix_cache: start a prompt behind the full pages that the cache still holds of it. Changes no bit of a result,
            only its time; requests with different `cache_salt` share nothing.
        speculation: propose several tokens per step and keep those that the model draws itself: "prompt_lookup" or a
            PromptLookup takes them from the prompt and the answer, a DraftModel from a smaller model. Changes no bit of
            a result either; it is off where it does not pay.

    `priority` of a request: higher goes first, and takes memory from lower. `cache_salt`: who may notice by the time
    that a prompt takes that another one began alike: give each tenant a salt of its own. `adapter`: the name of
    a loaded adapter to compute it with.

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
        speculation: Literal["prompt_lookup"] | Speculation | None = None,
    ) -> None:
        chosen = parse_speculation(speculation)
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
        self._runner = Runner(self._loaded.decoder, self._loaded.spec.vocab_size, self._loaded.spec.hidden_size)
        self._prefix_cache = prefix_cache
        self._speculator = None if chosen is None else _make_speculator(chosen, self._loaded)
        self._scheduler = Scheduler(self._runner, prefix_cache=prefix_cache, speculator=self._speculator)
        self._grammars = GrammarCompiler(self.tokenizer, self.spec.vocab_size, self.spec.eos_token_ids)
        self._prompts = PromptEncoder(self.tokenizer, self.spec, self.max_context)
        self._lock = EngineLock()
        self._adapters = AdapterTable(self._loaded)
        self._driver = Driver(self._scheduler, self._lock, self._runner.max_tokens)

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], **options: Any) -> LLM:
        """Same as LLM(model, **options)."""
        return cls(model, **options)

    @property
    def chat_template(self) -> ChatTemplate:
        """Raises BackendUnavailable if the model comes without one."""
        if self._loaded.chat_template is None:
            raise BackendUnavailable(f"{self._loaded.path}: the model has no chat template; use generate")
        return self._loaded.chat_template

    # --- adapters -----------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        """Read a low-rank adapter in the format of PEFT, a folder, and serve it under `name`. Others run meanwhile.

        Raises ModelFileError for files that are broken or do not fit the model, ArgumentError for a name in use,
        CapacityError where no adapter more has room, BackendUnavailable for a family whose adapters are not computed.
        """
        return self._adapters.load(name, path)

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter. Requests under way end with it, and its memory goes with the last of them; new requests
        cannot name it, and nothing that the cache holds of it serves another that is loaded by this name."""
        self._adapters.drop(name)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name."""
        return self._adapters.infos()

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        adapter: AdapterNames = None,
    ) -> list[Completion]:
        """Complete each prompt; prompts run together, and each gets the same bits as alone.

        A prompt is text or token ids. `params` and `adapter` are one for all, or one per prompt. Returns completions in
        order, the n of a prompt side by side.
        """
        groups = self._start(
            prompt_list(prompts), params, stream=False, priority=priority, cache_salt=cache_salt, adapter=adapter
        )
        self._driver.run([sequence for group in groups for sequence in group])
        return [completion for group in groups for completion in best_of(group)]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        adapter: str | None = None,
    ) -> Iterator[TextPiece]:
        """Complete one prompt piece by piece. Closing the iterator cancels the request.

        The pieces of n completions come mixed; `index` tells which one a piece belongs to.
        """
        if params is not None and params.best_of is not None:
            raise ArgumentError(f"best_of: expected None for a stream, got {params.best_of}")
        (sequences,) = self._start(
            [prompt], params, stream=True, priority=priority, cache_salt=cache_salt, adapter=adapter
        )
        return self._driver.stream(sequences)

    @overload
    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        params: SamplingParams | None = ...,
        *,
        stream: Literal[False] = ...,
        adapter: str | None = ...,
        **variables: Any,
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        params: SamplingParams | None = ...,
        *,
        stream: Literal[True],
        adapter: str | None = ...,
        **variables: Any,
    ) -> Iterator[TextPiece]: ...
    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        adapter: str | None = None,
        **variables: Any,
    ) -> Completion | Iterator[TextPiece]:
        """Answer a conversation, a list of {"role", "content"}, by the model's chat template; the first answer of n.

        `variables` go to the template (tools, documents, enable_thinking, ...).
        """
        prompt = self.chat_prompt(messages, **variables)
        if stream:
            return self.stream(prompt, params, adapter=adapter)
        return self.generate([prompt], params, adapter=adapter)[0]

    def chat_prompt(self, messages: SequenceOf[Mapping[str, Any]], **variables: Any) -> list[int]:
        """The token ids that a conversation becomes, with the prompt for the assistant's turn."""
        text = self.chat_template.render(messages, add_generation_prompt=True, **variables)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def beam_search(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        params: BeamSearchParams | None = None,
        *,
        adapter: AdapterNames = None,
    ) -> list[Completion]:
        """The likeliest completions of each prompt, `beam_width` side by side, best first; `index` is the rank.

        A beam goes on from the pages of the one that it came from: a step computes one token of each.
        """
        options = params or BeamSearchParams()
        items = prompt_list(prompts)
        adapters = self._adapters_of(adapter, len(items))
        return [
            completion
            for position, prompt in enumerate(items)
            for completion in self._search(
                self._prompt_ids(prompt, f"prompts[{position}]"), options, adapters[position]
            )
        ]

    def _search(self, prompt_ids: list[int], params: BeamSearchParams, adapter: _C.Adapter | None) -> list[Completion]:
        end = () if params.ignore_eos else self.spec.eos_token_ids
        num_logprobs = min(params.num_candidates(len(end)), self.spec.vocab_size)
        params = replace(params, max_tokens=min(params.max_tokens, self.max_context - len(prompt_ids)))
        one = SamplingParams(max_tokens=1, ignore_eos=True)
        # Pages of the beams of the last step, by their tokens.
        kept: dict[tuple[int, ...], KeptPages] = {}

        def next_logprobs(beams: list[list[int]]) -> list[dict[int, float]]:
            nonlocal kept
            sequences = [
                Sequence.start(prompt_ids + ids, one, self.tokenizer, self.spec, index=0, stream=False) for ids in beams
            ]
            for ids, sequence in zip(beams, sequences, strict=True):
                sequence.num_logprobs, sequence.adapter = num_logprobs, adapter
                sequence.origin, sequence.kept = kept.get(tuple(ids[:-1])), KeptPages()
            try:
                self._driver.run(sequences)
            finally:
                self._driver.drop(kept.values())
                kept = {tuple(ids): s.kept for ids, s in zip(beams, sequences, strict=True) if s.kept is not None}
            return [sequence.logprobs[0].top for sequence in sequences]

        try:
            beams = beam_search(next_logprobs, end, params)
        finally:
            self._driver.drop(kept.values())
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
            for rank, beam in enumerate(beams)
        ]

    def explain(self) -> Explanation:
        """What was chosen and why: ISA level, formats, bytes per token, and where the time of past steps went."""
        stats = self._scheduler.stats if self._prefix_cache else None
        return explain(self._loaded, stats, self._speculator, self._adapters.infos().values())

    # --- shared -------------------------------------------------------------------------------------------------------

    def _start(
        self,
        prompts: list[Prompt],
        params: SamplingParams | SequenceOf[SamplingParams] | None,
        *,
        stream: bool,
        priority: int = 0,
        cache_salt: str = "",
        adapter: AdapterNames = None,
    ) -> list[list[Sequence]]:
        """The sequences of each prompt, checked; none runs yet."""
        check_priority(priority)
        check_salt(cache_salt)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ArgumentError(f"params: expected one, or {len(prompts)}, one per prompt, got {len(params)}")
        adapters = self._adapters_of(adapter, len(prompts))
        return [
            self._start_prompt(position, prompt, each, stream, priority, cache_salt, its_adapter)
            for position, (prompt, each, its_adapter) in enumerate(zip(prompts, params, adapters, strict=True))
        ]

    def _start_prompt(
        self,
        position: int,
        prompt: Prompt,
        params: SamplingParams,
        stream: bool,
        priority: int,
        cache_salt: str,
        adapter: _C.Adapter | None,
    ) -> list[Sequence]:
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
        for sequence in sequences:
            sequence.priority, sequence.cache_salt, sequence.adapter = priority, cache_salt, adapter
        if params.prompt_logprobs is not None:
            num_top = params.prompt_logprobs
            logprobs = prompt_logprobs(
                self._driver, ids, num_top, priority=priority, cache_salt=cache_salt, adapter=adapter
            )
            for sequence in sequences:
                sequence.prompt_logprobs = logprobs
        return sequences

    def _prompt_ids(self, prompt: Prompt, name: str) -> list[int]:
        """The tokens of a prompt that leaves room for an answer; at least one."""
        self._check_lm_head()
        ids = self._prompts.encode_some(prompt, name)
        self._prompts.check_length(len(ids) + 1, name, "tokens with the answer")
        return ids


def _make_speculator(speculation: Speculation, target: LoadedModel) -> Speculator:
    proposer: Proposer
    if isinstance(speculation, DraftModel):
        draft = load_draft(speculation, target)
        proposer = DraftProposer(draft)
        # Until it is measured: a step takes the time to read the weights.
        control = SpeculationControl(draft.model.bytes_per_token / target.model.bytes_per_token)
    else:
        proposer, control = LookupProposer(speculation), SpeculationControl()
    return Speculator(speculation, proposer, control)


def best_of(sequences: list[Sequence]) -> list[Completion]:
    """The completions of one prompt that its caller gets."""
    params = sequences[0].params
    if params.best_of is not None:
        # Stable: of equals, the first drawn.
        sequences = sorted(sequences, key=lambda sequence: -sequence.rank_by(params.best_of_by))[: params.n]
    return [sequence.completion() for sequence in sequences]
