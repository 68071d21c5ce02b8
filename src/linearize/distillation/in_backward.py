"""The optimizer's step within the backward pass: no two layers' gradients are in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import Optimizer

# Whether a parameter takes part in the step.
Takes = Callable[[nn.Parameter], bool]


class StepInBackward:
    """Steps each parameter as soon as its gradient is whole, and drops the gradient.

    The optimizer stays what it is, with one group and one state dict, so that checkpoints do not tell the difference;
    its own `step` finds no gradients afterwards. Clipping by the norm of all gradients, their accumulation and their
    exchange between processes have no place here.

    Args:
        optimizer: With one group, which treats each parameter by itself.
        parameters: What it optimizes.
        takes: Whether a parameter takes part in the step; by default all do.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter], takes: Takes = lambda _: True) -> None:
        self._optimizer, self._takes = optimizer, takes
        self._handles = [value.register_post_accumulate_grad_hook(self._step) for value in parameters]

    def remove(self) -> None:
        """Leaves gradients alone again."""
        for handle in self._handles:
            handle.remove()

    def _step(self, parameter: nn.Parameter) -> None:
        if self._takes(parameter):
            (group,) = self._optimizer.param_groups
            everything, group["params"] = group["params"], [parameter]
            try:
                type(self._optimizer).step(self._optimizer)
            finally:
                group["params"] = everything
        parameter.grad = None
