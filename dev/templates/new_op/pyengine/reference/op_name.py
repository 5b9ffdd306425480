"""The specification of op_name. Contract: csrc/include/pe/op_name.h."""

from torch import Tensor


def op_name(x: Tensor) -> Tensor:
    """FILL: the formula, computed in at least float32."""
    raise NotImplementedError("op_name: FILL the specification")
