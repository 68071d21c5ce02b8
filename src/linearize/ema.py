"""An exponential moving average of chosen parameters, and of nothing else."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class ParameterAverage:
    """Keeps an exponential moving average of parameters in their own dtype and on their own device.

    Early on the decay is lower, ``(1 + updates) / (10 + updates)``, so that the initial weights are soon forgotten.

    Args:
        parameters: The parameters by name.
        decay: Share of the old average that stays at each update.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.num_updates = 0
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the current values."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        average = list(self.average.values())
        torch._foreach_lerp_(average, [parameter.detach() for parameter in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the parameters hold the average; afterwards their own values again."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.copy_to_parameters()
        try:
            yield
        finally:
            _copy(own, self.parameters)

    def copy_to_parameters(self) -> None:
        """Gives the parameters the averaged values for good."""
        _copy(self.average, self.parameters)

    def state_dict(self) -> dict[str, Tensor]:
        """The average and the number of updates, as tensors by name."""
        return {**self.average, "num_updates": torch.tensor(self.num_updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what ``state_dict`` gave.

        Raises:
            KeyError: If a parameter is missing in ``state``.
        """
        self.num_updates = int(state["num_updates"])
        for name, tensor in self.average.items():
            tensor.copy_(state[name])


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
