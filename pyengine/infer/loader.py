"""From a model on disk to a native decoder. Weights go from the mapped file into the native arena, part by part."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pyengine import _C
from pyengine.errors import ArgumentError, BackendUnavailable
from pyengine.formats.quantizers import QUANTIZERS, block_geometry
from pyengine.infer.classifier import Classifier
from pyengine.infer.source import WeightSource, open_source
from pyengine.spec import NORM_NAMES, POSITIONS_NAME, ModelSpec
from pyengine.tokenizer import ChatTemplate, Tokenizer

BLOCK_FORMATS = tuple(_C.block_formats())
# What `weights` may ask for; of the other block formats a file's own weights are kept.
WEIGHT_FORMATS = ("float32", "bfloat16", *QUANTIZERS)
# Other formats of a file -> what `weights="auto"` makes of them.
_DENSE_FORMATS = {"float32": "float32", "float16": "float32", "bfloat16": "bfloat16"}
DEFAULT_MAX_CONTEXT = 8192
# Mode -> what products with block weights round activations to.
PRODUCT_INPUTS = {"exact": "unrounded", "bf16": "bfloat16", "fast": "int8"}

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The choices of `LLM`, checked."""

    weights: str = "auto"
    mode: str = "auto"
    max_context: int | None = None
    cache_tokens: int | None = None
    kv_dtype: str = "auto"
    page_size: int = 32
    max_batch_tokens: int = 512

    def __post_init__(self) -> None:
        _one_of("weights", self.weights, ("auto", *WEIGHT_FORMATS))
        _one_of("mode", self.mode, ("auto", *PRODUCT_INPUTS))
        _one_of("kv_dtype", self.kv_dtype, ("auto", "float32", "bfloat16", "int8"))
        for name, low, high in (
            ("max_context", 1, 1 << 24),
            ("cache_tokens", 1, 1 << 31),
            ("max_batch_tokens", 1, 8192),
        ):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and low <= value <= high):
                raise ArgumentError(f"{name}: expected a whole number from {low} to {high}, got {value!r}")
        if self.page_size not in (16, 32, 64, 128, 256):
            raise ArgumentError(f"page_size: expected 16, 32, 64, 128 or 256 tokens, got {self.page_size!r}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ArgumentError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A native decoder with what belongs to it."""

    path: str
    spec: ModelSpec
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    model: _C.DecoderModel
    decoder: _C.Decoder
    has_lm_head: bool
    classifier: Classifier | None
    options: EngineOptions
    weight_formats: dict[str, str]
    """Format in memory of each matrix, by its Hugging Face name."""
    act_dtype: str
    mode: str
    kv_dtype: str
    max_context: int


def load_model(path: str | os.PathLike[str], options: EngineOptions) -> LoadedModel:
    """Raises ModelFileError for a bad file, BackendUnavailable for one whose formats have no kernel here."""
    source = open_source(path)
    spec = source.spec
    formats = {name: _target_format(source, name, options.weights) for name in source.matrix_names()}
    has_blocks = any(f in BLOCK_FORMATS for f in formats.values())
    if options.mode in ("bf16", "fast") and not has_blocks:
        raise ArgumentError(
            f"mode: '{options.mode}' needs weights in blocks ({', '.join(BLOCK_FORMATS)}), "
            f"got {sorted(set(formats.values()))}"
        )
    act_dtype = "bfloat16" if set(formats.values()) == {"bfloat16"} else "float32"
    mode = "exact" if options.mode == "auto" else options.mode
    kv_dtype = options.kv_dtype
    if kv_dtype == "auto":
        kv_dtype = act_dtype if mode == "exact" else "bfloat16"
    max_context = min(spec.max_position_embeddings, options.max_context or DEFAULT_MAX_CONTEXT)

    model = _C.DecoderModel(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rotary_dim=2 * spec.num_rotary_pairs,
        sliding_windows=[spec.window_of(layer) or 0 for layer in range(spec.num_layers)],
        rope_tables=[spec.rope_table_of(layer) if spec.has_rope(layer) else -1 for layer in range(spec.num_layers)],
        norm_eps=spec.norm_eps,
        norm_weight_offset=spec.norm_weight_offset,
        embedding_multiplier=spec.embedding_multiplier,
        residual_multiplier=spec.residual_multiplier,
        attention_scale=spec.softmax_scale,
        tie_word_embeddings=spec.tie_word_embeddings,
        qkv_bias=spec.qkv_bias,
        o_bias=spec.o_bias,
        mlp_bias=spec.mlp_bias,
        qk_norm=spec.qk_norm,
        norm_placement=spec.norm_placement,
        norm=spec.norm,
        norm_bias=spec.norm_bias,
        parallel_blocks=spec.parallel_blocks,
        gated_mlp=spec.gated_mlp,
        activation=spec.activation,
        num_learned_positions=max_context if spec.learned_positions else 0,
        act_dtype=act_dtype,
        product_input=PRODUCT_INPUTS[mode],
        capacity_bytes=_capacity(spec, formats, max_context),
    )
    # Packing runs outside the interpreter, so the tokenizer, which takes longer, is built meanwhile.
    with ThreadPoolExecutor(1, "tokenizer") as pool:
        tokenizer = pool.submit(source.tokenizer)
        _fill(model, source, formats, act_dtype)
    shape = max_context, spec.num_rotary_pairs
    for table, (inv_freq, attention_factor) in enumerate(spec.rope_tables(options.max_context)):
        cos, sin = np.empty(shape, np.float32), np.empty(shape, np.float32)
        _C.rope_table(inv_freq, cos, sin, attention_factor)
        model.set_rope(cos, sin, table=table)
    model.check()

    cache_tokens = options.cache_tokens or max_context
    decoder = _C.Decoder(
        model,
        page_size=options.page_size,
        num_pages=-(-cache_tokens // options.page_size),
        kv_dtype=kv_dtype,
        max_tokens=options.max_batch_tokens,
    )
    return LoadedModel(
        path=os.fspath(path),
        spec=spec,
        tokenizer=tokenizer.result(),
        chat_template=source.chat_template(),
        model=model,
        decoder=decoder,
        has_lm_head=source.has_lm_head,
        classifier=source.classifier(),
        options=options,
        weight_formats=formats,
        act_dtype=act_dtype,
        mode=mode,
        kv_dtype=kv_dtype,
        max_context=max_context,
    )


# The stacked matrices of a layer, and the weights that each is made of.
SLOTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
# The same for vectors; norms of the residual stream have the slots of `NORM_NAMES`.
_VECTOR_SLOTS = {
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "o_bias": ("self_attn.o_proj.bias",),
    "gate_up_bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "down_bias": ("mlp.down_proj.bias",),
}


_TOP_VECTOR_SLOTS = {"positions": POSITIONS_NAME, "norm": "model.norm.weight", "norm_bias": "model.norm.bias"}


def _vector_slots(spec: ModelSpec) -> dict[str, list[str]]:
    """Native slot -> names of the vectors that it joins, for those that the model has."""
    norms = {slot: (f"{name}.weight",) for slot, name in NORM_NAMES[spec.norm_placement].items()}
    norm_biases = {f"{slot}_bias": (f"{name}.bias",) for slot, name in NORM_NAMES[spec.norm_placement].items()}
    shapes = spec.tensor_shapes()
    slots = {slot: [name] for slot, name in _TOP_VECTOR_SLOTS.items() if name in shapes}
    for i in range(spec.num_layers):
        for slot, parts in (norms | norm_biases | _VECTOR_SLOTS).items():
            names = [name for part in parts if (name := f"model.layers.{i}.{part}") in shapes]
            if names:
                slots[f"layers.{i}.{slot}"] = names
    return slots


def _slots(spec: ModelSpec) -> dict[str, list[str]]:
    """Native slot -> Hugging Face names, in order of execution."""
    shapes = spec.tensor_shapes()
    slots = {"embed": ["model.embed_tokens.weight"]}
    for i in range(spec.num_layers):
        for slot, parts in SLOTS.items():
            names = [f"model.layers.{i}.{part}.weight" for part in parts]
            slots[f"layers.{i}.{slot}"] = [name for name in names if name in shapes]
    if not spec.tie_word_embeddings:
        slots["head"] = ["lm_head.weight"]
    return slots


def _groups(names: list[str], formats: dict[str, str]) -> list[list[str]]:
    """Neighbours of one format together: each group becomes one packed matrix."""
    groups: list[list[str]] = []
    for name in names:
        if groups and formats[groups[-1][0]] == formats[name]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _capacity(spec: ModelSpec, formats: dict[str, str], max_context: int) -> int:
    shapes = spec.tensor_shapes()
    total = 0
    for names in _slots(spec).values():
        for group in _groups(names, formats):
            num_rows = sum(shapes[name][0] for name in group)
            total += _C.packed_weight_bytes(formats[group[0]], num_rows, shapes[group[0]][1]) + 64
    for slot, names in _vector_slots(spec).items():
        num_rows = max_context if slot == "positions" else 1
        total += 4 * num_rows * sum(shapes[name][-1] for name in names) + 64
    return total + 2 * len(spec.rope_tables()) * (max_context * spec.num_rotary_pairs * 4 + 64)


def _fill(model: _C.DecoderModel, source: WeightSource, formats: dict[str, str], act_dtype: str) -> None:
    dtype = ml_dtypes.bfloat16 if act_dtype == "bfloat16" else np.float32
    for slot, names in _vector_slots(source.spec).items():
        values = np.concatenate([source.dense(name) for name in names]).astype(dtype)
        if slot == "positions":
            values = values[: model.num_learned_positions]
        if slot == "norm" and source.spec.logits_divisor != 1.0:
            # The head is linear: dividing what it reads divides the logits.
            values = (values.astype(np.float32) / np.float32(source.spec.logits_divisor)).astype(dtype)
        model.set_vector(slot, values.view(np.uint8).reshape(-1))
    shapes = source.spec.tensor_shapes()
    for slot, names in _slots(source.spec).items():
        for group in _groups(names, formats):
            parts = [_rows(source, name, formats[name]) for name in group]
            rows, orders = [part[0] for part in parts], [part[1] for part in parts]
            model.add_matrix(slot, formats[group[0]], rows, orders, shapes[group[0]][1])


def _target_format(source: WeightSource, name: str, wanted: str) -> str:
    stored = source.stored_format(name)
    if wanted == "auto":
        if stored in BLOCK_FORMATS:
            return stored
        if stored not in _DENSE_FORMATS:
            raise BackendUnavailable(
                f"{source.path}: {name} is stored as {stored}, which is not read; "
                f"expected one of {', '.join((*_DENSE_FORMATS, *BLOCK_FORMATS))}"
            )
        return _DENSE_FORMATS[stored]
    num_cols = source.spec.tensor_shapes()[name][1]
    block_size, _ = block_geometry(wanted) if wanted in BLOCK_FORMATS else (1, 0)
    if num_cols % block_size:
        raise ArgumentError(
            f"weights: {wanted} needs rows of a multiple of {block_size} values, got {num_cols} in {name}"
        )
    return wanted


def _rows(source: WeightSource, name: str, target: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32] | None]:
    """The weight as uint8 [num_rows, row_bytes] in the target format and its row order; copied only to convert."""
    if source.stored_format(name) == target:
        return source.raw(name)
    dense = source.dense(name)
    if target in QUANTIZERS:
        blocks = QUANTIZERS[target](np.ascontiguousarray(dense, np.float32), False)
        return blocks.view(np.uint8).reshape(len(dense), -1), None
    dtype = np.dtype(np.float32) if target == "float32" else np.dtype(ml_dtypes.bfloat16)
    return np.ascontiguousarray(dense.astype(dtype)).view(np.uint8).reshape(len(dense), -1), None
