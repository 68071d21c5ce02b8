"""Every mixer in bfloat16 autocast beside float32 parameters, as in training, against its definition in float64."""

from dataclasses import replace

import pytest
import torch

from contexts import flux_context, random_tokens
from linearize.layout import TILE, Grid, Layout
from linearize.mixers import AttentionShape, build_mixer, mixer_class, mixer_names
from linearize.mixers._joint import JointMixer
from linearize.mixers._tokens import Tokens
from linearize.ops.precision import has_narrow_products

SHAPE = AttentionShape(num_heads=2, head_dim=64, hidden_size=128)
LAYOUT = Layout(5, (Grid(9, 14),))
# Of bfloat16; sums of few numbers over all tokens, such as the gradient of one scale a head, cancel and lose twice.
ROUNDING = 2**-8
JOINT = [name for name in mixer_names() if issubclass(mixer_class(name), JointMixer)]
VARIANTS = {
    "care": [{"variant": "paper"}],
    "lawcat": [{"rope": "after_map"}, {"branches": "linear"}],
    "linear": [{"feature_map": "exponential"}, {"feature_map": "polar", "convolution": 3}],
    "lizard": [{"branches": "window"}, {"variant": "paper"}],
    "lolcats": [{"text": "state"}, {"branches": "linear"}],
    "sla": [{"variant": "paper"}, {"branches": "window"}],
}
NARROWED = [(name, arguments) for name in JOINT for arguments in [{}, *VARIANTS.get(name, [])]]
# Tiles, and text, that are whole: other kernels take these.
WHOLE = Layout(128, (Grid(16, 24),))
PLACES = [
    pytest.param("cpu", LAYOUT, id="cpu"),
    pytest.param("cuda", LAYOUT, marks=pytest.mark.gpu, id="cuda"),
    pytest.param("cuda", WHOLE, marks=pytest.mark.gpu, id="cuda, whole tiles"),
]


def results(compute, mixer, inputs, weight, context):
    """The output, and the gradients of (output * weight).sum() by name."""
    states = [one.to(weight.device, weight.dtype).requires_grad_() for one in inputs]
    output = compute(*states, context)
    leaves = dict(zip(("query", "key", "value"), states, strict=True)) | dict(mixer.named_parameters())
    gradients = torch.autograd.grad((output * weight).sum(), list(leaves.values()), materialize_grads=True)
    return {"output": output.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize(("device", "layout"), PLACES)
@pytest.mark.parametrize("name", mixer_names())
def test_forward_and_gradients_are_off_by_rounding_alone(name, device, layout):
    torch.manual_seed(0)
    exact = build_mixer(name, SHAPE, {}).double()
    with torch.no_grad():
        for parameter in exact.parameters():  # away from the zeros behind which other gradients vanish
            parameter += 0.05 * torch.randn_like(parameter)
    layout = layout.with_tile({"tile": TILE}.get(exact.token_order))
    inputs = [states.detach().bfloat16() for states in random_tokens(layout, shape=SHAPE)]
    weight = torch.randn(inputs[0].shape).bfloat16()
    expected = results(exact.reference, exact, inputs, weight.double(), flux_context(layout, shape=SHAPE))
    mixer = build_mixer(name, SHAPE, {}).to(device)
    mixer.load_state_dict(exact.state_dict())
    context = flux_context(layout, shape=SHAPE, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        found = results(mixer, mixer, inputs, weight.to(device), context)
    states = ("output", "query", "key", "value")
    for label, exactly in expected.items():
        if layout.num_text_tokens == WHOLE.num_text_tokens and label not in states:
            continue  # the kernels' gradients are those of states; others cancel the more, the more tokens there are
        error = (found[label].cpu().double() - exactly).norm()
        limit = (4 if label in states else 8) * ROUNDING
        assert error <= limit * exactly.norm(), f"{label}: {error / exactly.norm():.3g} of its norm"


@torch.no_grad()
@pytest.mark.parametrize("name", mixer_names())
def test_parameters_in_bfloat16_are_good_enough_for_inference(name):
    torch.manual_seed(0)
    exact = build_mixer(name, SHAPE, {}).double()
    for parameter in exact.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    mixer = build_mixer(name, SHAPE, {}).bfloat16()
    mixer.load_state_dict(exact.state_dict())
    layout = LAYOUT.with_tile({"tile": TILE}.get(exact.token_order))
    inputs = [states.bfloat16() for states in random_tokens(layout, shape=SHAPE)]
    found = mixer(*inputs, flux_context(layout, shape=SHAPE, dtype=torch.bfloat16))
    expected = exact.reference(*(states.double() for states in inputs), flux_context(layout, shape=SHAPE))
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() <= 4 * ROUNDING * expected.norm()


@pytest.mark.parametrize(("name", "arguments"), [*((name, {}) for name in JOINT), ("regla", {"variant": "paper"})])
def test_autocast_changes_nothing_in_what_calibration_sets(name, arguments):
    context = flux_context(LAYOUT, shape=SHAPE, dtype=torch.bfloat16)
    query, key, value = (states.detach().float() for states in random_tokens(LAYOUT, shape=SHAPE))
    found = []
    for enabled in (True, False):
        torch.manual_seed(0)
        mixer = build_mixer(name, SHAPE, arguments)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            mixer.calibrate(query, key, value.bfloat16(), context)
        found.append(mixer.state_dict())
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


def test_products_are_narrow_in_bfloat16_on_a_gpu_alone():
    types = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    narrow = [(dtype, device) for dtype in types for device in ("cuda", "cpu") if has_narrow_products(dtype, device)]
    assert narrow == [(torch.bfloat16, "cuda")]


@pytest.mark.parametrize(("name", "arguments"), NARROWED)
def test_narrow_products_are_off_by_rounding_alone(name, arguments):
    """As on a GPU under autocast, which gives norms of query and key in float32, and the value in bfloat16."""
    torch.manual_seed(0)
    exact = build_mixer(name, SHAPE, arguments).double()
    layout = LAYOUT.with_tile({"tile": TILE}.get(exact.token_order))
    query, key, value = (states.detach().float() for states in random_tokens(layout, shape=SHAPE))
    value = value.bfloat16()
    with torch.no_grad():
        doubles = (states.double() for states in (query, key, value))
        expected = exact.reference(*doubles, flux_context(layout, shape=SHAPE))
    mixer = build_mixer(name, SHAPE, arguments)
    mixer.load_state_dict(exact.state_dict())
    context = flux_context(layout, shape=SHAPE, dtype=torch.bfloat16)
    tokens = Tokens.of(query, key, value, context)
    outputs = [mixer(query, key, value, context)]
    if not mixer.has_wide_products:
        narrow = replace(tokens, product_dtype=torch.bfloat16)
        pair_types = {narrow.product_value.dtype, *(states.dtype for states in narrow.product_rotated)}
        assert pair_types == {torch.bfloat16}
        outputs.append(mixer.finish(mixer.mix(narrow), narrow))
        assert not torch.equal(outputs[1].to(value.dtype), outputs[0])
    for output in outputs:
        error = (output.double() - expected).norm() / expected.norm()
        assert error <= 4 * ROUNDING, f"{error:.3g} of its norm"
