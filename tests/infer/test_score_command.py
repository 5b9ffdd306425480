"""`pyengine score`: arguments, and a file of pairs."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from pyengine import LLM
from pyengine.cli.score import command

PAIRS = [("ab", "cd"), ("ab", [7, 8, 9]), ([5, 6], "é"), ("x", "")]


def run(*arguments):
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": completion, "id": 7}) for prompt, completion in PAIRS]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def test_a_file_of_pairs(tiny, pairs_file):
    expected = LLM(tiny).score(*zip(*PAIRS, strict=True))
    result = run(tiny, "--input", pairs_file, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["completion"] for row in rows] == [completion for _, completion in PAIRS]
    assert [row["logprobs"] for row in rows] == [score.logprobs for score in expected]
    assert [row["token_ids"] for row in rows] == [score.token_ids for score in expected]
    assert [row["logprob"] for row in rows] == [score.total for score in expected]
    assert result.stderr.startswith(f"4 pairs, {sum(len(s.token_ids) for s in expected)} tokens, ")


def test_arguments(tiny):
    score = LLM(tiny).score(["ab"], ["cd"])[0]
    lines = run(tiny, "ab", "cd", "e").stdout.splitlines()
    assert len(lines) == 2
    assert lines[0] == f"{score.total:10.4f}  {len(score.token_ids)} tokens  'cd'"


@pytest.mark.parametrize("arguments", [[], ["ab"], ["ab", "cd", "--input", "x.jsonl"]])
def test_wrong_usage(tiny, arguments):
    result = CliRunner().invoke(command, [str(tiny), *arguments])
    assert result.exit_code == 2
    assert "expected PROMPT and COMPLETIONS, or --input" in result.output


def test_a_bad_line_ends_with_the_code_of_a_bad_file(tiny, pairs_file):
    pairs_file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 7}\n', encoding="utf-8")
    arguments = [sys.executable, "-m", "pyengine", "score", str(tiny), "--input", str(pairs_file)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stdout.count("\n") == 1
    assert f"{pairs_file}, line 2: expected Pair: " in done.stderr
