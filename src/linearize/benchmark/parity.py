"""No speed is told of what computes something else: the pictures of a comparison, and what its rounding may be."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from linearize.errors import LinearizeError
from linearize.layout import Grid
from linearize.ops.parity import WHOLE_GRID

# Largest relative error, |out - reference| / |reference| against float64, at which a speed may be reported.
PARITY = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Neither square nor cut evenly by any tile.
PROBE = Grid(19, 37)
# Cut evenly: kernels may take another path there.
WHOLE_PROBE = WHOLE_GRID


def check_errors(errors: Iterable[float], dtype: torch.dtype, subject: str, instead: str) -> float:
    """Checks that errors are what a dtype's rounding explains; NaN is not.

    Args:
        errors: Of each probe.
        dtype: What the subject computes in.
        subject: What was compared.
        instead: What the user may do without it.

    Returns:
        The largest.

    Raises:
        LinearizeError: It is above that.
    """
    # The maximum of a tensor, unlike Python's, keeps NaN.
    error, limit = torch.tensor(list(errors)).max().item(), PARITY[dtype]
    if not error <= limit:
        raise LinearizeError(
            f"{subject} in {dtype} is off by {error:.2g} from the definition (at most {limit:.0e} is rounding), so no "
            f"speed of it is reported: {instead}."
        )
    return error
