"""Tables of facts, and the words for what is not known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pyengine.ledger import Entry
from pyengine.report import format as fmt
from pyengine.report.html import Html, element


def id_rows(entry: Entry | None) -> list[tuple[str, str]]:
    """Rows with the hashes of what an entry made."""
    outputs = entry.outputs if entry else {}
    return [
        (f"Hash of {name}", element("code", fmt.short_id(value), title=value)) for name, value in outputs.items()
    ] or [("Hash", fmt.UNKNOWN)]


def facts_table(rows: Iterable[tuple[str, str]]) -> Html:
    """Names beside values; "unknown" is set apart."""
    body = [
        element("tr", element("th", name), element("td", value, class_="unknown" if value == fmt.UNKNOWN else None))
        for name, value in rows
    ]
    return element("div", element("table", element("tbody", *body), class_="facts"), class_="scroll")


def counts_table(counts: Any, what: str) -> Html:
    """Counts, largest first, or "unknown"."""
    if not isinstance(counts, dict) or not counts:
        return unknown()
    ordered = sorted(counts.items(), key=lambda item: (-item[1] if fmt.is_number(item[1]) else 0, item[0]))
    rows = [
        [element("td", name.replace("_", " ")), element("td", fmt.number(count), class_="n")] for name, count in ordered
    ]
    return table((what, "Count"), rows, numeric=(1,))


def table(heads: Sequence[str], rows: Iterable[Sequence[Html]], numeric: Iterable[int] = ()) -> Html:
    """A table with heads; `numeric` columns stand to the right."""
    right = set(numeric)
    head = element(
        "tr", *(element("th", name, class_="n" if place in right else None) for place, name in enumerate(heads))
    )
    body = element("tbody", *(element("tr", *row) for row in rows))
    return element("div", element("table", element("thead", head), body), class_="scroll")


def unknown(note: str = "") -> Html:
    """The word for what is not known, with a reason."""
    return element("p", fmt.UNKNOWN, element("span", f" · {note}" if note else ""), class_="unknown")


def cut(value: str, limit: int) -> str:
    """Text of at most `limit` characters, and how many more there are."""
    return value if len(value) <= limit else f"{value[:limit]}… ({len(value) - limit} more characters in the ledger)"


def fact(entry: Entry | None, name: str) -> Any:
    """A fact of an entry that may not be there."""
    return None if entry is None else entry.facts.get(name)
