"""Lineage: which entry was made from which, as a drawing and as a table."""

from __future__ import annotations

from typing import NamedTuple

from pyengine.ledger import Entry
from pyengine.report import facts
from pyengine.report import format as fmt
from pyengine.report.html import Html, element, join
from pyengine.report.run import Run, made_by, title

MAX_NODES = 60
MAX_PER_LAYER = 6

_BOX_WIDTH, _BOX_HEIGHT, _GAP_X, _GAP_Y = 208, 46, 20, 32
_MAX_LABEL, _MAX_DETAIL = 25, 32
_LEFT_OUT = frozenset({facts.ENVIRONMENT, "repair"})


class Node(NamedTuple):
    """Entries of one kind made from the same things; `parents` are indices of nodes."""

    entries: tuple[Entry, ...]
    parents: tuple[int, ...]


def nodes_of(run: Run) -> list[Node]:
    """The graph of a run in ledger order. Evaluations and answers that read the same things share a node."""
    made = made_by(run.entries)
    node_of_entry: dict[int, int] = {}
    nodes: list[Node] = []
    shared: dict[tuple[str, tuple[int, ...]], int] = {}
    for index, entry in enumerate(run.entries):
        if entry.kind in _LEFT_OUT:
            continue
        sources = {made[value] for value in entry.inputs.values() if made.get(value, index) < index}
        parents = tuple(sorted({node_of_entry[source] for source in sources if source in node_of_entry}))
        key = (entry.kind, parents)
        if entry.kind in (facts.EVALUATE, facts.GENERATE) and key in shared:
            place = shared[key]
            nodes[place] = nodes[place]._replace(entries=(*nodes[place].entries, entry))
        else:
            place = len(nodes)
            nodes.append(Node((entry,), parents))
            shared[key] = place
        node_of_entry[index] = place
    return nodes


def without_shortcuts(nodes: list[Node]) -> list[Node]:
    """The graph without links that a longer way implies (its transitive reduction)."""
    above: list[set[int]] = []
    for node in nodes:
        above.append(set(node.parents).union(*(above[parent] for parent in node.parents)))
    return [
        node._replace(
            parents=tuple(
                parent for parent in node.parents if not any(parent in above[other] for other in node.parents)
            )
        )
        for node in nodes
    ]


def layers_of(nodes: list[Node]) -> list[list[int]]:
    """Nodes by depth: a node stands below all of its parents."""
    depth: list[int] = []
    for node in nodes:
        depth.append(1 + max((depth[parent] for parent in node.parents), default=-1))
    return [[index for index, at in enumerate(depth) if at == level] for level in range(max(depth, default=-1) + 1)]


def drawing(run: Run) -> Html:
    """The graph from top to bottom as SVG; nothing if it is empty or too large to read."""
    nodes = without_shortcuts(nodes_of(run))
    layers = layers_of(nodes)
    widest = max(map(len, layers), default=0)
    if not nodes or len(nodes) > MAX_NODES or widest > MAX_PER_LAYER:
        return join()
    width = widest * (_BOX_WIDTH + _GAP_X) + _GAP_X
    height = len(layers) * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y + 4
    corner: dict[int, tuple[float, float]] = {}
    for level, members in enumerate(layers):
        middles = {
            index: sum(corner[parent][0] for parent in nodes[index].parents) / len(nodes[index].parents)
            for index in members
            if nodes[index].parents
        }
        members = sorted(members, key=lambda index: (middles.get(index, 0.0), index))
        left = (width - len(members) * (_BOX_WIDTH + _GAP_X) + _GAP_X) / 2
        for place, index in enumerate(members):
            corner[index] = (left + place * (_BOX_WIDTH + _GAP_X), 2 + level * (_BOX_HEIGHT + _GAP_Y))
    parts: list[Html] = []
    for index, node in enumerate(nodes):
        x, y = corner[index]
        for parent in node.parents:
            from_x, from_y = corner[parent]
            start, end = (from_x + _BOX_WIDTH / 2, from_y + _BOX_HEIGHT), (x + _BOX_WIDTH / 2, y)
            bend = (end[1] - start[1]) / 2
            path = (
                f"M{start[0]:.1f} {start[1]:.1f}C{start[0]:.1f} {start[1] + bend:.1f} "
                f"{end[0]:.1f} {end[1] - bend:.1f} {end[0]:.1f} {end[1]:.1f}"
            )
            parts.append(element("path", d=path, class_="edge"))
    for index, node in enumerate(nodes):
        x, y = corner[index]
        head, detail = _labels(node)
        parts.append(
            element(
                "g",
                element("rect", x=f"{x:.1f}", y=y, width=_BOX_WIDTH, height=_BOX_HEIGHT, rx=7, class_="box"),
                element("text", _cut(head, _MAX_LABEL), x=f"{x + _BOX_WIDTH / 2:.1f}", y=y + 18, class_="node"),
                element("text", _cut(detail, _MAX_DETAIL), x=f"{x + _BOX_WIDTH / 2:.1f}", y=y + 34, class_="detail"),
            )
        )
    label = f"Lineage graph with {len(nodes)} boxes; the table below holds the same."
    svg = element("svg", *parts, viewBox=f"0 0 {width} {height}", width=width, role="img", aria_label=label)
    note = "Links that a longer way implies are left out of the drawing; the table has all of them."
    return join(element("div", svg, class_="scroll graph"), element("p", note, class_="note"))


