"""`Classifier`: the head of a model that transformers calls ForSequenceClassification."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import ModelFileError
from pyengine.families import load_config
from pyengine.infer.outputs import Classification
from pyengine.jsonfile import file_error
from pyengine.spec import ModelSpec

CLASSIFIER_WEIGHT = "score.weight"
MAX_LABELS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """One logit per label of the hidden state of the last token of a text, padding left out."""

    weight: npt.NDArray[np.float64]
    """[num_labels, C]"""
    labels: tuple[str, ...]
    pad_token_id: int | None

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str], weight: npt.NDArray[Any], spec: ModelSpec) -> Classifier:
        """Labels are those of config.json, `LABEL_0` and so on where it has none. Raises ModelFileError."""
        num_labels = weight.shape[0] if weight.ndim == 2 else 0
        if weight.shape != (num_labels, spec.hidden_size) or not 1 <= num_labels <= MAX_LABELS:
            expected = f"a shape of 1 to {MAX_LABELS} labels by {spec.hidden_size}"
            raise ModelFileError(os.fspath(path), None, CLASSIFIER_WEIGHT, f"expected {expected}, got {weight.shape}")
        config = load_config(path)
        names = config.get("id2label")
        if names is None:
            names = {str(i): f"LABEL_{i}" for i in range(num_labels)}
        ids = [str(i) for i in range(num_labels)]
        if not isinstance(names, dict) or set(names) != set(ids) or not all(isinstance(names[i], str) for i in ids):
            message = f"expected a name for each of 0 to {num_labels - 1}, got {names!r:.80}"
            raise file_error(Path(path) / "config.json", message, field="id2label")
        if len(set(names.values())) != num_labels:
            raise file_error(
                Path(path) / "config.json", f"expected names that differ, got {names!r:.80}", field="id2label"
            )
        pad_token_id = config.get("pad_token_id")
        return cls(
            weight=weight.astype(np.float64),
            labels=tuple(names[i] for i in ids),
            pad_token_id=pad_token_id if isinstance(pad_token_id, int) else None,
        )

    def without_padding(self, token_ids: list[int]) -> list[int]:
        """The tokens up to the last one that is no padding; the first alone where all are."""
        length = len(token_ids)
        while length > 1 and token_ids[length - 1] == self.pad_token_id:
            length -= 1
        return token_ids[:length]

    def classify(self, state: npt.NDArray[np.float64]) -> Classification:
        """state [C]."""
        return Classification(self.labels, (self.weight * state).sum(-1).astype(np.float32).tolist())
