"""HTML that is escaped by construction: text becomes markup only inside `element`."""

from __future__ import annotations

import html
import re

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)
_VOID = frozenset({"meta", "line", "path", "rect", "circle"})


class Html(str):
    """Markup that is safe to put in a page. Made by `element`, `join` and `text` alone."""

    __slots__ = ()


def text(value: str) -> Html:
    """Text as markup. Control characters and those that reorder or hide text are shown as escapes."""
    visible = _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", value)
    return Html(html.escape(visible, quote=True))


def join(*parts: str) -> Html:
    """Parts one after another; those that are not `Html` are escaped."""
    return Html("".join(part if isinstance(part, Html) else text(part) for part in parts))


def element(name: str, *children: str, **attributes: str | int | float | None) -> Html:
    """`<name attributes>children</name>`. A trailing `_` of an attribute name is dropped and other `_` become `-`; an
    attribute that is None is left out."""
    head = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{head}/>")
    return Html(f"<{name}{head}>{join(*children)}</{name}>")
