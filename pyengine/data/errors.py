"""The error of damaged data files."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from pyengine.errors import PyEngineError


class DataFileError(PyEngineError):
    """A data file is damaged: `path`, and where it applies `line` (from 1), `offset` (bytes) and `field`."""

    def __init__(
        self,
        message: str,
        *,
        path: str | PathLike[str],
        line: int | None = None,
        offset: int | None = None,
        field: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.line = line
        self.offset = offset
        self.field = field
        where = str(path)
        where += "" if line is None else f", line {line}"
        where += "" if offset is None else f", byte {offset}"
        where += "" if field is None else f", {field}"
        super().__init__(f"{where}: {message}")
