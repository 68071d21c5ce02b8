"""What kernels of gated scans are made of: chunks of tokens, and the states that segments start from and add.

Programs are for blocks of channels, lanes and segments, in this order: at a time, those of all heads read the same
tokens, which often lie side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, start, step, place, channel, num_tokens, WIDTH: tl.constexpr):
    """The numbers of C tokens from `start` on, zeros where there is no token or channel."""
    at = (place * step)[:, None] + channel[None, :]
    mask = (start + place < num_tokens)[:, None] & (channel < WIDTH)[None, :]
    return tl.load(pointer + start.to(tl.int64) * step + at, mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, start, step, place, channel, num_tokens, numbers, WIDTH: tl.constexpr):
    """Writes what `load_tile` reads."""
    at = (place * step)[:, None] + channel[None, :]
    mask = (start + place < num_tokens)[:, None] & (channel < WIDTH)[None, :]
    tl.store(pointer + start.to(tl.int64) * step + at, numbers.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _state_at(direction, features, channels, F: tl.constexpr, V: tl.constexpr):
    """Where numbers of a program's state lie, [2, segments, lanes, features, channels], and which of them there are."""
    number = (direction * tl.num_programs(2) + tl.program_id(2)) * tl.num_programs(1) + tl.program_id(1)
    at = number.to(tl.int64) * (F * V) + (features[:, None] * V + channels[None, :])
    return at, (features < F)[:, None] & (channels < V)[None, :]


@triton.jit
def load_state(states, direction, features, channels, F: tl.constexpr, V: tl.constexpr, CARRIED: tl.constexpr):
    """The state that a segment starts from."""
    if CARRIED:
        at, mask = _state_at(direction, features, channels, F, V)
        state = tl.load(states + at, mask=mask, other=0.0)
    else:
        state = tl.zeros((features.shape[0], channels.shape[0]), tl.float32)
    return state


@triton.jit
def store_states(states, features, channels, ahead_state, behind_state, F: tl.constexpr, V: tl.constexpr):
    """Writes what a segment adds to the states of both directions."""
    at, mask = _state_at(0, features, channels, F, V)
    tl.store(states + at, ahead_state, mask=mask)
    at, mask = _state_at(1, features, channels, F, V)
    tl.store(states + at, behind_state, mask=mask)
