"""Turns whatever the library `tokenizers` raises, panics included, into typed errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyengine.errors import PyEngineError


@contextmanager
def typed_errors(make_error: Callable[[str], PyEngineError]) -> Iterator[None]:
    """A panic of Rust code arrives as `pyo3_runtime.PanicException`, which derives from BaseException only."""
    try:
        yield
    except PyEngineError:
        raise
    except Exception as error:
        raise make_error(_one_line(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise make_error(f"the tokenizers library panicked: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
