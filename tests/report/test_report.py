"""The report page: only what the ledger says, everything escaped, nothing fetched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report.runs import write_run

from pyengine.ledger import Ledger, LedgerError, content_id
from pyengine.report import facts, write_report
from pyengine.report.html import element, text
from pyengine.report.run import load_run

VOID = {"meta", "line", "path", "rect", "circle"}
ALLOWED = VOID | {
    "html", "head", "title", "style", "body", "header", "nav", "main", "section", "footer", "h1", "h2", "h3", "h4",
    "p", "a", "div", "span", "table", "thead", "tbody", "tr", "th", "td", "code", "pre", "figure", "svg", "text",
    "g", "ul", "li", "b", "details", "summary",
}  # fmt: skip
HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "<!-- --><![CDATA[ ]]>&lt;b&gt;&#60;&amp;",
    "</pre></div></body></html>",
    "javascript:alert(1)",
    "a\x00b\x1b[31m\u202eright to left\u2066",
    "{{7*7}}${7*7}",
)


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on tags that do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.styles: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            (self.styles if self.open[-1] == "style" else self.texts).append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"comment {data!r}")

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def render(folder: Path) -> Page:
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert page.tags <= ALLOWED
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "srcset", "action", "style", "xlink:href")
        if name == "href":
            assert re.fullmatch(r"#[a-z0-9-]+", value)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value[1:] for _, name, value in page.attributes if name == "href"}
    assert links <= set(ids)
    assert not any(word in style for style in page.styles for word in ("url(", "@import", "http", "<"))
    return page


def section(page_text: str, start: str, end: str) -> str:
    return page_text.split(f"\n{start}\n")[-1].split(f"\n{end}\n")[0]


def test_whole_run_is_told(tmp_path: Path) -> None:
    page = render(write_run(tmp_path / "demo"))
    shown = page.text
    for expected in (
        "Run demo",
        "17 ledger entries, chain verified",
        "15\u2009458",
        "9.08 MB",
        "duplicate",
        "2\u2009583\u2009000",
        "3.412 bytes per token",
        "1.293 bits per byte",
        "2.614 (unigram)",
        "\u221250.5 %",
        "0.0316 nats",
        "21.31",
        "22.04",
        "+3.43 %",
        "4.25",
        "Both must be numbers.",
        "812.4 tokens per second",
        "avx512_vnni",
        "2.13.0+cpu",
        "47 min 15 s",
        content_id(b"int4").removeprefix("blake3:")[:12],
    ):
        assert expected in shown, expected
    assert shown.count("The metrics file has the hash that the ledger names.") == 2
    assert sum(tag == "svg" for tag, name, _ in page.attributes if name == "viewbox") == 9
    head = load_run(tmp_path / "demo").entries[-1].id
    assert head in shown


def test_page_depends_on_ledger_and_metrics_alone(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    first = write_report(folder).read_bytes()
    shutil.copytree(folder, tmp_path / "copy" / "demo")
    (tmp_path / "copy" / "demo" / "other.jsonl").write_text("noise")
    assert write_report(tmp_path / "copy" / "demo").read_bytes() == first
    assert sorted(path.name for path in folder.iterdir()) == [
        "ledger.jsonl",
        "pretrain.jsonl",
        "report.html",
        "sft.jsonl",
    ]


def test_empty_run_reads_unknown_everywhere(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    shown = render(tmp_path).text
    assert shown.count("unknown") > 30
    assert not re.search("None|nan", shown)


@pytest.mark.parametrize("kind", sorted(facts.KINDS))
def test_entry_without_facts_reads_unknown(tmp_path: Path, kind: str) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.record(kind)
    shown = render(tmp_path).text
    assert "unknown" in shown
    assert "None" not in shown


def test_each_missing_fact_is_unknown_and_the_rest_stays(tmp_path: Path) -> None:
    source = write_run(tmp_path / "demo")
    full = render(source).text.count("unknown")
    for kind, fact in ((facts.QUANTIZE, "kl"), (facts.TRAIN, "seconds"), (facts.CORPUS, "bytes")):
        folder = tmp_path / f"without-{fact}"
        with Ledger(folder) as ledger:
            for entry in load_run(source).entries:
                known = {name: value for name, value in entry.facts.items() if (entry.kind, name) != (kind, fact)}
                ledger.record(entry.kind, inputs=entry.inputs, outputs=entry.outputs, facts=known)
        for name in ("pretrain.jsonl", "sft.jsonl"):
            shutil.copy(source / name, folder)
        assert render(folder).text.count("unknown") > full


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_stays_text(tmp_path: Path, hostile: str) -> None:
    with Ledger(tmp_path) as ledger:
        for kind, names in facts.KINDS.items():
            as_text = dict.fromkeys(names, hostile)
            as_dict = {name: {hostile: hostile} for name in names}
            ledger.record(kind, inputs={hostile: content_id(b"x")}, outputs={hostile: content_id(b"y")}, facts=as_text)
            ledger.record(kind, inputs={hostile: content_id(b"y")}, facts=as_dict | {"metrics": "m.jsonl"})
    (tmp_path / "m.jsonl").write_text(json.dumps({"step": 1, hostile: 1.0}) + "\n")
    page = render(tmp_path)
    visible = re.sub("[\x00-\x1f\u202e\u2066]", lambda match: f"\\u{ord(match[0]):04x}", hostile)
    for place in ("prompt", "answer"):
        assert place in facts.KINDS[facts.GENERATE]
    assert page.texts.count(visible) > 15
    assert not re.search("[\x00\x1b\u202a-\u202e\u2066-\u2069]", page.text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
KINDS = st.sampled_from(sorted(facts.KINDS))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        KINDS.flatmap(
            lambda kind: st.tuples(
                st.just(kind),
                st.dictionaries(st.sampled_from(sorted(facts.KINDS[kind])), JSON, max_size=6),
                st.dictionaries(st.sampled_from("abc"), st.integers(0, 5), max_size=2),
                st.dictionaries(st.sampled_from("abc"), st.integers(0, 5), max_size=2),
            )
        ),
        max_size=8,
    ),
    st.lists(st.dictionaries(st.sampled_from(["step", "train/loss", "eval/loss", "x"]), JSON, max_size=4), max_size=5),
)
def test_any_facts_make_a_page(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, Any, Any, Any]], metrics: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with Ledger(folder) as ledger:
        for kind, known, inputs, outputs in entries:
            ids = [{name: content_id(b"%d" % value) for name, value in side.items()} for side in (inputs, outputs)]
            if kind == facts.TRAIN:
                known = known | {"metrics": "m.jsonl"}
            try:
                ledger.record(kind, inputs=ids[0], outputs=ids[1], facts=known)
            except ValueError:
                continue
    (folder / "m.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics), errors="replace")
    render(folder)


def test_damaged_ledger_gives_no_page_and_torn_tail_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    path = folder / "ledger.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-30])
    shown = render(folder).text
    assert "16 ledger entries" in shown
    assert "unfinished" in shown
    (folder / "report.html").unlink()
    path.write_bytes(data.replace(b"15458", b"15459"))
    with pytest.raises(LedgerError) as error:
        write_report(folder)
    assert error.value.line == 2
    assert not (folder / "report.html").exists()
    with pytest.raises(LedgerError):
        write_report(tmp_path / "absent")


def train_entry(folder: Path, metrics: Any, outputs: dict[str, str] | None = None) -> str:
    with Ledger(folder) as ledger:
        ledger.record(facts.TRAIN, outputs=outputs, facts={"stage": "x", "metrics": metrics})
    return render(folder).text


def test_changed_metrics_are_said(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step":1,"train/loss":2.5}\n')
    shown = train_entry(tmp_path, "m.jsonl", {"metrics": content_id(b"other")})
    assert "its hash differs" in shown
    assert "The ledger holds no hash of the metrics file." in train_entry(tmp_path, "m.jsonl")


@pytest.mark.parametrize("name", ["../secret.jsonl", "/etc/passwd", "link.jsonl", "a\0b", "", ".", 7, "x" * 5000])
def test_metrics_outside_the_run_are_not_read(tmp_path: Path, name: Any) -> None:
    (tmp_path / "secret.jsonl").write_text('{"step":1,"train/loss":77.125}\n')
    run = tmp_path / "run"
    run.mkdir()
    (run / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    shown = train_entry(run, name)
    assert "77.12" not in shown
    assert "The metrics file is unknown." in shown


def test_metrics_with_damage_and_not_finite_values(tmp_path: Path) -> None:
    lines = [
        '{"step":1,"train/loss":4.0}',
        '{"step":2,"train/loss":NaN}',
        '{"step":3,"train/loss":"NaN"}',
        '{"step":4,"train/loss":3.0,"train/grad_norm":true,"note":"text"}',
        "[]",
        '{"train/loss":9}',
        '{"step":-1,"train/loss":9}',
        "",
        '{"step":5,"train/loss":1' + "0" * 400 + "}",
        '{"step":5,"x":1' + "0" * 5000 + "}",
        '{"step":5,"train/loss":2.0}',
        '{"step":6,"train/lo',
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    shown = train_entry(tmp_path, "m.jsonl")
    assert "4 lines of the metrics file could not be read." in shown
    assert "The last line of the metrics file is unfinished." in shown
    assert "(2 not finite)" in shown


def test_escaping_is_of_every_text_and_only_once() -> None:
    assert element("b", "<&>", element("i", "'\""), title='"<') == (
        '<b title="&quot;&lt;">&lt;&amp;&gt;<i>&#x27;&quot;</i></b>'
    )
    assert text("a\x7f\ud800\n\tb") == "a\\u007f\\ud800\n\tb"


def test_report_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, pyengine.report; print(sorted({'numpy', 'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
