"""The order of samples: which are held out, and which form batch after batch of an epoch.

Everything here is a function of small per-row facts and a seed, computed alike on every rank without reading a tensor.
A rank takes its slice of each global batch, and a run that goes on starts at any batch at once.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def prompt_keys(prompts: list[str], indices: Rows) -> NDArray[np.uint64]:
    """A key for each sample that decides whether it is held out.

    The hash of its prompt, or of its index if the prompt is empty.
    """
    texts = [prompt or f"\0{index}" for prompt, index in zip(prompts, indices.tolist(), strict=True)]
    return np.array(
        [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts], dtype=np.uint64
    )


def held_out_mask(keys: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """True for about `share` of the samples, at least one if share > 0: those with the smallest keys.

    Samples of one prompt stay together.
    """
    if share <= 0 or len(keys) == 0:
        return np.zeros(len(keys), dtype=np.bool_)
    target = max(1, round(share * len(keys)))
    return keys <= np.sort(keys)[target - 1]


def epoch_batches(
    layouts: Rows, shards: Rows, *, batch_size: int, seed: int, epoch: int, shuffle_shards: int
) -> NDArray[np.int64]:
    """Global batches of one epoch, as positions into the given rows: [batches, batch_size].

    Shards are shuffled and taken `shuffle_shards` at a time; rows are shuffled within that window, so no more shards
    have to be in memory at once. A batch has one layout. What does not fill a batch goes over to the next window, and
    at the end of the epoch is left out.

    Args:
        layouts: Layout number of each row.
        shards: Shard number of each row.
        batch_size: Samples in a global batch, over all ranks.
        seed: Seed of the order.
        epoch: Number of the epoch.
        shuffle_shards: Shards in a window.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(np.unique(shards))
    waiting: dict[int, Rows] = {int(layout): np.empty(0, dtype=np.int64) for layout in np.unique(layouts)}
    batches: list[Rows] = []
    for first in range(0, len(order), shuffle_shards):
        rows = random.permutation(np.flatnonzero(np.isin(shards, order[first : first + shuffle_shards])))
        window: list[Rows] = []
        for layout, left in waiting.items():
            # Rows left over come first: their shards have just been in memory.
            pool = np.concatenate([left, rows[layouts[rows] == layout]])
            full = len(pool) // batch_size * batch_size
            window.extend(pool[:full].reshape(-1, batch_size))
            waiting[layout] = pool[full:]
        batches.extend(window[index] for index in random.permutation(len(window)))
    return np.stack(batches) if batches else np.empty((0, batch_size), dtype=np.int64)


def ordered_batches(layouts: Rows, *, batch_size: int, world_size: int) -> list[Rows]:
    """Every row once, in order, in batches of one layout.

    A last batch is filled up from its own start to a multiple of the world size.
    """
    batches = []
    for layout in np.unique(layouts):
        rows = np.flatnonzero(layouts == layout)
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            batches.append(np.resize(batch, -(-len(batch) // world_size) * world_size))
    return batches
