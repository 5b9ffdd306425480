"""The errors that pyengine raises. Catch `PyEngineError` for all of them."""

from __future__ import annotations

__all__ = ["ArgumentError", "BackendUnavailable", "CapacityError", "ConfigError", "ModelFileError", "PyEngineError"]


class PyEngineError(Exception):
    """The root of every error that pyengine raises on purpose."""


class ArgumentError(PyEngineError, ValueError):
    """A caller passed something the function does not take: "argument: expected ..., got ..."."""


class ModelFileError(PyEngineError):
    """A model file breaks its format.

    Attributes:
        path: the file.
        offset: the byte in the file where reading stopped, or None.
        field: the part of the format that is wrong, or None.
        message: what was expected and what came.
    """

    def __init__(self, path: str, offset: int | None, field: str | None, message: str) -> None:
        super().__init__(path, offset, field, message)
        self.path = path
        self.offset = offset
        self.field = field
        self.message = message

    def __str__(self) -> str:
        place = []
        if self.offset is not None:
            place.append(f"at byte {self.offset}")
        if self.field is not None:
            place.append(f"field '{self.field}'")
        return ": ".join([self.path, *([", ".join(place)] if place else []), self.message])


class ConfigError(PyEngineError):
    """A configuration has an unknown key, or a value that its key does not take.

    Attributes:
        key: the dotted key, or None.
        file: the file it came from, or None for the command line or Python.
        line: the line in that file, from 1, or None.
        message: what was expected and what came.
    """

    def __init__(self, message: str, key: str | None = None, file: str | None = None, line: int | None = None) -> None:
        super().__init__(message, key, file, line)
        self.message = message
        self.key = key
        self.file = file
        self.line = line

    def __str__(self) -> str:
        place = self.file or ""
        if self.file is not None and self.line is not None:
            place += f":{self.line}"
        return ": ".join(part for part in (place, self.key or "", self.message) if part)


class CapacityError(PyEngineError):
    """A stated limit of memory, sequence length or queue is reached."""


class BackendUnavailable(PyEngineError):
    """No kernel or library on this machine can do what was asked."""
