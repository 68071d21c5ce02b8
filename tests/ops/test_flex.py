"""FlexAttention as a backend: its block mask against the one that torch finds pair by pair, and its numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.ops.flex_mask import BLOCK, block_mask, visited_pairs
from linearize.ops.local_attention import explain_backend, local_attention
from linearize.ops.naive import naive_attention
from linearize.ops.regions import REGIONS

CPU = torch.device("cpu")
sizes = st.integers(1, 21)
grids = st.one_of(
    st.tuples(st.builds(Grid, sizes, sizes)),
    st.tuples(st.builds(Grid, sizes, sizes), st.builds(Grid, sizes, sizes)),
)


def listed(counts, indices):
    """[rows, columns] bool of a list of blocks."""
    found = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (count, index) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        found[row, index[:count].long()] = True
    return found


def blocks(mask):
    """Blocks that need a mask and blocks that do not, seen from the queries."""
    return listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)


@settings(deadline=None, max_examples=60)
@given(
    grids=grids,
    window=st.integers(1, 24),
    num_text_tokens=st.integers(0, 150),
    text_first=st.booleans(),
    tile=st.sampled_from([None, (16, 8), (3, 2)]),
    num_pooled=st.integers(0, 3),
    region=st.sampled_from(sorted(REGIONS)),
)
def test_the_block_mask_is_what_its_mask_says(grids, window, num_text_tokens, text_first, tile, num_pooled, region):
    layout = Layout(num_text_tokens, grids, text_first, tile)
    mask = block_mask(layout, REGIONS[region](window), num_pooled, CPU)
    exact = create_block_mask(mask.mask_mod, None, None, layout.num_tokens, layout.num_tokens + num_pooled, "cpu")
    partial, full = blocks(mask)
    exact_partial, exact_full = blocks(exact)
    assert not (partial & full).any()
    assert not ((exact_partial | exact_full) & ~(partial | full)).any()
    assert not (full & ~exact_full).any()
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), partial.T)
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), full.T)
    assert mask.kv_indices.shape == mask.full_kv_indices.shape


@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 3),
    window=st.integers(1, 40),
    text_first=st.booleans(),
    region=st.sampled_from(sorted(REGIONS)),
)
def test_of_whole_tiles_no_block_is_looked_at_in_vain(rows, columns, window, text_first, region):
    layout = Layout(BLOCK, (Grid(16 * rows, 8 * columns),), text_first, (16, 8))
    mask = block_mask(layout, REGIONS[region](window), 0, CPU)
    exact = create_block_mask(mask.mask_mod, None, None, layout.num_tokens, layout.num_tokens, "cpu")
    for ours, theirs in zip(blocks(mask), blocks(exact), strict=True):
        assert torch.equal(ours, theirs)
    assert visited_pairs(layout, REGIONS[region](window)) == sum(int(kind.sum()) for kind in blocks(exact)) * BLOCK**2


@settings(deadline=None, max_examples=30)
@given(
    grids=grids,
    window=st.integers(1, 24),
    num_text_tokens=st.integers(0, 5),
    tile=st.sampled_from([None, (16, 8)]),
    num_pooled=st.integers(0, 3),
    region=st.sampled_from(sorted(REGIONS)),
)
def test_the_mask_is_the_definition(grids, window, num_text_tokens, tile, num_pooled, region):
    layout, rule = Layout(num_text_tokens, grids, tile=tile), REGIONS[region](window)
    size = layout.num_tokens
    queries, keys = torch.arange(size)[:, None], torch.arange(size + num_pooled)
    sees = block_mask(layout, rule, num_pooled, CPU).mask_mod(None, None, queries, keys)
    query, key = torch.zeros(1, 1, size, 1), torch.zeros(1, 1, size + num_pooled, 1)
    value = torch.eye(size + num_pooled)[None, None]
    weights = naive_attention(query, key, value, layout=layout, region=rule, scale=1.0, num_pooled=num_pooled)
    assert torch.equal(sees, weights[0, 0] > 0)


@pytest.mark.slow
def test_every_grid_is_compiled_for_itself():
    # Where one code object served all, the second grid would be one recompilation too many.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for grid in (Grid(19, 37), Grid(13, 21)):
            query, key, value = (torch.randn(2, heads, 5 + grid.num_tokens, 16) for heads in (4, 2, 2))
            arguments = {"grid": grid, "num_text_tokens": 5, "tile": (16, 8), "window": 5}
            arguments |= {"pooled_key": torch.randn(2, 2, 9, 16), "pooled_value": torch.randn(2, 2, 9, 16)}
            expected = local_attention(query, key, value, backend="naive", **arguments)
            for _ in range(2):
                output = local_attention(query, key, value, backend="flex", **arguments)
                torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_in_a_compiled_region_it_is_part_of_the_graph(masked):
    torch.compiler.reset()

    def attend(states, grid, key_mask, backend="flex"):
        arguments = {"grid": grid, "num_text_tokens": 5, "window": 2, "region": "neighborhood"}
        return local_attention(*states, key_mask=key_mask, backend=backend, **arguments)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for grid in (Grid(19, 37), Grid(37, 19), Grid(13, 21)):
        states = [torch.randn(2, 2, 5 + grid.num_tokens, 16) for _ in range(3)]
        # So few valid keys that some queries see none.
        valid = torch.rand(2, 5 + grid.num_tokens) > 0.9
        valid[:, :5] = False
        key_mask = valid if masked else None
        expected = attend(states, grid, key_mask, "naive")
        assert (expected == 0).all(dim=-1).any() == masked
        torch.testing.assert_close(compiled(states, grid, key_mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "grid", "message"),
    [
        (torch.float64, 16, Grid(9, 15), "bfloat16, float16 and float32, not float64"),
        (torch.float32, 8, Grid(9, 15), "16 to 256 channels, not 8"),
        (torch.float32, 16, Grid(9, 14), "128 tokens or more, not 126"),
    ],
)
def test_calls_that_it_cannot_run_are_refused(dtype, head_dim, grid, message):
    states = [torch.randn(1, 2, grid.num_tokens, head_dim, dtype=dtype) for _ in range(3)]
    with pytest.raises(LinearizeError, match=message):
        explain_backend(*states, grid=grid, num_text_tokens=0, window=3, backend="flex")


def test_training_on_a_cpu_is_refused():
    states = [torch.randn(1, 2, 135, 16, requires_grad=True) for _ in range(3)]
    with pytest.raises(LinearizeError, match="no gradients on a CPU; choose auto, naive, halo"):
        local_attention(*states, grid=Grid(9, 15), num_text_tokens=0, window=3, backend="flex")


def test_more_numbers_than_its_kernels_address_are_refused():
    states = [torch.empty(1, 1, 1, 128).expand(3, 24, 512 + 512 * 512, 128) for _ in range(3)]
    with pytest.raises(LinearizeError, match="fewer than 2\\^31 numbers, not 2420637696: use smaller batches"):
        explain_backend(*states, grid=Grid(512, 512), num_text_tokens=512, window=16, backend="flex")
    one = [state[:1] for state in states]
    assert explain_backend(*one, grid=Grid(512, 512), num_text_tokens=512, window=16, backend="flex").chosen == "flex"


ONE, TWO = (Grid(19, 37),), (Grid(19, 37), Grid(11, 23))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("grids", "num_text_tokens", "tile", "region", "masked"),
    [
        # Whole blocks of text need no mask, and come after blocks in which some query sees nothing.
        (ONE, 256, (16, 8), "disc", False),
        (ONE, 256, None, "disc", False),
        (ONE, 33, (16, 8), "tiles", False),
        (TWO, 33, (16, 8), "neighborhood", False),
        (TWO, 0, None, "disc", True),
        ((Grid(32, 48),), 33, (16, 8), "disc", True),
    ],
)
def test_gradients_on_a_gpu(grids, num_text_tokens, tile, region, masked):
    layout = Layout(num_text_tokens, grids, tile=tile)
    exact = [torch.randn(2, heads, layout.num_tokens, 64, dtype=torch.float64) for heads in (4, 2, 2)]
    arguments = {"grid": grids, "num_text_tokens": num_text_tokens, "window": 9, "tile": tile, "region": region}
    key_mask = torch.rand(2, layout.num_tokens) > 0.3
    results = []
    for device, dtype, backend in (("cpu", torch.float64, "naive"), ("cuda", torch.bfloat16, "flex")):
        states = [state.to(device, dtype).requires_grad_() for state in exact]
        valid = key_mask.to(device) if masked else None
        output = local_attention(*states, key_mask=valid, backend=backend, **arguments)
        gradients = torch.autograd.grad(output.sin().sum(), states)
        results.append([tensor.detach().cpu().double() for tensor in (output, *gradients)])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() <= 2e-2 * expected.norm()
