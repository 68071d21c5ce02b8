"""Tables of a layout and a region that compilers take as constants, in the place of tracing how they are built."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from operator import index
from typing import Concatenate, ParamSpec, TypeVar

import torch

from linearize.layout import Grid, Layout
from linearize.ops.regions import Region

Arguments = ParamSpec("Arguments")
Table = TypeVar("Table")
Builder = Callable[Concatenate[Layout, Region, Arguments], Table]


def constant_table(build: Builder[Arguments, Table]) -> Builder[Arguments, Table]:
    """A decorator for functions (layout, region, ...) -> table that run outside compilers and inference mode.

    A compiled region specializes to the table; another grid, region or further argument compiles again. What sampling
    needed first, and a cache may keep, is used for training later, hence no inference mode.
    """

    # A compiler hands over plain numbers and classes, but no objects that came to be while it traced.
    @torch.compiler.assume_constant_result
    def from_numbers(
        num_text_tokens: int,
        sizes: tuple[tuple[int, int, int], ...],
        text_first: bool,
        tile: tuple[int, int] | None,
        rule: type[Region],
        window: int,
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Table:
        layout = Layout(num_text_tokens, tuple(Grid(*size) for size in sizes), text_first, tile)
        with torch.inference_mode(False):
            return build(layout, rule(window), *args, **kwargs)

    @wraps(build)
    def table(layout: Layout, region: Region, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Table:
        # Under dynamic shapes numbers may be symbols, which `index` settles.
        sizes = tuple((index(grid.height), index(grid.width), index(grid.frames)) for grid in layout.grids)
        return from_numbers(
            index(layout.num_text_tokens),
            sizes,
            layout.text_first,
            layout.tile,
            type(region),
            index(region.window),
            *args,
            **kwargs,
        )

    return table
