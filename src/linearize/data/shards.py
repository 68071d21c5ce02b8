"""One Parquet shard: its name, its columns, how it is written whole and read back.

A shard holds the samples of one range of indices. Every tensor is three columns: its raw bytes (`latents`),
`latents_shape` and `latents_dtype`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.files import atomic_file

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SCALARS = {
    "index": pa.int64(),
    "prompt": pa.string(),
    "seed": pa.int64(),
    "guidance": pa.float32(),
    "height": pa.int32(),
    "width": pa.int32(),
    "num_inference_steps": pa.int32(),
    "max_sequence_length": pa.int32(),
    "teacher": pa.string(),
    "revision": pa.string(),
    "weight_hash": pa.string(),
}
_NAME = re.compile(r"^samples-(\d{9})-(\d{9})\.parquet$")


@dataclass(frozen=True, order=True)
class ShardRange:
    """The sample indices start, ..., stop - 1."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def file_name(self) -> str:
        """Name of the shard that holds these samples."""
        return f"samples-{self.start:09d}-{self.stop:09d}.parquet"


def shard_ranges(folder: str | Path) -> list[ShardRange]:
    """Ranges of the shards in a folder, in order. Files under temporary names are none."""
    found = (_NAME.match(file.name) for file in Path(folder).glob("*.parquet"))
    return sorted(ShardRange(int(match[1]), int(match[2])) for match in found if match)


def missing_ranges(wanted: ShardRange, present: Sequence[ShardRange]) -> list[ShardRange]:
    """What of `wanted` no range in `present` covers."""
    missing, start = [], wanted.start
    for taken in sorted(present):
        if taken.start < wanted.stop and taken.stop > start:
            if taken.start > start:
                missing.append(ShardRange(start, taken.start))
            start = taken.stop
    if start < wanted.stop:
        missing.append(ShardRange(start, wanted.stop))
    return missing


def tensor_bytes(tensor: Tensor) -> bytes:
    """Raw bytes of a tensor in its own dtype, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_shard(
    folder: str | Path, rows: Sequence[Mapping[str, Any]], tensors: Mapping[str, Sequence[Tensor]], dtype: str
) -> None:
    """Writes one shard; it appears under its name when it is complete.

    Args:
        folder: Folder of the store.
        rows: The scalar columns of each sample, in order of `index`, without a gap.
        tensors: For each tensor column one tensor per sample.
        dtype: What the tensors are stored in.

    Raises:
        LinearizeError: the disk refuses the write.
    """
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in SCALARS.items()}
    for name, values in tensors.items():
        columns[name] = pa.array([tensor_bytes(value.to(DTYPES[dtype])) for value in values], pa.large_binary())
        columns[f"{name}_shape"] = pa.array([list(value.shape) for value in values], pa.list_(pa.int32()))
        columns[f"{name}_dtype"] = pa.array([dtype] * len(values), pa.string())
    target = Path(folder) / ShardRange(rows[0]["index"], rows[-1]["index"] + 1).file_name
    with atomic_file(target) as temporary:
        repeating = [name for name in columns if name not in tensors]
        pq.write_table(
            pa.table(columns), temporary, compression="zstd", use_dictionary=repeating, write_page_checksum=True
        )
    for stale in target.parent.glob(f".{target.name}.*.tmp"):
        stale.unlink(missing_ok=True)


def damaged(path: Path, error: Exception | str) -> LinearizeError:
    """The error of a shard that cannot be read."""
    return LinearizeError(
        f"{path} is truncated or corrupt ({error}): delete it and generate it again, or copy the store again."
    )


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a shard, or some of its columns, checking page checksums and the number of rows that its name promises.

    Raises:
        LinearizeError: the shard is missing, truncated or corrupt.
    """
    match = _NAME.match(path.name)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read(columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from error
    if match is None or table.num_rows != int(match[2]) - int(match[1]):
        raise damaged(path, f"it holds {table.num_rows} rows")
    return table


def tensor_names(path: Path) -> list[str]:
    """The tensor columns of a shard."""
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from error
    return [name.removesuffix("_shape") for name in names if name.endswith("_shape")]


def read_tensor(table: pa.Table, name: str, row: int) -> Tensor:
    """One tensor of one row."""
    content = table[name][row].as_buffer()
    dtype = DTYPES[table[f"{name}_dtype"][row].as_py()]
    # A copy, because Arrow's memory is read-only and goes away with the table.
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(table[f"{name}_shape"][row].as_py())
