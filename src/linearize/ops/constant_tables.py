"""Tables of a layout that compilers take as constants, in the place of tracing how they are built."""

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


def layout_table(
    build: Callable[Concatenate[Layout, Arguments], Table],
) -> Callable[Concatenate[Layout, Arguments], Table]:
    """A decorator for functions (layout, ...) -> table that run outside compilers and inference mode.

    A compiled region specializes to the table; another grid or further argument compiles again. What sampling needed
    first, and a cache may keep, is used for training later, hence no inference mode. Tables are built on the CPU,
    whatever the default device, and lie where `build` puts them. They are not to be written to.
    """

    # A compiler hands over plain numbers and classes, but no objects that came to be while it traced.
    @torch.compiler.assume_constant_result
    def from_numbers(numbers: Numbers, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Table:
        with torch.inference_mode(False), torch.device("cpu"):
            return build(Layout.from_numbers(numbers), *args, **kwargs)

    @wraps(build)
    def table(layout: Layout, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Table:
        return from_numbers(layout.numbers(), *args, **kwargs)

    return table


def constant_table(
    build: Callable[Concatenate[Layout, Region, Arguments], Table],
) -> Callable[Concatenate[Layout, Region, Arguments], Table]:
    """`layout_table` for functions (layout, region, ...) -> table."""

    @layout_table
    def from_rule(
        layout: Layout, rule: type[Region], window: int, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Table:
        return build(layout, rule(window), *args, **kwargs)

    @wraps(build)
    def table(layout: Layout, region: Region, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Table:
        return from_rule(layout, type(region), index(region.window), *args, **kwargs)

    return table
