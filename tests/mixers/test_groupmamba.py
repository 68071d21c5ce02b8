"""What the groupmamba mixer's formula promises, beside the matrix."""

import pytest
import torch
import torch.nn.functional as F

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.mixers._tokens import Tokens
from linearize.mixers.groupmamba import GroupmambaMixer

LAYOUT = Layout(4, (Grid(5, 8),))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def relative_error(ours, theirs):
    return ((ours - theirs).square().sum() / theirs.square().sum()).item()


@pytest.mark.parametrize("knobs", [{}, {"text": "state"}, {"variant": "paper"}])
def test_calibration_brings_it_near_the_teacher(knobs):
    query, key, value = (states.detach() for states in random_tokens(LAYOUT))
    context = flux_context(LAYOUT)
    mixer = GroupmambaMixer(SHAPE, **knobs).double()
    teacher = build_mixer("softmax", SHAPE, {})(query, key, value, context)
    before = relative_error(mixer(query, key, value, context), teacher)
    mixer.calibrate(query, key, value, context)
    after = relative_error(mixer(query, key, value, context), teacher)
    assert after < min(0.6, before / 2)


def test_the_fitted_mass_is_the_teachers_where_it_is_an_exponential_of_the_query():
    query, key, value = (states.detach() for states in random_tokens(LAYOUT))
    key[:, :, LAYOUT.image_slice] = torch.randn(16, dtype=torch.float64)
    context = flux_context(LAYOUT)
    context.rotate = lambda states: states
    mixer = GroupmambaMixer(SHAPE).double()
    mixer.calibrate(query, key, value, context)
    tokens = Tokens.of(query, key, value, context)
    images = query[:, :, LAYOUT.image_slice] @ key[:, :, LAYOUT.image_slice].transpose(-1, -2)
    expected = (images * context.scale).logsumexp(dim=-1, keepdim=True)
    torch.testing.assert_close(mixer._log_mass(tokens), expected, rtol=0.0, atol=0.05)


def test_the_mass_grows_with_the_picture():
    small, large = Layout(0, (Grid(3, 4),)), Layout(0, (Grid(6, 8),))
    mixer = GroupmambaMixer(SHAPE).double()
    masses = [
        mixer._log_mass(Tokens.of(*random_tokens(layout), flux_context(layout))).mean() for layout in (small, large)
    ]
    torch.testing.assert_close(masses[1] - masses[0], torch.tensor(4.0, dtype=torch.float64).log())


def test_at_first_a_group_reads_what_came_before_in_its_direction_and_fades_on_the_way():
    """The read-out starts as the identity, so that channel c is group c % 4."""
    grid = Grid(5, 8)
    layout = Layout(0, (grid,))
    query, key, value = random_tokens(layout)
    row, column = 2, 3
    value = torch.zeros_like(value)
    value[:, :, row * grid.width + column] = 1.0
    output = GroupmambaMixer(SHAPE).double()(query, key, value, flux_context(layout)).detach()
    seen = output[0, 0].unflatten(0, (grid.height, grid.width))
    along_rows = torch.arange(40).view(5, 8) - (row * grid.width + column)
    along_columns = torch.arange(40).view(8, 5).t() - (column * grid.height + row)
    for group, distance in enumerate((along_rows, along_columns, -along_rows, -along_columns)):
        assert torch.equal(seen[..., group] > 0, distance >= 0)
        nearest_first = seen[..., group].flatten()[distance.flatten().argsort()]
        assert (nearest_first[-(distance >= 0).sum() :].diff() < 0).all()


def test_with_text_as_a_state_pictures_see_text_and_text_sees_pictures():
    query, key, value = random_tokens(LAYOUT)
    output = GroupmambaMixer(SHAPE, text="state").double()(query, key, value, flux_context(LAYOUT))
    for readers, read in ((LAYOUT.image_slice, LAYOUT.text_slice), (LAYOUT.text_slice, LAYOUT.image_slice)):
        (gradient,) = torch.autograd.grad(output[:, :, readers].sum(), value, retain_graph=True)
        assert (gradient[:, :, read].abs().amax(dim=(0, 1, 3)) > 0).any()


def test_the_published_formula_written_out():
    """One group's arithmetic, by hand, for a picture of one row, where the first scan goes from left to right."""
    layout = Layout(0, (Grid(1, 6),))
    context = flux_context(layout)
    mixer = GroupmambaMixer(SHAPE, variant="paper").double()
    tokens = Tokens.of(*random_tokens(layout), context)
    scans, states = mixer.scans, F.layer_norm(context.hidden_states, (32,))
    u, z = (states[..., :8] @ mixer.inner[0]).chunk(2, dim=-1)
    kernel = scans.filter.unflatten(0, (4, 8))[0, :, 1]
    u = F.silu(F.conv1d(u.transpose(1, 2), kernel[:, None], padding=1, groups=8).transpose(1, 2))
    low, write, read = (u @ scans.project[0]).split([1, 1, 1], dim=-1)
    step = F.softplus(low @ scans.step_weight[0] + scans.step_bias[0])
    h, y = torch.zeros(2, 8, dtype=torch.float64), []
    for t in range(6):
        h = (-step[:, t] * scans.log_rate[0].exp()).exp() * h + step[:, t] * write[:, t] * u[:, t]
        y.append(read[:, t] * h + scans.skip[0] * u[:, t])
    y = F.layer_norm(torch.stack(y, dim=1), (8,)) * F.silu(z) @ mixer.outer[0]
    mean = states.mean(dim=1, keepdim=True)
    factor = mixer.excite(F.relu(mixer.squeeze(mean))).sigmoid()
    product = (y * states[..., :8] * factor[..., :8]).detach()
    # The outer norm is over all channels: of one group the differences are known up to its deviation.
    ours = mixer.token_features(tokens, dense=False)[..., :8].detach()
    ours, product = (x - x.mean(dim=-1, keepdim=True) for x in (ours, product))
    torch.testing.assert_close(F.normalize(ours, dim=-1), F.normalize(product, dim=-1), rtol=1e-6, atol=1e-7)


def test_operations_grow_linearly_with_the_picture():
    mixer = GroupmambaMixer(AttentionShape(4, 32, 128))
    small, large, larger = (mixer.flops(Layout(512, (Grid(side, 64),))) for side in (64, 128, 192))
    assert larger - large == large - small


@pytest.mark.parametrize(
    ("shape", "knobs", "sentence"),
    [
        (SHAPE, {"text": "none"}, "mixer 'groupmamba' got text='none'; choose exact or state"),
        (SHAPE, {"variant": "v2"}, "choose dit or paper"),
        (AttentionShape(3, 6, 18), {}, "into 4 groups, but the layer has 18 of them; choose another mixer"),
    ],
)
def test_what_it_cannot_do_is_told(shape, knobs, sentence):
    with pytest.raises(LinearizeError, match=sentence):
        build_mixer("groupmamba", shape, knobs)
