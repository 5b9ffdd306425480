"""A model as one GGUF file with its matrices in blocks."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError, CapacityError, ModelFileError
from pyengine.families import family_of, gguf_metadata_from_spec, stacked_weights, stored_shapes
from pyengine.formats import GgufTensor, open_gguf, write_gguf
from pyengine.formats.quantizers import QUANTIZERS, block_geometry
from pyengine.infer.source import WeightSource, open_source
from pyengine.ledger import content_id
from pyengine.spec import ModelSpec
from pyengine.tokenizer.gguf_writer import gguf_tokenizer_metadata

# format -> its name in GGUF, and `general.file_type` of a file whose matrices have it
FORMATS = {
    "float32": ("F32", 0),
    "bfloat16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
    "q6_k": ("Q6_K", 18),
    "q5_1": ("Q5_1", 9),
    "q5_k": ("Q5_K", 16),
    "q5_0": ("Q5_0", 8),
    "q4_1": ("Q4_1", 3),
    "q4_k": ("Q4_K", 14),
    "q4_0": ("Q4_0", 2),
    "iq4_nl": ("IQ4_NL", 25),
}
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_QUANTIZATION_VERSION = 2
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
# Metadata that a GGUF file hands on.
_KEPT_KEYS = ("general.", "tokenizer.")
# Values that are quantised at once: the temporaries of a large matrix would take several times its size.
_CHUNK_VALUES = 1 << 21

Progress = Callable[[str, int, int], None]
"""Called as (name of the tensor in the file, parameters done, parameters in all), before the first and after each."""


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What `quantize_to_gguf` wrote."""

    path: str
    weights: str
    embedding: str
    num_parameters: int
    num_bytes: int
    """Of the whole file: weights, norms, vocabulary and all."""
    bits_per_weight: float
    """8 * num_bytes / num_parameters."""
    content_id: str
    """Of the file, as ledgers name it."""


