"""Checkpoints that survive crashes: directories that appear whole, by rename, with a hashed manifest.

A save writes `step-00001200.tmp-<pid>-<random>/`, syncs every file, then `MANIFEST.json` with the size and BLAKE3 hash
of each, then the folder, renames it to `step-00001200` and syncs the parent. A checkpoint is a folder whose manifest
holds; which one is the latest is computed, never stored. A folder that fails is reported, left in place, and the one
before it is used.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from pyengine.errors import PyEngineError
from pyengine.formats import open_safetensors, write_safetensors
from pyengine.formats.atomic import atomic_write
from pyengine.ledger import content_id
from pyengine.models.tensors import from_numpy, to_numpy

MANIFEST_NAME = "MANIFEST.json"
STATE_NAME = "state.json"
FORMAT = "pyengine checkpoint"
VERSION = 1
MAX_MANIFEST_BYTES = 16 << 20
MIN_KEPT = 2

_FREE_SPACE_FACTOR = 1.2
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"step-\d{8,}\.tmp-(\d+)-[0-9a-f]+")

logger = logging.getLogger("pyengine")


class CheckpointError(PyEngineError):
    """A checkpoint is damaged, or cannot be written. `path` is its folder or the file in it."""

    def __init__(self, path: str | os.PathLike[str], message: str) -> None:
        super().__init__(path, message)
        self.path = Path(path)
        self.message = message

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class ManifestFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and content id of one file."""

    size: int
    id: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `MANIFEST.json` holds: every other file of the checkpoint."""

    format: str
    version: int
    step: int
    files: dict[str, ManifestFile]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose manifest was verified.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        id: content id of the manifest, which names all files by their hash.
        num_bytes: size of all files.
    """

    path: Path
    step: int
    id: str
    num_bytes: int

    def state(self) -> dict[str, Any]:
        """The content of `state.json`."""
        state: dict[str, Any] = msgspec.json.decode((self.path / STATE_NAME).read_bytes())
        return state

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `name`.safetensors, copied."""
        reader = open_safetensors(self.path / f"{name}.safetensors")
        return {key: from_numpy(reader[key]) for key in reader}


class Latest(NamedTuple):
    """The newest checkpoint that holds, or None, and why each newer one does not."""

    checkpoint: Checkpoint | None
    damaged: list[CheckpointError]


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    keep: int = MIN_KEPT,
) -> Checkpoint:
    """Write the checkpoint of `step` under `folder`; when this returns, it is on disk, and older ones may be gone.

    Args:
        folder: holds all checkpoints of a run; one process writes to it.
        step: optimizer steps done.
        tensors: file name without suffix -> tensors of that safetensors file.
        state: JSON values.
        files: file name -> content of further files.
        keep: checkpoints to keep, at least 2; others are deleted only after the new one was read back and verified.

    Raises:
        CheckpointError: not enough free space, or a different checkpoint of this step exists.
        OSError: the disk failed. What was there before is as it was.
    """
    folder = Path(folder)
    if not folder.is_dir():
        folder.mkdir(parents=True)
        _sync_folder(folder.parent)
    _remove_leftovers(folder)
    _check_space(folder, tensors)
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    os.mkdir(temporary)
    try:
        for name, group in tensors.items():
            write_safetensors(
                temporary / f"{name}.safetensors",
                {key: to_numpy(value) for key, value in group.items()},
                metadata={"format": "pt"},
            )
        for name, content in (files or {}).items():
            _write(temporary / name, content)
        _write(temporary / STATE_NAME, msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n")
        entries = {
            name: ManifestFile((temporary / name).stat().st_size, content_id(temporary / name))
            for name in sorted(os.listdir(temporary))
        }
        manifest = Manifest(format=FORMAT, version=VERSION, step=step, files=entries)
        # Every write also synced the folder.
        _write(temporary / MANIFEST_NAME, msgspec.json.encode(manifest))
        if final.exists() and not _make_way(final, temporary):
            shutil.rmtree(temporary)
        else:
            os.rename(temporary, final)
        _sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    checkpoint = verify_checkpoint(final)
    _delete_older(folder, checkpoint, max(keep, MIN_KEPT))
    return checkpoint


def latest_checkpoint(folder: str | os.PathLike[str]) -> Latest:
    """The newest checkpoint under `folder` that holds. Each damaged one on the way is logged and returned."""
    damaged: list[CheckpointError] = []
    for path in _candidates(Path(folder)):
        try:
            return Latest(verify_checkpoint(path), damaged)
        except CheckpointError as error:
            logger.warning("damaged checkpoint left out: %s", error)
            damaged.append(error)
    return Latest(None, damaged)


def verify_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read every byte of a checkpoint and compare it with the manifest.

    Raises:
        CheckpointError: names the first file that is missing, damaged or not in the manifest.
    """
    path = Path(path)
    manifest_path = path / MANIFEST_NAME
    try:
        if manifest_path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(manifest_path, f"expected at most {MAX_MANIFEST_BYTES} bytes, got more")
        content = manifest_path.read_bytes()
        manifest = msgspec.json.decode(content, type=Manifest)
        names = set(os.listdir(path)) - {MANIFEST_NAME}
    except OSError as error:
        raise CheckpointError(manifest_path, f"cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(manifest_path, f"expected a manifest: {error}") from error
    name = _NAME.fullmatch(path.name)
    for field, expected, got in (
        ("format", FORMAT, manifest.format),
        ("version", VERSION, manifest.version),
        ("step", int(name[1]) if name else manifest.step, manifest.step),
        ("encoding", msgspec.json.encode(manifest), content),
    ):
        if expected != got:
            raise CheckpointError(manifest_path, f"{field}: expected {expected!r:.200}, got {got!r:.200}")
    if missing := sorted(manifest.files.keys() - names):
        raise CheckpointError(path, f"expected the file {missing[0]!r} of the manifest, got none")
    if unknown := sorted(names - manifest.files.keys()):
        raise CheckpointError(path, f"expected only files of the manifest, got {unknown[0]!r}")
    for file_name, entry in manifest.files.items():
        _verify_file(path / file_name, entry)
    num_bytes = sum(entry.size for entry in manifest.files.values()) + len(content)
    return Checkpoint(path=path, step=manifest.step, id=content_id(content), num_bytes=num_bytes)


def _verify_file(path: Path, entry: ManifestFile) -> None:
    try:
        size = path.stat().st_size
        if size != entry.size:
            raise CheckpointError(path, f"expected {entry.size} bytes, got {size}")
        found = content_id(path)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    if found != entry.id:
        raise CheckpointError(path, f"expected {entry.id}, got {found}")


def _candidates(folder: Path) -> list[Path]:
    """Folders named as checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _make_way(final: Path, temporary: Path) -> bool:
    """Whether `temporary` may take the name `final`: a damaged folder there is moved aside, an equal one stays."""
    try:
        existing = verify_checkpoint(final)
    except CheckpointError:
        os.rename(final, final.with_name(f"{final.name}.damaged-{secrets.token_hex(4)}"))
        return True
    if (existing.path / MANIFEST_NAME).read_bytes() != (temporary / MANIFEST_NAME).read_bytes():
        raise CheckpointError(final, "expected no other checkpoint of this step, got one with different content")
    return False


def _delete_older(folder: Path, newest: Checkpoint, keep: int) -> None:
    """Keep the `keep` newest that hold. Damaged folders are not counted and not touched."""
    kept = 0
    for path in _candidates(folder):
        if kept < keep:
            try:
                kept += path == newest.path or bool(verify_checkpoint(path))
            except CheckpointError as error:
                logger.warning("damaged checkpoint not counted: %s", error)
        else:
            # Under its own name a folder that is half deleted would look like a damaged checkpoint.
            doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    """Delete what a process that is gone, or this one, left half written."""
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not os.path.exists(f"/proc/{match[1]}")):
            shutil.rmtree(path, ignore_errors=True)


def _check_space(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    needed = sum(value.numel() * value.element_size() for group in tensors.values() for value in group.values())
    free = shutil.disk_usage(folder).free
    if free < needed * _FREE_SPACE_FACTOR:
        raise CheckpointError(folder, f"expected {int(needed * _FREE_SPACE_FACTOR)} bytes of free space, got {free}")


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
