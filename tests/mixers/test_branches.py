"""What `branches` means in every mixer with a window and a linear branch, told from the weights of all pairs."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from contexts import SHAPE, flux_context, random_tokens
from linearize.layout import Grid, Layout
from linearize.mixers import Mixer, MixerContext, build_mixer, mixer_defaults, mixer_names
from linearize.mixers._tokens import Tokens
from linearize.mixers._window import inside_window

LAYOUT = Layout(3, (Grid(7, 10),))
# Knobs, whether the linear branch goes on under the window, and the knob that says how much the window sees.
HYBRIDS = {
    "lawcat": ({"window": 3}, True, {"window": 5}),
    "liger": ({"window": 3, "share": 0.3}, True, {"window": 5}),
    "lizard": ({"window": 3}, True, {"window": 5}),
    "lolcats": ({"window": 3}, False, {"window": 5}),
    "sla": ({"key_ratio": 0.3, "block_size": 3, "feature_map": "exponential"}, False, {"key_ratio": 0.6}),
}


def test_every_hybrid_has_the_switch() -> None:
    assert {name for name in mixer_names() if "branches" in mixer_defaults(name)} == set(HYBRIDS)
    for name in HYBRIDS:
        config = OmegaConf.load(Path(__file__).parents[2] / "configs" / "mixer" / f"{name}.yaml")
        assert config.branches == config.mixer.branches == "both"


def weights_of(mixer: Mixer, inputs: tuple[Tensor, Tensor, Tensor], context: MixerContext) -> Tensor:
    """The weights [batch, heads, queries, keys] of a mixer that is linear in the value, by values of one token each."""
    query, key, value = inputs
    columns = []
    for start in range(0, LAYOUT.num_tokens, SHAPE.head_dim):
        probe = torch.zeros_like(value)
        size = min(SHAPE.head_dim, LAYOUT.num_tokens - start)
        probe[:, :, torch.arange(start, start + size), torch.arange(size)] = 1
        columns.append(mixer(query, key, probe, context)[..., :size])
    return torch.cat(columns, dim=-1)


def is_constant(ratios: Tensor, where: Tensor) -> Tensor:
    """Whether each row of [batch, heads, queries, keys] has one value in all places `where`."""
    low, high = (ratios.masked_fill(~where, fill) for fill in (torch.inf, -torch.inf))
    spread = high.amax(dim=-1) - low.amin(dim=-1)
    return (spread[where.any(dim=-1)] < 1e-8).all()


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRIDS)
def test_both_branches_are_the_window_and_the_linear_branch(name: str) -> None:
    torch.manual_seed(0)
    knobs, goes_on, wider = HYBRIDS[name]
    inputs, context, image = random_tokens(LAYOUT), flux_context(LAYOUT), LAYOUT.image_slice
    both = build_mixer(name, SHAPE, knobs).double()
    for parameter in both.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    def with_branches(branches: str, **changed: float) -> tuple[Mixer, Tensor]:
        mixer = build_mixer(name, SHAPE, {**knobs, **changed, "branches": branches}).double()
        unknown = mixer.load_state_dict(both.state_dict(), strict=False)
        assert not unknown.missing_keys
        return mixer, weights_of(mixer, inputs, context)

    window_mixer, window = with_branches("window")
    _, linear = with_branches("linear")
    joint = weights_of(both, inputs, context)
    tokens = Tokens.of(*inputs, context)
    scores = torch.einsum("bhid,bhjd->bhij", *tokens.rotated) * context.scale
    seen = window_mixer.sees_exactly(tokens) if name == "sla" else inside_window(tokens, knobs["window"])
    seen = seen.expand_as(scores)[:, :, image, image]

    # Text sees everything by softmax, whatever the branches.
    teacher = scores.softmax(dim=-1)
    for weights in (window, linear, joint):
        torch.testing.assert_close(weights[:, :, LAYOUT.text_slice], teacher[:, :, LAYOUT.text_slice])

    # The window alone: softmax over what it sees, and nothing else.
    window_images, linear_images, joint_images, scores = (
        weights[:, :, image, image] for weights in (window, linear, joint, scores)
    )
    assert torch.equal(window_images != 0, seen)
    assert is_constant(window_images.clamp_min(1e-300).log() - scores, seen)

    # The linear branch alone: every token, not by softmax, and the same for any window.
    assert (linear_images != 0).all()
    assert not is_constant(linear_images.clamp_min(1e-300).log() - scores, seen)
    torch.testing.assert_close(with_branches("linear", **wider)[1], linear)

    # Both: the linear branch off the window, and in it the window, alone or on top of the linear branch, all up to
    # factors that a row shares.
    assert (~seen).any(dim=-1).all()
    ratio = joint_images / linear_images
    assert is_constant(ratio, ~seen)
    factor = ratio.masked_fill(seen, -torch.inf).amax(dim=-1, keepdim=True)
    near = joint_images - factor * linear_images if goes_on else joint_images
    assert is_constant(near / window_images.masked_fill(~seen, 1.0), seen)
    assert (factor > 0).all() and (near[seen] > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("num_text_tokens", [3, 0])
@pytest.mark.parametrize("name", ["lolcats", "sla"])
def test_published_hybrids_follow_their_definition_while_training_leaves_the_window_out(
    name: str, num_text_tokens: int
) -> None:
    torch.manual_seed(0)
    layout = Layout(num_text_tokens, LAYOUT.grids)
    inputs, context = random_tokens(layout), flux_context(layout)
    mixer = build_mixer(name, SHAPE, {"variant": "paper"}).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mixer.branches = "linear"
    torch.testing.assert_close(mixer(*inputs, context), mixer.reference(*inputs, context))
