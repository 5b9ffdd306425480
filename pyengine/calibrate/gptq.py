"""Rounding of a model's matrices that keeps what they compute on calibration text.

Frantar et al. 2022, arXiv:2210.17323: columns are rounded one after the other, and the error of each is taken up by
those that follow, weighted by how the inputs of calibration move together. Layers go in order, so that each is fitted
to the inputs that the rounded layers before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pyengine.errors import ArgumentError
from pyengine.formats.blocks import BLOCK_BYTES, BLOCK_ELEMENTS, fit_grid
from pyengine.models import CausalLM
from pyengine.nn import Linear, PackedPositions

DAMPING = 0.01
"""Added to the diagonal of the input statistics, as a share of its mean."""
BATCH_TOKENS = 2048

Progress = Callable[[str, int, int], None]
"""Called as (name of the weight, weights done, weights in all) after each matrix."""


@torch.no_grad()
def round_to_calibration(
    model: CausalLM, sequences: Sequence[Sequence[int]], block_format: str, *, progress: Progress | None = None
) -> dict[str, npt.NDArray[np.uint8]]:
    """Round every matrix inside the layers of `model` to blocks.

    Args:
        model: float32; its matrices become the rounded ones.
        sequences: token ids to calibrate on, each a text of its own.
        block_format: "q4_0", "q4_1" or "q8_0".
        progress: told of every matrix.

    Returns:
        name of the weight -> its blocks, uint8 [out_features, row_bytes].

    Raises:
        ArgumentError: no tokens, or ids outside the vocabulary.
    """
    if block_format not in BLOCK_BYTES:
        raise ArgumentError(f"block_format: expected one of {', '.join(BLOCK_BYTES)}, got {block_format!r}")
    if model.output_weight.dtype != torch.float32:
        raise ArgumentError(f"model: expected float32, got {model.output_weight.dtype}")
    batches = [_embed(model, batch) for batch in _batches(sequences)]
    if not batches:
        raise ArgumentError("calibration: expected at least one token, got none")
    rounded: dict[str, npt.NDArray[np.uint8]] = {}
    done, total = 0, sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, Linear))
    for index, layer in enumerate(model.model.layers):
        modules = {name: module for name, module in layer.named_modules() if isinstance(module, Linear)}
        with _InputStatistics(modules) as statistics:
            for x, residual, packed in batches:
                layer(x, residual, packed)
        for reader, gram in statistics.grams.items():
            factor = inverse_factor(gram)
            for name in statistics.readers[reader]:
                weight = modules[name].weight
                full_name = f"model.layers.{index}.{name}.weight"
                rounded[full_name], values = round_matrix(weight.numpy(), factor, block_format)
                weight.copy_(torch.from_numpy(values))
                done += weight.numel()
                if progress is not None:
                    progress(full_name, done, total)
        batches = [(*layer(x, residual, packed), packed) for x, residual, packed in batches]
    return rounded


def inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U, float64 [K, K], with U^T U = (gram + damping)^-1 for the sum of x x^T over inputs x."""
    diagonal = gram.diagonal()
    # An input that is always zero has no say: its column keeps its own rounding.
    damped = gram + torch.diag(torch.where(diagonal > 0, DAMPING * diagonal.mean(), 1.0))
    # With rows and columns reversed, the lower factor of Cholesky is the upper one of gram = R R^T.
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(gram), dtype=gram.dtype)
    factor: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return factor


def round_matrix(
    weight: npt.NDArray[np.float32], factor: Tensor, block_format: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Blocks of `weight` [N, K] and the values that they stand for; `factor` is the `inverse_factor` of its inputs."""
    importance = factor.diagonal().numpy() ** -2.0
    upper = factor.to(torch.float32).numpy()
    rest, values, blocks = weight.copy(), np.empty_like(weight), []
    for begin in range(0, weight.shape[1], BLOCK_ELEMENTS):
        end = begin + BLOCK_ELEMENTS
        grid = fit_grid(rest[:, begin:end], block_format, importance[begin:end])
        block, rows = rest[:, begin:end].T.copy(), upper[begin:end]  # a column of the weight is contiguous
        codes, errors = np.empty_like(block), np.empty_like(block)
        for i in range(BLOCK_ELEMENTS):
            codes[i] = grid.codes(block[i, :, None])[:, 0]
            value = grid.values(codes[i, :, None])[:, 0]
            errors[i] = (block[i] - value) / rows[i, begin + i]
            block[i + 1 :] -= rows[i, begin + i + 1 : end, None] * errors[i]
            values[:, begin + i] = value
        rest[:, end:] -= errors.T @ rows[:, end:]
        blocks.append(grid.blocks(codes.T))
    return np.concatenate(blocks, axis=-1), values


class _InputStatistics:
    """Sums x x^T over the inputs x of matrices while it is entered; those that read one tensor share one sum."""

    def __init__(self, modules: Mapping[str, Linear]) -> None:
        self.grams: dict[str, Tensor] = {}
        """The first reader of a tensor -> float64 [K, K]."""
        self.readers: dict[str, dict[str, None]] = {}
        """The first reader -> all readers."""
        self._modules = modules
        self._last: tuple[Tensor, str] | None = None

    def __enter__(self) -> _InputStatistics:
        self._handles = [
            module.register_forward_pre_hook(partial(self._collect, name)) for name, module in self._modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None

    def _collect(self, name: str, _: nn.Module, arguments: tuple[Tensor]) -> None:
        x = arguments[0]
        if self._last is None or x is not self._last[0]:
            self._last = x, name
            gram = (x.T @ x).double()
            self.grams[name] = self.grams[name] + gram if name in self.grams else gram
        self.readers.setdefault(self._last[1], {})[name] = None


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    for sequence in sequences:
        if batch and sum(map(len, batch)) + len(sequence) > BATCH_TOKENS:
            yield batch
            batch = []
        if len(sequence):
            batch.append(sequence)
    if batch:
        yield batch


def _embed(model: CausalLM, batch: list[Sequence[int]]) -> tuple[Tensor, Tensor | None, PackedPositions]:
    ids = torch.tensor([token for sequence in batch for token in sequence])
    model.check_ids("calibration", ids)
    offsets = torch.tensor([0, *np.cumsum([len(sequence) for sequence in batch])], dtype=torch.int32)
    packed = model.packed_positions(ids, segment_offsets=offsets)
    return model.model.embed(ids, packed), None, packed
