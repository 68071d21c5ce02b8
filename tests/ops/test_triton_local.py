"""The Triton kernels compute the definition of local attention, forward and backward."""

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid, Layout
from linearize.ops.hopper_local import serves
from linearize.ops.local_attention import local_attention
from linearize.ops.triton_local import refusal
from ops.interpreted import errors_of, needs_interpreter
from ops.triton_parity import CASES, IN_PARTS, INNER_CASES, check_operators, parity, parity_in_parts


@needs_interpreter
def test_kernels_by_the_interpreter_are_exact_in_float32():
    found = errors_of("triton_parity.py")
    assert list(found) == [*CASES, *(f"{name} in parts" for name in IN_PARTS)]
    for name, errors in found.items():
        assert len(errors) == 5 and all(error < 2e-6 for error in errors), name


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [(name, 64, torch.bfloat16) for name in CASES]
    + [(name, dim, torch.bfloat16) for name in INNER_CASES for dim in (64, 128)]
    + [(name, dim, torch.float16) for name in ("ragged", "whole") for dim in (32, 128)],
)
def test_kernels_on_a_gpu_are_as_exact_as_their_dtype(name, head_dim, dtype):
    rounding = {torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    errors = parity(name, heads=3, head_dim=head_dim, dtype=dtype, device="cuda", batch=2)
    assert all(error < rounding for error in errors)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["whole", "whole neighborhood", "two whole images", *INNER_CASES])
def test_whole_tiles_are_the_hopper_kernels_on_a_hopper_gpu(name, head_dim):
    """Or what is compared here, and in other tests of whole tiles, would be the portable kernel alone."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    grids, num_text_tokens, text_first, tile, region, _ = (CASES | INNER_CASES)[name]
    assert serves(Layout(num_text_tokens, grids, text_first, tile), region, head_dim, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*IN_PARTS, "inner disc 8"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lists_of_text_in_parts_are_as_exact(name, head_dim):
    errors = parity_in_parts(name, heads=2, head_dim=head_dim, dtype=torch.bfloat16, device="cuda", batch=2)
    assert all(error < 4e-3 for error in errors)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["whole", "whole neighborhood", "ragged", "inner disc 16"])
def test_scores_that_go_on_rising_lose_nothing(name, head_dim):
    """Later scores exceed earlier ones by hundreds, so that peaks move and what was added up before shrinks."""
    output, mass, *_ = parity(name, heads=2, head_dim=head_dim, dtype=torch.bfloat16, device="cuda", growth=60.0)
    assert output < 4e-3 and mass < 4e-3


@pytest.mark.gpu
def test_operators_satisfy_torchs_own_checks():
    check_operators("cuda", torch.bfloat16, 64)


@pytest.mark.gpu
def test_a_compiled_caller_has_no_graph_break_and_the_same_numbers():
    def call(query, key, value):
        return local_attention(
            query * 1, key, value, grid=Grid(16, 32), window=5, num_text_tokens=128, tile=TILE, backend="triton"
        )

    states = [torch.randn(1, 2, 640, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(*states), call(*states))


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [Grid(512, 512), Grid(509, 515)], ids=["whole blocks", "ragged"])
def test_tensors_of_more_numbers_than_32_bits_count_are_read_and_written_whole(grid):
    """The last picture of a batch, whose last third lies beyond number 2^31, is the picture by itself."""
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    shape, options = (3, grid.num_tokens, 24, 128), {"device": "cuda", "dtype": torch.bfloat16}
    states = [torch.randn(shape, **options).transpose(1, 2) for _ in range(3)]
    assert states[0].numel() > 2**31

    def attend(*states: torch.Tensor) -> torch.Tensor:
        return local_attention(*states, grid=grid, window=8, num_text_tokens=0, tile=TILE, backend="triton")

    with torch.no_grad():
        whole, alone = attend(*states)[-1:], attend(*(one[-1:] for one in states))
    assert torch.equal(whole, alone) and alone.float().std() > 0.01


def test_a_machine_or_a_call_that_the_kernels_do_not_take_is_told():
    states = torch.randn(1, 2, 40, 16)
    assert refusal(states) in ("it needs the package triton", "it needs a GPU")
    with pytest.raises(LinearizeError, match=r"backend='triton' cannot run this call: it needs .*; choose auto, naive"):
        local_attention(states, states, states, grid=Grid(5, 7), window=2, num_text_tokens=5, backend="triton")


@pytest.mark.gpu
def test_dtypes_and_heads_that_the_kernels_do_not_take_are_told():
    states = torch.randn(1, 2, 40, 64, device="cuda")
    assert refusal(states) == "it takes bfloat16 and float16, not float32"
    assert refusal(states[..., :48].bfloat16()) == "it takes heads of 32, 64, 128 channels, not 48"
    assert refusal(states.bfloat16()) is None
