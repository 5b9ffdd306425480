"""The adapters of one `LLM`: loaded and dropped by name while it runs."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pyengine import _C
from pyengine.adapters import AdapterWeights, read_adapter
from pyengine.adapters.files import LinearModule
from pyengine.errors import ArgumentError, CapacityError
from pyengine.infer.engine_lock import EngineLock
from pyengine.infer.loader import SLOTS, LoadedModel
from pyengine.spec import ModelSpec

MAX_ADAPTERS = 256
MAX_ADAPTER_BYTES = 8 << 30
MAX_ADAPTER_NAME_CHARS = 256


@dataclass(frozen=True)
class AdapterInfo:
    """One loaded adapter."""

    name: str
    path: str
    content_id: str
    """Of its two files."""
    rank: int
    """The largest of its modules."""
    num_modules: int
    num_parameters: int
    num_bytes: int
    """In memory; weights that one token reads."""


class AdapterTable:
    """Name -> adapter. Safe to use from several threads.

    A request holds the adapter that it began with: dropping a name takes it from new requests at once, those under way
    end with it, and its memory goes with the last of them.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._lock = EngineLock()
        self._entries: dict[str, tuple[AdapterInfo, _C.Adapter]] = {}
        # Names of those that are being loaded, and the bytes that are set aside for them.
        self._reserved: dict[str, int] = {}
        # Dropped ones that a request still holds count too.
        self._alive: weakref.WeakSet[_C.Adapter] = weakref.WeakSet()

    def load(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        """See `LLM.load_adapter`."""
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_ADAPTER_NAME_CHARS:
            raise ArgumentError(f"name: expected 1 to {MAX_ADAPTER_NAME_CHARS} printable characters, got {name!r:.80}")
        with self._lock:
            self._reserve_name(name)
        try:
            weights = read_adapter(path, self._loaded.spec)
            num_bytes = sum(module.a.nbytes + module.b.nbytes for module in weights.modules)
            with self._lock:
                self._check_room(num_bytes)
                self._reserved[name] = num_bytes
            native = _native(weights, self._loaded)
            info = AdapterInfo(
                name=name,
                path=weights.path,
                content_id=weights.content_id,
                rank=weights.rank,
                num_modules=len(weights.modules),
                num_parameters=weights.num_parameters,
                num_bytes=native.num_bytes,
            )
        except BaseException:
            with self._lock:
                del self._reserved[name]
            raise
        with self._lock:
            del self._reserved[name]
            self._check_room(native.num_bytes)
            self._entries[name] = info, native
            self._alive.add(native)
        return info

    def drop(self, name: str) -> None:
        with self._lock:
            if name not in self._entries:
                raise self._unknown("name", name)
            del self._entries[name]

    def get(self, name: str | None, argument: str = "adapter") -> _C.Adapter | None:
        """The adapter of a name; None for None."""
        if name is None:
            return None
        entry = self._entries.get(name) if isinstance(name, str) else None
        if entry is None:
            raise self._unknown(argument, name)
        return entry[1]

    def infos(self) -> dict[str, AdapterInfo]:
        return {name: info for name, (info, _) in list(self._entries.items())}

    def _reserve_name(self, name: str) -> None:
        if name in self._entries or name in self._reserved:
            raise ArgumentError(f"name: expected one that is not in use, got {name!r}; drop it first")
        if len(self._entries) + len(self._reserved) >= MAX_ADAPTERS:
            raise CapacityError(f"adapters: at most {MAX_ADAPTERS} are loaded at a time; drop one first")
        self._reserved[name] = 0

    def _check_room(self, num_bytes: int) -> None:
        used = sum(adapter.num_bytes for adapter in self._alive) + sum(self._reserved.values())
        if used + num_bytes > MAX_ADAPTER_BYTES:
            raise CapacityError(
                f"adapters: {num_bytes} bytes more than the {used} in use are over the limit of {MAX_ADAPTER_BYTES}; "
                "drop one first"
            )

    def _unknown(self, argument: str, name: object) -> ArgumentError:
        names = ", ".join(map(repr, list(self._entries))) or "none is loaded"
        return ArgumentError(f"{argument}: expected the name of a loaded adapter ({names}), got {name!r:.80}")


def _native(weights: AdapterWeights, loaded: LoadedModel) -> _C.Adapter:
    native = _C.Adapter(loaded.model)
    for module in weights.modules:
        slot, offset = _place(module.module, loaded.spec)
        native.add(module.module.layer, slot, offset, _bits(module.a), _bits(module.b), module.scale)
    return native


def _bits(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """float32 as it is, bfloat16 as uint16."""
    return values.view(np.uint16) if values.dtype == np.dtype(ml_dtypes.bfloat16) else values


def _place(module: LinearModule, spec: ModelSpec) -> tuple[str, int]:
    """The native slot of a module, and its first row in it. Rows are in the order of Hugging Face in every slot, also
    where a file holds them in another."""
    shapes = spec.tensor_shapes()
    for slot, parts in SLOTS.items():
        names = [f"model.layers.{module.layer}.{part}.weight" for part in parts]
        if module.weights[0] in names:
            first = names.index(module.weights[0])
            assert names[first : first + len(module.weights)] == list(module.weights)
            return slot, sum(shapes[name][0] for name in names[:first])
    raise AssertionError(f"{module.name} is in no slot")
