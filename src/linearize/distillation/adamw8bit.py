"""AdamW whose two moments take one byte a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Numbers that share a scale, and the smallest tensor that is worth it: both as in the paper.
BLOCK = 256
_SMALLEST = 4096


class AdamW8bit(Optimizer):
    """AdamW with block-wise 8-bit moments (Dettmers et al., 2021, "8-bit Optimizers via Block-wise Quantization").

    A moment is kept as codes of a dynamic data type, whose steps grow with the number, times the largest magnitude of
    256 neighbours. Tensors of fewer than 4096 numbers keep float32 moments. State dicts hold plain tensors.

    Args:
        params: What is optimized, or groups of it.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr={lr}, eps={eps} or betas={betas} is out of range")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Takes one step with all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)
        return loss

    def moment_bytes(self) -> int:
        """Bytes of both moments of all parameters, once each has taken a step."""
        sizes = [parameter.numel() for group in self.param_groups for parameter in group["params"]]
        block_bytes = BLOCK + torch.float32.itemsize
        return 2 * sum(
            size * torch.float32.itemsize if size < _SMALLEST else -(-size // BLOCK) * block_bytes for size in sizes
        )

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for moment in ("mean", "square"):
                state |= _zeros(moment, parameter)
        state["step"] += 1
        step, (beta1, beta2) = state["step"], group["betas"]
        mean = _load(state, "mean", parameter).lerp_(gradient, 1 - beta1)
        square = _load(state, "square", parameter).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        _store(state, "mean", mean)
        _store(state, "square", square)
        root = square.div(1 - beta2**step).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_((mean / root).to(parameter.dtype), alpha=-group["lr"] / (1 - beta1**step))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned, byte for byte: the base class would turn codes into floats."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in state_dict["state"].items():
            device = parameters[index].device
            self.state[parameters[index]] = {
                name: value.to(device, copy=True) if isinstance(value, Tensor) else value
                for name, value in state.items()
            }


def dynamic_codes(signed: bool) -> Tensor:
    """The 256 numbers of the dynamic data type, sorted, float32: seven decades up to 1, finer towards the large end."""
    values = [0.0, 1.0]
    for exponent in range(7):
        # A decade has as many steps as the bits that its exponent leaves free.
        edges = torch.linspace(0.1, 1.0, (2**exponent if signed else 2 ** (exponent + 1)) + 1)
        means = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += [*means, *(-mean for mean in means)] if signed else means
    return torch.tensor(sorted(values)).float()


@lru_cache(maxsize=8)
def _table(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The codes' numbers, and the middles between them.

    A second moment above 0 is never rounded to 0, which would divide by `eps` alone.
    """
    codes = dynamic_codes(signed)
    middles = (codes[1:] + codes[:-1]) / 2
    if not signed:
        middles[0] = 0.0
    return codes.to(device), middles.to(device)


def _zeros(moment: str, parameter: Tensor) -> dict[str, Tensor]:
    if parameter.numel() < _SMALLEST:
        return {moment: torch.zeros_like(parameter, dtype=torch.float32)}
    numbers, _ = _table(moment == "mean", parameter.device)
    zero = int((numbers == 0).nonzero()[0])
    size = -(-parameter.numel() // BLOCK)
    return {
        f"{moment}_codes": torch.full((size, BLOCK), zero, dtype=torch.uint8, device=parameter.device),
        f"{moment}_scales": torch.zeros(size, 1, dtype=torch.float32, device=parameter.device),
    }


def _load(state: dict[str, Tensor], moment: str, parameter: Tensor) -> Tensor:
    """A moment in float32, in the parameter's shape."""
    if moment in state:
        return state[moment]
    numbers, _ = _table(moment == "mean", parameter.device)
    values = numbers[state[f"{moment}_codes"].int()] * state[f"{moment}_scales"]
    return values.flatten()[: parameter.numel()].view(parameter.shape)


def _store(state: dict[str, Tensor], moment: str, value: Tensor) -> None:
    if moment in state:
        state[moment].copy_(value)
        return
    codes, scales = state[f"{moment}_codes"], state[f"{moment}_scales"]
    padded = nn.functional.pad(value.flatten(), (0, codes.numel() - value.numel())).view_as(codes)
    torch.amax(padded.abs(), dim=1, keepdim=True, out=scales)
    _, middles = _table(moment == "mean", value.device)
    codes.copy_(torch.bucketize(padded / scales.clamp_min(torch.finfo(torch.float32).tiny), middles, out_int32=True))
