"""Feeds training with samples of a store: the same global batches on any number of ranks, from any batch on."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from linearize.data.order import Rows, epoch_batches, held_out_mask, ordered_batches
from linearize.data.store import SampleStore
from linearize.errors import LinearizeError, check_share


class _Batches(Dataset):
    """Batches of a store by the positions of their samples."""

    def __init__(self, store: SampleStore, batches: Sequence[Rows] | Rows):
        self._store = store
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._store.batch(self._batches[number])


def _load(store: SampleStore, batches: Sequence[Rows] | Rows, num_workers: int) -> DataLoader:
    # A generator of its own: starting to iterate must not draw from the global one, or a run that goes on would differ
    # from one that never stopped.
    return DataLoader(
        _Batches(store, batches),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


class TrainLoader:
    """Endless epochs of shuffled batches with a position that is saved and restored.

    Iterating gives the rest of the current epoch; the next iteration the next epoch. `len` is the number of batches in
    a whole epoch.

    Attributes:
        next_batch: Number of the batch that comes next, counted over all epochs; set it to start anywhere.
    """

    def __init__(
        self,
        store: SampleStore,
        rows: Rows,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_shards: int = 4,
        num_workers: int = 0,
    ):
        """Prepares the order.

        Args:
            store: Where samples are read from.
            rows: Positions in the store that are trained on.
            batch_size: Samples in a global batch, over all ranks.
            seed: Seed of the order.
            rank: This process.
            world_size: Number of processes.
            shuffle_shards: Shards among which samples are shuffled.
            num_workers: Processes that read ahead.

        Raises:
            LinearizeError: the batch does not divide among the ranks, or no layout has enough samples for one batch.
        """
        if batch_size < 1 or batch_size % world_size:
            raise LinearizeError(
                f"data.batch_size={batch_size} is shared by {world_size} processes: use a positive multiple of "
                f"{world_size}."
            )
        self._store, self._rows = store, rows
        self._batch_size, self._seed, self._shuffle_shards = batch_size, seed, shuffle_shards
        self._rank, self._world_size, self._num_workers = rank, world_size, num_workers
        self._num_batches = int(
            sum(count // batch_size for count in np.unique(store.layouts[rows], return_counts=True)[1])
        )
        if self._num_batches == 0:
            raise LinearizeError(
                f"data.batch_size={batch_size} is more than the {len(rows)} training samples of any one size: lower "
                "it or raise data.num_samples."
            )
        self.next_batch = 0

    def __len__(self) -> int:
        return self._num_batches

    def epoch(self, number: int) -> np.ndarray:
        """Global batches of one epoch as positions in the store: [batches, batch_size]."""
        batches = epoch_batches(
            self._store.layouts[self._rows],
            self._store.shards[self._rows],
            batch_size=self._batch_size,
            seed=self._seed,
            epoch=number,
            shuffle_shards=self._shuffle_shards,
        )
        return self._rows[batches]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number, done = divmod(self.next_batch, self._num_batches)
        share = self._batch_size // self._world_size
        own = self.epoch(number)[done:, self._rank * share : (self._rank + 1) * share]
        for batch in _load(self._store, own, self._num_workers):
            self.next_batch += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"next_batch": self.next_batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to a saved position."""
        self.next_batch = state["next_batch"]


class SampleDataModule(lightning.LightningDataModule):
    """Training and held-out samples of a store.

    Batches are dicts: see `SampleStore.batch`. Its state is the number of training batches already given out.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        *,
        batch_size: int,
        num_samples: int | None = None,
        val_share: float = 0.05,
        val_batch_size: int | None = None,
        seed: int = 0,
        shuffle_shards: int = 4,
        num_workers: int = 0,
        teacher: tuple[str, str] | None = None,
    ):
        """Opens the store and splits it.

        Args:
            folders: Folders of the store; see `ensure_samples`.
            batch_size: Samples in a global training batch, over all ranks.
            num_samples: Use the first so many samples; None is all.
            val_share: Share that is held out; prompts are never in both parts.
            val_batch_size: Samples in a global validation batch; None is `batch_size`.
            seed: Seed of the training order.
            shuffle_shards: Shards among which training samples are shuffled.
            num_workers: Processes that read ahead.
            teacher: Name and weight hash of the teacher that is trained, checked against the store's.

        Raises:
            LinearizeError: the store is missing, damaged, of another teacher, or too small for the split.
        """
        super().__init__()
        check_share("data.val_share", val_share)
        # Two more than a window: what the window before left over still has its shards in memory.
        self.store = SampleStore(*folders, num_samples=num_samples, cached_shards=shuffle_shards + 2)
        if teacher is not None:
            self.store.check_teacher(*teacher)
        held_out = held_out_mask(self.store.keys, val_share)
        self.train_rows, self.val_rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        if len(self.train_rows) == 0:
            raise LinearizeError(
                f"data.val_share={val_share} holds out all {len(self.store)} samples: raise data.num_samples, give "
                "more prompts, or set data.val_share=0."
            )
        self._batch_size, self._val_batch_size = batch_size, val_batch_size or batch_size
        self._seed, self._shuffle_shards, self._num_workers = seed, shuffle_shards, num_workers
        self._next_batch = 0
        self._train: TrainLoader | None = None

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def train_dataloader(self) -> TrainLoader:
        """This rank's part of the training batches, from the restored position on."""
        rank, world_size = self._place()
        self._train = TrainLoader(
            self.store,
            self.train_rows,
            batch_size=self._batch_size,
            seed=self._seed,
            rank=rank,
            world_size=world_size,
            shuffle_shards=self._shuffle_shards,
            num_workers=self._num_workers,
        )
        self._train.next_batch = self._next_batch
        return self._train

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """This rank's part of the held-out batches, always in the same order; nothing if nothing is held out."""
        rank, world_size = self._place()
        batches = ordered_batches(
            self.store.layouts[self.val_rows], batch_size=self._val_batch_size, world_size=world_size
        )
        own = [self.val_rows[batch.reshape(world_size, -1)[rank]] for batch in batches]
        return _load(self.store, own, self._num_workers) if own else []

    def first_batches(self, size: int) -> list[dict[str, Any]]:
        """The first training samples of one layout, and where there are more the next ones, at most `size` each.

        They are the same on every rank.
        """
        layouts = self.store.layouts[self.train_rows]
        rows = self.train_rows[layouts == layouts[0]]
        further = rows[size : 2 * size]
        return [self.store.batch(some) for some in (rows[:size], *([further] if len(further) else []))]

    def held_out_prompts(self, number: int) -> list[str]:
        """The first held-out prompts, as many as asked for or as there are."""
        return [self.store.row(position)["prompt"] for position in self.val_rows[:number]]

    def state_dict(self) -> dict[str, int]:
        """The position in the training batches."""
        return {"next_batch": self._next_batch if self._train is None else self._train.next_batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes to a saved position."""
        self._next_batch = state_dict["next_batch"]
        if self._train is not None:
            self._train.next_batch = self._next_batch
