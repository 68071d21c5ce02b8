"""Which of a student's blocks keep their activations for the backward pass, and which compute them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from linearize.backbones.recording import Recorder
from linearize.costs import GIB

# Numbers that a compiled FLUX block keeps for its backward pass, for each number of its input, when the projections of
# attention train.
KEPT_PER_INPUT = 12
# Share of the free memory that activations may take; the rest is for temporaries.
_USABLE = 0.85


class ActivationBudget:
    """A student's checkpointing function: as many of the last blocks keep their activations as the budget allows.

    The first blocks compute theirs again: by then the backward pass has let go of those that were kept.

    Args:
        blocks: The transformer's blocks, in the order of the forward pass.
        gib: The budget; None takes what is free on the GPU, and keeps everything on a CPU.
        pending_bytes: What the rest of the step will still allocate on the GPU: gradients, the optimizer's state.
    """

    def __init__(self, blocks: Sequence[nn.Module], gib: float | None, pending_bytes: Callable[[], int]) -> None:
        self._positions = {block: position for position, block in enumerate(blocks)}
        self.gib, self.pending_bytes = gib, pending_bytes
        self.num_recomputed = 0

    def __call__(self, block: nn.Module, *arguments: Any) -> Any:
        """Calls a block; the first one of a forward pass settles how many compute again."""
        position = self._positions[block]
        if position == 0:
            self.num_recomputed = self._choose(sum(value.nbytes for value in arguments[:2]), arguments[0].device)
        if position >= self.num_recomputed:
            return block(*arguments)
        return checkpoint(block, *arguments, use_reentrant=False, context_fn=partial(_contexts, block))

    def _choose(self, input_bytes: int, device: torch.device) -> int:
        """How many blocks compute again, given the bytes of all tokens at the entrance of a block."""
        if self.gib is not None:
            budget = int(self.gib * GIB)
        elif device.type == "cuda":
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            budget = int(_USABLE * (torch.cuda.mem_get_info(device)[0] + cached)) - self.pending_bytes()
        else:
            return 0
        kept = max(budget, 0) // (KEPT_PER_INPUT * input_bytes)
        return max(len(self._positions) - kept, 0)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _clearing(block)


@contextmanager
def _clearing(block: nn.Module) -> Iterator[None]:
    """Around a recomputation: what sites record in it was recorded before, and would hold the block's activations."""
    try:
        yield
    finally:
        for module in block.modules():
            recorder = getattr(module, "recorder", None)
            if isinstance(recorder, Recorder):
                recorder.clear()
