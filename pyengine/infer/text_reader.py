"""`TextReader`: what a model says about texts that are there: scores, logits, hidden states, embeddings, labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf

import numpy as np

from pyengine import _C
from pyengine.errors import ArgumentError, BackendUnavailable
from pyengine.infer.adapters import AdapterTable
from pyengine.infer.classifier import Classifier
from pyengine.infer.driver import Driver
from pyengine.infer.embed import embedding, pooled_readings
from pyengine.infer.loader import LoadedModel
from pyengine.infer.outputs import Classification, Score
from pyengine.infer.prompts import Prompt, PromptEncoder, prompt_list
from pyengine.infer.reading import Float32, HiddenReading, LogitsReading, PooledReading, Pooling, TargetReading
from pyengine.infer.score import score_readings
from pyengine.spec import ModelSpec
from pyengine.tokenizer import Tokenizer

AdapterNames = str | SequenceOf[str | None] | None


class TextReader:
    """The part of `LLM` that draws no tokens. Texts are packed into full native steps, with the bits of each alone.

    An embedding model, or a classifier, has these methods only: those that need a head for text raise
    BackendUnavailable.
    """

    _loaded: LoadedModel
    _prompts: PromptEncoder
    _driver: Driver
    _adapters: AdapterTable

    @property
    def spec(self) -> ModelSpec:
        return self._loaded.spec

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def max_context(self) -> int:
        return self._loaded.max_context

    def score(
        self,
        prompts: SequenceOf[Prompt],
        completions: SequenceOf[Prompt],
        *,
        priority: int = 0,
        cache_salt: str = "",
        adapter: AdapterNames = None,
    ) -> list[Score]:
        """Log-probability of every token of each completion after its prompt; the same bits as in generation.

        Pairs are packed into full native steps; what completions side by side share of a prompt is computed once. Text
        is encoded in two parts, prompt and completion. An empty prompt becomes the model's bos token; without one, the
        first token of the completion cannot be scored: ArgumentError.
        """
        readings = self._score_readings(prompts, completions, priority=priority, cache_salt=cache_salt, adapter=adapter)
        return [reading.score() for reading in self._driver.read(readings)]

    def score_stream(
        self,
        pairs: Iterable[tuple[Prompt, Prompt]],
        *,
        priority: int = 0,
        cache_salt: str = "",
        adapter: str | None = None,
    ) -> Iterator[Score]:
        """The same for any number of pairs (prompt, completion), which are taken as their turn comes.

        An error of a pair comes behind the scores of those before it. Closing the iterator cancels what is under way.
        """
        self._check_lm_head()
        adapters = itertools.repeat(self._adapters.get(adapter))
        readings = score_readings(self._prompts, pairs, adapters, priority=priority, cache_salt=cache_salt)
        return (reading.score() for reading in self._driver.read(readings))

    def _score_readings(
        self,
        prompts: SequenceOf[Prompt],
        completions: SequenceOf[Prompt],
        *,
        priority: int,
        cache_salt: str,
        adapter: AdapterNames,
    ) -> list[TargetReading]:
        if len(prompts) != len(completions):
            raise ArgumentError(f"completions: expected {len(prompts)}, one per prompt, got {len(completions)}")
        self._check_lm_head()
        pairs = zip(prompts, completions, strict=True)
        adapters = self._adapters_of(adapter, len(prompts))
        return list(score_readings(self._prompts, pairs, adapters, priority=priority, cache_salt=cache_salt))

    def logits(self, token_ids: SequenceOf[int], *, adapter: str | None = None) -> np.ndarray:
        """Logits after each token of one sequence: float32 [len(token_ids), vocab_size]."""
        self._check_lm_head()
        ids = self._prompts.encode(token_ids, "token_ids")
        self._prompts.check_length(len(ids), "token_ids")
        (reading,) = self._driver.read([LogitsReading(token_ids=ids, first=0, adapter=self._adapters.get(adapter))])
        return np.concatenate([np.empty((0, self.spec.vocab_size), np.float32), *reading.logits])

    def embed(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        priority: int = 0,
        cache_salt: str = "",
        adapter: AdapterNames = None,
    ) -> Float32:
        """One vector for each text, of the hidden states after the last norm: float32 [len(prompts), hidden_size].

        Args:
            pooling: the state of the "last" token, which has seen the whole text, of the "first", or the "mean".
            normalize: to length 1.
        """
        readings = self._embed_readings(
            prompts, pooling=pooling, priority=priority, cache_salt=cache_salt, adapter=adapter
        )
        return self._embeddings(self._driver.read(readings), normalize)

    def embed_stream(
        self,
        prompts: Iterable[Prompt],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        priority: int = 0,
        cache_salt: str = "",
        adapter: str | None = None,
    ) -> Iterator[Float32]:
        """The same for any number of texts, one by one, as `score_stream` does: float32 [hidden_size] each."""
        adapters = itertools.repeat(self._adapters.get(adapter))
        readings = pooled_readings(
            self._prompts, prompts, adapters, pooling=pooling, priority=priority, cache_salt=cache_salt
        )
        return (self._embedding(reading, normalize) for reading in self._driver.read(readings))

    def _embed_readings(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        *,
        pooling: Pooling,
        priority: int,
        cache_salt: str,
        adapter: AdapterNames,
        classifier: Classifier | None = None,
    ) -> list[PooledReading]:
        texts = prompt_list(prompts)
        adapters = self._adapters_of(adapter, len(texts))
        return list(
            pooled_readings(
                self._prompts,
                texts,
                adapters,
                pooling=pooling,
                priority=priority,
                cache_salt=cache_salt,
                classifier=classifier,
            )
        )

    def _embeddings(self, readings: Iterable[PooledReading], normalize: bool) -> Float32:
        vectors = [self._embedding(reading, normalize) for reading in readings]
        return np.stack(vectors) if vectors else np.empty((0, self.spec.hidden_size), np.float32)

    def _embedding(self, reading: PooledReading, normalize: bool) -> Float32:
        return embedding(reading.pooled(), scale=self.spec.logits_divisor, normalize=normalize)

    def hidden_states(self, token_ids: SequenceOf[int], *, adapter: str | None = None) -> Float32:
        """State of each token of one sequence after the last norm: float32 [len(token_ids), hidden_size]."""
        ids = self._prompts.encode(token_ids, "token_ids")
        self._prompts.check_length(len(ids), "token_ids")
        (reading,) = self._driver.read([HiddenReading(token_ids=ids, first=0, adapter=self._adapters.get(adapter))])
        states = np.concatenate([np.empty((0, self.spec.hidden_size), np.float32), *reading.states])
        return states * np.float32(self.spec.logits_divisor)

    def classify(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        *,
        priority: int = 0,
        cache_salt: str = "",
        adapter: AdapterNames = None,
    ) -> list[Classification]:
        """What the classifier of a model for sequence classification says about each text."""
        readings = self._classify_readings(prompts, priority=priority, cache_salt=cache_salt, adapter=adapter)
        return self._classifications(self._driver.read(readings))

    def _classify_readings(
        self, prompts: Prompt | SequenceOf[Prompt], *, priority: int, cache_salt: str, adapter: AdapterNames
    ) -> list[PooledReading]:
        return self._embed_readings(
            prompts,
            pooling="last",
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
            classifier=self._classifier,
        )

    def _classifications(self, readings: Iterable[PooledReading]) -> list[Classification]:
        classifier, scale = self._classifier, self.spec.logits_divisor
        return [classifier.classify(reading.pooled() * scale) for reading in readings]

    def reward(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        *,
        priority: int = 0,
        cache_salt: str = "",
        adapter: AdapterNames = None,
    ) -> list[float]:
        """The one logit of a reward model for each text; for a conversation pass `chat_prompt` of it."""
        if len(self._classifier.labels) != 1:
            raise ArgumentError(f"reward: expected a model with one label, got {len(self._classifier.labels)}")
        results = self.classify(prompts, priority=priority, cache_salt=cache_salt, adapter=adapter)
        return [result.logits[0] for result in results]

    def _adapters_of(self, adapter: AdapterNames, num_prompts: int) -> list[_C.Adapter | None]:
        """The adapter of each prompt."""
        if isinstance(adapter, str) or not isinstance(adapter, SequenceOf):
            return [self._adapters.get(adapter)] * num_prompts
        if len(adapter) != num_prompts:
            raise ArgumentError(f"adapter: expected one, or {num_prompts}, one per prompt, got {len(adapter)}")
        return [self._adapters.get(name, f"adapter[{i}]") for i, name in enumerate(adapter)]

    @property
    def _classifier(self) -> Classifier:
        if self._loaded.classifier is None:
            raise BackendUnavailable(f"{self._loaded.path}: the model has no classifier; use embed, score or generate")
        return self._loaded.classifier

    def _check_lm_head(self) -> None:
        if not self._loaded.has_lm_head:
            raise BackendUnavailable(
                f"{self._loaded.path}: the model has no language-model head; use embed or classify"
            )
