"""Image grids from position ids, for families whose transformer is not told how large the picture is."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.layout import Grid


@torch.compiler.disable
def grids_from_ids(ids: Tensor) -> tuple[Grid, ...]:
    """The image grids of position ids in raster order.

    A new image starts where the first id changes (FLUX Kontext's reference image) or row and column run back. Steps may
    be of any size, as where ids are scaled for resolution, if they are equal as far as bf16 tells, in which the stock
    pipeline's are rounded beyond 256 tokens a side.

    Args:
        ids: [tokens, 3]: image, row, column.

    Raises:
        LinearizeError: The ids do not form rectangles with equal steps in raster order.
    """
    ids = ids.detach().to("cpu", torch.float64)
    image, row, column = (ids[1:] - ids[:-1]).unbind(-1)
    starts = (image != 0) | ((row < 0) & (column <= 0))
    sizes = torch.diff(torch.cat([torch.tensor([-1]), torch.nonzero(starts).flatten(), torch.tensor([len(ids) - 1])]))
    grids = [_grid_of(image) for image in ids.split(sizes.tolist())]
    if None in grids:
        raise LinearizeError(
            f"the position ids of {len(ids)} image tokens do not form rectangles with equal steps in raster order, as "
            "all mixers of a student need them; pass img_ids as the pipeline makes them, or the grids that are meant "
            "by joint_attention_kwargs={'grids': (Grid(height, width),)}"
        )
    return tuple(grid for grid in grids if grid is not None)


def _grid_of(ids: Tensor) -> Grid | None:
    """The grid of one image; None if there is none."""
    rows, columns = ids[:, 1], ids[:, 2]
    wraps = torch.nonzero(columns[1:] < columns[:-1]).flatten()
    upright = len(ids) > 1 and bool((columns == columns[0]).all())
    width = 1 if upright else int(wraps[0]) + 1 if len(wraps) else len(ids)
    if len(ids) % width == 0 and _is_raster(rows.view(-1, width), columns.view(-1, width)):
        return Grid(len(ids) // width, width)
    return None


def _is_raster(rows: Tensor, columns: Tensor) -> bool:
    same_row = bool((rows == rows[:, :1]).all())
    same_column = bool((columns == columns[:1]).all())
    return same_row and same_column and _is_even(rows[:, 0]) and _is_even(columns[0])


def _is_even(places: Tensor) -> bool:
    """Whether they rise in equal steps, with the rounding to bf16 of each and of the ends."""
    even = torch.linspace(float(places[0]), float(places[-1]), len(places), dtype=places.dtype)
    rounding = torch.finfo(torch.bfloat16).eps * places.abs().max()
    rises = len(places) == 1 or bool(places[-1] > places[0])
    return rises and bool((places.diff() >= 0).all() and ((places - even).abs() <= rounding).all())
