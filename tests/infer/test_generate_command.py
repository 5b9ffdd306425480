"""`pyengine generate`: the options that reach SamplingParams."""

import importlib.util
import json
import re

import pytest
from click.testing import CliRunner

from pyengine import LLM, SamplingParams
from pyengine.cli.generate import command

needs_library = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="needs llguidance")


def run(*arguments):
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_several_completions_of_several_prompts(tiny):
    options = ["--max-tokens", 6, "--temperature", 1, "--seed", 4, "-n", 2, "--json"]
    lines = [json.loads(line) for line in run(tiny, "ab", "cd", *options).splitlines()]
    expected = LLM(tiny).generate(["ab", "cd"], SamplingParams(max_tokens=6, temperature=1.0, seed=4, n=2))
    assert [line["prompt"] for line in lines] == ["ab", "ab", "cd", "cd"]
    assert [line["token_ids"] for line in lines] == [c.token_ids for c in expected]
    best = run(tiny, "ab", *options[:-3], "--best-of", 5)
    assert best.startswith("--- ab\n")


def test_penalties_and_bad_words(tiny):
    options = {"frequency_penalty": 1.5, "presence_penalty": -0.5, "bad_words": ("the",), "min_tokens": 3}
    arguments = ["--frequency-penalty", 1.5, "--presence-penalty", -0.5, "--bad-word", "the", "--min-tokens", 3]
    line = json.loads(run(tiny, "ab", "--json", "--max-tokens", 12, *arguments))
    expected = LLM(tiny).generate("ab", SamplingParams(max_tokens=12, **options))[0]
    assert line["token_ids"] == expected.token_ids


def test_speculation_changes_no_answer(tiny):
    options = ["ab ab ab ab", "--json", "--max-tokens", 30]
    expected = run(tiny, *options)
    assert run(tiny, *options, "--speculation", "prompt_lookup", "--num-speculative-tokens", 5) == expected
    assert run(tiny, *options, "--draft-model", tiny) == expected
    for bad, message in (
        (["--speculation", "prompt_lookup", "--draft-model", tiny], "--draft-model: expected no --speculation"),
        (["--num-speculative-tokens", 3], "--num-speculative-tokens: expected --speculation or --draft-model"),
    ):
        result = CliRunner().invoke(command, [str(a) for a in (tiny, "ab", *bad)])
        assert result.exit_code == 2
        assert message in result.output


@needs_library
def test_forms(tiny, tmp_path):
    assert re.fullmatch("[a-f]{2}[0-9]\n", run(tiny, "x", "--regex", "[a-f]{2}[0-9]"))
    assert run(tiny, "x", "--choice", "yes", "--choice", "no") in ("yes\n", "no\n")
    (tmp_path / "schema.json").write_text('{"enum": ["é", 7]}', encoding="utf-8")
    assert json.loads(run(tiny, "x", "--json-schema", tmp_path / "schema.json")) in ("é", 7)
    (tmp_path / "grammar.lark").write_text('start: "(" start? ")"\n', encoding="utf-8")
    text = run(tiny, "x", "--grammar", tmp_path / "grammar.lark", "--temperature", 1).strip()
    assert text == "(" * (len(text) // 2) + ")" * (len(text) // 2)
