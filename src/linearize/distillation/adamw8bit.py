"""AdamW whose two moments take one byte a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, lru_cache
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
        if min(lr, eps, weight_decay) < 0 or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr={lr}, eps={eps}, weight_decay={weight_decay} or betas={betas} is out of range")
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
                    self._update(parameter, group)
        return loss

    def moment_bytes(self) -> int:
        """Bytes of both moments of all parameters, once each has taken a step."""
        sizes = [parameter.numel() for group in self.param_groups for parameter in group["params"]]
        block_bytes = BLOCK + torch.float32.itemsize
        return 2 * sum(
            size * torch.float32.itemsize if size < _SMALLEST else -(-size // BLOCK) * block_bytes for size in sizes
        )

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for moment in ("mean", "square"):
                state |= _zeros(moment, parameter)
        state["step"] += 1
        rates = _rates(state["step"], group["lr"], group["weight_decay"], group["betas"])
        constants = (*group["betas"], group["eps"])
        if "mean" in state:
            _step(parameter, parameter.grad.float(), state["mean"], state["square"], rates, constants)
            return
        moments = [(state[f"{name}_codes"], state[f"{name}_scales"]) for name in ("mean", "square")]
        tables = [_table(signed, parameter.device) for signed in (True, False)]
        blocks = _in_blocks(parameter.detach())
        step = _compiled_step() if parameter.is_cuda else _step_in_codes
        step(blocks, _in_blocks(parameter.grad), moments, tables, rates, constants)
        if blocks.data_ptr() != parameter.data_ptr():
            parameter.copy_(blocks.flatten()[: parameter.numel()].view(parameter.shape))

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


def _rates(step: int, lr: float, weight_decay: float, betas: tuple[float, float]) -> tuple[Tensor, ...]:
    """What changes from step to step, as numbers on the CPU that a compiled function takes as they are.

    What weight decay leaves, the factor of the mean, and that of the second moment.
    """
    beta1, beta2 = betas
    numbers = 1 - lr * weight_decay, lr / (1 - beta1**step), 1 / (1 - beta2**step)
    return tuple(torch.tensor(number, dtype=torch.float32) for number in numbers)


def _step(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    rates: tuple[Tensor, ...],
    constants: tuple[float, float, float],
) -> None:
    """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) in place, with moments in float32."""
    (kept, rate, correction), (beta1, beta2, eps) = rates, constants
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    parameter.copy_(parameter.float() * kept - rate * mean / ((square * correction).sqrt() + eps))


def _step_in_codes(
    parameter: Tensor,
    gradient: Tensor,
    moments: list[tuple[Tensor, Tensor]],
    tables: list[tuple[Tensor, Tensor]],
    rates: tuple[Tensor, ...],
    constants: tuple[float, float, float],
) -> None:
    """`_step` on blocks, [blocks, BLOCK], of which each moment has codes and scales, [blocks, 1]."""
    mean, square = (
        numbers[codes.int()] * scales for (codes, scales), (numbers, _) in zip(moments, tables, strict=True)
    )
    _step(parameter, gradient.float(), mean, square, rates, constants)
    for value, (codes, scales), (_, middles) in zip((mean, square), moments, tables, strict=True):
        largest = value.abs().amax(dim=1, keepdim=True)
        scales.copy_(largest)
        shares = value / largest.clamp_min(torch.finfo(torch.float32).tiny)
        codes.copy_(torch.bucketize(shares, middles, out_int32=True))


@cache
def _compiled_step() -> Callable[..., None]:
    """`_step_in_codes` as few kernels: one by one, its twenty would take a fifth of a training step of FLUX.1-dev."""
    return torch.compile(_step_in_codes, dynamic=True, fullgraph=True)


def _in_blocks(states: Tensor) -> Tensor:
    """[blocks, BLOCK]: a view, or a copy that is filled up with zeros."""
    missing = -states.numel() % BLOCK
    flat = states.flatten()
    return (nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)
