import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid, Layout
from linearize.ops.disc import coordinates, disc_covers, exact_pairs
from linearize.ops.halo_tables import seen_pairs, visited_pairs
from linearize.ops.local_attention import local_attention
from linearize.ops.naive import dense_sight
from linearize.ops.regions import REGIONS, Disc, Neighborhood, TouchedTiles

sizes = st.integers(1, 21)
grids = st.one_of(
    st.tuples(st.builds(Grid, sizes, sizes)),
    st.tuples(st.builds(Grid, sizes, sizes), st.builds(Grid, sizes, sizes)),
)


def tokens(num_tokens, batch=2, heads=2, key_heads=2, dtype=torch.float64):
    shapes = [(batch, heads), (batch, key_heads), (batch, key_heads)]
    return [torch.randn(*shape, num_tokens, 8, dtype=dtype, requires_grad=True) for shape in shapes]


def with_gradients(inputs, **arguments):
    output = local_attention(*inputs, **arguments)
    return output, *torch.autograd.grad(output.sin().sum(), inputs)


@settings(deadline=None, max_examples=60)
@given(
    grids=grids,
    window=st.integers(1, 24),
    num_text_tokens=st.integers(0, 5),
    text_first=st.booleans(),
    tile=st.sampled_from([None, (16, 8), (3, 2)]),
    masked=st.booleans(),
    batch=st.integers(1, 3),
    key_heads=st.sampled_from([1, 2]),
    region=st.sampled_from(sorted(REGIONS)),
)
def test_halo_equals_the_dense_definition(
    grids, window, num_text_tokens, text_first, tile, masked, batch, key_heads, region
):
    num_tokens = Layout(num_text_tokens, grids).num_tokens
    inputs = tokens(num_tokens, batch, key_heads=key_heads)
    arguments = dict(
        grid=grids,
        window=window,
        num_text_tokens=num_text_tokens,
        text_first=text_first,
        tile=tile,
        scale=0.3,
        region=region,
        key_mask=torch.rand(batch, num_tokens) > 0.4 if masked else None,
    )
    expected = with_gradients(inputs, backend="naive", **arguments)
    for backend in ("halo", "auto"):
        for ours, theirs in zip(with_gradients(inputs, backend=backend, **arguments), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_pooled_keys_are_seen_by_image_and_not_by_text(masked):
    layout = Layout(3, (Grid(9, 11),), tile=(16, 8))
    query, key, value = tokens(layout.num_tokens)
    pooled = tokens(4)[1:]
    masks = {"key_mask": torch.rand(2, layout.num_tokens) > 0.3, "pooled_mask": torch.rand(2, 4) > 0.3}
    outputs = [
        local_attention(
            query,
            key,
            value,
            grid=layout.grids,
            window=3,
            num_text_tokens=3,
            tile=layout.tile,
            pooled_key=pooled[0],
            pooled_value=pooled[1],
            backend=backend,
            **(masks if masked else {}),
        )
        for backend in ("halo", "naive")
    ]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-10)
    outputs[0][:, :, layout.image_slice].sum().backward()
    assert pooled[0].grad.abs().sum() > 0
    pooled[0].grad = None
    again = local_attention(
        query, key, value, grid=layout.grids, window=3, num_text_tokens=3, pooled_key=pooled[0], pooled_value=pooled[1]
    )
    again[:, :, layout.text_slice].sum().backward()
    assert pooled[0].grad.abs().sum() == 0


def test_sampling_computes_what_training_computes():
    layout = Layout(5, (Grid(30, 43),), tile=(16, 8))
    inputs = tokens(layout.num_tokens, dtype=torch.float32)
    arguments = dict(grid=layout.grids, window=8, num_text_tokens=5, tile=layout.tile)
    trained = local_attention(*inputs, **arguments)
    with torch.inference_mode():
        assert torch.equal(local_attention(*inputs, **arguments), trained)


def test_a_gradient_of_one_input_alone_is_right():
    layout = Layout(2, (Grid(30, 43),))
    query, key, value = tokens(layout.num_tokens, batch=1)
    key, value = key.detach(), value.detach()
    arguments = dict(grid=layout.grids, window=5, num_text_tokens=2)
    (ours,) = torch.autograd.grad(local_attention(query, key, value, **arguments).sin().sum(), query)
    naive = local_attention(query, key, value, backend="naive", **arguments)
    torch.testing.assert_close(ours, torch.autograd.grad(naive.sin().sum(), query)[0], rtol=1e-9, atol=1e-10)


