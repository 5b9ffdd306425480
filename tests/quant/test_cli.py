import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from pyengine import LLM
from pyengine.cli import command
from pyengine.formats import open_gguf
from pyengine.ledger import content_id
from pyengine.testing.random_model import make_spec, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("cli") / "model", make_spec())


def run(*arguments):
    return CliRunner().invoke(command, ["quantize", *map(str, arguments)], catch_exceptions=False)


def test_line_of_the_result(model, tmp_path):
    out = tmp_path / "out.gguf"
    result = run(model, out)
    bits = 8 * out.stat().st_size / LLM(model).spec.num_parameters()
    assert result.output == f"{out}: 0.1 MB, {bits:.2f} bits per weight, 0.1 M parameters\n"
    file = open_gguf(out)
    assert {file.info(name).type for name in file} == {"Q4_1", "Q8_0", "F32"}


def test_json_and_options(model, tmp_path):
    out = tmp_path / "out.gguf"
    facts = json.loads(run(model, out, "--weights", "q4_0", "--embedding", "bfloat16", "--search", "--json").output)
    assert facts["path"] == str(out)
    assert (facts["weights"], facts["embedding"]) == ("q4_0", "bfloat16")
    assert facts["content_id"] == content_id(out)
    file = open_gguf(out)
    assert {file.info(name).type for name in file} == {"Q4_0", "BF16", "F32"}
    run(model, tmp_path / "plain.gguf", "--weights", "q4_0", "--embedding", "bfloat16")
    assert content_id(tmp_path / "plain.gguf") != content_id(out)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["{model}", "{folder}/none/out.gguf"], 2, "out: expected a path to write"),
        (["{folder}/none", "{folder}/out.gguf"], 4, "none"),
        (["{model}", "{folder}/out.gguf", "--weights", "q3_k"], 2, "--weights"),
    ],
)
def test_exit_codes(model, tmp_path, arguments, code, text):
    arguments = [argument.format(model=model, folder=tmp_path) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "pyengine", "quantize", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_no_torch_is_imported(model, tmp_path):
    code = (
        "import sys; from pyengine.quant import quantize_to_gguf; "
        f"quantize_to_gguf({str(model)!r}, {str(tmp_path / 'out.gguf')!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_calibration(model, tmp_path):
    pytest.importorskip("torch")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    plain, out = tmp_path / "plain.gguf", tmp_path / "out.gguf"
    run(model, plain)
    result = run(model, out, "--calibration", text, "--calibration-tokens", 300)
    assert "bits per weight" in result.output
    a, b = open_gguf(plain), open_gguf(out)
    changed = {name for name in a if bytes(a.data(name)) != bytes(b.data(name))}
    assert changed == {name for name in a if a.info(name).type == "Q4_1"}
