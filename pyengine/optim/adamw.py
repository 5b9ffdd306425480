"""AdamW for float32 parameters, or for bfloat16 ones with a float32 master copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from pyengine.errors import ArgumentError
from pyengine.ops.adamw import adamw_


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to scales of norms and other vectors."""
    return parameter.dim() >= 2


class AdamW:
    """Adam with decoupled weight decay. Loshchilov & Hutter 2019, arXiv:1711.05101.

    The moments are float32. A bfloat16 parameter also has a float32 master, which is what the optimiser moves; the
    parameter is its rounding. The state is addressed by parameter name, so it survives a change of order.

    Args:
        named_parameters: (name, parameter), as `module.named_parameters()` gives them. A parameter that appears twice
            (tied) counts once; one that needs no gradient is left out.
        lr: learning rate; `step` may be given another.
        beta1, beta2, eps, weight_decay: of AdamW.
        decays: (name, parameter) -> whether weight decay applies.

    Raises:
        ArgumentError: no parameter, a dtype other than float32 and bfloat16, or a value out of range.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decays: Callable[[str, Tensor], bool] = is_matrix,
    ) -> None:
        for name, value, holds, expected in (
            ("lr", lr, lr >= 0.0, "at least 0"),
            ("beta1", beta1, 0.0 <= beta1 < 1.0, "0 to below 1"),
            ("beta2", beta2, 0.0 <= beta2 < 1.0, "0 to below 1"),
            ("eps", eps, eps > 0.0, "more than 0"),
            ("weight_decay", weight_decay, weight_decay >= 0.0, "at least 0"),
        ):
            if not holds:
                raise ArgumentError(f"{name}: expected {expected}, got {value}")
        self.lr, self.beta1, self.beta2, self.eps, self.weight_decay = lr, beta1, beta2, eps, weight_decay
        self.num_steps = 0
        self.parameters: dict[str, nn.Parameter] = {}
        self.decayed: frozenset[str]
        seen: set[int] = set()
        for name, parameter in named_parameters:
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ArgumentError(f"{name}: expected torch.float32 or torch.bfloat16, got {parameter.dtype}")
            seen.add(id(parameter))
            self.parameters[name] = parameter
        if not self.parameters:
            raise ArgumentError("named_parameters: expected at least one that needs a gradient, got none")
        self.decayed = frozenset(name for name, parameter in self.parameters.items() if decays(name, parameter))
        self._state = {name: self._initial_state(parameter) for name, parameter in self.parameters.items()}

    @staticmethod
    def _initial_state(parameter: nn.Parameter) -> dict[str, Tensor]:
        zeros = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        state = {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        if parameter.dtype != torch.float32:
            state["master"] = parameter.detach().to(torch.float32, copy=True)
        return state

    def grads(self) -> dict[str, Tensor]:
        """Name -> gradient of every parameter that has one."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    @torch.no_grad()
    def step(
        self, *, lr: float | None = None, grad_scale: float = 1.0, grads: Mapping[str, Tensor] | None = None
    ) -> None:
        """One update. A parameter without a gradient stays as it is.

        Args:
            lr: learning rate of this step; `self.lr` by default.
            grad_scale: what every gradient is multiplied by, for clipping.
            grads: gradients by name instead of those of the parameters.
        """
        self.num_steps += 1
        for name, grad in (self.grads() if grads is None else grads).items():
            state = self._state[name]
            adamw_(
                self.parameters[name].data,
                grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                state.get("master"),
                lr=self.lr if lr is None else lr,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                weight_decay=self.weight_decay if name in self.decayed else 0.0,
                step=self.num_steps,
                grad_scale=grad_scale,
            )

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """ "exp_avg.NAME", "exp_avg_sq.NAME" and, for bfloat16, "master.NAME": the tensors themselves, not copies.

        `num_steps` is the other half of the state.
        """
        return {f"{kind}.{name}": value for name, state in self._state.items() for kind, value in state.items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], *, num_steps: int) -> None:
        """Inverse of `state_dict`; values are copied in.

        Raises:
            ArgumentError: a tensor is missing, unknown, or of another shape or dtype. Nothing is changed then.
        """
        own = self.state_dict()
        if missing := sorted(own.keys() - tensors.keys()):
            raise ArgumentError(f"tensors: expected {missing[0]!r}, got none")
        if unknown := sorted(tensors.keys() - own.keys()):
            raise ArgumentError(f"tensors: expected only the state of the parameters, got {unknown[0]!r}")
        for name, value in own.items():
            got = tensors[name]
            if got.shape != value.shape or got.dtype != value.dtype:
                raise ArgumentError(
                    f"tensors[{name!r}]: expected {value.dtype} {tuple(value.shape)}, got {got.dtype} {tuple(got.shape)}"
                )
        if num_steps < 0:
            raise ArgumentError(f"num_steps: expected at least 0, got {num_steps}")
        for name, value in own.items():
            value.copy_(tensors[name])
        self.num_steps = num_steps
