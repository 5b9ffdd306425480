"""docs/limits.md holds every limit of the code, with the value that the code has."""

import ast
import dataclasses
import importlib
import math
import re

import pytest
from rules import ROOT, tracked

from pyengine.errors import ArgumentError

UNITS = {"": 1, "bytes": 1, "characters": 1, "times": 1, "s": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
ROWS = re.findall(r"^\| [^|]+ \| ([^|]+) \| `([^`]+)` \|$", (ROOT / "docs/limits.md").read_text(), re.MULTILINE)
# Bounds of the work of one task: they cut work into pieces and refuse nothing.
NOT_LIMITS = {"kMaxPanelsPerTask"}


def parse_value(text):
    """2^64 - 1, 65,535 bytes, 64 MiB, 2 s."""
    match = re.fullmatch(r"([\d,]+)(?:\^(\d+))?( - 1)?(?: (\w+))?", text)
    assert match, f"'{text}' is no value"
    base, power, minus_one, unit = match.groups()
    return int(base.replace(",", "")) ** int(power or 1) * UNITS[unit or ""] - bool(minus_one)


def evaluate(text):
    """A constant expression of Python or C++."""
    text = re.sub(r"\b(?:u?int\d+_t|size_t)\{([^}]*)\}", r"(\1)", text).replace("'", "_")

    def number(node):
        match node:
            case ast.Constant(value=int() | float() as value):
                return value
            case ast.BinOp(left=left, op=ast.LShift(), right=right):
                return number(left) << number(right)
            case ast.BinOp(left=left, op=ast.Pow(), right=right):
                return number(left) ** number(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return number(left) * number(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return number(left) - number(right)
        raise AssertionError(f"'{text}' is no constant expression")

    return number(ast.parse(text, mode="eval").body)


def constant(path, name):
    pattern = rf"\b{name}(?:: \w+)? = ([^;#\n]+)" if path.suffix == ".py" else rf"\bconstexpr \w+ {name} = ([^;]+);"
    found = re.findall(pattern, path.read_text(), re.MULTILINE)
    assert len(found) == 1, f"{path} defines {name} {len(found)} times"
    return evaluate(found[0].strip())


def class_of(path, name):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("value", "where"), ROWS, ids=[where for _, where in ROWS])
def test_value_is_that_of_the_code(value, where):
    file, name = where.split(":")
    path, expected = ROOT / file, parse_value(value)
    if match := re.fullmatch(r"(\w+)\((\w+)\)", name):  # the largest value that an argument takes
        owner, argument = class_of(path, match[1]), match[2]
        owner(**{argument: expected})
        with pytest.raises(ArgumentError, match=f"^{argument}: "):
            owner(**{argument: math.nextafter(expected, math.inf) if expected <= 100 else expected + 1})
    elif "." in name:  # the default of a field
        owner, field = name.split(".")
        assert {f.name: f.default for f in dataclasses.fields(class_of(path, owner))}[field] == expected
    else:
        assert constant(path, name) == expected


def test_every_limit_has_a_row():
    """A constant with `max` in its name is a limit, unless a kernel uses it to size its own work."""
    named = {where for _, where in ROWS}
    places = {
        f"{path.relative_to(ROOT)}:{name}"
        for pattern, expression in [
            ("pyengine/**/*.py", r"^((?:DEFAULT_)?MAX_[A-Z_]+|_MAX_\w*(?:BYTES|DIMS|ALIGNMENT))(?:: \w+)? = "),
            ("csrc/**/*.h", r"\bconstexpr \w+ (k[A-Z]\w*Max[A-Z]\w*|kMax\w+) = "),
            ("csrc/**/*.cpp", r"\bconstexpr \w+ (kMax\w+) = "),
        ]
        for path in tracked(pattern)
        if not path.name.endswith(".isa.cpp") and "testing" not in path.parts and "simd" not in path.parts
        for name in re.findall(expression, path.read_text(), re.MULTILINE)
        if name not in NOT_LIMITS
    }
    assert places, "the patterns match nothing"
    missing = {place for place in places if place not in named}
    assert not missing, f"docs/limits.md lacks {sorted(missing)}"


def test_rows_are_unique():
    places = [where for _, where in ROWS]
    assert len(places) > 80
    assert len(set(places)) == len(places)
