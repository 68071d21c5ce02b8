"""Learning-rate schedules: a factor of the base rate for each optimizer step of a stage."""

import math


def constant(step: int, num_steps: int, *, num_warmup_steps: int = 0) -> float:
    """A linear warm-up, then the full rate.

    Args:
        step: Optimizer steps done in this stage.
        num_steps: Optimizer steps of the stage.
        num_warmup_steps: Steps until the full rate; at most a tenth of a short stage.
    """
    return _warmup(step, num_steps, num_warmup_steps)


def cosine(step: int, num_steps: int, *, num_warmup_steps: int = 0, final_factor: float = 0.1) -> float:
    """A linear warm-up, then half a cosine down to `final_factor` at the last step; arguments as for `constant`."""
    progress = min(1.0, step / max(1, num_steps))
    decay = final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress))
    return decay * _warmup(step, num_steps, num_warmup_steps)


def _warmup(step: int, num_steps: int, num_warmup_steps: int) -> float:
    length = min(num_warmup_steps, num_steps // 10)
    return min(1.0, (step + 1) / (length + 1))
