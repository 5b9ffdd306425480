"""Numbers, sizes and ids as a reader wants them. What is not known reads "unknown"."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

UNKNOWN = "unknown"

_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def number(value: Any) -> str:
    """An integer with thin spaces between thousands, or a float with four significant digits."""
    if isinstance(value, bool) or value is None:
        return UNKNOWN
    if isinstance(value, str):
        return value if value in _NOT_FINITE else UNKNOWN
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u2009")
    if not isinstance(value, float):
        return UNKNOWN
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    size = abs(value)
    if value == int(value) and size < 1e15:
        return number(int(value))
    if 1e-3 <= size < 1e4:
        return f"{value:.4g}"
    if 1e4 <= size < 1e15:
        return number(round(value))
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def size(value: Any) -> str:
    """Bytes in decimal units."""
    if not is_number(value) or value < 0:
        return UNKNOWN
    if value < 1000:
        return f"{number(value)} B"
    power = next((power for power in (1, 2, 3) if value < 999.5 * 1000**power), 4)
    return f"{value / 1000**power:.3g} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def seconds(value: Any) -> str:
    """A duration."""
    if not is_number(value) or value < 0:
        return UNKNOWN
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def words(value: Any) -> str:
    """Any fact as text."""
    if value is None or value == "":
        return UNKNOWN
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list):
        return ", ".join(words(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {words(item)}" for key, item in value.items()) or "none"
    return UNKNOWN


def with_unit(value: Any, unit: str, write: Callable[[Any], str] = number) -> str:
    """A number and its unit, or "unknown" alone."""
    written = write(value)
    return written if written == UNKNOWN or not unit else f"{written} {unit}"


def short_id(content_id: str) -> str:
    """The first twelve digits of a content id."""
    return content_id.removeprefix("blake3:")[:12]


def is_number(value: Any) -> bool:
    """Whether a fact is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
