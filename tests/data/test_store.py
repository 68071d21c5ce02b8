"""Shards are whole, checked, readable by `datasets`, and never mixed up between teachers."""

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linearize.data.shards import ShardRange, missing_ranges, shard_ranges, tensor_bytes
from linearize.data.store import SampleStore
from linearize.errors import LinearizeError
from linearize.files import write_json


@given(st.integers(0, 50), st.integers(1, 50), st.lists(st.tuples(st.integers(0, 90), st.integers(1, 20)), max_size=6))
def test_missing_and_present_ranges_are_the_whole(start, num, taken):
    wanted = ShardRange(start, start + num)
    present = [ShardRange(first, first + count) for first, count in taken]
    missing = [index for part in missing_ranges(wanted, present) for index in range(part.start, part.stop)]
    covered = {index for part in present for index in range(part.start, part.stop)}
    assert missing == [index for index in range(wanted.start, wanted.stop) if index not in covered]


def test_datasets_reads_the_shards(make_store):
    folder = make_store(20, sizes=2)
    store = SampleStore(folder)
    dataset = datasets.load_dataset(
        "parquet", data_files=str(folder / "*.parquet"), split="train", cache_dir=folder / "cache"
    )
    assert dataset["index"][:] == list(range(20))
    for position in (0, 13):
        row, latents = dataset[position], store.row(position)["latents"]
        assert row["latents"] == tensor_bytes(latents) and row["latents_shape"] == list(latents.shape)
        assert row["latents_dtype"] == "bfloat16" and row["prompt"] == f"prompt {position}"
        raw = torch.frombuffer(bytearray(row["latents"]), dtype=torch.bfloat16).reshape(row["latents_shape"])
        assert torch.equal(raw, latents)


def test_a_store_larger_than_its_cache_is_read_right(make_store):
    folder = make_store(40, shard_size=3)
    small, large = SampleStore(folder, cached_shards=1), SampleStore(folder, cached_shards=100)
    for position in torch.randperm(40).tolist():
        assert torch.equal(small.row(position)["latents"], large.row(position)["latents"])
    assert len(small._cache) == 1


def test_two_folders_are_one_store(make_store):
    whole = SampleStore(make_store(10), make_store(12, start=6))
    assert whole.indices.tolist() == list(range(18))
    assert [whole.row(position)["index"] for position in range(18)] == list(range(18))
    assert len(SampleStore(make_store(10), num_samples=4)) == 4


def test_a_file_under_a_temporary_name_is_no_data(make_store):
    folder = make_store(14)
    shard = folder / shard_ranges(folder)[0].file_name
    (folder / f".{shard.name}.0123456789ab.tmp").write_bytes(shard.read_bytes()[:100])
    (folder / "notes.parquet").write_bytes(b"")
    assert len(SampleStore(folder)) == 14


@pytest.mark.parametrize("kept", [0, 3, 200, -4])
def test_a_truncated_shard_is_an_error_that_names_it(make_store, kept):
    folder = make_store(14)
    shard = folder / shard_ranges(folder)[1].file_name
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(LinearizeError, match=rf"{shard.name} is truncated or corrupt .*generate it again"):
        SampleStore(folder)


def test_flipped_bytes_inside_a_shard_are_an_error(make_store):
    folder = make_store(14, shard_size=14)
    shard = folder / shard_ranges(folder)[0].file_name
    metadata = pq.read_metadata(shard).row_group(0)
    latents = next(
        column for column in map(metadata.column, range(metadata.num_columns)) if column.path_in_schema == "latents"
    )
    content = bytearray(shard.read_bytes())
    content[latents.data_page_offset + latents.total_compressed_size // 2] ^= 255
    shard.write_bytes(content)
    with pytest.raises(LinearizeError, match=rf"{shard.name} is truncated or corrupt"):
        SampleStore(folder).row(0)


def test_a_shard_with_another_number_of_rows_than_its_name_is_an_error(make_store):
    folder = make_store(14)
    (folder / ShardRange(7, 14).file_name).rename(folder / ShardRange(7, 15).file_name)
    with pytest.raises(LinearizeError, match="it holds 7 rows"):
        SampleStore(folder)


def test_stores_of_other_teachers_are_refused_by_name(make_store):
    folder = make_store(5)
    with pytest.raises(
        LinearizeError, match=r"teacher random \(weights aaaaaaaaaaaa\).* is scenes \(weights bbbbbbbbbbbb\)"
    ):
        SampleStore(folder).check_teacher("scenes", "b" * 64)
    with pytest.raises(LinearizeError, match="weights cccccccccccc"):
        SampleStore(folder, make_store(5, weight_hash="c" * 64))


def test_what_is_no_store_is_an_error(make_store, tmp_path):
    with pytest.raises(LinearizeError, match="is no store of samples"):
        SampleStore(tmp_path)
    write_json(tmp_path / "store.json", {"format": 1, "teacher": "random", "weight_hash": "a"})
    with pytest.raises(LinearizeError, match="holds no samples yet"):
        SampleStore(tmp_path)
    write_json(tmp_path / "store.json", {"format": 99})
    with pytest.raises(LinearizeError, match="format 99"):
        SampleStore(tmp_path)
