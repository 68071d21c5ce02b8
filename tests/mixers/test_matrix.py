"""What holds for every mixer: one case for each YAML in configs/mixer."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from contexts import SHAPE, flux_context, flux_positions, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid, Layout
from linearize.mixers import build_mixer, mixer_class, mixer_defaults, mixer_names

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "mixer").glob("*.yaml"))
# Knobs that make every part of a mixer work on the small grids below, beside its defaults.
VARIANTS = {
    "care": [{"text": "state", "reduction": 2}, {"variant": "paper"}],
    "clear": [{"window": 3}, {"window": 5, "downsample": 2}, {"window": 2, "downsample": 3}],
    "gla": [
        {"gate": "head", "directions": "rows", "feature_map": "elu", "rope": "after_map", "rank": 0},
        {"feature_map": "exponential", "text": "state"},
        {"variant": "paper", "rank": 3},
    ],
    "groupmamba": [{"text": "state"}, {"variant": "paper"}],
    "lawcat": [
        {"window": 3, "directions": "rows_and_columns", "rank": 2},
        {"branches": "linear", "rope": "after_map", "convolution": 5, "rank": 0},
        {"window": 2, "text": "state", "rope": "none", "convolution": 1, "width": 3},
        {"window": 3, "branches": "window"},
        {"window": 3, "variant": "paper"},
    ],
    "liger": [
        {"window": 3, "directions": "rows_and_columns", "share": 0.3},
        {"branches": "linear", "rope": "after_map"},
        {"window": 3, "text": "state", "rope": "none"},
        {"window": 3, "variant": "paper"},
        {"window": 3, "branches": "window"},
    ],
    "linear": [
        {"feature_map": "relu", "rope": "none", "num_heads": 1, "convolution": 5},
        {"feature_map": "hedgehog", "rope": "after_map", "mlp": 4},
        {"feature_map": "polar", "rope": "after_map", "num_heads": 1, "text": "state"},
        {"feature_map": "exponential", "text": "state", "rope": "none"},
        {"feature_map": "focused", "focused_lengths": "width", "convolution": 3, "text": "state"},
    ],
    "lolcats": [
        {"window": 3},
        {"window": 2, "text": "state", "rope": "none", "width": 5},
        {"window": 3, "variant": "paper"},
        {"window": 3, "branches": "linear"},
        {"window": 3, "branches": "window"},
    ],
    "lizard": [
        {"window": 3, "directions": "rows_and_columns", "width": 5},
        {"branches": "linear", "rope": "after_map"},
        {"window": 3, "text": "state", "rope": "none", "num_meta": 0},
        {"window": 3, "variant": "paper"},
        {"window": 3, "branches": "window"},
    ],
    "mhla": [
        {"blocks_per_side": 3, "feature_map": "relu", "rope": "after_map", "shared_mix": True},
        {"blocks_per_side": 2, "feature_map": "elu", "text": "state"},
        {"blocks_per_side": 2, "feature_map": "elu", "variant": "paper"},
    ],
    "nprf": [
        {"num_features": 3, "bias_width": 4, "text": "state"},
        {"num_features": 3, "bias_reach": 4, "variant": "paper"},
    ],
    "performer": [{"num_features": 24, "text": "state"}, {"num_features": 40, "variant": "paper"}],
    "regla": [
        {"gate": "head", "directions": "rows_and_columns", "rank": 0, "rope": "none"},
        {"text": "state", "rank": 3},
        {"variant": "paper"},
    ],
    "soft": [
        {"landmarks_per_side": 2},
        {"landmarks_per_side": 2, "normalization": "none", "text": "state"},
        {"landmarks_per_side": 2, "normalization": "none"},
        {"landmarks_per_side": 2, "text": "state"},
        {"landmarks_per_side": 2, "variant": "paper"},
    ],
    "sla": [
        {"key_ratio": 0.3, "block_size": 3, "feature_map": "exponential"},
        {"key_ratio": 0.5, "block_size": 2, "variant": "paper"},
        {"key_ratio": 0.2, "block_size": 4, "text": "state"},
        {"key_ratio": 0.2, "block_size": 3, "branches": "window"},
        {"block_size": 3, "branches": "linear"},
    ],
}
LAYOUTS = [
    Layout(0, (Grid(9, 13),)),
    Layout(5, (Grid(8, 17),)),
    Layout(3, (Grid(11, 5),), text_first=False),
    Layout(4, (Grid(7, 10), Grid(5, 6))),
    Layout(1, (Grid(1, 6),)),
]
CASES = [(path.stem, knobs) for path in CONFIGS for knobs in ({}, *VARIANTS.get(path.stem, []))]


def case_id(value):
    if isinstance(value, Layout):
        side = "" if value.text_first else "_text_last"
        return f"{value.num_text_tokens}+{'+'.join(str(grid) for grid in value.grids)}{side}"
    return ",".join(f"{key}={knob}" for key, knob in value.items()) or "defaults" if isinstance(value, dict) else value


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*covers the whole grid")
        yield


def randomized(name, knobs):
    mixer = build_mixer(name, SHAPE, knobs).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def in_order_of(mixer, layout):
    return layout.with_tile({"tile": TILE}.get(mixer.token_order))


def serves(mixer, layout):
    """Whether a mixer serves a layout; where it says no, `forward` must say the same."""
    try:
        mixer.check_layout(layout)
    except LinearizeError as error:
        with pytest.raises(LinearizeError, match=re.escape(str(error))):
            mixer(*random_tokens(layout), flux_context(layout))
        return False
    return True


def test_every_mixer_has_its_yaml_and_every_yaml_its_mixer():
    assert [path.stem for path in CONFIGS] == mixer_names()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_yaml_repeats_the_defaults_and_puts_the_knobs_at_the_root(path):
    config = OmegaConf.load(path)
    knobs = OmegaConf.to_container(config.mixer, resolve=True)
    assert knobs.pop("name") == path.stem
    assert knobs == mixer_defaults(path.stem)
    assert {key: config[key] for key in knobs} == knobs
    assert path.read_text().startswith("# @package _global_\n")


@pytest.mark.parametrize("layout", LAYOUTS, ids=case_id)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(("name", "knobs"), CASES, ids=case_id)
def test_forward_and_gradients_equal_the_reference(name, knobs, layout, masked):
    mixer = randomized(name, knobs)
    layout = in_order_of(mixer, layout)
    if not serves(mixer, layout):
        return
    key_mask = None
    if masked:
        key_mask = torch.rand(2, layout.num_tokens) > 0.3
        key_mask[:, 0] = True
    inputs, context = random_tokens(layout), flux_context(layout, key_mask)
    leaves = [*inputs, *mixer.parameters()]
    results = []
    for compute in (mixer, mixer.reference):
        output = compute(*inputs, context)
        results.append((output, *torch.autograd.grad(output.sin().sum(), leaves, materialize_grads=True)))
    assert results[0][0].shape == inputs[0].shape
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("name", "knobs"), CASES, ids=case_id)
def test_the_order_of_image_tokens_does_not_change_the_result(name, knobs):
    mixer, raster = randomized(name, knobs), Layout(3, (Grid(11, 19),))
    tiled = raster.with_tile(TILE)
    index, back = raster.index_to(TILE), tiled.index_to(None)
    inputs = random_tokens(raster)
    expected = mixer(*inputs, flux_context(raster))
    ours = mixer(*(states[:, :, index] for states in inputs), flux_context(tiled))[:, :, back]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", mixer_names())
def test_a_default_device_of_the_caller_changes_nothing(name):
    # A grid that no other test has: tables are built here.
    mixer = randomized(name, {})
    layout = in_order_of(mixer, Layout(2, (Grid(8, 23),)))
    inputs, context = random_tokens(layout), flux_context(layout)
    with torch.device("meta"):
        found = mixer(*inputs, context)
    torch.testing.assert_close(found, mixer.reference(*inputs, context), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in mixer_names() if mixer_class(name).is_softmax_when_covered])
@pytest.mark.parametrize("num_text_tokens", [0, 4])
def test_a_window_over_everything_is_the_teacher(name, num_text_tokens):
    mixer, layout = build_mixer(name, SHAPE, {"window": 40}).double(), Layout(num_text_tokens, (Grid(9, 21),))
    layout = in_order_of(mixer, layout)
    inputs, context = random_tokens(layout), flux_context(layout)
    softmax = build_mixer("softmax", SHAPE, {})
    torch.testing.assert_close(mixer(*inputs, context), softmax.reference(*inputs, context), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "knobs"), CASES, ids=case_id)
def test_parameters_do_not_depend_on_the_grid_and_the_cost_is_declared(name, knobs):
    mixer = randomized(name, knobs)
    for layout in LAYOUTS:
        layout = in_order_of(mixer, layout)
        if not serves(mixer, layout):
            continue
        assert mixer(*random_tokens(layout), flux_context(layout)).isfinite().all()
        assert mixer.flops(layout, batch=2) == 2 * mixer.flops(layout) > 0


@pytest.mark.parametrize(("name", "knobs"), CASES, ids=case_id)
def test_bf16_stays_near_float64(name, knobs):
    mixer = randomized(name, knobs)
    layout = in_order_of(mixer, Layout(5, (Grid(16, 24),)))
    inputs, context = [states.bfloat16() for states in random_tokens(layout)], flux_context(layout)
    with torch.no_grad():
        # Of the same rounded numbers: what powers and exponentials make of the rounding is not the mixer's error.
        ours = mixer.bfloat16()(*inputs, context)
        expected = mixer.double()(*(states.double() for states in inputs), context)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("name", ["gla", "lawcat", "liger", "lizard", "mhla", "nprf"])
def test_published_linear_attention_is_not_rotated(name):
    branches = {"branches": "linear"} if "branches" in mixer_defaults(name) else {}
    mixer, layout = randomized(name, {"variant": "paper", "text": "state", **branches}), Layout(3, (Grid(7, 9),))
    inputs, context = random_tokens(layout), flux_context(layout)
    still = replace(context, rotate=lambda states: states)
    torch.testing.assert_close(mixer(*inputs, context), mixer(*inputs, still))


@pytest.mark.parametrize("name", mixer_names())
def test_the_class_says_what_it_is(name):
    mixer = mixer_class(name)
    assert mixer.__module__ == f"linearize.mixers.{name}"
    assert build_mixer(name, SHAPE, {}).token_order in ("any", "raster", "tile")
    assert mixer.__doc__


def test_positions_follow_the_tokens():
    layout = Layout(2, (Grid(9, 20),))
    moved = flux_positions(layout)[layout.index_to(TILE)]
    assert torch.equal(moved, flux_positions(layout.with_tile(TILE)))
