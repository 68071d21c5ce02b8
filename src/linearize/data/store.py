"""Reads stores of samples: a table of small facts in memory, tensors shard by shard from the disk."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from linearize.data.description import read_description, wrong_teacher
from linearize.data.order import Rows, prompt_keys
from linearize.data.shards import read_shard, read_tensor, shard_ranges, tensor_names
from linearize.errors import LinearizeError


class SampleStore:
    """The samples of one or more folders, in order of their index.

    Tensors are read when they are asked for; a few shards stay in memory, so a store may be larger than it.

    Attributes:
        descriptions: Content of store.json of each folder.
        indices: Index of each sample, ascending: [samples].
        layouts: Layout number of each sample; samples of one layout have the same tensor shapes: [samples].
        shards: Shard number of each sample: [samples].
        keys: See `order.prompt_keys`: [samples].
    """

    def __init__(self, *folders: str | Path, num_samples: int | None = None, cached_shards: int = 8):
        """Opens a store.

        Args:
            folders: Folders that `generate_samples` wrote; where indices are there twice, the first folder's samples
                count.
            num_samples: Take the samples with the smallest indices only.
            cached_shards: How many shards stay in memory.

        Raises:
            LinearizeError: a folder is no store or empty, a shard is damaged, or folders are of different teachers.
        """
        self.descriptions = [read_description(Path(folder)) for folder in folders]
        for folder, description in zip(folders[1:], self.descriptions[1:], strict=True):
            if description["weight_hash"] != self.descriptions[0]["weight_hash"]:
                raise wrong_teacher(
                    Path(folder), description, self.descriptions[0]["teacher"], self.descriptions[0]["weight_hash"]
                )
        self._paths = [Path(folder) / shard.file_name for folder in folders for shard in shard_ranges(folder)]
        if not self._paths:
            raise LinearizeError(f"{folders[0]} holds no samples yet: run scripts/generate_data.py out={folders[0]}.")
        self.tensor_names = tensor_names(self._paths[0])
        self._read_facts(num_samples)
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_shards = cached_shards

    def _read_facts(self, num_samples: int | None) -> None:
        shapes = [f"{name}_shape" for name in self.tensor_names]
        numbers: dict[tuple[Any, ...], int] = {}
        indices, layouts, keys, places = [], [], [], []
        for shard, path in enumerate(self._paths):
            table = read_shard(path, ["index", "prompt", "height", "width", *shapes])
            facts = zip(*(map(str, table[name].to_pylist()) for name in ("height", "width", *shapes)), strict=True)
            index = table["index"].to_numpy()
            indices.append(index)
            layouts.append(np.array([numbers.setdefault(fact, len(numbers)) for fact in facts], dtype=np.int64))
            keys.append(prompt_keys(table["prompt"].to_pylist(), index))
            places.append(np.stack([np.full(len(index), shard), np.arange(len(index))]))
        _, first = np.unique(np.concatenate(indices), return_index=True)
        first = first[:num_samples]
        self.indices: Rows = np.concatenate(indices)[first]
        self.layouts: Rows = np.concatenate(layouts)[first]
        self.keys = np.concatenate(keys)[first]
        self.shards, self._rows = np.concatenate(places, axis=1)[:, first]

    def __len__(self) -> int:
        return len(self.indices)

    def check_teacher(self, name: str, weight_hash: str) -> None:
        """Raises LinearizeError if another teacher made these samples."""
        if self.descriptions[0]["weight_hash"] != weight_hash:
            raise wrong_teacher(self._paths[0].parent, self.descriptions[0], name, weight_hash)

    def _table(self, shard: int) -> pa.Table:
        if shard not in self._cache:
            self._cache[shard] = read_shard(self._paths[shard])
            if len(self._cache) > self._cached_shards:
                self._cache.popitem(last=False)
        self._cache.move_to_end(shard)
        return self._cache[shard]

    def row(self, position: int) -> dict[str, Any]:
        """One sample with every column: tensors as tensors, the rest as Python values.

        Raises:
            LinearizeError: its shard is damaged.
        """
        table, row = self._table(int(self.shards[position])), int(self._rows[position])
        extra = {f"{name}_{part}" for name in self.tensor_names for part in ("shape", "dtype")}
        scalars = [name for name in table.column_names if name not in extra and name not in self.tensor_names]
        content: dict[str, Any] = {name: table[name][row].as_py() for name in scalars}
        return content | {name: read_tensor(table, name, row) for name in self.tensor_names}

    def batch(self, positions: Sequence[int] | Rows) -> dict[str, Any]:
        """A batch for training, of samples of one layout.

        Returns:
            {"latents": [batch, channels, height, width], "prompt_embeds": [batch, tokens, dim], "pooled_prompt_embeds":
            [batch, dim], "guidance": [batch], "index": [batch], "prompt": list of str}
        """
        rows = [self.row(position) for position in positions]
        tensors = {name: torch.stack([row[name] for row in rows]) for name in self.tensor_names}
        return tensors | {
            "guidance": torch.tensor([row["guidance"] for row in rows], dtype=torch.float32),
            "index": torch.tensor([row["index"] for row in rows]),
            "prompt": [row["prompt"] for row in rows],
        }
