"""Where weights, description and tokenizer come from: a GGUF file or a Hugging Face folder."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError, ModelFileError
from pyengine.families import (
    family_of,
    load_config,
    load_spec,
    read_rope_factors,
    spec_from_gguf,
    stored_rows,
    stored_shapes,
)
from pyengine.formats import GgufReader, SafetensorsReader, open_gguf, open_safetensors
from pyengine.infer.classifier import CLASSIFIER_WEIGHT, Classifier
from pyengine.jsonfile import read_json_object
from pyengine.spec import ModelSpec
from pyengine.tokenizer import ChatTemplate, Tokenizer

MAX_INDEX_BYTES = 64 << 20

Array = npt.NDArray[Any]


class WeightSource(Protocol):
    """What the loader needs of a model on disk. Names are Hugging Face's."""

    path: str
    spec: ModelSpec
    has_lm_head: bool
    """False for the body of a model alone, or with a classifier on it. `spec` then calls the embedding tied."""

    def classifier(self) -> Classifier | None: ...

    def matrix_names(self) -> list[str]: ...

    def stored_format(self, name: str) -> str:
        """ "float32", "float16", "bfloat16", or a lower-case GGUF type such as "q4_1"."""

    def raw(self, name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32] | None]:
        """Stored bytes as [num_rows, row_bytes], and the index array that puts the rows into Hugging Face order."""

    def dense(self, name: str) -> Array:
        """Values as a float array of the weight's shape, rows in Hugging Face order."""

    def tokenizer(self) -> Tokenizer: ...

    def chat_template(self) -> ChatTemplate | None: ...


def open_source(path: str | os.PathLike[str]) -> WeightSource:
    """Open a .gguf file or a folder with config.json. Raises ModelFileError."""
    place = Path(path)
    if place.is_dir():
        return FolderSource(place)
    return GgufSource(place)


def _check_shape(path: str, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise ModelFileError(path, None, name, f"expected shape {expected}, got {got}")


class GgufSource:
    """One GGUF file."""

    has_lm_head = True

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._file: GgufReader = open_gguf(path)
        self._metadata = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self._file.metadata.items()}
        try:
            self.spec = spec_from_gguf(self._metadata, list(self._file), rope_factors=read_rope_factors(self._file))
        except ArgumentError as error:
            field, _, message = str(error).partition(": ")
            raise ModelFileError(self.path, None, field, message) from error
        self._family = family_of(self.spec)
        names = self._family.gguf_tensor_names(self.spec)
        self._rows = stored_rows(self.spec, names)
        for stored, shape in stored_shapes(self.spec, names).items():
            if stored not in self._file:
                raise ModelFileError(self.path, None, stored, "expected this tensor, got none of that name")
            _check_shape(self.path, stored, self._file.info(stored).shape, shape)

    def classifier(self) -> None:
        return None

    def matrix_names(self) -> list[str]:
        return self.spec.matrix_names()

    def stored_format(self, name: str) -> str:
        stored = self._file.info(self._rows[name].name).type.lower()
        return {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(stored, stored)

    def raw(self, name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32] | None]:
        place = self._rows[name]
        data = np.frombuffer(self._file.data(place.name), np.uint8)
        rows = data.reshape(self._file.info(place.name).shape[0], -1)[place.start : place.stop]
        order = self._family.gguf_row_order(self.spec, name)
        return rows, None if order is None else order.astype(np.int32)

    def dense(self, name: str) -> Array:
        place = self._rows[name]
        rows = self._file.dequantize(place.name)[place.start : place.stop]
        order = self._family.gguf_row_order(self.spec, name)
        return rows if order is None else rows[order]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._metadata, path=self.path)

    def chat_template(self) -> ChatTemplate | None:
        if "tokenizer.chat_template" not in self._metadata:
            return None
        return ChatTemplate.from_gguf(self._metadata, path=self.path)


