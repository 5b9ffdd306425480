"""An adapter folded into the weights equals PEFT's merge_and_unload, and computes what serving it beside them does."""

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

from pyengine import LLM
from pyengine.cli import command
from pyengine.errors import ArgumentError, ModelFileError
from pyengine.formats import open_safetensors, write_safetensors
from pyengine.quant import merge_adapter
from pyengine.testing.random_adapter import write_random_adapter
from pyengine.testing.random_model import make_spec, write_model

SPEC = make_spec(tie_word_embeddings=False)


def test_computes_what_the_adapter_does(tmp_path):
    model = write_model(tmp_path / "model", SPEC)
    adapter = write_random_adapter(tmp_path / "adapter", SPEC, rank=5, alpha=10, target_modules=("q_proj", "down_proj"))
    result = CliRunner().invoke(command, ["merge", str(model), str(adapter), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    llm, merged = LLM(model), LLM(tmp_path / "out")
    llm.load_adapter("a", adapter)
    ids = np.random.default_rng(0).integers(0, 384, 60).tolist()
    expected = llm.logits(ids, adapter="a")
    assert np.abs(llm.logits(ids) - expected).max() > 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(merged.logits(ids), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert merged.chat_template.render([{"role": "user", "content": "hi"}]) == llm.chat_template.render(
        [{"role": "user", "content": "hi"}]
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_rounds_once_and_leaves_the_rest(tmp_path, dtype):
    model = write_model(tmp_path / "model", SPEC, dtype)
    adapter = write_random_adapter(tmp_path / "adapter", SPEC, rank=1, alpha=2, target_modules=("k_proj",))
    merge_adapter(model, adapter, tmp_path / "out")
    before, after = (open_safetensors(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    weights = open_safetensors(adapter / "adapter_model.safetensors")
    assert set(before) == set(after)
    for name in before:
        expected = before[name]
        if "k_proj" in name:
            key = "base_model.model." + name.removesuffix("weight")
            # One product each: rounded to float32 before the sum.
            delta = np.float32(2) * (weights[key + "lora_B.weight"] * weights[key + "lora_A.weight"])
            expected = (expected.astype(np.float32) + delta).astype(dtype)
        assert after[name].dtype == before[name].dtype
        assert after[name].tobytes() == expected.tobytes()


def test_errors_leave_no_model(tmp_path):
    model = write_model(tmp_path / "model", SPEC)
    adapter = write_random_adapter(tmp_path / "adapter", make_spec(hidden_size=32), rank=2)
    with pytest.raises(ModelFileError, match="expected shape"):
        merge_adapter(model, adapter, tmp_path / "out")
    with pytest.raises(ArgumentError, match=r"^model: expected a Hugging Face folder"):
        merge_adapter(tmp_path / "model.gguf", adapter, tmp_path / "out")
    with pytest.raises(ArgumentError, match=r"^folder: expected one without a config.json"):
        merge_adapter(model, adapter, model)
    assert not (tmp_path / "out").exists()


def test_a_classifier_is_refused(tmp_path):
    model = write_model(tmp_path / "model", make_spec())
    tensors = dict(open_safetensors(model / "model.safetensors")) | {"score.weight": np.zeros((2, 64), np.float32)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "model.safetensors").rename(model / "model.safetensors")
    adapter = write_random_adapter(tmp_path / "adapter", make_spec(), rank=2)
    with pytest.raises(ArgumentError, match=r"^model: expected a language model, got .*, which has no head for text$"):
        merge_adapter(model, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sum_that_the_dtype_cannot_hold_is_an_error(tmp_path):
    adapter = write_random_adapter(tmp_path / "adapter", SPEC, rank=1, alpha=2**20, target_modules=("up_proj",))
    narrow, wide = (write_model(tmp_path / d.__name__, SPEC, d) for d in (np.float16, np.float32))
    with pytest.raises(ModelFileError, match=r"up_proj\.weight': expected sums .* that float16 holds, got inf or nan"):
        merge_adapter(narrow, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_adapter(wide, adapter, tmp_path / "out")


@pytest.mark.parametrize("name", ["llama_patterns", "phi3", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_equals_peft(tmp_path, name, dtype):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from infer.test_peft import CASES, load, make_adapter, with_adapter

    from pyengine.testing import assert_accurate
    from pyengine.testing.tiny import tiny_model

    dtype = getattr(torch, dtype)
    model_type, overrides, config = CASES[name]
    base = tiny_model(tmp_path / "base", model_type, dtype=dtype, **overrides)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    merge_adapter(base, adapter, tmp_path / "out")
    theirs = with_adapter(load(base, dtype), adapter).merge_and_unload().state_dict()
    exact = with_adapter(load(base).double(), adapter).double().merge_and_unload().state_dict()
    ours = load(tmp_path / "out", dtype).state_dict()
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert_accurate(ours[key], exact[key], theirs[key])
