"""The page of a report: one function a section. All text reaches the page through `element`, which escapes it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

import msgspec

from pyengine.ledger import Entry
from pyengine.report import facts, lineage
from pyengine.report import format as fmt
from pyengine.report.charts import Series, line_chart
from pyengine.report.html import Html, element, join
from pyengine.report.run import Metrics, Run, title
from pyengine.report.style import STYLE
from pyengine.report.tables import counts_table, cut, fact, facts_table, id_rows, table, unknown

MAX_SAMPLES = 60
MAX_SAMPLE_CHARACTERS = 4000
MAX_FACT_CHARACTERS = 2000
MAX_EXTRA_CHARTS = 12

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_CHARTS: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    ("Loss", "nats per token", ("train/loss", "eval/loss"), False),
    ("Learning rate", "", ("train/learning_rate",), True),
    ("Gradient norm", "", ("train/grad_norm",), True),
    ("Throughput", "tokens per second", ("train/tokens_per_second",), True),
)


def page(run: Run) -> str:
    """The whole document."""
    sections = (
        ("inputs", "What went in", inputs_section(run)),
        ("lineage", "Lineage", join(lineage.drawing(run), lineage.table(run))),
        ("curves", "Curves", curves_section(run)),
        ("numbers", "Numbers", numbers_section(run)),
        ("samples", "Samples", samples_section(run)),
        ("machine", "Versions and machine", machine_section(run)),
    )
    name = run.folder.resolve().name or "run"
    body = [
        header(run, name),
        element("nav", *(element("a", heading, href=f"#{anchor}") for anchor, heading, _ in sections)),
        element(
            "main",
            tiles(run),
            *(element("section", element("h2", heading), part, id=anchor) for anchor, heading, part in sections),
        ),
        footer(run),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>'),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"Report of {name}"),
        Html(f"<style>{STYLE}</style>"),
    )
    return "<!doctype html>\n" + element("html", head, element("body", *body), lang="en") + "\n"


def header(run: Run, name: str) -> Html:
    """Name, time and state of the ledger."""
    times = sorted(entry.time for entry in run.entries)
    when = f"{_minute(times[0])} to {_minute(times[-1])} UTC" if times else fmt.UNKNOWN
    line = [element("span", when), f" · {fmt.number(len(run.entries))} ledger entries, chain verified"]
    parts = [element("h1", f"Run {name}"), element("p", *line, class_="soft")]
    if run.torn:
        note = "The last line of the ledger is unfinished (a crash, or a run in progress) and was left out."
        parts.append(element("p", note, class_="bad"))
    return element("header", *parts)


def tiles(run: Run) -> Html:
    """The figures that a reader asks for first."""
    bits = _last(entry for entry in run.of(facts.EVALUATE) if _is_bits_per_byte(entry))
    quantize = _last(run.of(facts.QUANTIZE))
    train = _last(run.of(facts.TRAIN))
    speeds = [
        entry.facts["tokens_per_second"]
        for entry in run.of(facts.GENERATE)
        if fmt.is_number(entry.facts.get("tokens_per_second"))
    ]
    tokens = [entry.facts.get("tokens") for entry in run.of(facts.TRAIN)]
    known = [count for count in tokens if fmt.is_number(count)]
    return element(
        "div",
        _tile("Held-out text", fact(bits, "value"), "bits per byte", _against(bits)),
        _tile("Trained on", sum(known) if known else None, "tokens", _stages(run)),
        _tile("Final training loss", fact(train, "train_loss"), "nats per token", fmt.words(fact(train, "stage"))),
        _tile("Quantised", fact(quantize, "bits_per_weight"), "bits per weight", fmt.words(fact(quantize, "format"))),
        _tile("Quantisation error", fact(quantize, "kl"), "nats per token", "mean KL to the source model"),
        _tile("Decode speed", statistics.median(speeds) if speeds else None, "tokens per second", "median of samples"),
        class_="tiles",
    )


def inputs_section(run: Run) -> Html:
    """Corpora, tokenizers and shards with counts, filters and hashes."""
    parts: list[Html] = []
    for entry in _or_unknown(run.of(facts.CORPUS)):
        rows = [
            ("Text", fmt.words(fact(entry, "name"))),
            ("Licence", fmt.words(fact(entry, "license"))),
            ("Source files", fmt.number(fact(entry, "files"))),
            ("Documents", fmt.number(fact(entry, "documents"))),
            ("Bytes", fmt.size(fact(entry, "bytes"))),
            ("In training", fmt.with_unit(fact(entry, "train_documents"), "documents")),
            ("Held out", fmt.with_unit(fact(entry, "held_out_documents"), "documents")),
        ]
        counts = element(
            "div",
            element("h3", title(entry) if entry else "corpus"),
            facts_table(rows + id_rows(entry)),
        )
        kinds = element(
            "div",
            element("h3", "Kept, by kind"),
            counts_table(fact(entry, "documents_by_kind"), "Kind"),
            element("h3", "Dropped, by reason"),
            counts_table(fact(entry, "dropped"), "Reason"),
        )
        parts.append(element("div", counts, kinds, class_="pair"))
    blocks: list[Html] = []
    for entry in _or_unknown(run.of(facts.TOKENIZER)):
        rows = [
            ("Algorithm", fmt.words(fact(entry, "algorithm"))),
            ("Vocabulary", fmt.with_unit(fact(entry, "vocab_size"), "entries")),
            ("Special tokens", fmt.words(fact(entry, "special_tokens"))),
            ("Held-out text", fmt.with_unit(fact(entry, "bytes_per_token"), "bytes per token")),
        ]
        blocks.append(element("div", element("h3", "tokenizer"), facts_table(rows + id_rows(entry))))
    for entry in _or_unknown(run.of(facts.SHARDS)):
        bits = fact(entry, "token_bits")
        rows = [
            ("Documents", fmt.number(fact(entry, "documents"))),
            ("Tokens", fmt.number(fact(entry, "tokens"))),
            ("Text", fmt.size(fact(entry, "text_bytes"))),
            ("Width", fmt.with_unit(bits, "bits per token")),
        ]
        name = title(entry) if entry else "shards"
        blocks.append(element("div", element("h3", name), facts_table(rows + id_rows(entry))))
    return join(*parts, element("div", *blocks, class_="pair"))


def curves_section(run: Run) -> Html:
    """Four charts for each training stage, and its configuration."""
    entries = run.of(facts.TRAIN)
    if not entries:
        return unknown("No training stage is in the ledger.")
    return join(*(_stage(entry, run.metrics(entry)) for entry in entries))


def numbers_section(run: Run) -> Html:
    """Evaluations with their baselines, and what quantisation costs."""
    rows = []
    for entry in run.of(facts.EVALUATE):
        get = entry.facts.get
        rows.append(
            [
                element("td", fmt.words(get("name"))),
                element("td", fmt.words(get("model"))),
                element("td", fmt.with_unit(get("value"), str(get("unit") or "")), class_="n"),
                element("td", _baseline(entry), class_="n unknown" if _baseline(entry) == fmt.UNKNOWN else "n"),
                element("td", _change(get("value"), get("baseline"), get("better")), class_="n"),
            ]
        )
    heads = ("What", "Model", "Value", "Compared with", "Change")
    evaluations = table(heads, rows, numeric=(2, 3, 4)) if rows else unknown("No evaluation is in the ledger.")
    rows = []
    for entry in run.of(facts.QUANTIZE):
        get = entry.facts.get
        before, after = get("perplexity_before"), get("perplexity_after")
        rows.append(
            [
                element("td", fmt.words(get("format"))),
                element("td", fmt.number(get("bits_per_weight")), class_="n"),
                element("td", fmt.size(get("bytes")), class_="n"),
                element("td", fmt.number(before), class_="n"),
                element("td", fmt.number(after), class_="n"),
                element("td", _change(after, before, "lower"), class_="n"),
                element("td", fmt.with_unit(get("kl"), "nats"), class_="n"),
            ]
        )
    columns = ("Format", "Bits per weight", "Size", "Perplexity before", "after", "Change", "KL per token")
    quantised = table(columns, rows, numeric=range(1, 7)) if rows else unknown("No quantisation is in the ledger.")
    return join(element("h3", "Evaluations"), evaluations, element("h3", "Quantisation"), quantised)


def samples_section(run: Run) -> Html:
    """Prompts, each with the answers of every model that got it."""
    entries = run.of(facts.GENERATE)
    if not entries:
        return unknown("No answer is in the ledger.")
    by_prompt: dict[str, list[Entry]] = {}
    for entry in entries[:MAX_SAMPLES]:
        by_prompt.setdefault(fmt.words(entry.facts.get("prompt")), []).append(entry)
    cards = []
    for prompt, answers in by_prompt.items():
        parts = [element("div", "Prompt", class_="who"), element("pre", cut(prompt, MAX_SAMPLE_CHARACTERS))]
        for entry in answers:
            get = entry.facts.get
            speed = fmt.with_unit(get("tokens_per_second"), "tokens per second")
            who = f"{fmt.words(get('model'))} · {fmt.with_unit(get('tokens'), 'tokens')} · {speed}"
            answer = cut(fmt.words(get("answer")), MAX_SAMPLE_CHARACTERS)
            parts += [element("div", who, class_="who"), element("pre", answer, class_="answer")]
        cards.append(element("div", *parts, class_="sample"))
    if len(entries) > MAX_SAMPLES:
        cards.append(element("p", f"{len(entries) - MAX_SAMPLES} more answers are in the ledger.", class_="note"))
    return join(*cards)


def machine_section(run: Run) -> Html:
    """Environment entries and the versions of pyengine that wrote the ledger."""
    written_by = ", ".join(sorted({entry.version for entry in run.entries})) or fmt.UNKNOWN
    parts = []
    for entry in _or_unknown(run.of(facts.ENVIRONMENT)):
        rows = [
            ("Processor", fmt.words(fact(entry, "cpu"))),
            ("ISA level", fmt.words(fact(entry, "isa"))),
            ("Threads", fmt.number(fact(entry, "threads"))),
            ("Operating system", fmt.words(fact(entry, "os"))),
            ("Ledger written by", f"pyengine {written_by}"),
        ]
        versions = fact(entry, "versions")
        known = isinstance(versions, dict) and versions
        listed = facts_table([(name, fmt.words(versions[name])) for name in sorted(versions)]) if known else unknown()
        machine = element("div", element("h3", "Machine"), facts_table(rows))
        parts.append(element("div", machine, element("div", element("h3", "Versions"), listed), class_="pair"))
    return join(*parts)


def footer(run: Run) -> Html:
    """Every entry in full, and the head of the chain."""
    rows = []
    for line, entry in enumerate(run.entries, start=1):
        known = cut(msgspec.json.encode(entry.facts).decode(), MAX_FACT_CHARACTERS)
        rows.append(
            [
                element("td", str(line), class_="n"),
                element("td", entry.time.replace("T", " ")[:19], class_="n"),
                element("td", entry.kind),
                element("td", element("code", fmt.short_id(entry.id), title=entry.id)),
                element("td", element("code", known), class_="long"),
            ]
        )
    heads = ("Line", "Time (UTC)", "Kind", "Id", "Facts")
    entries = element("details", element("summary", "All ledger entries"), table(heads, rows, numeric=(0, 1)))
    head = run.entries[-1].id if run.entries else fmt.UNKNOWN
    source = element(
        "p",
        "Computed from ledger.jsonl and the metrics files that it names, and from nothing else. "
        "What the ledger does not say reads “unknown”. Head of the chain: ",
        element("code", head),
    )
    return element("footer", entries, source)


def _stage(entry: Entry, metrics: Metrics) -> Html:
    get = entry.facts.get
    rows = [
        ("Parameters", fmt.number(get("parameters"))),
        ("Steps", fmt.number(get("steps"))),
        ("Tokens", fmt.number(get("tokens"))),
        ("Wall time", fmt.seconds(get("seconds"))),
        ("Training loss", fmt.with_unit(get("train_loss"), "nats per token")),
        ("Held-out loss", fmt.with_unit(get("eval_loss"), "nats per token")),
    ]
    state = {
        "verified": "The metrics file has the hash that the ledger names.",
        "changed": "The metrics file is not the one that the ledger names: its hash differs.",
        "not verified": "The ledger holds no hash of the metrics file.",
        "missing": "The metrics file is unknown.",
    }[metrics.state]
    charts = []
    drawn = {"tokens"}
    for heading, unit, names, zero in _CHARTS:
        curves = [Series(name, metrics.curves[name]) for name in names if name in metrics.curves]
        charts.append(line_chart(heading, unit, curves, zero=zero))
        drawn.update(names)
    others = sorted(set(metrics.curves) - drawn)
    extra = [line_chart(name, "", [Series(name, metrics.curves[name])]) for name in others[:MAX_EXTRA_CHARTS]]
    parts = [
        element("h3", title(entry)),
        element("div", *charts, class_="charts"),
        element(
            "p", state, *(f" {note}" for note in metrics.notes), class_="note" if metrics.state != "changed" else "bad"
        ),
    ]
    if extra:
        listed = element("div", *extra, class_="charts")
        parts.insert(2, element("details", element("summary", f"{len(extra)} more curves"), listed))
    config = get("config")
    if isinstance(config, dict) and config:
        listed = facts_table([(key, cut(fmt.words(config[key]), MAX_FACT_CHARACTERS)) for key in config])
    else:
        listed = unknown()
    sides = (("Outcome", facts_table(rows)), ("Configuration", listed))
    return join(
        *parts, element("div", *(element("div", element("h4", name), side) for name, side in sides), class_="pair")
    )


def _tile(label: str, value: Any, unit: str, under: str) -> Html:
    written = fmt.number(value)
    if written == fmt.UNKNOWN:
        shown = element("div", written, class_="value unknown")
    else:
        shown = element("div", written, element("span", f" {unit}", class_="unit"), class_="value")
    return element(
        "div", element("div", label, class_="label"), shown, element("div", under, class_="under"), class_="tile"
    )


def _against(entry: Entry | None) -> str:
    if entry is None or not fmt.is_number(entry.facts.get("baseline")):
        return "baseline unknown"
    name = entry.facts.get("baseline_name")
    return f"{name if isinstance(name, str) and name else 'baseline'}: {fmt.number(entry.facts['baseline'])}"


def _baseline(entry: Entry) -> str:
    value, name = fmt.number(entry.facts.get("baseline")), entry.facts.get("baseline_name")
    return f"{value} ({name})" if isinstance(name, str) and name and value != fmt.UNKNOWN else value


def _change(value: Any, base: Any, better: Any) -> Html:
    """Relative change; green or red only if the ledger says which way is better."""
    if not fmt.is_number(value) or not fmt.is_number(base) or base == 0:
        return element("span", fmt.UNKNOWN, class_="unknown")
    change = (value - base) / abs(base)
    if not math.isfinite(change):
        return element("span", fmt.UNKNOWN, class_="unknown")
    sign = "+" if change > 0 else "\u2212" if change < 0 else ""
    improved = {"lower": change < 0, "higher": change > 0}.get(better) if isinstance(better, str) else None
    tone = None if improved is None or change == 0 else "good" if improved else "bad"
    return element("span", f"{sign}{abs(change) * 100:.3g} %", class_=tone)


def _stages(run: Run) -> str:
    return ", ".join(fmt.words(entry.facts.get("stage")) for entry in run.of(facts.TRAIN)) or fmt.UNKNOWN


def _is_bits_per_byte(entry: Entry) -> bool:
    return any(
        str(entry.facts.get(fact, "")).lower().replace("_", " ").replace("/", " per ") == "bits per byte"
        for fact in ("name", "unit")
    )


def _or_unknown(entries: list[Entry]) -> list[Entry | None]:
    return [*entries] or [None]


def _last(entries: Iterable[Entry]) -> Entry | None:
    return next(iter(reversed(list(entries))), None)


def _minute(time: str) -> str:
    return time.replace("T", " ")[:16]
