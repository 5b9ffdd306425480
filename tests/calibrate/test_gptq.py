"""Calibrated rounding against the procedure written out with Schur complements in float64, and plain rounding."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from pyengine.calibrate import round_to_calibration
from pyengine.calibrate.gptq import DAMPING, inverse_factor, round_matrix
from pyengine.errors import ArgumentError
from pyengine.formats.blocks import fit_grid, quantize_q4_0, quantize_q4_1, quantize_q8_0
from pyengine.infer import LLM
from pyengine.models import CausalLM
from pyengine.quant import quantize_to_gguf
from pyengine.testing.random_model import make_spec, write_model

FORMATS = ["q4_0", "q4_1", "q8_0"]
PLAIN = {"q4_0": quantize_q4_0, "q4_1": quantize_q4_1, "q8_0": quantize_q8_0}


def dequantize(blocks, block_format):
    return gguf.quants.dequantize(blocks, GGMLQuantizationType[block_format.upper()])


def correlated_inputs(num_tokens, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num_tokens, width // 4)) @ rng.standard_normal((width // 4, width)) + 0.1 * (
        rng.standard_normal((num_tokens, width))
    )


def gram_of(x):
    return torch.from_numpy(x.T @ x)


def obs_reference(weight, gram, block_format):
    """Optimal brain surgeon, column by column: round, spread the error, eliminate the column from the inverse."""
    rest = weight.astype(np.float64)
    damped = gram + np.eye(len(gram)) * DAMPING * np.diag(gram).mean()
    inverse = np.linalg.inv(damped)
    values = np.empty_like(rest)
    grid = None
    for j in range(weight.shape[1]):
        if j % 32 == 0:
            pivots, left = [], inverse[j : j + 32, j : j + 32].copy()
            for i in range(32):
                pivots.append(left[i, i])
                left -= np.outer(left[:, i], left[i]) / left[i, i]
            grid = fit_grid(rest[:, j : j + 32].astype(np.float32), block_format, 1.0 / np.array(pivots))
        values[:, j] = grid.values(grid.codes(rest[:, j : j + 1].astype(np.float32)))[:, 0]
        error = (rest[:, j] - values[:, j]) / inverse[j, j]
        rest[:, j:] -= np.outer(error, inverse[j, j:])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return values


def test_inverse_factor_is_the_upper_factor_of_the_damped_inverse():
    gram = gram_of(correlated_inputs(200, 48))
    factor = inverse_factor(gram)
    assert torch.equal(factor, factor.triu())
    damped = gram + torch.eye(48, dtype=torch.float64) * DAMPING * gram.diagonal().mean()
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(48, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("block_format", FORMATS)
def test_round_matrix_is_optimal_brain_surgeon(block_format):
    weight = np.random.default_rng(1).standard_normal((24, 96)).astype(np.float32)
    gram = gram_of(correlated_inputs(300, 96))
    _, values = round_matrix(weight, inverse_factor(gram), block_format)
    expected = obs_reference(weight, gram.numpy(), block_format)
    # float32 against float64 may round a near tie the other way, and what follows in that row differs then.
    rows_equal = (np.abs(values - expected) < 1e-6).all(axis=1)
    assert rows_equal.mean() > 0.8


@pytest.mark.parametrize("block_format", FORMATS)
def test_blocks_hold_the_values(block_format):
    weight = np.random.default_rng(2).standard_normal((5, 64)).astype(np.float32)
    blocks, values = round_matrix(weight, inverse_factor(gram_of(correlated_inputs(99, 64))), block_format)
    assert np.array_equal(dequantize(blocks, block_format), values)


@pytest.mark.parametrize("block_format", ["q4_0", "q4_1"])
def test_outputs_move_less_than_by_plain_rounding(block_format):
    weight = np.random.default_rng(3).standard_normal((40, 128)).astype(np.float32)
    x = correlated_inputs(500, 128)
    _, values = round_matrix(weight, inverse_factor(gram_of(x)), block_format)
    plain = dequantize(PLAIN[block_format](weight, search=True), block_format)
    ours, theirs = (np.square(x @ (weight - rounded).T).mean() for rounded in (values, plain))
    assert ours < 0.5 * theirs


def test_uncorrelated_inputs_leave_every_column_alone():
    weight = np.random.default_rng(4).standard_normal((7, 64)).astype(np.float32)
    _, values = round_matrix(weight, inverse_factor(torch.eye(64, dtype=torch.float64) * 3), "q4_1")
    for begin in (0, 32):
        block = weight[:, begin : begin + 32]
        grid = fit_grid(block, "q4_1", np.ones(32))
        assert np.array_equal(values[:, begin : begin + 32], grid.values(grid.codes(block)))


def test_an_input_that_is_always_zero_is_no_error():
    x = correlated_inputs(80, 32)
    x[:, [0, 13]] = 0.0
    weight = np.random.default_rng(5).standard_normal((3, 32)).astype(np.float32)
    _, values = round_matrix(weight, inverse_factor(gram_of(x)), "q4_1")
    assert np.isfinite(values).all()
    assert np.abs(values - weight).max() < 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("calibrate") / "model", make_spec(), seed=3)


def random_sequences(count, length, seed):
    """Of few different tokens, so that inputs are correlated, as those of text are."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 8, length).tolist() for _ in range(count)]


