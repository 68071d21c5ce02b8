"""Runs the Hopper kernel of local attention without a GPU: what Triton's interpreter is for kernels, for Gluon's.

Functions of the kernel's modules run as Python, on a language of PyTorch. Warps are threads, barriers count arrivals
and bytes and keep phases as the chip's do, and a product that is waited for later reads shared memory as late as that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from linearize.ops import gluon_blocks, gluon_kernels

# Seconds after which a wait counts as a deadlock.
PATIENCE = 20.0


class Block(torch.Tensor):
    """A tensor of the kernel, with the layout that nothing here looks at."""

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=None)


def _block(values: Any) -> Block:
    return torch.as_tensor(values).as_subclass(Block)


class Pointer:
    """A place, or places, in a tensor's memory."""

    def __init__(self, memory: Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, at

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.memory, self.at + step)


class Shared:
    """Shared memory in the chip's order: 64 channels of all rows, then the next 64."""

    def __init__(self, memory: Tensor, shape: Sequence[int], transposed: bool = False) -> None:
        self.memory, self.shape, self.transposed = memory, list(shape), transposed
        self.dtype = memory.dtype

    def index(self, i: Any) -> Shared:
        size = self.memory.numel() // self.shape[0]
        return Shared(self.memory[int(i) * size : (int(i) + 1) * size], self.shape[1:])

    def reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        return Shared(self.memory, shape)

    _reinterpret = reinterpret
    layout = None

    def permute(self, order: tuple[int, int]) -> Shared:
        assert order == (1, 0)
        return Shared(self.memory, self.shape, not self.transposed)

    def _panels(self) -> Tensor:
        rows, columns = self.shape
        return self.memory.view(columns // 64, rows, 64).transpose(0, 1)

    def load(self, layout: Any = None) -> Block:
        found = self._panels().reshape(self.shape).clone()
        return _block(found.T if self.transposed else found)

    def store(self, values: Tensor) -> None:
        rows, columns = self.shape
        self._panels().copy_(values.as_subclass(torch.Tensor).view(rows, columns // 64, 64))


class Plane:
    """A descriptor of the tensor memory accelerator: boxes of a matrix."""

    def __init__(self, descriptor: Any) -> None:
        base, shape, strides = descriptor.base, descriptor.shape, descriptor.strides
        self.matrix = base.as_strided(shape, strides)
        self.dtype, self.layout, self.box = base.dtype, None, descriptor.block_shape
        self.block_type = SimpleNamespace(nbytes=self.box[0] * self.box[1] * base.element_size())

    def at(self, corner: Sequence[Any]) -> Tensor:
        row, column = map(int, corner)
        assert 0 <= row <= len(self.matrix) - self.box[0] and column + self.box[1] <= self.matrix.shape[1]
        return self.matrix[row : row + self.box[0], column : column + self.box[1]]


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that were announced are there."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = self.phase = 0
        self.changed = threading.Condition()

    def update(self, arrivals: int, num_bytes: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += num_bytes
            assert self.missing >= 0, "more arrivals than a phase has"
            if self.missing == 0 and self.bytes == 0:
                self.phase ^= 1
                self.missing = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase != parity, PATIENCE):
                raise TimeoutError("the kernel hangs")


class Pending:
    """A product that nobody has waited for yet."""

    def __init__(self, left: Tensor, right: Shared, start: Any) -> None:
        self.left, self.right, self.start = left, right, start

    def result(self) -> Block:
        start = self.start.result() if isinstance(self.start, Pending) else self.start
        return _block(self.left.float() @ self.right.load().float() + start)


def _mma(left: Tensor, right: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    pending = Pending(left, right, acc if use_acc else 0.0)
    return pending if is_async else pending.result()


def _mma_wait(num_outstanding: int, deps: Sequence[Any]) -> Any:
    found = tuple(one.result() if isinstance(one, Pending) else one for one in deps)
    return found[0] if len(found) == 1 else found


def _specialize(workers: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], **_: Any) -> None:
    failures: list[BaseException] = []

    def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=worker) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _load(pointer: Pointer) -> Block:
    return _block(pointer.memory[torch.as_tensor(pointer.at).as_subclass(torch.Tensor)])


def _store(pointer: Pointer, values: Tensor) -> None:
    pointer.memory[pointer.at.as_subclass(torch.Tensor)] = values.as_subclass(torch.Tensor).to(pointer.memory.dtype)


def _language(program: int) -> SimpleNamespace:
    """The part of `gluon.language` that the kernel is written in, for one program."""
    both = {"where": torch.where, "minimum": torch.minimum, "maximum": torch.maximum}
    layouts = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout")
    return SimpleNamespace(
        **{name: lambda *values, apply=apply: apply(*map(_block, values)) for name, apply in both.items()},
        **dict.fromkeys(layouts, lambda *_: None),
        program_id=lambda axis: _block(program),
        static_range=range,
        load=_load,
        store=_store,
        arange=lambda first, last, layout: _block(torch.arange(first, last)),
        zeros=lambda shape, dtype, layout: _block(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, value, dtype, layout: _block(torch.full(shape, value, dtype=dtype)),
        expand_dims=lambda values, axis: values.unsqueeze(axis),
        convert_layout=lambda values, layout: values,
        max=lambda values, axis: values.amax(axis),
        sum=lambda values, axis: values.sum(axis),
        exp2=torch.exp2,
        log2=torch.log2,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(
            torch.zeros(torch.Size(shape).numel(), dtype=dtype), shape
        ),
        warp_specialize=_specialize,
        int64=torch.int64,
        float32=torch.float32,
    )


def _barriers() -> SimpleNamespace:
    """`mbarrier`, whose barriers are known by where they lie."""
    found: dict[int, Barrier] = {}

    def at(place: Shared) -> Barrier:
        return found[place.memory.data_ptr()]

    def load(plane: Plane, corner: Sequence[Any], barrier: Shared, target: Shared) -> None:
        target.store(plane.at(corner))
        at(barrier).update(0, -plane.block_type.nbytes)

    return SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda place, count: found.__setitem__(place.memory.data_ptr(), Barrier(count)),
        expect=lambda place, num_bytes: at(place).update(1, num_bytes),
        arrive=lambda place, count=1, pred=True: at(place).update(count, 0) if pred else None,
        wait=lambda place, parity: at(place).wait(int(parity)),
        load=load,
    )


# Functions and constants of the kernel's modules.
_SOURCE = {
    name: value
    for module in (gluon_blocks, gluon_kernels)
    for name, value in vars(module).items()
    if not name.startswith("__")
}


def _namespace(program: int) -> dict[str, Any]:
    """The names that the kernel's functions see, these functions among them, for one program."""
    barriers = _barriers()
    names: dict[str, Any] = {}
    for name, value in _SOURCE.items():
        if isinstance(value, JITFunction):
            names[name] = FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        else:
            names[name] = getattr(value, "value", value)
    names |= {
        "gl": _language(program),
        "mbarrier": barriers,
        "warpgroup_mma": _mma,
        "warpgroup_mma_wait": _mma_wait,
        "fence_async_shared": lambda: None,
        "_barrier": lambda: None,
        "tma": SimpleNamespace(store_wait=lambda pending: None),
        "_load": barriers.load,
        "_store": lambda plane, corner, source: plane.at(corner).copy_(source.load()),
        # These two are instructions of the chip.
        "_beyond": lambda down, room: (down * down - room).clamp(0, 1),
        "shrink": lambda acc, decay: acc * decay.unsqueeze(1),
    }
    return names


class Interpreted:
    """Stands for `forward_kernel`: started as it is, program after program."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def start(*arguments: Any, num_warps: int, **constants: Any) -> None:
            given = [Plane(one) if hasattr(one, "block_shape") else one for one in arguments]
            given = [Pointer(one.view(-1)) if isinstance(one, Tensor) else one for one in given]
            for program in range(grid[0]):
                _namespace(program)["forward_kernel"](*given, **constants)

        return start