def quantize_to_gguf(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str = "q4_1",
    embedding: str = "q8_0",
    search: bool = False,
    rounded: Mapping[str, npt.NDArray[np.uint8]] | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write `model` as one GGUF file, whole or not at all.

    The file holds what the folder held: `LLM(out)` gives the bits of `LLM(model, weights=...)` where `embedding` equals
    `weights`. Blocks that are in the wanted format already are copied bit for bit. Norms are float32. Rope scaling of
    the Llama 3 kind becomes one float32 factor per frequency, which is what GGUF has for it. Where the tokenizer of a
    folder names a bos, eos or pad token other than config.json, the tokenizer's is written; of end tokens, both.
    One tensor is in memory at a time.

    Args:
        model: a .gguf file, or a folder with config.json, tokenizer.json and model.safetensors.
        out: the file to make or replace; may be `model` itself.
        weights: format of the matrices, one of FORMATS.
        embedding: format of the embedding (which is the head, where the two are tied) and of lm_head.
        search: choose the scales of each block for the least squared error; about 80 times the work.
        rounded: blocks of `weights` that take the place of the model's own, as `pyengine.calibrate` makes them: Hugging
            Face name -> uint8 [num_rows, row_bytes].
        progress: told of every tensor.

    Raises:
        ArgumentError: an unknown format; rows that do not divide into blocks; a model that GGUF cannot describe, such
            as a Qwen 2 with a sliding window; a path that cannot be written.
        BackendUnavailable: a tokenizer that GGUF cannot describe, or stored weights in a format that is not read.
        ModelFileError: a broken model, or a tokenizer with more ids than the embedding has rows.
        CapacityError: the disk is full.
    """
    for argument, value in (("weights", weights), ("embedding", embedding)):
        if value not in FORMATS:
            raise ArgumentError(f"{argument}: expected one of {', '.join(FORMATS)}, got {value!r}")
    if Path(out).is_dir():
        raise ArgumentError(f"out: expected a file to write, got the folder {os.fspath(out)}")
    source = open_source(model)
    if not source.has_lm_head:
        raise ArgumentError(f"model: expected a language model, got {source.path}, which has no head for text")
    spec = source.spec
    formats = {name: embedding if name in _EMBEDDINGS else weights for name in source.matrix_names()}
    _check_rows(spec, formats)
    rounded = dict(rounded or {})
    _check_rounded(spec, rounded, weights)
    metadata, types = _metadata(source)
    metadata["general.file_type"] = FORMATS[weights][1]
    metadata["general.quantization_version"] = _QUANTIZATION_VERSION

    done, total = 0, spec.num_parameters()

    def report(name: str, num_values: int) -> None:
        nonlocal done
        done += num_values
        if progress is not None:
            progress(name, done, total)

    def make(stored_name: str, parts: list[str], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        report(stored_name, 0)
        rows = [_encode(source, name, formats.get(name, "float32"), search, rounded.get(name)) for name in parts]
        report(stored_name, math.prod(shape))
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    tensors: dict[str, npt.NDArray[Any] | GgufTensor] = {**family_of(spec).gguf_rope_factors(spec)}
    names = family_of(spec).gguf_tensor_names(spec)
    shapes = stored_shapes(spec, names)
    for stored_name, parts in stacked_weights(names).items():
        shape = shapes[stored_name]
        stored_format = FORMATS[formats.get(parts[0], "float32")][0]
        tensors[stored_name] = GgufTensor(partial(make, stored_name, parts, shape), stored_format, shape)
    try:
        write_gguf(out, metadata, tensors, types)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"out: expected room for {os.fspath(out)}, got: {error.strerror}") from error
        raise ArgumentError(f"out: expected a path to write, got {os.fspath(out)}: {error.strerror}") from error
    num_bytes = os.path.getsize(out)
    return QuantizeResult(
        path=os.fspath(out),
        weights=weights,
        embedding=embedding,
        num_parameters=total,
        num_bytes=num_bytes,
        bits_per_weight=8 * num_bytes / total,
        content_id=content_id(out),
    )


def _check_rows(spec: ModelSpec, formats: dict[str, str]) -> None:
    shapes = spec.tensor_shapes()
    for name, wanted in formats.items():
        if wanted in QUANTIZERS and shapes[name][1] % block_geometry(wanted)[0]:
            argument = "embedding" if name in _EMBEDDINGS else "weights"
            raise ArgumentError(
                f"{argument}: {wanted} needs rows of a multiple of {block_geometry(wanted)[0]} values, "
                f"got {shapes[name][1]} in {name}"
            )


def _check_rounded(spec: ModelSpec, rounded: Mapping[str, npt.NDArray[np.uint8]], weights: str) -> None:
    shapes, matrices = spec.tensor_shapes(), set(spec.matrix_names()) - set(_EMBEDDINGS)
    for name, rows in rounded.items():
        if name not in matrices or weights not in QUANTIZERS:
            raise ArgumentError(f"rounded: expected matrices that are written in blocks, got {name!r:.80}")
        block_size, block_bytes = block_geometry(weights)
        expected = (shapes[name][0], shapes[name][1] // block_size * block_bytes)
        if rows.dtype != np.uint8 or rows.shape != expected:
            raise ArgumentError(f"rounded[{name!r}]: expected uint8 {expected}, got {rows.dtype} {rows.shape}")


def _metadata(source: WeightSource) -> tuple[dict[str, Any], dict[str, str]]:
    """Metadata and the types that its values do not show."""
    architecture = gguf_metadata_from_spec(source.spec)
    path = Path(source.path)
    if not path.is_dir():
        file = open_gguf(path)
        kept = [key for key in file.metadata if key.startswith(_KEPT_KEYS) and key != "general.alignment"]
        metadata = {key: file.metadata[key] for key in kept} | architecture
        return metadata, {key: file.metadata_types[key] for key in kept}
    template = source.chat_template()
    tokenizer = gguf_tokenizer_metadata(
        path, None if template is None else template.source, vocab_size=source.spec.vocab_size
    )
    prefix = "tokenizer.ggml."
    ends = [tokenizer.get(f"{prefix}eos_token_id"), *source.spec.eos_token_ids]
    ends = list(dict.fromkeys(token_id for token_id in ends if token_id is not None))
    if len(ends) > 2:
        raise ArgumentError(f"eos_token_ids: expected at most 2, which a GGUF file can say, got {ends}")
    end_ids = {f"{prefix}{key}_token_id": token_id for key, token_id in zip(("eos", "eot"), ends, strict=False)}
    metadata = {"general.name": path.resolve().name, **architecture, **tokenizer, **end_ids}
    return metadata, {f"{prefix}merges": "array[string]", f"{prefix}token_type": "array[int32]"}


def _encode(
    source: WeightSource, name: str, wanted: str, search: bool, rounded: npt.NDArray[np.uint8] | None
) -> npt.NDArray[np.uint8]:
    """The weight as it stands in the file: uint8 [num_rows, row_bytes], rows in the order of GGUF."""
    offset = source.spec.norm_weight_offset
    if offset != 0.0 and name.endswith("norm.weight"):
        # GGUF has no such offset: its norms hold the sum.
        return _convert(source.dense(name).reshape(-1, 1) + np.float32(offset), wanted, search)
    if rounded is not None:
        rows = rounded
    elif source.stored_format(name) == wanted:
        rows, stored_order = source.raw(name)
        rows = rows if stored_order is None else rows[stored_order]
    else:
        dense = source.dense(name)
        table = dense.reshape(len(dense), -1)
        step = max(1, _CHUNK_VALUES // table.shape[1])
        try:
            parts = [_convert(table[start : start + step], wanted, search) for start in range(0, len(table), step)]
        except ArgumentError as error:
            raise ModelFileError(source.path, None, name, str(error).removeprefix("weight: ")) from error
        rows = np.concatenate(parts)
    order = family_of(source.spec).gguf_row_order(source.spec, name)
    return rows if order is None else rows[np.argsort(order)]


def _convert(rows: npt.NDArray[np.float32], wanted: str, search: bool) -> npt.NDArray[np.uint8]:
    if wanted in QUANTIZERS:
        return QUANTIZERS[wanted](rows, search)
    return np.ascontiguousarray(rows.astype(_DTYPES[wanted])).view(np.uint8)
