"""A whole Hugging Face folder, and the promise that reading one needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pyengine.families import load_spec
from pyengine.testing.tiny import tiny_llama
from pyengine.tokenizer import ChatTemplate, Tokenizer

MESSAGES = [{"role": "user", "content": "Hi 42 é😀"}, {"role": "assistant", "content": "ok"}]

SCRIPT = """
import json, sys

sys.modules["torch"] = sys.modules["transformers"] = sys.modules["jinja2"] = None
from pyengine.families import load_spec
from pyengine.tokenizer import ChatTemplate, StreamDecoder, Tokenizer, assistant_mask

folder, messages = sys.argv[1], json.loads(sys.argv[2])
tokenizer, template = Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder)
assert "minijinja" not in sys.modules
spec, text = load_spec(folder).to_dict(), template.render(messages)
print(json.dumps([spec, text, assistant_mask(tokenizer, template, messages)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=3, rope_theta=50000.0)


def test_spec_is_that_of_the_saved_model(folder: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    spec = load_spec(folder)
    assert (spec.num_layers, spec.rope.theta, spec.eos_token_ids) == (3, 50000.0, (2,))
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert spec.tensor_shapes() == shapes
    assert spec.num_parameters() == AutoModelForCausalLM.from_pretrained(folder).num_parameters()


def test_text_is_that_of_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(folder)
    tokenizer, template = Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder)
    text = template.render(MESSAGES, add_generation_prompt=True)
    assert text == oracle.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(text) == oracle.encode(text)
    assert tokenizer.special_tokens["eos_token"] == oracle.eos_token
    assert max(tokenizer.encode(text)) < load_spec(folder).vocab_size


def test_everything_works_without_torch(folder: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(folder), json.dumps(MESSAGES)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    spec, text, (ids, mask) = json.loads(result.stdout)
    assert spec == load_spec(folder).to_dict()
    assert text == ChatTemplate.from_folder(folder).render(MESSAGES)
    tokenizer = Tokenizer.from_folder(folder)
    assert ids == tokenizer.encode(text)
    masked = [token_id for token_id, flag in zip(ids, mask, strict=True) if flag]
    assert tokenizer.decode(masked, skip_special_tokens=False) == "ok<|im_end|>"


def test_tiny_models_are_a_function_of_their_seed(tmp_path: Path, folder: Path) -> None:
    files = [tiny_llama(tmp_path / str(seed), seed=seed) / "model.safetensors" for seed in (1, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = tiny_llama(tmp_path / "2", seed=2) / "model.safetensors"
    assert other.read_bytes() != files[0].read_bytes()
