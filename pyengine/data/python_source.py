"""Takes Python source apart: docstrings, prose comments, code without either, and function signatures."""

from __future__ import annotations

import ast
import codecs
import inspect
import io
import re
import tokenize
import warnings
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

_PRAGMA = re.compile(r"(?i)^(!|.*coding[:=]\s*[-\w.]+|type:|noqa\b|pragma\b|pylint:|mypy:|fmt:|ruff:|flake8:)")


Documented: TypeAlias = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Piece(NamedTuple):
    """A piece of text and the byte offset in the file of the first byte it comes from."""

    offset: int
    text: str


class Signature(NamedTuple):
    """A documented function: `signature` is its head with the class around it, body left out."""

    offset: int
    signature: str
    docstring: str


class PythonSource:
    """One parsed Python file.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError: `data` is not UTF-8 text that this
            Python can parse.
    """

    def __init__(self, data: bytes) -> None:
        data.decode("utf-8")
        self.data = data
        self.tree = parse_quietly(data)
        self.starts = [len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0]
        for line in data[self.starts[0] :].splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self._comments = list(_whole_line_comments(data))
        self._docstrings = sorted(_docstring_nodes(self.tree), key=lambda pair: (pair[1].lineno, pair[1].col_offset))

    def docstrings(self) -> Iterator[Piece]:
        """Docstrings of the module, its classes and functions, cleaned as `inspect.cleandoc` does, in file order."""
        for _, node in self._docstrings:
            yield Piece(self._offset(node.lineno, node.col_offset), inspect.cleandoc(_text_of(node)))

    def comments(self) -> Iterator[Piece]:
        """Blocks of whole-line comments: neighbouring lines at one indent joined, without marks, rulers, pragmas."""
        block: list[str] = []
        offset = last_row = last_column = -1
        for row, column, text in self._comments:
            if block and (row != last_row + 1 or column != last_column):
                yield from _comment_piece(offset, block)
                block = []
            if not block:
                offset = self._offset(row, column)
            block.append(text)
            last_row, last_column = row, column
        yield from _comment_piece(offset, block)

    def code(self, max_bytes: int) -> Iterator[Piece]:
        """The source without the lines of docstrings and whole-line comments, cut between top-level statements into
        pieces of at most `max_bytes` where the statements allow it. A docstring that is the whole body stays."""
        dropped = [(self.starts[row - 1], self.starts[row]) for row, _, _ in self._comments]
        for parent, node in self._docstrings:
            if len(parent.body) == 1 and not isinstance(parent, ast.Module):
                continue
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            start, end = self.starts[node.lineno - 1], self.starts[node.end_lineno]
            before = self.data[start : self._offset(node.lineno, node.col_offset)]
            after = self.data[self._offset(node.end_lineno, node.end_col_offset) : end]
            if not before.strip() and not after.strip():
                dropped.append((start, end))
        dropped.sort()
        piece_start = None
        piece_end = 0
        for start, end in self._statement_spans():
            if piece_start is None:
                piece_start = start
            elif end - piece_start > max_bytes:
                yield from self._without(piece_start, piece_end, dropped)
                piece_start = start
            piece_end = end
        if piece_start is not None:
            yield from self._without(piece_start, piece_end, dropped)

    def signatures(self) -> Iterator[Signature]:
        """Documented functions and methods, in file order; functions inside functions are left out."""
        yield from self._signatures(self.tree.body, [])

    def _signatures(self, body: list[ast.stmt], classes: list[str]) -> Iterator[Signature]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                bases = ", ".join(ast.unparse(base) for base in node.bases)
                head = "    " * len(classes) + f"class {node.name}" + (f"({bases})" if bases else "") + ":"
                yield from self._signatures(node.body, [*classes, head])
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node, clean=True)
                if not docstring:
                    continue
                indent = "    " * len(classes)
                word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
                result = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
                decorators = [f"{indent}@{ast.unparse(decorator)}" for decorator in node.decorator_list]
                head = f"{indent}{word} {node.name}({ast.unparse(node.args)}){result}:"
                text = "\n".join([*classes, *decorators, head])
                yield Signature(self._offset(node.lineno, node.col_offset), text, docstring)

    def _statement_spans(self) -> Iterator[tuple[int, int]]:
        previous = self.starts[0]
        for node in self.tree.body:
            assert node.end_lineno is not None
            end = self.starts[node.end_lineno]
            yield previous, max(previous, end)
            previous = max(previous, end)

    def _without(self, start: int, end: int, dropped: list[tuple[int, int]]) -> Iterator[Piece]:
        kept = []
        position = start
        for drop_start, drop_end in dropped:
            if drop_end <= position or drop_start >= end:
                continue
            kept.append(self.data[position : max(position, drop_start)])
            position = drop_end
        kept.append(self.data[position:end])
        text = b"".join(kept).decode("utf-8").replace("\r\n", "\n").strip("\n")
        if text:
            lead = len(self.data[start:end]) - len(self.data[start:end].lstrip())
            yield Piece(start + lead, text)

    def _offset(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column


def parse_quietly(source: bytes | str) -> ast.Module:
    """`ast.parse` without warnings, whatever the warning filters are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _docstring_nodes(tree: ast.Module) -> Iterator[tuple[Documented, ast.Constant]]:
    for node in ast.walk(tree):
        if isinstance(node, Documented) and node.body:
            first = node.body[0]
            constant = first.value if isinstance(first, ast.Expr) else None
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                yield node, constant


def _whole_line_comments(data: bytes) -> Iterator[tuple[int, int, str]]:
    """(line from 1, column in bytes, text) of comments with nothing before them."""
    for token in tokenize.tokenize(io.BytesIO(data).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            yield token.start[0], len(token.line[: token.start[1]].encode()), token.string


def _text_of(node: ast.Constant) -> str:
    assert isinstance(node.value, str)
    return node.value


def _comment_piece(offset: int, block: list[str]) -> Iterator[Piece]:
    lines = [line.lstrip("#").rstrip() for line in block]
    lines = [line if any(character.isalnum() for character in line) else "" for line in lines]
    lines = ["" if _PRAGMA.match(line.strip()) else line for line in lines]
    text = inspect.cleandoc("\n".join(["", *lines])).strip()
    if text:
        yield Piece(offset, text)
