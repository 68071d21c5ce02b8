"""NATTEN as a backend: what it refuses everywhere, and its numbers where the package is installed."""

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.ops.local_attention import local_attention
from linearize.ops.naive import naive_attention
from linearize.ops.natten import natten_attention
from linearize.ops.regions import Neighborhood


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"region": "disc"}, "it knows the region 'neighborhood' alone; choose auto, naive, halo"),
        ({"grid": (Grid(5, 7), Grid(5, 7))}, "it takes one picture, not 2"),
        ({}, "it needs a GPU"),
    ],
)
def test_calls_that_it_cannot_run_are_refused(change, message):
    arguments = {"grid": (Grid(5, 7),), "num_text_tokens": 2, "window": 3, "region": "neighborhood", **change}
    states = [torch.randn(1, 2, 2 + 35 * len(arguments["grid"]), 16) for _ in range(3)]
    with pytest.raises(LinearizeError, match=f"backend='natten' cannot run this call: {message}"):
        local_attention(*states, backend="natten", **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [2, 5, 12])
@pytest.mark.parametrize(("num_text_tokens", "text_first"), [(0, True), (7, True), (7, False)])
@pytest.mark.parametrize("tile", [None, (16, 8)])
def test_it_computes_its_definition(tile, num_text_tokens, text_first, window):
    natten = pytest.importorskip("natten")
    if not natten.HAS_LIBNATTEN:
        pytest.skip("natten is installed without its kernels")
    layout = Layout(num_text_tokens, (Grid(9, 21),), text_first, tile)
    states = [torch.randn(2, 4, layout.num_tokens, 32) for _ in range(3)]
    results = []
    for device, attend in (("cpu", naive_attention), ("cuda", natten_attention)):
        moved = [state.to(device).requires_grad_() for state in states]
        output = attend(*moved, layout=layout, region=Neighborhood(window), scale=0.3)
        gradients = torch.autograd.grad(output.sin().sum(), moved)
        results.append([tensor.detach().cpu() for tensor in (output, *gradients)])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-2 * expected.norm()
