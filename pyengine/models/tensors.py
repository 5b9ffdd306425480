"""Between torch tensors and the numpy arrays that files hold; numpy has bfloat16 through ml_dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def from_numpy(array: npt.NDArray[Any], dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor with the values of `array`, in `dtype` or the array's own."""
    if array.dtype == _BFLOAT16:
        tensor = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(np.array(array))
    return tensor if dtype is None else tensor.to(dtype)


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """The values of a CPU tensor, sharing memory where it is contiguous."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return np.asarray(tensor.numpy())
