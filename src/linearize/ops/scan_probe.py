"""Whether kernels of gated scans work on a GPU: they are run once and compared with the portable form."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops.chunked_scan import chunked
from linearize.ops.parity import largest_error

# Tokens of the comparison, which is also when kernels choose their blocks.
PROBE = 4096
# Largest relative error that rounding to bf16 explains.
TOLERANCE = 2e-2
_log = logging.getLogger(__name__)


def failure(
    scan: Callable[..., Tensor],
    device: torch.device,
    num_heads: int,
    num_features: int,
    channels: int,
    gate_width: int,
) -> str | None:
    """Why a scan's kernels fail on this GPU, forward or backward, in one clause, or None where they do not.

    Args:
        scan: Takes what the backends of `bidirectional_gated_attention` take.
        device: The GPU.
        num_heads: Heads.
        num_features: Channels of query and key.
        channels: Of the value.
        gate_width: Gates of each head.
    """
    sizes = f"{num_heads} heads of {num_features} x {channels}"
    _log.info("kernels of gated scans are compiled and tried for %s; once", sizes)
    with torch.inference_mode(False), torch.enable_grad():
        try:
            leaves = _probe(device, num_heads, num_features, channels, gate_width)
            found = _results(scan, leaves)
        # Triton raises errors of many kinds, none of which should end a run that can do without.
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "no message")
            return f"its kernels fail on this GPU ({type(error).__name__}: {reason})"
        expected = _results(chunked, [leaf.detach().float().requires_grad_() for leaf in leaves])
    off = largest_error(found, expected)
    return None if off <= TOLERANCE else f"its kernels are off by {off:.2g} from the definition on this GPU"


def _probe(device: torch.device, num_heads: int, num_features: int, channels: int, gate_width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(width: int) -> Tensor:
        return torch.randn(1, num_heads, PROBE - 7, width, generator=generator)

    query, key, value = (draw(width).to(device, torch.bfloat16) for width in (num_features, num_features, channels))
    gates = (F.logsigmoid(draw(gate_width) + 5).to(device) for _ in range(2))
    return [states.requires_grad_() for states in (query, key, value, *gates)]


def _results(compute: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    output = compute(*leaves)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, weight)]
