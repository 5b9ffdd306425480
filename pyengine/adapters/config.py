"""adapter_config.json: which modules have an adapter, of which rank and scale.

Format: https://huggingface.co/docs/peft, "LoRA". What would change the mathematics and is not computed is an error that
names the key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pyengine.errors import ArgumentError

MAX_RANK = 256
MAX_ALPHA = 1 << 20
MAX_NAMES = 1 << 16
MAX_NAME_CHARS = 1024
MAX_REGEX_CHARS = 1 << 16

ALL_LINEAR = "all-linear"

# Keys that do not change what an adapter computes once it is trained.
_IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
# Ways to begin that leave the weights of the model as they are.
_INITS = (True, False, "gaussian", "eva", "orthogonal")
_NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "")
# What PEFT reads as an expression is a name in practice, or the whole of one.
_PLAIN_PATTERN = re.compile(r"\^?(?:\w|-|\\?\.)+")
_LAYER = re.compile(r"[^.]*\.([^.]*)\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What adapter_config.json says.

    Attributes:
        rank: `r`, of a module that `rank_pattern` does not name.
        alpha: `lora_alpha`, of a module that `alpha_pattern` does not name.
        use_rslora: the scale is alpha / sqrt(rank), not alpha / rank.
        target_modules: names, of which a module's must be one or end in; or "all-linear"; or a regular expression.
        exclude_modules: names of modules to leave out, or a regular expression.
        layers: only these layers, where target_modules is a list; None for all.
        rank_pattern, alpha_pattern: name of modules, or its end, to their own rank or alpha.
        dropout: of the input of an adapter in training.
    """

    rank: int = 8
    alpha: float = 8.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    exclude_modules: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    base_model: str | None = None

    def __post_init__(self) -> None:
        _check_rank("r", self.rank)
        _check_alpha("lora_alpha", self.alpha)
        if not isinstance(self.dropout, (int, float)) or isinstance(self.dropout, bool) or not 0 <= self.dropout < 1:
            raise ArgumentError(f"lora_dropout: expected a number from 0 to 1, 1 excluded, got {self.dropout!r:.80}")
        if not self.target_modules:
            raise ArgumentError(f"target_modules: expected names of modules, got {self.target_modules!r:.80}")
        for key, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if len(patterns) > MAX_NAMES:
                raise ArgumentError(f"{key}: expected at most {MAX_NAMES} names, got {len(patterns)}")
            for pattern in patterns:
                if len(pattern) > MAX_NAME_CHARS or not _PLAIN_PATTERN.fullmatch(pattern):
                    raise ArgumentError(f"{key}: expected names of modules, no regular expression, got {pattern!r:.80}")
        for pattern, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{pattern}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{pattern}]", alpha)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """`values` is the content of adapter_config.json. Raises ArgumentError that begins with the key."""
        rest = dict(values)
        _expect(rest, "peft_type", ("LORA",))
        _expect(rest, "task_type", (None, "CAUSAL_LM"))
        _expect(rest, "bias", (None, "none"))
        init = rest.pop("init_lora_weights", True)
        if not any(init is known or (isinstance(init, str) and init == known) for known in _INITS):
            raise ArgumentError(
                f"init_lora_weights: expected one of {list(_INITS)}, which leave the weights of the model as they are, "
                f"got {init!r:.80}"
            )
        config = cls(
            rank=rest.pop("r", 8),
            alpha=rest.pop("lora_alpha", 8),
            use_rslora=_bool(rest, "use_rslora"),
            target_modules=_names(rest, "target_modules"),
            exclude_modules=_names(rest, "exclude_modules"),
            layers=_layers(rest),
            rank_pattern=_mapping(rest, "rank_pattern"),
            alpha_pattern=_mapping(rest, "alpha_pattern"),
            dropout=rest.pop("lora_dropout", None) or 0.0,
            base_model=base if isinstance(base := rest.get("base_model_name_or_path"), str) else None,
        )
        for key, value in rest.items():
            if key not in _IGNORED and not any(value is n or (value == n and value is not True) for n in _NEUTRAL):
                raise ArgumentError(f"{key}: expected none, which is all that is computed here, got {value!r:.80}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of an adapter_config.json that PEFT and `from_dict` read."""
        names = self.target_modules
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.use_rslora,
            "target_modules": names if isinstance(names, str) else list(names),
            "exclude_modules": (
                self.exclude_modules if isinstance(self.exclude_modules, str) else list(self.exclude_modules) or None
            ),
            "layers_to_transform": None if self.layers is None else list(self.layers),
            "layers_pattern": None,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "lora_dropout": self.dropout,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "use_dora": False,
        }

    def rank_of(self, module: str) -> int:
        return int(_first_match(self._ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What the product of a module is multiplied by."""
        alpha, rank = _first_match(self._alphas, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, modules: Iterable[str]) -> list[str] | None:
        """Those of `modules` that have an adapter; None where a regular expression says it.

        A stranger's expression may take forever, so none is run: the tensors of the file are what it hit.
        """
        if isinstance(self.exclude_modules, str):
            return None
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            return None
        hit = []
        targets, excluded = frozenset(self.target_modules), frozenset(self.exclude_modules)
        for module in modules:
            if isinstance(self.target_modules, str):
                is_hit = module != "lm_head"
            else:
                is_hit = _is_named(module, targets) and self._has_layer(module)
            if is_hit and not _is_named(module, excluded):
                hit.append(module)
        return hit

    @cached_property
    def _ranks(self) -> dict[str, tuple[int, float]]:
        return _by_name(self.rank_pattern)

    @cached_property
    def _alphas(self) -> dict[str, tuple[int, float]]:
        return _by_name(self.alpha_pattern)

    def _has_layer(self, module: str) -> bool:
        if self.layers is None or module in self.target_modules:
            return True
        match = _LAYER.match(module)
        return match is not None and int(match[2]) in self.layers


def _by_name(patterns: Mapping[str, float]) -> dict[str, tuple[int, float]]:
    """Name, with ^ before a whole one -> (place in the order, value)."""
    return {name.replace("\\.", "."): (i, value) for i, (name, value) in enumerate(patterns.items())}


def _first_match(values: Mapping[str, tuple[int, float]], module: str, default: float) -> float:
    """The value of the first name that a module has or ends in, as PEFT looks it up."""
    found = [values[name] for name in (f"^{module}", *_ends(module)) if name in values]
    return min(found)[1] if found else default


def _ends(module: str) -> list[str]:
    """The module's name, and what stands behind each of its dots."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _is_named(module: str, names: Set[str]) -> bool:
    return any(end in names for end in _ends(module))


def _check_rank(key: str, rank: object) -> None:
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise ArgumentError(f"{key}: expected a whole number from 1 to {MAX_RANK}, got {rank!r:.80}")


def _check_alpha(key: str, alpha: object) -> None:
    if type(alpha) not in (int, float) or not abs(alpha) <= MAX_ALPHA:  # type: ignore[arg-type]
        raise ArgumentError(f"{key}: expected a number of at most {MAX_ALPHA}, got {alpha!r:.80}")


def _expect(values: dict[str, Any], key: str, allowed: tuple[str | None, ...]) -> None:
    value = values.pop(key, None)
    if not (value is None or isinstance(value, str)) or value not in allowed:
        raise ArgumentError(f"{key}: expected {allowed[-1]!r}, got {value!r:.80}")


def _bool(values: dict[str, Any], key: str) -> bool:
    value = values.pop(key, None)
    if value is not None and type(value) is not bool:
        raise ArgumentError(f"{key}: expected true or false, got {value!r:.80}")
    return bool(value)


def _names(values: dict[str, Any], key: str) -> tuple[str, ...] | str:
    value = values.pop(key, None)
    if value is None:
        return ()
    if isinstance(value, str) and len(value) <= MAX_REGEX_CHARS:
        return value
    names = value if isinstance(value, list) and len(value) <= MAX_NAMES else [None]
    if all(isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS for name in names):
        return tuple(sorted(set(names)))
    raise ArgumentError(f"{key}: expected names of modules, got {value!r:.80}")


def _layers(values: dict[str, Any]) -> tuple[int, ...] | None:
    pattern = values.pop("layers_pattern", None)
    if pattern not in (None, "", [], "layers", ["layers"]):
        raise ArgumentError(f"layers_pattern: expected 'layers', got {pattern!r:.80}")
    value = values.pop("layers_to_transform", None)
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if len(layers) > MAX_NAMES or any(type(layer) is not int for layer in layers):
        raise ArgumentError(f"layers_to_transform: expected numbers of layers, got {value!r:.80}")
    return tuple(sorted(set(layers)))


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    value = values.pop(key, None)
    if value is not None and not isinstance(value, dict):
        raise ArgumentError(f"{key}: expected an object, got {value!r:.80}")
    return value or {}
