"""Tables of a layout and a region that compilers take as constants, in the place of tracing how they are built."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from operator import index
from typing import Concatenate, ParamSpec, TypeVar

import torch

from linearize.layout import Layout, Numbers
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
        numbers: Numbers, rule: type[Region], window: int, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Table:
        with torch.inference_mode(False):
            return build(Layout.from_numbers(numbers), rule(window), *args, **kwargs)

    @wraps(build)
    def table(layout: Layout, region: Region, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Table:
        return from_numbers(layout.numbers(), type(region), index(region.window), *args, **kwargs)

    return table
