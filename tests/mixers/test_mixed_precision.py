"""Every mixer in bfloat16 autocast beside float32 parameters, as in training, against its definition in float64."""

import pytest
import torch

from contexts import flux_context, random_tokens
from linearize.layout import TILE, Grid, Layout
from linearize.mixers import AttentionShape, build_mixer, mixer_names

SHAPE = AttentionShape(num_heads=2, head_dim=64, hidden_size=128)
LAYOUT = Layout(5, (Grid(9, 14),))
# Of bfloat16; sums of few numbers over all tokens, such as the gradient of one scale a head, cancel and lose twice.
ROUNDING = 2**-8
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def results(compute, mixer, inputs, weight, context):
    """The output, and the gradients of (output * weight).sum() by name."""
    states = [one.to(weight.device, weight.dtype).requires_grad_() for one in inputs]
    output = compute(*states, context)
    leaves = dict(zip(("query", "key", "value"), states, strict=True)) | dict(mixer.named_parameters())
    gradients = torch.autograd.grad((output * weight).sum(), list(leaves.values()), materialize_grads=True)
    return {"output": output.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", mixer_names())
def test_forward_and_gradients_are_off_by_rounding_alone(name, device):
    torch.manual_seed(0)
    exact = build_mixer(name, SHAPE, {}).double()
    with torch.no_grad():
        for parameter in exact.parameters():  # away from the zeros behind which other gradients vanish
            parameter += 0.05 * torch.randn_like(parameter)
    layout = LAYOUT.with_tile({"tile": TILE}.get(exact.token_order))
    inputs = [states.detach().bfloat16() for states in random_tokens(layout, shape=SHAPE)]
    weight = torch.randn(inputs[0].shape).bfloat16()
    expected = results(exact.reference, exact, inputs, weight.double(), flux_context(layout, shape=SHAPE))
    mixer = build_mixer(name, SHAPE, {}).to(device)
    mixer.load_state_dict(exact.state_dict())
    context = flux_context(layout, shape=SHAPE, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        found = results(mixer, mixer, inputs, weight.to(device), context)
    for label, exactly in expected.items():
        error = (found[label].cpu().double() - exactly).norm()
        limit = (4 if label in ("output", "query", "key", "value") else 8) * ROUNDING
        assert error <= limit * exactly.norm(), f"{label}: {error / exactly.norm():.3g} of its norm"
