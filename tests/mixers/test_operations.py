"""Declared operations against those that PyTorch counts, where nothing is masked and no kernel hides them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from contexts import flux_context, random_tokens
from linearize.layout import Grid, Layout
from linearize.mixers import AttentionShape, build_mixer

SHAPE = AttentionShape(4, 64, 256)
LAYOUT = Layout(64, (Grid(16, 24),))
CASES = [
    ("care", {}),
    ("gla", {"directions": "rows"}),
    ("gla", {"variant": "paper"}),
    ("groupmamba", {}),
    ("mhla", {}),
    ("mhla", {"feature_map": "hedgehog"}),
    ("nprf", {}),
    ("performer", {}),
    ("regla", {}),
    ("soft", {"landmarks_per_side": 4}),
]


@pytest.mark.parametrize(("name", "knobs"), CASES, ids=str)
def test_declared_operations_are_those_that_run(name, knobs):
    mixer = build_mixer(name, SHAPE, {**knobs, "text": "state"})
    context = flux_context(LAYOUT, shape=SHAPE, dtype=torch.float32)
    context.hidden_states = context.hidden_states[:1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer(*random_tokens(LAYOUT, batch=1, dtype=torch.float32, shape=SHAPE), context)
    # More run on the zeros that align a value, fewer where the counter does not see elementwise work.
    assert 0.9 < counter.get_total_flops() / mixer.flops(LAYOUT) < 1.15
