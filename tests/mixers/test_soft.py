from functools import partial

import pytest
import torch

from contexts import SHAPE, flux_context, random_tokens
from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.mixers import AttentionShape, build_mixer
from linearize.ops.gaussian_kernel import cell_landmarks, gaussian_kernel, landmark_index
from linearize.ops.newton_inverse import newton_inverse, newton_iterate, num_newton_iterations
from linearize.ops.rotary import rotate_features


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def kernels(size=12, jitter=0.01):
    points = torch.randn(3, size, 4, dtype=torch.float64)
    return gaussian_kernel(points, points) + jitter * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("num_iterations", [1, 5, 10, 20])
def test_the_residual_follows_the_law(num_iterations):
    """|I - V_k A|_2 = (1 - step least_eigenvalue^2)^(2^k)."""
    matrix = kernels()
    inverse = newton_iterate(matrix, num_iterations)
    residual = torch.linalg.matrix_norm(torch.eye(12, dtype=torch.float64) - inverse @ matrix, ord=2)
    step = 1.8 / matrix.sum(dim=-1).amax(dim=-1).square()
    law = (1 - step * torch.linalg.eigvalsh(matrix)[:, 0].square()) ** (2**num_iterations)
    torch.testing.assert_close(residual, law, rtol=1e-6, atol=1e-9)


def test_twenty_iterations_may_not_do_and_the_bound_always_does():
    close = torch.ones(1, 60, 60, dtype=torch.float64) + 0.01 * torch.eye(60, dtype=torch.float64)
    eye = torch.eye(60, dtype=torch.float64)
    assert (eye - newton_iterate(close, 20) @ close).abs().max() > 0.5
    assert num_newton_iterations(0.01, 60.01) > 25
    assert (eye - newton_inverse(close, 0.01) @ close).abs().max() < 1e-8


def test_the_inverse_and_its_gradient_are_those_of_a_solver():
    matrix = kernels().requires_grad_()
    torch.testing.assert_close(newton_inverse(matrix, 0.01), torch.linalg.inv(matrix), rtol=1e-9, atol=1e-9)
    ours, theirs = (
        torch.autograd.grad(inverse(matrix).sin().sum(), matrix)[0]
        for inverse in (lambda x: newton_inverse(x, 0.01), torch.linalg.inv)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-6)


def test_the_inverse_of_a_matrix_does_not_depend_on_others_of_its_batch():
    matrix = kernels()
    torch.testing.assert_close(newton_inverse(matrix, 0.01)[1], newton_inverse(matrix[1], 0.01), rtol=1e-12, atol=1e-12)


def test_a_kernel_that_is_not_finite_is_told():
    with pytest.raises(LinearizeError, match="residual of nan; check that query and key are finite"):
        newton_inverse(torch.full((4, 4), torch.nan), 0.01)


def test_softmax_weights_are_gaussian_ones_for_keys_of_one_length():
    query, key = (torch.nn.functional.normalize(torch.randn(7, 5, dtype=torch.float64), dim=-1) for _ in range(2))
    kernel = gaussian_kernel(3 * query, 3 * key)
    torch.testing.assert_close(kernel / kernel.sum(dim=-1, keepdim=True), (9 * query @ key.T).softmax(dim=-1))


def test_landmarks_that_are_all_tokens_give_the_kernel_itself():
    """K (K + jitter)^-1 K -> K, and its rows over the mass are softmax's for tokens of one length."""
    layout = Layout(0, (Grid(3, 3),))
    query, key, value = (torch.nn.functional.normalize(states, dim=-1) * 6 for states in random_tokens(layout))
    context = flux_context(layout)
    mixer = build_mixer("soft", SHAPE, {"landmarks_per_side": 3, "temperature": 1.0, "normalization": "none"}).double()
    expected = build_mixer("softmax", SHAPE, {}).reference(query, key, value, context)
    assert (mixer(query, key, value, context) - expected).norm() < 0.03 * expected.norm()


def test_weights_are_relative_under_rotation():
    layout = Layout(0, (Grid(6, 8),))
    inputs, contexts = random_tokens(layout), [flux_context(layout), flux_context(layout)]
    for context, shift in zip(contexts, ([0, 0, 0], [0, 5, 3]), strict=True):
        angles = context.angles(context.positions + torch.tensor(shift), SHAPE.head_dim)
        context.rotate = partial(rotate_features, angles=angles)
    for normalization in ("symmetric", "none"):
        mixer = build_mixer("soft", SHAPE, {"landmarks_per_side": 3, "normalization": normalization}).double()
        outputs = [mixer(*inputs, context) for context in contexts]
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