class FolderSource:
    """A Hugging Face folder: config.json, tokenizer.json, model.safetensors or its index."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.spec = load_spec(path)
        self._files: dict[str, SafetensorsReader] = {}
        self._place: dict[str, SafetensorsReader] = {}
        for name, file in self._weight_map(path).items():
            if file not in self._files:
                self._files[file] = open_safetensors(path / file)
            self._place[name] = self._files[file]
        family = family_of(self.spec)
        first = next(iter(family.folder_tensors(self.spec)))
        # Older folders, and those of a body alone, leave the first part of every name away.
        self._prefix = "" if first in self._place else family.folder_prefix or f"{first.partition('.')[0]}."
        self.has_lm_head = CLASSIFIER_WEIGHT not in self._place and not self._is_body()
        if not self.has_lm_head:
            self.spec = replace(self.spec, tie_word_embeddings=True)
        self._tensors = family.folder_tensors(self.spec)
        self._stored = family.folder_tensor_names(self.spec)
        for stored, tensor in self._tensors.items():
            _check_shape(self.path, stored, self._reader(stored).info(self._file_name(stored)).shape, tensor.shape)
        for name in self._stored:
            self.stored_format(name)

    def _is_body(self) -> bool:
        """Whether this is what AutoModel of transformers writes: names without their first part, and no head."""
        if not self._prefix:
            return False
        architectures = load_config(Path(self.path)).get("architectures")
        name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
        names_head = name.endswith(("ForCausalLM", "LMHeadModel"))
        is_older = not name and family_of(self.spec).folder_prefix != ""
        return not (self.spec.tie_word_embeddings and (names_head or is_older))

    def classifier(self) -> Classifier | None:
        if CLASSIFIER_WEIGHT not in self._place:
            return None
        return Classifier.from_folder(self.path, self._reader(CLASSIFIER_WEIGHT)[CLASSIFIER_WEIGHT], self.spec)

    def _file_name(self, stored: str) -> str:
        return stored.removeprefix(self._prefix)

    def _reader(self, stored: str) -> SafetensorsReader:
        name = self._file_name(stored)
        if name not in self._place or name not in self._place[name]:
            raise ModelFileError(self.path, None, name, "expected this tensor, got none of that name")
        return self._place[name]

    @staticmethod
    def _weight_map(path: Path) -> dict[str, str]:
        single, index = path / "model.safetensors", path / "model.safetensors.index.json"
        if single.exists() or not index.exists():
            return dict.fromkeys(open_safetensors(single), "model.safetensors")
        weight_map = read_json_object(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelFileError(str(index), None, "weight_map", "expected an object")
        for name, file in weight_map.items():
            if not isinstance(file, str) or file != os.path.basename(file):
                raise ModelFileError(
                    str(index), None, f"weight_map.{name}", f"expected a file name, got {json.dumps(file)}"
                )
        return weight_map

    def matrix_names(self) -> list[str]:
        return self.spec.matrix_names()

    def stored_format(self, name: str) -> str:
        stored = self._stored[name]
        dtype = self._reader(stored).info(self._file_name(stored)).dtype
        known = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        if dtype not in known:
            raise ModelFileError(self.path, None, stored, f"expected one of {', '.join(known)}, got {dtype}")
        return known[dtype]

    def raw(self, name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32] | None]:
        tensor, rows = self._tensors[self._stored[name]], self._upright(name)
        data = rows.view(np.uint8).reshape(len(rows), -1)
        index = tensor.weights[name]
        return (data[index], None) if isinstance(index, slice) else (data, index.astype(np.int32))

    def dense(self, name: str) -> Array:
        return self._upright(name)[self._tensors[self._stored[name]].weights[name]].astype(np.float32)

    def _upright(self, name: str) -> Array:
        stored = self._stored[name]
        return self._tensors[stored].upright(self._reader(stored)[self._file_name(stored)])

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.path)

    def chat_template(self) -> ChatTemplate | None:
        folder = Path(self.path)
        config = folder / "tokenizer_config.json"
        has_own = config.exists() and "chat_template" in read_json_object(config, max_bytes=MAX_INDEX_BYTES)
        if not has_own and not (folder / "chat_template.jinja").exists():
            return None
        return ChatTemplate.from_folder(self.path)
