"""Charts, lineage and number formats on known values."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.ledger import Ledger, content_id
from pyengine.report import facts
from pyengine.report import format as fmt
from pyengine.report.charts import HEIGHT, MAX_POINTS, WIDTH, Series, line_chart, nice_ticks, tick_labels
from pyengine.report.lineage import drawing, layers_of, nodes_of, table, without_shortcuts
from pyengine.report.run import load_run

FINITE = st.floats(-1e12, 1e12)


def curve_points(svg: str, shape: str = "curve s1") -> list[tuple[float, float]]:
    paths = re.findall(rf'<path d="([^"]*)" class="{shape}"', svg)
    return [(float(x), float(y)) for path in paths for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", path)]


def test_chart_places_points_by_the_axes() -> None:
    svg = line_chart("t", "u", [Series("a", [(0, 0.0), (5, 10.0), (10, 5.0)])])
    left, right, top, bottom = 52, WIDTH - 12, 10, HEIGHT - 34
    middle = ((left + right) / 2, (top + bottom) / 2)
    assert curve_points(svg) == [(left, bottom), (middle[0], top), (right, middle[1])]
    labels = re.findall(r'<text x="45"[^>]*>([^<]*)<', svg)
    assert labels == ["0", "2", "4", "6", "8", "10"]
    heights = [float(y) for y in re.findall(r'<text x="45" y="([\d.]+)" class="tick end"', svg)]
    assert (heights[0], heights[-1]) == (bottom + 4, top + 4)


@given(st.lists(st.one_of(FINITE, st.sampled_from([math.nan, math.inf])), max_size=40), st.booleans())
def test_any_curve_stays_inside_the_chart(values: list[float], zero: bool) -> None:
    svg = line_chart("t", "", [Series("a", list(enumerate(values)))], zero=zero)
    assert not re.search("nan|inf", svg.replace("not finite", ""), re.IGNORECASE)
    for x, y in curve_points(svg):
        assert 52 - 0.1 <= x <= WIDTH - 12 + 0.1
        assert 10 - 0.1 <= y <= HEIGHT - 34 + 0.1


def test_a_spike_stays_visible_among_many_points() -> None:
    points = [(float(step), 1.0) for step in range(50 * MAX_POINTS)]
    points[4321] = (4321.0, 100.0)
    svg = line_chart("t", "", [Series("a", points)], zero=True)
    assert len(curve_points(svg)) <= MAX_POINTS
    assert min(y for _, y in curve_points(svg, "band s1")) == 10.0


def test_values_that_are_not_finite_leave_a_gap() -> None:
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 3.0), (5, 4.0), (6, math.inf), (7, 2.0)]
    svg = line_chart("t", "", [Series("a", points)])
    assert svg.count('class="curve s1"') == 2
    assert svg.count("<circle") == 1
    assert "(2 not finite)" in svg


@given(FINITE, FINITE, st.integers(2, 8))
def test_ticks_cover_the_range_evenly_and_their_labels_differ(a: float, b: float, count: int) -> None:
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high, count)
    room = (high - low) * 1e-6
    assert ticks[0] <= low + room
    assert ticks[-1] >= high - room
    assert len(ticks) <= count + 3
    assert len(tick_labels(ticks)) == len(ticks)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1e-3, ["0", "0.0002", "0.0004", "0.0006", "0.0008", "0.0010"]),
        (2.1, 3.4, ["2.0", "2.5", "3.0", "3.5"]),
        (0, 5400, ["0", "2k", "4k", "6k"]),
        (0, 2.2e6, ["0", "0.5M", "1.0M", "1.5M", "2.0M", "2.5M"]),
        (0, 4e-5, ["0", "1e-5", "2e-5", "3e-5", "4e-5"]),
        (-2, 3, ["-2", "-1", "0", "1", "2", "3"]),
        (7, 7, ["7"]),
    ],
)
def test_tick_labels(low: float, high: float, labels: list[str]) -> None:
    assert tick_labels(nice_ticks(low, high, 5)) == labels


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"),
        (1234567, "1\u2009234\u2009567"),
        (-1000, "-1\u2009000"),
        (1.23456, "1.235"),
        (0.03164, "0.03164"),
        (1e-4, "1e-4"),
        (2.5e-7, "2.5e-7"),
        (12345.6, "12\u2009346"),
        (3.0, "3"),
        (1e300, "1e300"),
        (math.nan, "NaN"),
        (-math.inf, "-Infinity"),
        ("NaN", "NaN"),
        (None, "unknown"),
        (True, "unknown"),
        ("12", "unknown"),
        ([1], "unknown"),
    ],
)
def test_numbers(value: object, written: str) -> None:
    assert fmt.number(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (9_076_694, "9.08 MB"),
        (1.5e12, "1.5 TB"),
        (-1, "unknown"),
        ("1", "unknown"),
    ],
)
def test_sizes(value: object, written: str) -> None:
    assert fmt.size(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.5, "0.5 s"),
        (59.94, "59.9 s"),
        (60, "1 min 0 s"),
        (2835.0, "47 min 15 s"),
        (7320, "2 h 2 min"),
        (None, "unknown"),
        (-1, "unknown"),
    ],
)
def test_durations(value: object, written: str) -> None:
    assert fmt.seconds(value) == written


def record_graph(folder: Path, graph: dict[str, str], kinds: dict[str, str]) -> None:
    """`graph` maps what an entry makes to the letters it was made from."""
    with Ledger(folder) as ledger:
        for made, sources in graph.items():
            inputs = {source: content_id(source.encode()) for source in sources}
            ledger.record(kinds.get(made, "step"), inputs=inputs, outputs={made: content_id(made.encode())})


def test_graph_links_shares_and_reduces(tmp_path: Path) -> None:
    graph = {"a": "x", "b": "a", "c": "ab", "d": "c", "e": "ca", "f": "ca", "g": "d", "h": "z"}
    record_graph(tmp_path, graph, dict.fromkeys("ef", facts.EVALUATE))
    nodes = nodes_of(load_run(tmp_path))
    assert [[next(iter(entry.outputs)) for entry in node.entries] for node in nodes] == [
        ["a"], ["b"], ["c"], ["d"], ["e", "f"], ["g"], ["h"]
    ]  # fmt: skip
    assert [node.parents for node in nodes] == [(), (0,), (0, 1), (2,), (0, 2), (3,), ()]
    reduced = without_shortcuts(nodes)
    assert [node.parents for node in reduced] == [(), (0,), (1,), (2,), (2,), (3,), ()]
    assert layers_of(reduced) == [[0, 6], [1], [2], [3, 4], [5]]


def test_an_entry_never_comes_from_a_later_one(tmp_path: Path) -> None:
    record_graph(tmp_path, {"a": "b", "b": "a", "c": "c"}, {})
    assert [node.parents for node in nodes_of(load_run(tmp_path))] == [(), (0,), ()]
    shown = table(load_run(tmp_path))
    assert shown.count("from outside this run") == 2
    assert shown.count('href="#entry-1"') == 1


def test_graph_too_large_to_read_is_left_to_the_table(tmp_path: Path) -> None:
    record_graph(tmp_path, {str(number): "" for number in range(30)}, {})
    assert drawing(load_run(tmp_path)) == ""
    assert table(load_run(tmp_path)).count("<tr>") == 31
