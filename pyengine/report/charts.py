"""Line charts as inline SVG: axes, ticks, units, legend. Colours come from the page's style sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from pyengine.report import format as fmt
from pyengine.report.html import Html, element

WIDTH, HEIGHT = 440, 230
MAX_POINTS = 220

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34


_Place: TypeAlias = Callable[[float, float], tuple[float, float]]


class Series(NamedTuple):
    """A named curve: points are (x, y) with x rising; y may be not finite, which leaves a gap."""

    name: str
    points: Sequence[tuple[float, float]]


class _Bucket(NamedTuple):
    x: float
    low: float
    mean: float
    high: float


def line_chart(title: str, unit: str, series: Sequence[Series], *, x_label: str = "step", zero: bool = False) -> Html:
    """A figure with title, unit, chart and legend.

    Over `MAX_POINTS` points of a curve become as many buckets: the line is their mean and the band runs from the least
    to the greatest value, so no spike is hidden.

    Args:
        title: what is drawn.
        unit: of the y axis.
        series: at most four curves; those without a finite value are named in the legend only.
        x_label: of the x axis.
        zero: whether the y axis starts at zero.
    """
    finite = [(x, y) for curve in series for x, y in curve.points if math.isfinite(y)]
    heading = element("h4", title, element("span", f" {unit}" if unit else "", class_="unit"))
    if not finite:
        return element("figure", heading, element("p", fmt.UNKNOWN, class_="unknown"))
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    y_low, y_high = min(y for _, y in finite), max(y for _, y in finite)
    y_ticks = nice_ticks(min(0.0, y_low) if zero else y_low, y_high, 5)
    x_ticks = [tick for tick in nice_ticks(x_low, x_high, 5) if x_low <= tick <= x_high]
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if x_high == x_low else (x - x_low) / (x_high - x_low)
        up = 0.5 if y_high == y_low else (y - y_low) / (y_high - y_low)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts: list[Html] = []
    for tick, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        _, y = place(x_low, tick)
        parts.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        parts.append(element("text", label, x=_LEFT - 7, y=f"{y + 4:.1f}", class_="tick end"))
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x, _ = place(tick, y_low)
        side = "middle" if x < WIDTH - 30 else "end"
        parts.append(element("text", label, x=f"{x:.1f}", y=HEIGHT - _BOTTOM + 16, class_=f"tick {side}"))
    base = HEIGHT - _BOTTOM
    parts.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=base, y2=base, class_="axis"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(element("text", x_label, x=middle, y=HEIGHT - 3, class_="tick middle"))

    legend: list[Html] = []
    spoken: list[str] = []
    for number, curve in enumerate(series[:4], start=1):
        runs = _runs(curve.points)
        lost = len(curve.points) - sum(map(len, runs))
        for run in runs:
            parts += _draw(run, number, place)
        last = fmt.number(runs[-1][-1][1]) if runs else fmt.UNKNOWN
        note = f" ({lost} not finite)" if lost else ""
        legend.append(
            element("li", element("span", class_=f"swatch s{number}"), f"{curve.name} ", element("b", last), note)
        )
        spoken.append(f"{curve.name}, last {last}")
    svg = element(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}: {'; '.join(spoken)}"
    )
    return element("figure", heading, svg, element("ul", *legend, class_="legend"))


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round values from at most `low` to at least `high`, about `count` of them, by steps of 1, 2 or 5."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    if rough == 0 or not math.isfinite(rough):
        return [low, high]
    power = 10.0 ** math.floor(math.log10(rough))
    if power == 0:
        return [low, high]
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if not first < last <= first + 4 * count:
        return [low, high]
    return [index * step for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of one axis: as few digits as tell neighbours apart, k and M for thousands and millions."""
    largest = max(abs(tick) for tick in ticks)
    step = min((abs(b - a) for a, b in itertools.pairwise(ticks)), default=largest)
    if largest == 0 or step == 0:
        return [fmt.number(tick) for tick in ticks]
    if largest < 1e-3 or largest >= 1e9:
        exponent = math.floor(math.log10(largest))
        digits = max(0, min(4, exponent - math.floor(math.log10(step) + 1e-9)))
        return ["0" if tick == 0 else _scientific(tick, digits) for tick in ticks]
    scale, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 or step >= 1e3 else (1.0, "")
    digits = max(0, min(6, -math.floor(math.log10(step / scale) + 1e-9)))
    return ["0" if tick == 0 else f"{tick / scale:.{digits}f}{suffix}" for tick in ticks]


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The stretches of finite points."""
    runs: list[list[tuple[float, float]]] = []
    open_run = False
    for x, y in points:
        if not math.isfinite(y):
            open_run = False
        elif open_run:
            runs[-1].append((x, y))
        else:
            runs.append([(x, y)])
            open_run = True
    return runs


def _draw(run: list[tuple[float, float]], number: int, place: _Place) -> list[Html]:
    if len(run) == 1:
        x, y = place(*run[0])
        return [element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.5, class_=f"dot s{number}")]
    buckets = _buckets(run)
    line = [place(bucket.x, bucket.mean) for bucket in buckets]
    parts = []
    if len(buckets) < len(run):
        top = [place(bucket.x, bucket.high) for bucket in buckets]
        bottom = [place(bucket.x, bucket.low) for bucket in reversed(buckets)]
        parts.append(element("path", d=_path(top + bottom) + "Z", class_=f"band s{number}"))
    parts.append(element("path", d=_path(line), class_=f"curve s{number}"))
    return parts


def _buckets(run: list[tuple[float, float]]) -> list[_Bucket]:
    size = max(1, math.ceil(len(run) / MAX_POINTS))
    buckets = []
    for start in range(0, len(run), size):
        chunk = run[start : start + size]
        values = [y for _, y in chunk]
        buckets.append(
            _Bucket(
                math.fsum(x / len(chunk) for x, _ in chunk),
                min(values),
                math.fsum(y / len(chunk) for y in values),
                max(values),
            )
        )
    return buckets


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
