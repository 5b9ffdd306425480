"""Typed errors: every failure that a user can cause or meet derives from `PyEngineError`."""

from __future__ import annotations

from os import PathLike


class PyEngineError(Exception):
    """Base of all errors that pyengine raises on purpose."""


class ArgumentError(PyEngineError, ValueError):
    """An argument is not what the function accepts: "argument: expected ..., got ..."."""


class ModelFileError(PyEngineError):
    """A model file is damaged or not supported; names the file, the byte offset and the field."""

    def __init__(
        self, message: str, *, path: str | PathLike[str], offset: int | None = None, field: str | None = None
    ) -> None:
        self.path = path
        self.offset = offset
        self.field = field
        where = str(path) + ("" if offset is None else f" at byte {offset}") + ("" if field is None else f" ({field})")
        super().__init__(f"{where}: {message}")


class ConfigError(PyEngineError):
    """A configuration value is wrong; names the key, the file and the line."""

    def __init__(
        self, message: str, *, key: str | None = None, file: str | None = None, line: int | None = None
    ) -> None:
        self.key = key
        self.file = file
        self.line = line
        super().__init__(message)


class CapacityError(PyEngineError):
    """A stated limit (memory, length, count) would be passed."""


class BackendUnavailable(PyEngineError):
    """A backend that was asked for cannot run on this machine."""
