"""States of linear attention that are carried on from chunk to chunk, in both directions at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# States that one matrix product carries on; more go through states of groups.
GROUP = 16
# Of the two sides, which passes from the last chunk to the first.
BOTH_WAYS, BOTH_WAYS_BACK = (False, True), (True, False)


def carry_states(added: Tensor, kept: Tensor, reverse: tuple[bool, bool] = BOTH_WAYS) -> Tensor:
    """The state of all earlier, or in reverse of all later, chunks at every chunk.

    States are carried on by products with small matrices of decays, within groups of chunks, and between groups in
    the same way: as many calls as the logarithm of the chunks. With the sides' directions changed over, it is the
    adjoint of itself.

    Args:
        added: [chunks, rows, 2, num_features, channels], what each chunk adds to the states of both sides.
        kept: [chunks, rows, 2, num_features or 1], logarithm of what is left of a state behind each chunk.
        reverse: For each side whether states pass from the last chunk to the first.

    Returns:
        As `added`: at chunk c the sum over c' < c (c' > c) of what c' adds times what the chunks between leave.
    """
    numbers = added.unflatten(3, (kept.shape[-1], -1))
    return _states(numbers.flatten(4), kept, reverse).unflatten(4, numbers.shape[4:]).flatten(3, 4)


def _states(added: Tensor, kept: Tensor, reverse: tuple[bool, bool]) -> Tensor:
    """`carry_states` on [chunks, rows, 2, width, numbers] and [chunks, rows, 2, width]."""
    num_chunks = len(kept)
    size = min(GROUP, num_chunks)
    if missing := -num_chunks % size:
        added, kept = (F.pad(states, (0, 0) * (states.dim() - 1) + (0, missing)) for states in (added, kept))
    # [groups, rows, 2, width, size, numbers] and [groups, rows, 2, width, size].
    added, kept = added.unflatten(0, (-1, size)).movedim(1, -2), kept.unflatten(0, (-1, size)).movedim(1, -1)
    through = kept.cumsum(dim=-1)
    up_to, whole = F.pad(through, (1, 0))[..., :-1], through[..., -1:]
    # A chunk sees another through the difference of what it reads and what the other writes.
    sides = [
        (-through[:, :, side], -up_to[:, :, side], torch.zeros_like(whole[:, :, side]))
        if turned
        else (up_to[:, :, side], through[:, :, side], whole[:, :, side])
        for side, turned in enumerate(reverse)
    ]
    reads, writes, ends = (torch.stack(parts, dim=2) for parts in zip(*sides, strict=True))
    hidden = _hidden(size, reverse, kept.device)
    weights = (reads[..., :, None] - writes[..., None, :]).masked_fill(hidden, -torch.inf).exp()
    states = weights @ added
    if len(added) > 1:
        total = ((ends - writes).exp()[..., None, :] @ added)[..., 0, :]
        carried = _states(total, whole[..., 0], reverse)
        states = torch.addcmul(states, (reads + whole - ends).exp()[..., None], carried[..., None, :])
    return states.movedim(-2, 1).flatten(0, 1)[:num_chunks]


def _hidden(size: int, reverse: tuple[bool, bool], device: torch.device) -> Tensor:
    """Which chunks do not see which, [2, 1, size, size]."""
    seen = torch.ones(size, size, dtype=torch.bool, device=device).tril(-1)
    return ~torch.stack([seen.t() if turned else seen for turned in reverse])[:, None]
