"""What a family of models provides: mappings between `ModelSpec` and the descriptions other systems write.

A family is mostly a table. What a table cannot say is in methods that a family may extend:

    fields_from_config, fields_to_config    fields of `ModelSpec` that config.json says in a way of its own
    fields_from_gguf, fields_to_gguf        the same for the metadata and the tensor names of a GGUF file
    rope_from_config                        rotary embeddings with keys or defaults of their own
    model_type_of                           which of several classes of transformers a model is
    spec_from_config, _spec_from_config     defaults of other keys, before and after keys get their usual names
    folder_part, gguf_tensor_names          names that depend on the model
    folder_row_order                        rows that a folder holds in another order
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError
from pyengine.families import config_keys, gguf_keys
from pyengine.families.fields import get_bool, get_float, get_optional_int
from pyengine.families.rope_config import partial_rotary_factor, rope_from_config, rope_to_config
from pyengine.families.rows import unpermute_rows
from pyengine.families.stacking import StoredTensor, stacked_weights, stored_rows, stored_shapes
from pyengine.spec import LongRopeScaling, ModelSpec, RopeSpec

_ROTATED = tuple(f".self_attn.{part}_proj.{kind}" for part in "qk" for kind in ("weight", "bias"))


@dataclass(frozen=True, kw_only=True)
class Option:
    """Fields of `ModelSpec`, all of one value, that config.json says by one key, and GGUF by one or none."""

    fields: tuple[str, ...]
    config_key: str
    default: float | bool
    """Where config.json has no such key."""
    gguf_key: str | None = None
    """After the name of the architecture."""


ATTENTION_BIAS = Option(fields=("qkv_bias", "o_bias"), config_key="attention_bias", default=False)
MLP_BIAS = Option(fields=("mlp_bias",), config_key="mlp_bias", default=False)


def _same_angles(spec: ModelSpec, back: ModelSpec) -> bool:
    lengths = [spec.max_position_embeddings]
    if isinstance(spec.rope.scaling, LongRopeScaling):
        lengths.append(spec.rope.scaling.original_max_position_embeddings)
    for length in lengths:
        table, other = spec.rope_tables(length)[0], back.rope_tables(length)[0]
        if len(table.inv_freq) != len(other.inv_freq) or not np.allclose(table.inv_freq, other.inv_freq, rtol=1e-6):
            return False
        if not math.isclose(table.attention_factor, other.attention_factor, rel_tol=1e-6):
            return False
    return True


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    Attributes:
        name: `ModelSpec.family`.
        classes: values of `model_type` in config.json -> their class in transformers.
        gguf_architecture: `general.architecture` of a GGUF file.
        traits: fields of `ModelSpec` that every model of the family has.
        options: fields that one key of config.json says.
        config_keys: keys beyond those of `options` that the family reads itself.
        default_*, is_tied: where config.json has no such key.
        partial_rotary: whether `partial_rotary_factor` is read.
        gguf_permuted: GGUF files hold the rows of q and k in the order of rotary pairs.
        gguf_biases: bias fields that GGUF files of the family can have.
        gguf_tied: whether a GGUF file of the family may leave the head to the embedding.
        gguf_keys: keys beyond those of `options` that the family reads itself.
        stacks: part of a layer -> (its name in a folder, in a GGUF file), where files hold several stacked in one.
        folder_names: part of a layer, or name of another weight without its last part -> that in a folder, where they
            differ and are not stacked.
        folder_layers: what the names of a layer's weights start with, in a folder.
        folder_prefix: what older folders leave away from every name.
        folder_extra: ends of names in a folder that are no weights.
        folder_transposed: parts of a layer whose weights are [in, out] in a folder.
        gguf_names: part of a layer -> its name in a GGUF file, where that is not the usual one.
        renamed_keys: usual key of config.json -> that of the family, or "" where it has none.
        both_keys: those of `renamed_keys` that may have their usual name too.
        eps_key: key of config.json for norm_eps.
    """

    name: str
    classes: Mapping[str, str]
    gguf_architecture: str
    traits: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    options: tuple[Option, ...] = ()
    config_keys: frozenset[str] = frozenset()
    default_theta: float = 10000.0
    default_norm_eps: float = 1e-6
    default_num_kv_heads: int | None = None
    is_tied: bool = False
    partial_rotary: bool = False
    gguf_permuted: bool = False
    gguf_biases: tuple[str, ...] = ()
    gguf_tied: bool = True
    gguf_keys: frozenset[str] = frozenset()
    stacks: Mapping[str, tuple[str, str]] = field(default_factory=lambda: MappingProxyType({}))
    folder_names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    folder_layers: str = "model.layers"
    folder_prefix: str = ""
    folder_extra: tuple[str, ...] = ()
    folder_transposed: frozenset[str] = frozenset()
    gguf_names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    renamed_keys: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    both_keys: frozenset[str] = frozenset()
    eps_key: str = "rms_norm_eps"

    @property
    def model_types(self) -> tuple[str, ...]:
        return tuple(self.classes)

    # --- what a family may extend -------------------------------------------------------------------------------------

    def fields_from_config(self, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that are not in a table. `sizes` are those that are known already."""
        return {}

    def fields_to_config(self, spec: ModelSpec) -> dict[str, Any]:
        """Keys of config.json for the same; None for a key that is to be left out."""
        return {}

    def fields_from_gguf(
        self, metadata: Mapping[str, Any], sizes: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Any]:
        return {}

    def fields_to_gguf(self, spec: ModelSpec) -> dict[str, Any]:
        return {}

    def rope_from_config(self, config: Mapping[str, Any]) -> RopeSpec:
        return rope_from_config(config, default_theta=self.default_theta, partial=self.partial_rotary)

    def model_type_of(self, spec: ModelSpec) -> str:
        return next(iter(self.classes))

    # --- config.json --------------------------------------------------------------------------------------------------

    def spec_from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        """`config` is the content of config.json. Unsupported features raise ArgumentError with their key."""
        theirs = {key: config[name] for key, name in self.renamed_keys.items() if name in config}
        kept = {key: value for key, value in config.items() if key not in {*self.renamed_keys} - self.both_keys}
        try:
            return self._spec_from_config(kept | theirs)
        except ArgumentError as error:
            key, colon, message = str(error).partition(":")
            raise ArgumentError((self.renamed_keys.get(key) or key) + colon + message) from error

    def _spec_from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        known = self.config_keys | {option.config_key for option in self.options}
        if self.partial_rotary:
            known |= {"partial_rotary_factor"}
        config_keys.check_neutral(config, known)
        values = config_keys.sizes_from_config(config, default_num_kv_heads=self.default_num_kv_heads)
        values |= {
            "norm_eps": get_float(config, self.eps_key, self.default_norm_eps),
            "rope": self.rope_from_config(config),
            "tie_word_embeddings": get_bool(config, "tie_word_embeddings", self.is_tied),
        }
        for option in self.options:
            if isinstance(option.default, bool):
                value: float | bool = get_bool(config, option.config_key, option.default)
            else:
                value = get_float(config, option.config_key, option.default)
            values |= dict.fromkeys(option.fields, value)
        values |= self.traits
        self._check_sizes(values)
        if self.partial_rotary and (factor := partial_rotary_factor(config)) != 1.0:
            values["rotary_dim"] = int(values["head_dim"] * factor)
        values |= self.fields_from_config(config, values)
        return ModelSpec(family=self.name, **values)

    def config_from_spec(self, spec: ModelSpec) -> dict[str, Any]:
        """The content of a config.json that transformers and `spec_from_config` read back to the same model."""
        if spec.rotary_dim is not None and not self.partial_rotary:
            raise ArgumentError(f"rotary_dim: expected None, which config.json can say, got {spec.rotary_dim}")
        model_type = self.model_type_of(spec)
        config: dict[str, Any] = {"architectures": [self.classes[model_type]], "model_type": model_type}
        config |= config_keys.sizes_to_config(spec)
        for option in self.options:
            value = getattr(spec, option.fields[0])
            config[option.config_key] = spec.softmax_scale if option.fields == ("attention_scale",) else value
        config |= rope_to_config(spec.rope, rotary_dim=spec.rotary_dim, head_dim=spec.head_dim)
        config |= self.fields_to_config(spec)
        if self.eps_key != "rms_norm_eps":
            config[self.eps_key] = config.pop("rms_norm_eps")
        for key, name in self.renamed_keys.items():
            value = config.pop(key)
            if name:
                config[name] = value
        self._check_same(spec, self.spec_from_config(config), "config.json")
        return config

    # --- GGUF ---------------------------------------------------------------------------------------------------------

    def spec_from_gguf(
        self,
        metadata: Mapping[str, Any],
        tensor_names: Collection[str],
        rope_factors: Mapping[str, npt.NDArray[np.floating[Any]]],
    ) -> ModelSpec:
        """`tensor_names` tell tied embeddings and biases; `rope_factors` are the tensors [P] of `ROPE_TENSORS`."""
        architecture = self.gguf_architecture
        if set(rope_factors) != set(gguf_keys.ROPE_TENSORS) & set(tensor_names):
            raise ArgumentError(
                "rope_factors: expected each of the tensors "
                f"{sorted(set(gguf_keys.ROPE_TENSORS) & set(tensor_names))} that tensor_names has, "
                f"got {sorted(rope_factors)}"
            )
        keys = {option.gguf_key: option for option in self.options if option.gguf_key is not None}
        gguf_keys.check_neutral(metadata, architecture, {*keys, *self.gguf_keys})
        values = gguf_keys.sizes_from_gguf(metadata, architecture, norm=self.traits.get("norm", "rms"))
        values |= {
            "rope": gguf_keys.rope_from_gguf(metadata, architecture, rope_factors),
            "tie_word_embeddings": "output.weight" not in tensor_names,
        }
        for key, option in keys.items():
            value = get_float(metadata, f"{architecture}.{key}", 0.0)
            if value != 0.0:
                values |= dict.fromkeys(option.fields, gguf_keys.shortest(value))
        rotary_dim = get_optional_int(metadata, f"{architecture}.rope.dimension_count")
        if rotary_dim not in (None, values["head_dim"]):
            if not self.partial_rotary:
                raise ArgumentError(
                    f"{architecture}.rope.dimension_count: expected {values['head_dim']}, got {rotary_dim}"
                )
            values["rotary_dim"] = rotary_dim
        for name in self.gguf_biases:
            values[name] = "blk.0." + gguf_keys.BIASES[name] in tensor_names
        values |= self.traits
        self._check_sizes(values)
        values |= self.fields_from_gguf(metadata, values, tensor_names)
        spec = ModelSpec(family=self.name, **values)
        extra = sorted(set(tensor_names) - {*self.gguf_tensor_names(spec).values(), *gguf_keys.ROPE_TENSORS})
        if extra:
            kind = "bias" if extra[0].endswith(".bias") else "tensors beyond those of the model"
            raise ArgumentError(f"tensor_names: expected no {kind}, got {extra[0]!r:.80}")
        return spec

    def gguf_metadata_from_spec(self, spec: ModelSpec) -> dict[str, Any]:
        """Architecture keys for a GGUF file. Factors of rotary frequencies go into tensors: `gguf_rope_factors`."""
        architecture = self.gguf_architecture
        metadata = gguf_keys.sizes_to_gguf(spec, architecture)
        for option in self.options:
            if option.gguf_key is not None:
                value = spec.softmax_scale if option.fields == ("attention_scale",) else getattr(spec, option.fields[0])
                metadata[f"{architecture}.{option.gguf_key}"] = value
        metadata |= self.fields_to_gguf(spec)
        absent = [name for name in gguf_keys.BIASES if name not in (*self.gguf_biases, *self.traits)]
        for name in absent if self.gguf_tied else (*absent, "tie_word_embeddings"):
            if getattr(spec, name):
                raise ArgumentError(
                    f"{name}: expected False, which a GGUF file of {architecture} can say, got {getattr(spec, name)}"
                )
        rope_factors = self.gguf_rope_factors(spec)
        names = {*self.gguf_tensor_names(spec).values(), *rope_factors}
        self._check_same(spec, self.spec_from_gguf(metadata, names, rope_factors), f"a GGUF file of {architecture}")
        return metadata

    def gguf_rope_factors(self, spec: ModelSpec) -> dict[str, npt.NDArray[np.float32]]:
        """Those tensors [P] of `ROPE_TENSORS` that a GGUF file of the model needs."""
        return gguf_keys.rope_factors_of(spec)

    # --- tensors: see families/stacking.py ----------------------------------------------------------------------------

    def folder_tensor_names(self, spec: ModelSpec) -> dict[str, str]:
        """Name of every weight -> its name in the safetensors files of a folder."""
        names = {}
        for name in spec.tensor_shapes():
            stem, _, kind = name.rpartition(".")
            if stem.startswith("model.layers."):
                _, _, layer, part = stem.split(".", 3)
                stacked = self.stacks[part][0] if part in self.stacks else part
                names[name] = f"{self.folder_layers}.{layer}.{self.folder_part(spec, part, stacked)}.{kind}"
            else:
                names[name] = f"{self.folder_names.get(stem, stem)}.{kind}"
        return names

    def folder_part(self, spec: ModelSpec, part: str, default: str) -> str:
        """Name in a folder of a part of a layer."""
        return self.folder_names.get(part, default)

    def folder_row_order(self, spec: ModelSpec, name: str) -> npt.NDArray[np.int64] | None:
        """Rows of the tensor in a folder that are the rows of the weight `name`; None where they follow in order."""
        return None

    def folder_tensors(self, spec: ModelSpec) -> dict[str, StoredTensor]:
        """Name of every tensor of a folder -> how it holds its weights."""
        names = self.folder_tensor_names(spec)
        shapes, places = stored_shapes(spec, names), stored_rows(spec, names)
        tensors = {}
        # The same in every layer: a config of many wide layers must not cost an array for each.
        orders: dict[str, npt.NDArray[np.int64] | None] = {}
        for stored, weights in stacked_weights(names).items():
            rows: dict[str, slice | npt.NDArray[np.int64]] = {}
            for name in weights:
                part = name.split(".", 3)[-1]
                if part not in orders:
                    orders[part] = self.folder_row_order(spec, name)
                order = orders[part]
                rows[name] = slice(places[name].start, places[name].stop) if order is None else order
            part = weights[0].removesuffix(".weight").split(".", 3)[-1]
            is_transposed = part in self.folder_transposed and len(shapes[stored]) == 2
            tensors[stored] = StoredTensor(shapes[stored][:: -1 if is_transposed else 1], rows, is_transposed)
        return tensors

    def gguf_tensor_names(self, spec: ModelSpec) -> dict[str, str]:
        """Name of every weight -> its name in a GGUF file."""
        stacked = {part: names[1] for part, names in self.stacks.items()}
        return gguf_keys.tensor_names(spec, gguf_keys.layer_tensors(spec) | stacked | dict(self.gguf_names))

    def gguf_row_order(self, spec: ModelSpec, name: str) -> npt.NDArray[np.int64] | None:
        """Index array i of the weight `name`, so that hf = gguf[i]; None where the rows agree."""
        if not self.gguf_permuted or not name.endswith(_ROTATED):
            return None
        return unpermute_rows(spec.num_heads if ".q_proj." in name else spec.num_kv_heads, spec.head_dim)

    def _check_sizes(self, values: Mapping[str, Any]) -> None:
        """Raises ArgumentError for sizes out of range, before a list is made or a root taken of one."""
        names = {item.name for item in fields(ModelSpec) if item.default is MISSING}
        checked = {name: values[name] for name in names if name in values}
        ModelSpec(**checked | {"family": self.name, "rope": RopeSpec(theta=values["rope"].theta)})

    def _check_same(self, spec: ModelSpec, back: ModelSpec, where: str) -> None:
        """Raises ArgumentError with the first field that the description `where` does not hold."""
        for item in fields(spec):
            value, expected = getattr(spec, item.name), getattr(back, item.name)
            if item.name == "rope" and _same_angles(spec, back):
                continue  # they may have passed through float32
            if item.name == "norm_weight_offset" and where != "config.json":
                continue  # norms in a GGUF file hold the sum
            if value != expected:
                raise ArgumentError(f"{item.name}: expected {expected!r}, which {where} can say, got {value!r:.80}")