def test_a_calibrated_file_is_closer_to_the_model(folder, tmp_path):
    model = CausalLM.from_pretrained(folder)
    seen = []
    rounded = round_to_calibration(
        model, random_sequences(12, 60, seed=0), "q4_0", progress=lambda *step: seen.append(step)
    )
    assert len(seen) == len(rounded) == 7 * model.spec.num_layers
    assert seen[-1][1] == seen[-1][2] == sum(model.get_parameter(name).numel() for name in rounded)
    paths = {name: tmp_path / f"{name}.gguf" for name in ("plain", "calibrated")}
    quantize_to_gguf(folder, paths["plain"], weights="q4_0")
    quantize_to_gguf(folder, paths["calibrated"], weights="q4_0", rounded=rounded)
    source = LLM(folder)
    errors = {}
    for name, path in paths.items():
        llm = LLM(path)
        errors[name] = sum(
            float(np.square(llm.logits(ids) - source.logits(ids)).mean())
            for ids in random_sequences(4, 50, seed=1)  # not those of calibration
        )
    assert errors["calibrated"] < 0.8 * errors["plain"]
    # What was rounded in memory is what the file holds.
    written = CausalLM.from_pretrained(paths["calibrated"])
    for name in rounded:
        assert torch.equal(written.get_parameter(name), model.get_parameter(name)), name


def test_each_layer_is_fitted_to_what_the_rounded_ones_before_it_give(folder):
    original, model = CausalLM.from_pretrained(folder), CausalLM.from_pretrained(folder)
    sequences = random_sequences(3, 40, seed=2)
    rounded = round_to_calibration(model, sequences, "q4_1")
    name = "layers.1.self_attn.q_proj"
    inputs = []
    model.model.get_submodule(name).register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        model(torch.tensor(sequences))
    (x,) = inputs
    weight = original.model.get_submodule(name).weight.detach().numpy()
    blocks, _ = round_matrix(weight, inverse_factor((x.T @ x).double()), "q4_1")
    assert np.array_equal(rounded[f"model.{name}.weight"], blocks)


def test_bad_arguments(folder, tmp_path):
    model = CausalLM.from_pretrained(folder)
    with pytest.raises(ArgumentError, match="calibration: expected at least one token"):
        round_to_calibration(model, [[]], "q4_1")
    with pytest.raises(ArgumentError, match="calibration: expected ids 0 to"):
        round_to_calibration(model, [[model.spec.vocab_size]], "q4_1")
    with pytest.raises(ArgumentError, match="block_format: expected one of"):
        round_to_calibration(model, [[1, 2]], "q5_k")
    with pytest.raises(ArgumentError, match="model: expected float32"):
        round_to_calibration(model.to(torch.bfloat16), [[1, 2]], "q4_1")
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = np.zeros((3, 40), np.uint8)
    with pytest.raises(ArgumentError, match=rf"rounded\['{name}'\]: expected uint8"):
        quantize_to_gguf(folder, tmp_path / "out.gguf", rounded={name: rows})
    for bad, weights in (("model.norm.weight", "q4_1"), ("model.embed_tokens.weight", "q4_1"), (name, "float32")):
        with pytest.raises(ArgumentError, match="rounded: expected matrices that are written in blocks"):
            quantize_to_gguf(folder, tmp_path / "out.gguf", weights=weights, rounded={bad: rows})