def test_bf16_gradients_of_text_are_summed_in_float32():
    layout = Layout(1, (Grid(64, 80),), tile=(16, 8))
    precise = tokens(layout.num_tokens, batch=1, dtype=torch.float32)
    rounded = [x.detach().bfloat16().requires_grad_() for x in precise]
    arguments = dict(grid=layout.grids, window=2, num_text_tokens=1, tile=layout.tile)
    gradients = [
        torch.autograd.grad(local_attention(*inputs, **arguments)[:, :, 1:].float().sum(), inputs[2])[0].float()
        for inputs in (precise, rounded)
    ]
    text = [gradient[:, :, 0] for gradient in gradients]
    torch.testing.assert_close(text[1], text[0], rtol=0.02, atol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers how large the largest tensor was."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


@pytest.mark.parametrize("training", [False, True])
def test_nothing_grows_faster_than_the_tokens(training):
    largest = []
    for side in (40, 80):
        layout = Layout(4, (Grid(side, side),), tile=(16, 8))
        inputs = tokens(layout.num_tokens, batch=1, heads=1, key_heads=1, dtype=torch.float32)
        with LargestTensor() as mode, torch.set_grad_enabled(training):
            output = local_attention(*inputs, grid=layout.grids, window=8, num_text_tokens=4, tile=layout.tile)
            if training:
                torch.autograd.grad(output.sum(), inputs)
        largest.append(mode.numel)
        assert mode.numel < layout.num_tokens**2 / 4
    assert largest[1] <= 4.1 * largest[0]


@given(grids=grids, window=st.integers(1, 30))
def test_exact_pairs_are_counted_right(grids, window):
    places = coordinates(Layout(0, grids))
    inside = (places[:, None] - places[None]).square().sum(-1) < window**2
    assert exact_pairs(grids, window) == int(inside.sum())
    assert disc_covers(grids, window) == bool(inside.all())
    assert seen_pairs(grids, Disc(window)) == exact_pairs(grids, window) <= visited_pairs(grids, Disc(window))


@pytest.mark.parametrize("window", [8, 16])
@pytest.mark.parametrize("grid", [Grid(32, 32), Grid(64, 64), Grid(128, 128), Grid(61, 97)])
def test_halo_visits_at_most_two_and_a_half_times_the_exact_pairs(grid, window):
    assert visited_pairs(grid, Disc(window)) <= 2.5 * exact_pairs(grid, window)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window=0; choose a whole number, 1 or more"),
        ({"window": 8.0}, "window=8.0; choose a whole number, 1 or more"),
        ({"pooled_key": torch.zeros(1, 1, 1, 8)}, "pooled_key and pooled_value belong together"),
        ({"backend": "fast"}, "auto, naive, dense, halo"),
        ({"region": "cross"}, "disc, tiles, neighborhood"),
        ({"num_text_tokens": 3}, "12 tokens are not 3 text tokens and a grid of 3x4"),
        ({"grid": Grid(2, 3, frames=2)}, "2 frames"),
    ],
)
def test_impossible_calls_are_refused(arguments, message):
    arguments = {"grid": Grid(3, 4), "window": 2, "num_text_tokens": 0, **arguments}
    with pytest.raises(LinearizeError, match=message):
        local_attention(*tokens(12), **arguments)


@settings(deadline=None)
@given(grids=grids, window=st.integers(1, 24))
def test_tiles_and_neighborhoods_hold_the_disc(grids, window):
    layout = Layout(0, grids)
    disc, tiles, square = (dense_sight(layout, rule(window)) for rule in (Disc, TouchedTiles, Neighborhood))
    assert not (disc & ~tiles).any()
    assert not (disc & ~square).any()


