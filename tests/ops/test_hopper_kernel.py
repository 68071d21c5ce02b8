"""The Hopper kernel computes the definition of local attention; here without a Hopper GPU, by an interpreter."""

import importlib.util

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from linearize.layout import TILE, Grid, Layout
from linearize.ops import block_tables, triton_launch
from linearize.ops.block_tables import BLOCK
from linearize.ops.hopper_local import HEAD_DIMS, _fault
from linearize.ops.hopper_tables import pair_tables
from linearize.ops.naive import naive_with_mass
from linearize.ops.regions import REGIONS
from linearize.ops.triton_local import triton_attention_with_mass
from ops.triton_parity import INNER_CASES

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from linearize.ops import gluon_kernels
from ops import gluon_interpreter
from ops.gluon_interpreter import Interpreted
from ops.interpreted import numbers_of

ROUNDING = 6e-4


grids = st.builds(lambda rows, columns: Grid(rows * TILE[0], columns * TILE[1]), st.integers(1, 3), st.integers(1, 5))
layouts = st.builds(
    lambda text, first, grid: Layout(text * BLOCK, (grid,), first, TILE), st.integers(0, 2), st.booleans(), grids
)


def attend(
    layout: Layout,
    name: str,
    window: int,
    *,
    head_dim: int = 64,
    num_heads: int = 1,
    batch: int = 1,
    head_major: bool = False,
    share: float = 1.0,
    growth: float = 1.0,
) -> list[float]:
    """Relative errors of output and log-sum-exp in float16; keys grow from the first token to the last, by `growth`."""
    region, scale = REGIONS[name](window), head_dim**-0.5
    generator = torch.Generator().manual_seed(window)
    drawn = torch.randn(3, batch, layout.num_tokens, num_heads, head_dim, generator=generator)
    drawn[1] *= torch.linspace(1, growth, layout.num_tokens)[:, None, None]
    query, key, value = drawn.half().transpose(2, 3)
    if head_major:
        query, key, value = (states.contiguous() for states in (query, key, value))
    # Tables are cut as on a GPU with so many processors.
    processors = batch * num_heads / share
    triton_launch.plan_for.cache_clear()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(triton_launch, "num_processors", lambda device: processors)
        output, log_mass = triton_attention_with_mass(query, key, value, layout=layout, region=region, scale=scale)
    wide = (states.double() for states in (query, key, value))
    expected = naive_with_mass(*wide, layout=layout, region=region, scale=scale)
    return [_error(*pair) for pair in zip((output, log_mass), expected, strict=True)]


def assert_exact(errors: list[float]) -> None:
    assert all(error < ROUNDING for error in errors)


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon_kernels, "forward_kernel", Interpreted())
        patch.setattr(triton_launch, "serves", lambda *_: True)
        yield
        triton_launch.plan_for.cache_clear()


@pytest.mark.parametrize("name", INNER_CASES)
def test_tiles_with_others_on_all_sides_lose_no_token(name):
    (grid,), num_text_tokens, _, tile, region, window = INNER_CASES[name]
    assert_exact(attend(Layout(num_text_tokens, (grid,), tile=tile), region, window))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=layouts,
    name=st.sampled_from(list(REGIONS)),
    window=st.integers(1, 20),
    head_dim=st.sampled_from(HEAD_DIMS),
    num_heads=st.integers(1, 2),
    head_major=st.booleans(),
    share=st.sampled_from([0.01, 1.0]),
)
def test_whole_tiles_are_exact_in_any_number(layout, name, window, head_dim, num_heads, head_major, share):
    sizes = {"head_dim": head_dim, "num_heads": num_heads, "head_major": head_major, "share": share}
    assert_exact(attend(layout, name, window, **sizes))


@pytest.mark.parametrize("growth", [0.02, 60.0])
def test_scores_that_fall_or_rise_by_hundreds_lose_nothing(growth):
    layout = Layout(BLOCK, (Grid(3 * TILE[0], 2 * TILE[1]),), tile=TILE)
    assert_exact(attend(layout, "disc", 16, growth=growth))


@pytest.mark.parametrize(("name", "window", "text_first"), [("disc", 5, True), ("disc", 9, False), ("tiles", 2, True)])
def test_several_images_and_lists_of_text_in_parts_are_exact(name, window, text_first, monkeypatch):
    monkeypatch.setattr(block_tables, "_SHORTEST", 2)
    layout = Layout(2 * BLOCK, (Grid(2 * TILE[0], 3 * TILE[1]), Grid(TILE[0], 2 * TILE[1])), text_first, TILE)
    share = 0.02  # of which no other test has tables
    assert pair_tables(layout, REGIONS[name](window), torch.device("cpu"), share=share).num_splits > 1
    assert_exact(attend(layout, name, window, batch=2, num_heads=2, share=share))


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_probe_of_a_gpu_finds_no_fault(name, head_dim):
    assert _fault(torch.device("cpu"), head_dim, name) is None


def _text_hidden(scores: Tensor, places: tuple[Tensor, ...], *_: object) -> Tensor:
    top = torch.where(torch.arange(128) < 64, places[0], places[2])
    return scores.masked_fill(top == -1, -1e30)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("hide_unseen", lambda scores, *_: scores),
        ("hide_unseen", _text_hidden),
        ("column_sums", lambda states: 1.05 * states.reshape(64, -1, 8).sum(1)),
    ],
    ids=["no mask", "text hidden", "sums off"],
)
def test_the_probe_of_a_gpu_tells_wrong_numbers(name, fault, monkeypatch):
    monkeypatch.setitem(gluon_interpreter._SOURCE, name, fault)
    assert _fault(torch.device("cpu"), 64, "disc") == "its numbers are wrong with this triton"


def test_the_interpreter_tells_a_kernel_that_hangs(monkeypatch):
    monkeypatch.setattr(gluon_interpreter, "PATIENCE", 0.2)
    monkeypatch.setitem(gluon_interpreter._SOURCE, "release", lambda empty, stage, own: None)
    with pytest.raises(TimeoutError, match="the kernel hangs"):
        attend(Layout(0, (Grid(3 * TILE[0], 5 * TILE[1]),), tile=TILE), "disc", 16)


def test_it_compiles_for_hopper_gpus_and_fits_their_shared_memory():
    found = numbers_of("gluon_compile.py")
    assert list(found) == ["disc", "neighborhood"]
    assert all(0 < num_bytes <= 227 * 1024 for (num_bytes,) in found.values())
