"""Image grids from position ids, for families whose transformer is not told how large the picture is."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.layout import Grid


@torch.compiler.disable
def grids_from_ids(ids: Tensor) -> tuple[Grid, ...]:
    """The image grids of position ids in raster order.

    A new image starts where the first id changes (FLUX Kontext's reference image) or row and column run back. Only
    order is used, never the
    distance: ids that bf16 rounds, as the stock pipeline's are beyond 256 tokens a side, or that are scaled for
        resolution, are read alike.

    Args:
        ids: [tokens, 3]: image, row, column.

    Raises:
        LinearizeError: The ids do not form rectangles in raster order.
    """
    ids = ids.detach().to("cpu", torch.float64)
    image, row, column = (ids[1:] - ids[:-1]).unbind(-1)
    starts = (image != 0) | ((row < 0) & (column <= 0))
    sizes = torch.diff(torch.cat([torch.tensor([-1]), torch.nonzero(starts).flatten(), torch.tensor([len(ids) - 1])]))
    return tuple(_grid_of(image) for image in ids.split(sizes.tolist()))


def _grid_of(ids: Tensor) -> Grid:
    rows, columns = ids[:, 1], ids[:, 2]
    wraps = torch.nonzero(columns[1:] < columns[:-1]).flatten()
    upright = len(ids) > 1 and bool((columns == columns[0]).all())
    width = 1 if upright else int(wraps[0]) + 1 if len(wraps) else len(ids)
    if len(ids) % width == 0 and _is_raster(rows.view(-1, width), columns.view(-1, width)):
        return Grid(len(ids) // width, width)
    raise LinearizeError(
        f"the position ids of {len(ids)} image tokens do not form a rectangle in raster order; "
        "pass img_ids as the pipeline makes them"
    )


def _is_raster(rows: Tensor, columns: Tensor) -> bool:
    height, width = rows.shape
    same_row = bool((rows == rows[:, :1]).all())
    same_column = bool((columns == columns[:1]).all())
    ordered = bool((rows[1:, 0] >= rows[:-1, 0]).all() and (columns[0, 1:] >= columns[0, :-1]).all())
    distinct = (height == 1 or bool(rows[-1, 0] > rows[0, 0])) and (width == 1 or bool(columns[0, -1] > columns[0, 0]))
    return same_row and same_column and ordered and distinct
