"""An exponential moving average of what trains, and of nothing else."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Keeps a float32 average beside each trained parameter.

    The decay warms up as (1 + n) / (10 + n) over n updates, so that a short run is not held at its first weights
    (the rule of TensorFlow's ExponentialMovingAverage).

    Args:
        parameters: What is averaged, by name.
        decay: Share of the old average kept at each update once warm; 0 keeps no average, and the parameters stand for
            it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Starts again from the parameters as they are."""
        self.num_updates = 0
        kept = self.parameters if self.decay else {}
        self.average = {name: value.detach().float().clone() for name, value in kept.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes one step towards the parameters."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, average in self.average.items():
            value = self.parameters[name].detach().float()
            self.average[name] = average.to(value.device).lerp_(value, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters hold the average; afterwards they hold their own values again."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges parameters and average, in place; a second call undoes it."""
        for name, average in self.average.items():
            parameter = self.parameters[name]
            self.average[name] = parameter.detach().float().clone()
            parameter.copy_(average.to(parameter.device))

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """Returns the averages and the number of updates behind them."""
        return {"num_updates": self.num_updates, "average": dict(self.average)}

    def load_state_dict(self, state: Mapping) -> None:
        """Takes over what `state_dict` returned; names and shapes have been checked by the caller."""
        self.num_updates = state["num_updates"]
        kept = state["average"] if self.decay else {}
        self.average = {name: value.float().clone() for name, value in kept.items()}