def table(run: Run) -> Html:
    """One row an entry: what it is, what it was made from, what it made."""
    made = made_by(run.entries)
    rows = []
    for index, entry in enumerate(run.entries):
        if entry.kind in _LEFT_OUT:
            continue
        inputs = [_origin(name, value, made, run.entries, index) for name, value in entry.inputs.items()]
        outputs = [_named_id(name, value) for name, value in entry.outputs.items()]
        rows.append(
            element(
                "tr",
                element("td", str(index + 1), class_="n", id=f"entry-{index + 1}"),
                element("td", title(entry)),
                element("td", *(inputs or [_unknown()])),
                element("td", *(outputs or [_made_no_file(entry)])),
            )
        )
    if not rows:
        return element("p", fmt.UNKNOWN, class_="unknown")
    head = element("tr", *(element("th", name) for name in ("Line", "Step", "Made from", "Made")))
    return element(
        "div", element("table", element("thead", head), element("tbody", *rows), class_="lineage"), class_="scroll"
    )


def _origin(name: str, value: str, made: dict[str, int], entries: list[Entry], index: int) -> Html:
    source = made.get(value, index)
    if source >= index:
        return element("div", _named_id(name, value, wrap="span"), " (from outside this run)")
    line = f"line {source + 1}"
    shown = entries[source].kind not in _LEFT_OUT
    link = element("a", line, href=f"#entry-{source + 1}") if shown else line
    return element("div", _named_id(name, value, wrap="span"), " from ", link)


def _named_id(name: str, value: str, wrap: str = "div") -> Html:
    return element(wrap, f"{name} ", element("code", fmt.short_id(value), title=value))


def _made_no_file(entry: Entry) -> Html:
    """An evaluation makes a figure; anything else without an output is unknown."""
    value = fmt.with_unit(entry.facts.get("value"), str(entry.facts.get("unit") or ""))
    return element("span", value) if entry.kind == facts.EVALUATE and value != fmt.UNKNOWN else _unknown()


def _unknown() -> Html:
    return element("span", fmt.UNKNOWN, class_="unknown")


def _labels(node: Node) -> tuple[str, str]:
    entry = node.entries[0]
    count = len(node.entries)
    known = entry.facts
    if entry.kind == facts.GENERATE:
        return f"{count} answer{'s' * (count > 1)}", fmt.words(known.get("model"))
    if entry.kind == facts.EVALUATE:
        names = fmt.words([item.facts.get("name") for item in node.entries])
        return f"{count} evaluation{'s' * (count > 1)}", names
    details = {
        facts.CORPUS: fmt.with_unit(known.get("documents"), "documents"),
        facts.TOKENIZER: fmt.with_unit(known.get("vocab_size"), "entries"),
        facts.SHARDS: fmt.with_unit(known.get("tokens"), "tokens"),
        facts.TRAIN: fmt.with_unit(known.get("steps"), "steps"),
        facts.CHECKPOINT: "step " + fmt.number(known.get("step")),
        facts.QUANTIZE: fmt.with_unit(known.get("bits_per_weight"), "bits per weight"),
    }
    return title(entry), details.get(entry.kind, fmt.short_id(entry.id))


def _cut(label: str, limit: int) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"