def test_landmarks_are_means_of_cells_whose_number_is_fixed():
    layout = Layout(2, (Grid(4, 6), Grid(2, 2)))
    index, num_cells = landmark_index(layout, 2, False, torch.device("cpu"))
    assert (
        num_cells == 8
        and index[:24].view(4, 6)[0].tolist() == [0, 0, 0, 1, 1, 1]
        and index[24:].tolist() == [4, 5, 6, 7]
    )
    states = torch.randn(1, 2, 28, 3)
    landmarks, counts = cell_landmarks(states, index, 8, None)
    cell = states[:, :, index == 1]
    torch.testing.assert_close(landmarks[:, :, 1].norm(dim=-1), cell.norm(dim=-1).mean(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(landmarks[:, :, 1], cell.mean(dim=2), dim=-1)
    torch.testing.assert_close(cosine, torch.ones(1, 2))
    hidden = torch.ones(1, 28, dtype=torch.bool)
    hidden[0, 24] = False
    assert (
        cell_landmarks(states, index, 8, hidden)[1][0, 0].tolist() == [6, 6, 6, 6, 0, 1, 1, 1] and counts[0, 0, 4] == 1
    )


def test_more_landmarks_than_tokens_are_refused():
    layout = Layout(3, (Grid(9, 9), Grid(5, 8)))
    words = "landmarks_per_side=7, which is more landmarks than the 40 tokens of a grid of 5x8; choose at most 6"
    with pytest.raises(LinearizeError, match=words):
        build_mixer("soft", SHAPE, {}).double()(*random_tokens(layout), flux_context(layout))


def test_the_cost_is_linear_in_tokens():
    mixer = build_mixer("soft", AttentionShape(24, 128, 3072), {})
    costs = [mixer.flops(Layout(512, (Grid(side, side),))) for side in (128, 256)]
    assert 3.8 < costs[1] / costs[0] < 4.1


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"landmarks_per_side": 0}, "landmarks_per_side=0; choose a whole number, 1 or more"),
        ({"normalization": "rows"}, "normalization='rows'; choose symmetric or none"),
        ({"temperature": 0}, "temperature=0; choose a number above 0"),
    ],
)
def test_wrong_knobs_name_the_choices(knobs, words):
    with pytest.raises(LinearizeError, match=words):
        build_mixer("soft", SHAPE, knobs)


@pytest.mark.parametrize("normalization", ["symmetric", "none"])
def test_the_published_formula_where_every_token_is_a_landmark(normalization):
    """Y = K D^-1/2 (K + 0.01)^-1 D^-1/2 K V with keys that are the queries, and D the row sums of K."""
    layout = Layout(0, (Grid(3, 3),))
    query, key, value = random_tokens(layout)
    mixer = build_mixer(
        "soft", SHAPE, {"landmarks_per_side": 3, "variant": "paper", "normalization": normalization}
    ).double()
    output = mixer(query, key, value, flux_context(layout))
    scaled = query / 16**0.25
    kernel = (-torch.cdist(scaled, scaled).square() / 2).exp()
    inverse = torch.linalg.inv(kernel + 0.01 * torch.eye(9, dtype=torch.float64))
    if normalization == "symmetric":
        root = kernel.sum(dim=-1).rsqrt()
        inverse = root[..., :, None] * inverse * root[..., None, :]
    torch.testing.assert_close(output, kernel @ inverse @ kernel @ value, rtol=1e-6, atol=1e-7)
    assert torch.autograd.grad(output.sum(), key, allow_unused=True)[0] is None


def test_text_as_a_state_has_landmarks_of_its_own_and_is_seen_and_sees():
    layout = Layout(4, (Grid(4, 6),))
    index, num_cells = landmark_index(layout, 2, True, torch.device("cpu"))
    assert num_cells == 6 and index[:4].tolist() == [4, 4, 5, 5] and index[4:].max() == 3
    last, _ = landmark_index(Layout(4, (Grid(4, 6),), text_first=False), 2, True, torch.device("cpu"))
    assert torch.equal(last, index.roll(-4))
    query, key, value = random_tokens(layout)
    output = build_mixer("soft", SHAPE, {"landmarks_per_side": 2, "text": "state"}).double()(
        query, key, value, flux_context(layout)
    )
    for readers, read in ((layout.image_slice, layout.text_slice), (layout.text_slice, layout.image_slice)):
        (gradient,) = torch.autograd.grad(output[:, :, readers].sum(), value, retain_graph=True)
        assert (gradient[:, :, read].abs() > 0).all()


def test_rows_of_the_state_form_sum_to_about_one():
    layout = Layout(4, (Grid(6, 8),))
    query, key, value = random_tokens(layout)
    mixer = build_mixer("soft", SHAPE, {"landmarks_per_side": 4, "text": "state"}).double()
    rows = mixer(query, key, torch.ones_like(value), flux_context(layout))
    assert (rows - 1).abs().mean() < 0.3
