import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import given
from hypothesis import strategies as st

from linearize.backbones.position_ids import grids_from_ids
from linearize.errors import LinearizeError
from linearize.layout import Grid

sides = st.integers(1, 12)


def ids_of(height, width, dtype=torch.float32, image=0):
    ids = FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", dtype)
    ids[:, 0] = image
    return ids


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=3))
def test_grids_are_read_off_the_pipelines_ids(shapes):
    ids = torch.cat([ids_of(*shape, image=number) for number, shape in enumerate(shapes)])
    assert grids_from_ids(ids) == tuple(Grid(*shape) for shape in shapes)


@pytest.mark.parametrize("shape", [(300, 2), (2, 300), (520, 260)])
def test_ids_that_bf16_rounds_are_read_right(shape):
    assert grids_from_ids(ids_of(*shape, dtype=torch.bfloat16)) == (Grid(*shape),)


def test_scaled_and_shifted_ids_are_read_right():
    assert grids_from_ids(ids_of(6, 9) * 0.5 + torch.tensor([0.0, 3.0, 7.0])) == (Grid(6, 9),)


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(12, 3),
        ids_of(4, 5)[:-1],
        ids_of(4, 5)[torch.randperm(20, generator=torch.Generator().manual_seed(0))],
        ids_of(4, 5).flip(0),
        ids_of(4, 5)[:, [0, 2, 1]],
        ids_of(24, 1).square(),
        ids_of(3, 4).square(),
        ids_of(24, 1)[torch.arange(24) != 11],
    ],
    ids=["all_zero", "one_missing", "shuffled", "reversed", "column_major", "squares", "squares_2d", "row_missing"],
)
def test_irregular_ids_are_refused(ids):
    with pytest.raises(
        LinearizeError, match=f"ids of {len(ids)} image tokens do not .* equal steps .* need them; pass"
    ):
        grids_from_ids(ids)
