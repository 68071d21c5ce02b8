"""Which backend serves a call, how that is told, and that compilers see through it."""

import warnings

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.layout import Grid
from linearize.ops.backends import BACKENDS, ELSEWHERE, PREFERENCE, BackendReport, warn_if_slow
from linearize.ops.local_attention import explain_backend, local_attention

ARGUMENTS = {"grid": Grid(5, 7), "num_text_tokens": 3, "tile": (16, 8)}


def tokens(num_tokens=38, head_dim=16, device="cpu"):
    return [torch.randn(1, 2, num_tokens, head_dim, device=device) for _ in range(3)]


def test_auto_takes_the_first_backend_that_does_not_refuse_and_tells_why():
    states = tokens()
    report = explain_backend(*states, window=3, **ARGUMENTS)
    assert report.chosen == "halo"
    assert str(report) == "halo; not dense: window=3 does not cover the whole picture"
    covered = explain_backend(*states, window=10, **ARGUMENTS)
    assert (covered.chosen, covered.refused) == ("dense", {})
    masked = explain_backend(*states, window=10, key_mask=torch.ones(1, 38, dtype=torch.bool), **ARGUMENTS)
    assert masked.refused == {"dense": "it takes neither a key mask nor pooled keys"}


def test_heads_of_several_radii_are_explained_as_they_are_computed():
    states = tokens()
    report = explain_backend(*states, window=[3, 10], **ARGUMENTS)
    assert str(report) == "halo and dense; not dense: window=3 does not cover the whole picture"
    assert explain_backend(*states, window=(10, 10), **ARGUMENTS) == BackendReport("dense")
    two = explain_backend(*states, window=[3, 4], **ARGUMENTS)
    assert two.chosen == "halo" and "window=3" in two.refused["dense"] and "window=4" in two.refused["dense"]
    with pytest.raises(LinearizeError, match="window names 3 radii for 2 heads"):
        explain_backend(*states, window=[3, 3, 10], **ARGUMENTS)


def test_auto_ends_with_a_backend_that_serves_everything():
    for order in (*PREFERENCE.values(), ELSEWHERE):
        assert order[-1] == "halo"
        assert set(order) <= set(BACKENDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "dense"}, r"backend='dense' cannot run this call: window=3 .*; choose auto, naive, halo$"),
        ({"backend": "flex"}, r"backend='flex' cannot run this call: it takes 128 tokens or more, not 38; choose"),
        ({"backend": "fast"}, r"unknown backend 'fast', choose one of auto, naive, dense, halo"),
    ],
)
@pytest.mark.parametrize("function", [local_attention, explain_backend])
def test_a_backend_that_cannot_run_a_call_says_so_in_one_sentence(function, change, message):
    with pytest.raises(LinearizeError, match=message):
        function(*tokens(), window=3, **ARGUMENTS, **change)


def test_a_slow_path_on_a_gpu_is_told_once_for_each_reason():
    report = BackendReport("halo", {"dense": "window=3 does not cover", "flex": "it takes no mask of valid keys"})
    with pytest.warns(UserWarning, match=r"slow path on this GPU, as no kernel serves it \(flex: it takes no mask"):
        warn_if_slow(report, torch.device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_slow(report, torch.device("cuda"))
        warn_if_slow(BackendReport("halo", {"flex": "it is another machine"}), torch.device("cpu"))
        warn_if_slow(BackendReport("flex"), torch.device("cuda"))


@pytest.mark.parametrize(("backend", "window"), [("naive", 3), ("dense", 10), ("auto", 10)])
def test_compilers_see_one_graph(backend, window):
    torch.compiler.reset()
    states = [state.requires_grad_() for state in tokens()]

    def attend(*states):
        return local_attention(*states, window=window, backend=backend, **ARGUMENTS)

    outputs = [torch.compile(attend, fullgraph=True, backend="aot_eager")(*states), attend(*states)]
    gradients = [torch.autograd.grad(output.sin().sum(), states) for output in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_compiled_call_follows_the_grid():
    torch.compiler.reset()
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    def attend(states, grid):
        return local_attention(*states, grid=grid, window=3, num_text_tokens=3, backend="naive")

    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for grid in (Grid(5, 7), Grid(7, 5), Grid(4, 6), Grid(5, 7), Grid(4, 6)):
        states = tokens(3 + grid.num_tokens)
        torch.testing.assert_close(compiled(states, grid), attend(states, grid))
    assert len(frames) == 3


@pytest.mark.gpu
def test_a_gpu_falls_to_the_slow_path_with_a_warning_only():
    states = [state.double() for state in tokens(head_dim=24, device="cuda")]
    with pytest.warns(UserWarning, match="slow path on this GPU"):
        output = local_attention(*states, window=3, **ARGUMENTS)
    torch.testing.assert_close(output, local_attention(*states, window=3, backend="naive", **ARGUMENTS))


def test_autocast_gives_local_attention_the_dtype_that_it_gives_attention():
    query, key, value = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        output = local_attention(query, key, value.bfloat16(), window=3, **ARGUMENTS)
        kept = local_attention(*(states.double() for states in (query, key, value)), window=3, **ARGUMENTS)
    assert (output.dtype, kept.dtype) == (torch.bfloat16, torch.float64)
    expected = local_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), window=3, **ARGUMENTS)
    assert torch.equal(output, expected)
