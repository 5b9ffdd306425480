"""The standard-library corpus on small trees with known answers, and once on the real library."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from pyengine.data.corpus import (
    DOCSTRING_PROMPT,
    Filters,
    build_corpus,
    signature_docstring_pairs,
    source_files,
    split_of,
)
from pyengine.data.jsonl import Document, write_jsonl
from pyengine.data.python_source import PythonSource
from pyengine.errors import ArgumentError
from pyengine.ledger import content_id

MODULE = b'''#!/usr/bin/env python3
# -*- coding: utf-8 -*-
"""Module text, \xc3\xa9 first."""

# ------------------------------------
# A block of prose that goes on
# over two lines.
#
# And a paragraph.

import os  # not a whole line

class Shape(Base, metaclass=Meta):
    """A shape with
       an odd indent."""

    # One comment inside a class.
    def area(self, scale: float = 1.0, *, unit="m") -> float:
        r"""Area of the shape, scaled.

            Indented more.
        And less.
        """
        # other indent
        return scale * 2  # trailing

    @property
    def name(self):
        "Short name of the shape."

    class Inner:
        async def run(self): """Run until all is done, then stop."""

def plain(a, /, b, *rest, c=3, **named):
    """Add everything that was given."""
    text = """
# not a comment
    """
    def nested():
        """Nested functions are left out of pairs."""
    return text

# first = compute(second)
# second = other
'''
SMALL = Filters(min_bytes=1, min_letters=0.0)


def without_docstrings(tree: ast.AST) -> str:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            constant = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            if constant and isinstance(first.value.value, str):  # type: ignore[attr-defined]
                node.body = node.body[1:]
    return ast.dump(tree)


def test_pieces_of_a_known_module() -> None:
    source = PythonSource(MODULE)
    assert [piece.text for piece in source.docstrings()] == [
        "Module text, é first.",
        "A shape with\nan odd indent.",
        "Area of the shape, scaled.\n\n    Indented more.\nAnd less.",
        "Short name of the shape.",
        "Run until all is done, then stop.",
        "Add everything that was given.",
        "Nested functions are left out of pairs.",
    ]
    assert [piece.text for piece in source.comments()] == [
        "A block of prose that goes on\nover two lines.\n\nAnd a paragraph.",
        "One comment inside a class.",
        "other indent",
        "first = compute(second)\nsecond = other",
    ]
    for piece in [*source.docstrings(), *source.comments()]:
        head = MODULE[piece.offset : piece.offset + 1]
        assert head in (b'"', b"r", b"#")
    (code,) = source.code(1 << 20)
    assert not any(gone in code.text for gone in ("Module text", "block of prose"))
    assert all(kept in code.text for kept in ("# not a comment", "# trailing"))
    assert without_docstrings(ast.parse(code.text)) == without_docstrings(ast.parse(MODULE))


def test_signatures_of_a_known_module() -> None:
    found = [(item.signature, item.docstring) for item in PythonSource(MODULE).signatures()]
    assert found == [
        (
            "class Shape(Base):\n    def area(self, scale: float=1.0, *, unit='m') -> float:",
            "Area of the shape, scaled.\n\n    Indented more.\nAnd less.",
        ),
        ("class Shape(Base):\n    @property\n    def name(self):", "Short name of the shape."),
        (
            "class Shape(Base):\n    class Inner:\n        async def run(self):",
            "Run until all is done, then stop.",
        ),
        ("def plain(a, /, b, *rest, c=3, **named):", "Add everything that was given."),
    ]


def test_code_pieces_cover_the_module_in_order() -> None:
    source = PythonSource(MODULE)
    whole = without_docstrings(ast.parse(MODULE))
    for max_bytes in (1, 60, 300, 1000):
        pieces = list(source.code(max_bytes))
        assert [piece.offset for piece in pieces] == sorted({piece.offset for piece in pieces})
        body = [statement for piece in pieces for statement in ast.parse(piece.text).body]
        assert without_docstrings(ast.Module(body, [])) == whole


@pytest.mark.parametrize("name", ["argparse.py", "tokenize.py", "dataclasses.py", "decimal.py", "this.py"])
def test_code_of_real_modules_means_the_same(name: str) -> None:
    data = next(file.data for file in source_files() if file.path == name)
    body = [node for piece in PythonSource(data).code(4096) for node in ast.parse(piece.text).body]
    assert without_docstrings(ast.Module(body, [])) == without_docstrings(ast.parse(data))


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfx = 1\n", b"x = 1\r\n# a comment\r\ny = 2\r\n", b"", b"# only"])
def test_byte_marks_and_line_ends(data: bytes) -> None:
    source = PythonSource(data)
    body = [node for piece in source.code(100) for node in ast.parse(piece.text).body]
    assert ast.dump(ast.Module(body, [])) == ast.dump(ast.parse(data))
    for piece in source.comments():
        assert data[piece.offset :].startswith(b"#")


def make_tree(root: Path) -> Path:
    files = {
        "a.py": MODULE,
        "b.py": b'"""Module text, \xc3\xa9 first."""\nvalue = 12345\n',
        "broken.py": b"def (",
        "latin.py": b"# caf\xe9 is not UTF-8\n",
        "made.py": b'"""Generated by a tool."""\nx = 1\n',
        "tests/t.py": b'"""Skipped folder."""\n',
        "site-packages/s.py": b'"""Skipped folder."""\n',
        "pkg/__init__.py": b'"""Bell \x07 inside."""\nother = 1\n',
        "notes.txt": b"not python",
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "link.py").symlink_to(root / "a.py")
    return root


def test_corpus_of_a_known_tree(tmp_path: Path) -> None:
    corpus = build_corpus(make_tree(tmp_path), filters=Filters(min_bytes=10), held_out_share=0)
    statistics = corpus.statistics
    assert statistics.dropped == {
        "duplicate": 1,
        "comment_is_code": 1,
        "code_too_short": 1,
        "file_not_parsed": 2,
        "file_generated": 1,
        "docstring_unprintable": 1,
    }
    assert statistics.files == 6
    assert {document.source for document in corpus.train} == {"a.py", "b.py"}
    assert corpus.held_out == []
    assert statistics.documents == len(corpus.train) == statistics.train_documents
    assert statistics.bytes == sum(len(document.text.encode()) for document in corpus.train)
    assert sum(statistics.documents_by_kind.values()) == statistics.documents
    for document in corpus.train:
        path, kind, offset = document.id.split("#")
        assert (path, kind) == (document.source, document.metadata["kind"])
        data = (tmp_path / path).read_bytes()
        assert document.metadata["file"] == content_id(data)
        assert 0 <= int(offset) < len(data)
    assert len({document.id for document in corpus.train}) == len(corpus.train)


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        (Filters(min_bytes=1000), "docstring_too_short"),
        (Filters(min_bytes=1, max_bytes=12), "docstring_too_long"),
        (Filters(min_bytes=1, min_letters=0.99, min_printable=0.0), "docstring_few_letters"),
        (Filters(min_bytes=1, min_printable=1.0), "docstring_unprintable"),
    ],
)
def test_each_filter_drops_and_counts(tmp_path: Path, filters: Filters, reason: str) -> None:
    (tmp_path / "m.py").write_bytes(b'"""Some words, \x07 then more."""\n')
    corpus = build_corpus(tmp_path, filters=filters)
    assert corpus.statistics.dropped[reason] == 1
    assert build_corpus(tmp_path, filters=Filters(min_bytes=1, min_printable=0.5)).statistics.documents == 1


def test_split_is_of_the_file_and_has_the_asked_share(tmp_path: Path) -> None:
    ids = [content_id(b"%d" % number) for number in range(20_000)]
    share = sum(split_of(name, 0.2) == "held_out" for name in ids) / len(ids)
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / len(ids)) ** 0.5
    held_out = {name for name in ids if split_of(name, 0.1) == "held_out"}
    assert held_out < {name for name in ids if split_of(name, 0.3) == "held_out"}
    with pytest.raises(ArgumentError, match="held_out_share"):
        split_of(ids[0], 1.5)
    for number in range(40):
        (tmp_path / f"m{number}.py").write_bytes(MODULE + b"z%d = %d\n" % (number, number))
    corpus = build_corpus(tmp_path, filters=SMALL, held_out_share=0.5)
    pairs = signature_docstring_pairs(tmp_path, filters=SMALL, held_out_share=0.5)
    sides = [{item.source for item in side} for side in (corpus.train, corpus.held_out)]
    for name in ("train", "held_out"):
        for item in [*getattr(corpus, name), *getattr(pairs, name)]:
            assert split_of(item.metadata["file"], 0.5) == name
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not {item.source for item in pairs.train} & sides[1]
    texts = [document.text for document in corpus.train + corpus.held_out]
    assert len(texts) == len(set(texts))


def test_pairs_are_chat_messages_with_limits(tmp_path: Path) -> None:
    make_tree(tmp_path)
    pairs = signature_docstring_pairs(tmp_path, held_out_share=0)
    assert next(item.messages[1].content for item in pairs.train).startswith("Area of the shape")
    assert all(item.messages[0].content.startswith(DOCSTRING_PROMPT) for item in pairs.train)
    assert [[message.role for message in item.messages] for item in pairs.train] == [["user", "assistant"]] * 4
    short = signature_docstring_pairs(tmp_path, max_signature_bytes=50, held_out_share=0)
    assert short.statistics.dropped["signature_too_long"] == 3
    assert [item.messages[1].content for item in short.train] == ["Add everything that was given."]


def test_order_does_not_depend_on_hash_seed_or_warnings(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    (tmp_path / "tree" / "w.py").write_bytes(b'# a\\d is no escape in "\\d" text\nx = "\\d" is 3  # warns\n')
    code = textwrap.dedent("""
        import sys
        from pyengine.data.corpus import Filters, build_corpus
        from pyengine.data.jsonl import write_jsonl
        print(write_jsonl(sys.argv[2], build_corpus(sys.argv[1], filters=Filters(min_bytes=1)).train).content_id)
    """)
    outputs = set()
    for seed, flag in (("1", "-Wignore"), ("2", "-Werror")):
        arguments = [sys.executable, flag, "-c", code, str(tmp_path / "tree"), str(tmp_path / seed)]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        result = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
        outputs.add(result.stdout)
    assert len(outputs) == 1


@pytest.mark.slow
def test_the_real_library(tmp_path: Path) -> None:
    """The properties that training counts on, on what this machine has."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = build_corpus()
    statistics = corpus.statistics
    assert statistics.bytes > 3_000_000
    assert statistics.held_out_bytes > 50_000
    assert set(statistics.documents_by_kind) == {"docstring", "comment", "code"}
    train, held_out = ({document.source for document in side} for side in (corpus.train, corpus.held_out))
    assert not train & held_out
    assert not any(part in source.split("/") for source in train for part in ("test", "tests", "lib2to3"))
    assert write_jsonl(tmp_path / "train.jsonl", corpus.train).lines == statistics.train_documents
    assert isinstance(corpus.train[0], Document)


def test_root_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="root"):
        list(source_files(tmp_path / "absent"))
