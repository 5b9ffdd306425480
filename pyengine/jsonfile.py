"""Read one JSON object from a file of a model: bounded size, no duplicate keys, no NaN, typed errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from pyengine.errors import ModelFileError


def file_error(
    path: str | os.PathLike[str], message: str, *, offset: int | None = None, field: str | None = None
) -> ModelFileError:
    """A ModelFileError for `path`: what was expected and what came, at the byte `offset` or in `field`."""
    return ModelFileError(os.fspath(path), offset, field, message)


def read_json_object(path: str | os.PathLike[str], *, max_bytes: int) -> dict[str, Any]:
    """The object in `path`, at most `max_bytes` long. Raises ModelFileError, also when the file does not exist."""
    return parse_json_object(read_bounded(path, max_bytes=max_bytes), path)


def read_bounded(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """The bytes of a regular file, at most `max_bytes` of them."""
    path = Path(path)
    try:
        if not path.is_file():
            raise file_error(path, "expected a regular file, got none")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise file_error(path, f"cannot be read: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise file_error(path, f"expected at most {max_bytes} bytes, got more")
    return data


def parse_json_object(data: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that `data`, the content of `path`, holds."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise file_error(path, "expected every key once, got it twice", field=key)
                seen.add(key)
        return result

    def no_constant(name: str) -> NoReturn:
        raise file_error(path, f"expected JSON numbers, got {name}")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise file_error(path, "expected UTF-8", offset=error.start) from error
    except json.JSONDecodeError as error:
        raise file_error(path, f"expected JSON: {error.msg}", offset=error.pos) from error
    except RecursionError as error:
        raise file_error(path, "expected JSON of modest depth, got deeper nesting") from error
    except ValueError as error:
        raise file_error(path, f"expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise file_error(path, f"expected a JSON object, got {type(value).__name__}")
    return value