@settings(deadline=None)
@given(grid=st.builds(Grid, sizes, sizes), window=st.integers(1, 24))
def test_tiles_are_the_smallest_union_of_tiles_that_holds_all_discs_of_a_tile(grid, window):
    layout = Layout(0, (grid,))
    places = coordinates(layout)
    tile = places // torch.tensor(TILE)
    same = (tile[:, None] == tile[None]).all(dim=-1).double()
    touched = (same @ dense_sight(layout, Disc(window)).double() @ same) > 0
    assert torch.equal(dense_sight(layout, TouchedTiles(window)), touched)
    assert visited_pairs(grid, TouchedTiles(window)) == int(touched.sum())


@settings(deadline=None)
@given(grid=st.builds(Grid, sizes, sizes), window=st.integers(1, 24))
def test_a_neighborhood_is_never_cut(grid, window):
    sees = dense_sight(Layout(0, (grid,)), Neighborhood(window))
    side = 2 * window - 1
    assert (sees.sum(dim=1) == min(side, grid.height) * min(side, grid.width)).all()


def test_every_head_may_have_a_radius_of_its_own():
    query, key, value, pooled_key, pooled_value = (
        torch.randn(2, heads, number, 8, dtype=torch.float64)
        for heads, number in ((4, 38), (2, 38), (2, 38), (2, 3), (2, 3))
    )
    options = {"grid": Grid(5, 7), "num_text_tokens": 3, "tile": (16, 8)}
    options |= {"pooled_key": pooled_key, "pooled_value": pooled_value}
    found = local_attention(query, key, value, window=[4, 2, 2, 6], **options)
    for head, window in enumerate([4, 2, 2, 6]):
        alone = local_attention(query, key, value, window=window, backend="naive", **options)
        torch.testing.assert_close(found[:, head], alone[:, head])
    with pytest.raises(LinearizeError, match="window names 3 radii for 4 heads; give one for each head"):
        local_attention(query, key, value, window=[4, 2, 2], **options)


@pytest.mark.parametrize("masked", ["tokens", "pooled"])
@pytest.mark.parametrize("backend", ["naive", "halo"])
def test_one_mask_without_the_other_leaves_the_rest_valid(backend, masked):
    states = [torch.randn(2, 2, 38, 8, dtype=torch.float64) for _ in range(3)]
    pooled = [torch.randn(2, 2, 3, 8, dtype=torch.float64) for _ in range(2)]
    masks = {"tokens": torch.rand(2, 38) > 0.3, "pooled": torch.tensor([[True, False, True]] * 2)}
    every = {"tokens": torch.ones(2, 38, dtype=torch.bool), "pooled": torch.ones(2, 3, dtype=torch.bool)}
    both = every | {masked: masks[masked]}
    call = {"grid": Grid(5, 7), "num_text_tokens": 3, "window": 2, "pooled_key": pooled[0], "pooled_value": pooled[1]}
    alone = {"tokens": {"key_mask": masks["tokens"]}, "pooled": {"pooled_mask": masks["pooled"]}}[masked]
    found = local_attention(*states, backend=backend, **call, **alone)
    expected = local_attention(*states, backend="naive", key_mask=both["tokens"], pooled_mask=both["pooled"], **call)
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_text_tokens", [0, 5])
@pytest.mark.parametrize("backend", ["halo", "flex", "auto"])
def test_on_a_gpu_queries_that_see_no_key_give_zeros_and_no_gradients(backend, num_text_tokens, dtype):
    grid = Grid(19, 37)
    num_tokens = num_text_tokens + grid.num_tokens
    exact = [torch.randn(2, 2, num_tokens, 64, dtype=torch.float64) for _ in range(3)]
    # Without text, most discs of the first picture hold no valid key; the second picture has none at all.
    key_mask = torch.rand(2, num_tokens) > torch.tensor([0.9, 1.0])[:, None]
    results = []
    for device, kind, name in (("cpu", torch.float64, "naive"), ("cuda", dtype, backend)):
        states = [one.to(dtype).to(device, kind).requires_grad_() for one in exact]
        call = {"grid": grid, "window": 2, "num_text_tokens": num_text_tokens, "tile": TILE, "backend": name}
        found = with_gradients(states, key_mask=key_mask.to(device), **call)
        results.append([one.detach().cpu().double() for one in found])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() <= (1e-4 if dtype == torch.float32 else 2e-2) * expected.norm()
