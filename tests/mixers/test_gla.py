"""What the gla mixer's formula promises, beside the matrix."""

import pytest
import torch
import torch.nn.functional as F

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.mixers._gated import OPEN, TEMPERATURE
from linearize.mixers.gla import GlaMixer
from linearize.mixers.linear import LinearMixer
from linearize.ops.scan_order import scan_order

LAYOUT = Layout(4, (Grid(5, 9),))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("text", ["exact", "state"])
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_open_gates_are_the_linear_mixer(text, gate):
    inputs, context = random_tokens(LAYOUT), flux_context(LAYOUT)
    mixer = GlaMixer(SHAPE, text=text, gate=gate).double()
    ungated = LinearMixer(SHAPE, feature_map="hedgehog", text=text).double()(*inputs, context)
    # As it starts, the weight of the farthest token is that of 44 gates.
    start = (mixer(*inputs, context) - ungated).norm() / ungated.norm()
    assert 0 < start < 0.02
    torch.nn.init.constant_(mixer.gates.outer.bias, 1e3)
    torch.testing.assert_close(mixer(*inputs, context), ungated)


def test_gates_start_open_over_a_whole_picture():
    gate = torch.tensor(OPEN).sigmoid() ** (1 / TEMPERATURE)
    assert 2500 < torch.log(torch.tensor(0.5)) / gate.log() < 3000
    for parameter in GlaMixer(SHAPE).gates.outer.parameters():
        assert parameter.dtype == torch.float32
    assert GlaMixer(SHAPE).gates.outer.weight.abs().max() == 0


def test_closed_gates_leave_a_token_its_own_value():
    layout = Layout(0, LAYOUT.grids)
    query, key, value = random_tokens(layout)
    mixer = GlaMixer(SHAPE).double()
    torch.nn.init.constant_(mixer.gates.outer.bias, -1e5)
    torch.testing.assert_close(mixer(query, key, value, flux_context(layout)), value)


def test_rows_and_columns_are_averaged_before_the_normaliser():
    layout = Layout(0, (Grid(3, 8), Grid(4, 5)), tile=TILE)
    order, back = scan_order(layout, "columns", torch.device("cpu"))
    assert torch.equal(order[back], torch.arange(44))
    raster = layout.raster_to_tile()[order]
    assert raster[:6].tolist() == [0, 8, 16, 1, 9, 17]
    assert raster[24:29].tolist() == [24, 29, 34, 39, 25]


def test_transposing_the_picture_changes_rows_for_columns():
    """With one gate for all tokens, a picture and its transpose give the same."""
    wide, tall = Layout(0, (Grid(4, 7),)), Layout(0, (Grid(7, 4),))
    order = torch.arange(28).view(4, 7).t().flatten()
    inputs = random_tokens(wide)
    mixer = GlaMixer(SHAPE, rope="none").double()
    torch.nn.init.constant_(mixer.gates.outer.bias, -3.0)
    turned = mixer(*(states[:, :, order] for states in inputs), flux_context(tall))
    torch.testing.assert_close(turned, mixer(*inputs, flux_context(wide))[:, :, order])


def test_the_published_formula_token_by_token():
    """GLA's recurrence from either end, RMS norm and output gate, without a normaliser."""
    layout = Layout(0, (Grid(3, 5),))
    query, key, value = random_tokens(layout)
    context = flux_context(layout)
    mixer = GlaMixer(SHAPE, variant="paper", rope="none", directions="rows").double()
    torch.nn.init.normal_(mixer.gates.outer.weight)
    ahead, behind = (gate.exp() for gate in mixer.gates(context.hidden_states))
    total = -(query * key).sum(-1, keepdim=True) * value
    for tokens, gates in ((range(15), ahead), (range(14, -1, -1), behind)):
        state = torch.zeros(2, 2, 16, 16, dtype=torch.float64)
        outputs = torch.zeros_like(value)
        for i in tokens:
            state = gates[:, :, i, :, None] * state + key[:, :, i, :, None] * value[:, :, i, None]
            outputs[:, :, i] = (query[:, :, i, None] @ state)[:, :, 0]
        total = total + outputs
    total = total * context.scale
    normed = total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    gate = F.silu(mixer.output_gate(context.hidden_states)).unflatten(-1, (2, 16)).transpose(1, 2)
    torch.testing.assert_close(mixer(query, key, value, context), normed * gate)


def test_operations_grow_linearly_with_the_picture():
    mixer = GlaMixer(AttentionShape(24, 128, 3072))
    small, large, larger = (mixer.flops(Layout(512, (Grid(side, 64),))) for side in (64, 128, 192))
    assert larger - large == large - small


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"gate": "token"}, "mixer 'gla' got gate='token'; choose head or channel"),
        ({"directions": "columns"}, "choose rows or rows_and_columns"),
        ({"variant": "code"}, "choose dit or paper"),
    ],
)
def test_what_it_cannot_do_is_told(knobs, sentence):
    with pytest.raises(LinearizeError, match=sentence):
        build_mixer("gla", SHAPE, knobs)
