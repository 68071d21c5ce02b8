"""The order of samples: complete, one layout per batch, alike on any number of ranks, continued from any batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.data.datamodule import SampleDataModule, TrainLoader
from linearize.data.order import epoch_batches, held_out_mask, ordered_batches, prompt_keys
from linearize.data.store import SampleStore
from linearize.errors import LinearizeError


@st.composite
def facts(draw):
    num = draw(st.integers(1, 60))
    layouts = draw(st.lists(st.integers(0, 2), min_size=num, max_size=num))
    shard_size = draw(st.integers(1, 20))
    return np.array(layouts), np.arange(num) // shard_size


@given(facts(), st.integers(1, 6), st.integers(0, 3), st.integers(1, 4))
def test_an_epoch_takes_each_row_at_most_once_and_fills_every_batch_it_can(rows, batch_size, epoch, shuffle_shards):
    layouts, shards = rows
    arguments = {"batch_size": batch_size, "epoch": epoch, "shuffle_shards": shuffle_shards}
    batches = epoch_batches(layouts, shards, seed=1, **arguments)
    assert len(np.unique(batches)) == batches.size
    assert all(len(np.unique(layouts[batch])) == 1 for batch in batches)
    assert len(batches) == sum(count // batch_size for count in np.bincount(layouts))
    np.testing.assert_array_equal(batches, epoch_batches(layouts, shards, seed=1, **arguments))


def test_epochs_and_seeds_differ_and_a_window_bounds_the_shards_in_use():
    layouts, shards = np.zeros(400, dtype=np.int64), np.arange(400) // 10
    batches = [
        epoch_batches(layouts, shards, batch_size=4, seed=seed, epoch=epoch, shuffle_shards=2)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert all((one != other).any() for one, other in ((batches[0], batches[1]), (batches[0], batches[2])))
    for window in batches[0].reshape(-1, 5 * 4):
        assert len(np.unique(shards[window])) == 2


@given(facts(), st.integers(1, 3), st.integers(1, 4))
def test_validation_sees_each_row_once_or_repeats_to_fill_the_ranks(rows, per_rank, world_size):
    layouts, _ = rows
    batches = ordered_batches(layouts, batch_size=per_rank * world_size, world_size=world_size)
    assert all(len(batch) % world_size == 0 and len(np.unique(layouts[batch])) == 1 for batch in batches)
    assert set(np.concatenate(batches)) == set(range(len(layouts)))
    if world_size == 1:
        assert sum(len(batch) for batch in batches) == len(layouts)


@given(st.integers(1, 200), st.floats(0.001, 0.5))
def test_the_held_out_share_is_as_asked_and_keeps_prompts_together(num, share):
    prompts = [f"prompt {index}" for index in range(num)]
    keys = prompt_keys(prompts, np.arange(num))
    assert held_out_mask(keys, share).sum() == max(1, round(share * num))
    assert held_out_mask(keys, 0.0).sum() == 0
    doubled = held_out_mask(np.concatenate([keys, keys]), share)
    np.testing.assert_array_equal(doubled[:num], doubled[num:])


def test_empty_prompts_are_split_by_index():
    assert len(np.unique(prompt_keys([""] * 10, np.arange(10)))) == 10


def _loader(folder, **arguments):
    store = SampleStore(folder)
    return TrainLoader(store, np.arange(len(store)), **{"batch_size": 4, "seed": 3, "shuffle_shards": 2, **arguments})


def test_ranks_together_see_the_batches_of_one_process(make_store):
    folder = make_store(60, sizes=2)
    alone = [batch["index"] for epoch in range(2) for batch in _loader(folder)]
    for world_size in (2, 4):
        loaders = [_loader(folder, rank=rank, world_size=world_size) for rank in range(world_size)]
        together = [
            torch.cat([part["index"] for part in parts]) for _ in range(2) for parts in zip(*loaders, strict=True)
        ]
        for one, other in zip(alone[: len(alone) // 2], together[: len(together) // 2], strict=True):
            assert torch.equal(one, other)


def test_batches_never_mix_layouts_and_hold_what_was_stored(make_store):
    folder = make_store(50, sizes=3)
    store = SampleStore(folder)
    by_index = {int(index): store.row(position) for position, index in enumerate(store.indices)}
    shapes = set()
    for batch in _loader(folder):
        shapes.add(batch["latents"].shape)
        for latents, embeddings, index, prompt in zip(
            batch["latents"], batch["prompt_embeds"], batch["index"], batch["prompt"], strict=True
        ):
            row = by_index[int(index)]
            assert torch.equal(latents, row["latents"]) and torch.equal(embeddings, row["prompt_embeds"])
            assert prompt == row["prompt"] == f"prompt {index}"
        assert batch["guidance"].dtype == torch.float32
    assert len(shapes) == 3


@settings(max_examples=20, deadline=None)
@given(stop=st.integers(0, 40))
def test_a_loader_goes_on_from_any_batch(small_store, stop):
    def indices(loader, num):
        seen = []
        while len(seen) < num:
            for batch in loader:
                seen.append(batch["index"].tolist())
                if len(seen) == num:
                    break
        return seen

    whole = indices(_loader(small_store), 50)
    first = _loader(small_store)
    assert indices(first, stop) == whole[:stop]
    second = _loader(small_store)
    second.load_state_dict(first.state_dict())
    assert indices(second, 50 - stop) == whole[stop:]


def test_workers_change_neither_order_nor_position(small_store):
    plain, working = _loader(small_store), _loader(small_store, num_workers=2)
    state = torch.get_rng_state()
    for one, other in zip(plain, working, strict=True):
        assert torch.equal(one["latents"], other["latents"])
        assert plain.state_dict() == working.state_dict()
    assert torch.equal(state, torch.get_rng_state())


def test_the_data_module_splits_and_goes_on(make_store):
    folder = make_store(40)
    data = SampleDataModule([folder], batch_size=4, val_share=0.2)
    trained = torch.cat([batch["index"] for batch in data.train_dataloader()])
    held_out = torch.cat([batch["index"] for batch in data.val_dataloader()])
    assert len(held_out) == 8 and not set(held_out.tolist()) & set(trained.tolist())
    assert torch.equal(held_out, torch.cat([batch["index"] for batch in data.val_dataloader()]))
    first = SampleDataModule([folder], batch_size=4, val_share=0.2)
    batches = iter(first.train_dataloader())
    next(batches), next(batches)
    second = SampleDataModule([folder], batch_size=4, val_share=0.2)
    second.load_state_dict(first.state_dict())
    rest = torch.cat([batch["index"] for batch in second.train_dataloader()])
    assert torch.equal(rest, trained[8:])


def test_first_batches_share_no_sample(make_store):
    data = SampleDataModule([make_store(40)], batch_size=4, val_share=0.2)
    calibrated, others = data.first_batches(3)
    assert len(calibrated["index"]) == len(others["index"]) == 3
    assert not set(calibrated["index"].tolist()) & set(others["index"].tolist())
    assert len(data.first_batches(1000)) == 1


def test_bad_sizes_are_clear_errors(make_store):
    folder = make_store(10)
    with pytest.raises(LinearizeError, match="positive multiple of 4"):
        _loader(folder, batch_size=6, world_size=4)
    with pytest.raises(LinearizeError, match="more than the 10 training samples"):
        _loader(folder, batch_size=11)
    with pytest.raises(LinearizeError, match=r"val_share=1\.0 is a share"):
        SampleDataModule([folder], batch_size=2, val_share=1.0)
    with pytest.raises(LinearizeError, match="holds out all 1 samples"):
        SampleDataModule([folder], batch_size=1, num_samples=1, val_share=0.1)
