"""Calibration weighs the linear branch so that no other weight brings the layer nearer to the teacher."""

import pytest
import torch

from contexts import SHAPE, flux_context, random_tokens
from linearize.layout import Grid, Layout
from linearize.mixers import build_mixer
from linearize.ops.least_squares import least_error_weight

LAYOUT = Layout(5, (Grid(8, 11),))
CASES = [
    ("gla", {}),
    ("lawcat", {"window": 3}),
    ("liger", {"window": 3, "share": 0.3}),
    ("linear", {"num_heads": 1, "convolution": 3}),
    ("linear", {"feature_map": "polar"}),
    ("lizard", {"window": 3}),
    ("lizard", {"branches": "linear"}),
    ("lolcats", {"window": 3}),
    ("lolcats", {"window": 3, "text": "state"}),
    ("mhla", {}),
    ("nprf", {}),
    ("performer", {}),
    ("regla", {}),
    ("sla", {"key_ratio": 0.2, "block_size": 3}),
    ("soft", {"landmarks_per_side": 4}),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
@pytest.mark.parametrize(("name", "knobs"), CASES)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_no_other_weight_of_the_linear_branch_is_nearer_to_the_teacher(name, knobs, masked):
    key_mask = None
    if masked:
        key_mask = torch.rand(2, LAYOUT.num_tokens) > 0.3
        key_mask[:, :2] = True
    inputs, context = [states.detach() for states in random_tokens(LAYOUT)], flux_context(LAYOUT, key_mask)
    mixer = build_mixer(name, SHAPE, knobs).double()
    teacher = build_mixer("softmax", SHAPE, {})(*inputs, context)

    def errors(log_scale):
        mixer.log_scale.copy_(log_scale)
        away = (mixer(*inputs, context) - teacher)[:, :, LAYOUT.image_slice]
        return away.square().sum(dim=(0, 2, 3))

    mixer.log_scale.fill_(7.0)
    mixer.calibrate(*inputs, context)
    found = mixer.log_scale.clone()
    least = errors(found)
    for away in (-8.0, -1.0, -0.05, 0.05, 1.0, 8.0):
        assert (errors(found + away) >= least * (1 - 1e-12)).all()


@pytest.mark.parametrize("name", ["care", "groupmamba"])
@pytest.mark.parametrize(
    ("text", "valid"), [("exact", slice(0)), ("exact", LAYOUT.text_slice), ("state", slice(0))], ids=str
)
def test_a_sample_without_a_valid_key_leaves_the_fit_to_the_others(name, text, valid):
    inputs = [states.detach() for states in random_tokens(LAYOUT)]
    key_mask = torch.ones(2, LAYOUT.num_tokens, dtype=torch.bool)
    key_mask[1] = False
    key_mask[1, valid] = True
    key_mask[0, LAYOUT.image_slice.start + 7] = False
    both, alone = (build_mixer(name, SHAPE, {"text": text}).double() for _ in range(2))
    alone.load_state_dict(both.state_dict())
    both.calibrate(*inputs, flux_context(LAYOUT, key_mask))
    alone.calibrate(*(states[:1] for states in inputs), flux_context(LAYOUT, key_mask[:1]))
    for key, value in both.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[key], msg=key)


@pytest.mark.parametrize("knobs", [{"variant": "paper"}, {"branches": "window"}])
@pytest.mark.parametrize("name", ["lolcats", "sla"])
def test_what_has_no_weight_keeps_its_parameters(name, knobs):
    inputs, context = [states.detach() for states in random_tokens(LAYOUT)], flux_context(LAYOUT)
    mixer = build_mixer(name, SHAPE, knobs)
    before = {key: value.clone() for key, value in mixer.state_dict().items()}
    mixer.calibrate(*inputs, context)
    assert "log_scale" not in before
    assert all(torch.equal(value, before[key]) for key, value in mixer.state_dict().items())


def test_the_weight_that_mixed_two_branches_is_found():
    log_ratio = torch.randn(2, 3, 50, 1, dtype=torch.float64)
    base, other = torch.randn(2, 2, 3, 50, 4, dtype=torch.float64)
    weight = torch.tensor([-7.3, 0.4, 12.0], dtype=torch.float64)
    mixed = base + (log_ratio + weight[:, None, None]).sigmoid() * (other - base)
    torch.testing.assert_close(least_error_weight(log_ratio, base, other, mixed), weight, rtol=0.0, atol=1e-2)
