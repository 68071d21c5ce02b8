"""Generation: real processes that are killed and go on, and samples that the stock pipeline makes again."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from hydra import compose, initialize_config_dir

from linearize.config import build_prompts, register_resolvers, user_errors
from linearize.data.ensure import ensure_samples
from linearize.data.generation import generate_samples
from linearize.data.prompts import prompt_source
from linearize.data.settings import GenerationSettings, sample_specs
from linearize.data.shards import ShardRange, read_shard, shard_ranges
from linearize.data.store import SampleStore
from linearize.errors import LinearizeError
from linearize.generate import generate
from linearize.teachers import Teacher, load_teacher

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "seed": 5,
    "buckets": [{"height": 32, "width": 48, "weight": 2}, {"height": 48, "width": 32, "weight": 1}],
    "guidance_scale": {"low": 1.5, "high": 3.5, "num_values": 2},
    "num_inference_steps": 12,
    "max_sequence_length": 16,
    "prompt_dropout": 0.2,
    "dtype": "bfloat16",
    "shard_size": 6,
    "batch_size": 2,
}
NUM_SAMPLES = 40
SOURCE = prompt_source({"source": "scenes"})


def _settings(**changes) -> GenerationSettings:
    return GenerationSettings.from_config({**SETTINGS, **changes})


@pytest.fixture(scope="module")
def teacher(tiny_flux_folder) -> Teacher:
    return load_teacher(tiny_flux_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def whole_store(teacher, tmp_path_factory) -> Path:
    """What one process makes that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    made = generate_samples(teacher, SOURCE, _settings(), folder, num_samples=NUM_SAMPLES, progress=False)
    assert made == NUM_SAMPLES
    return folder


def _start(teacher_folder: Path, out: Path, *overrides: str, rank: int = 0, world_size: int = 1) -> subprocess.Popen:
    buckets = "[{height:32,width:48,weight:2},{height:48,width:32,weight:1}]"
    numbers = [f"generation.{key}={SETTINGS[key]}" for key in SETTINGS if key not in ("buckets", "guidance_scale")]
    arguments = [
        f"teacher.path={teacher_folder}",
        "teacher.dtype=float32",
        "teacher.device=cpu",
        f"out={out}",
        f"num_samples={NUM_SAMPLES}",
        f"generation.buckets={buckets}",
        "generation.guidance_scale={low:1.5,high:3.5,num_values:2}",
        *numbers,
        *overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    environment |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "generate_data.py", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_a_shard(process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not shard_ranges(folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shard_ranges(folder)


def _assert_same_store(one: Path, other: Path) -> None:
    assert shard_ranges(one) == shard_ranges(other)
    for shard in shard_ranges(one):
        assert read_shard(one / shard.file_name).equals(read_shard(other / shard.file_name))
    assert (one / "store.json").read_text() == (other / "store.json").read_text()


def test_killed_then_shared_by_two_processes_equals_one_run(tiny_flux_folder, whole_store, tmp_path):
    process = _start(tiny_flux_folder, tmp_path)
    _wait_for_a_shard(process, tmp_path)
    process.kill()
    process.wait()
    before = {shard: (tmp_path / shard.file_name).stat().st_mtime_ns for shard in shard_ranges(tmp_path)}
    assert 0 < len(before) < len(shard_ranges(whole_store))
    (tmp_path / f".{ShardRange(36, 40).file_name}.0123456789ab.tmp").write_bytes(b"PAR1 half a shard")
    processes = [_start(tiny_flux_folder, tmp_path, rank=rank, world_size=2) for rank in range(2)]
    for running in processes:
        assert running.wait(120) == 0, running.stderr.read()
    _assert_same_store(tmp_path, whole_store)
    assert all((tmp_path / shard.file_name).stat().st_mtime_ns == when for shard, when in before.items())
    assert not list(tmp_path.glob(".*.tmp"))


def test_ctrl_c_says_how_to_go_on(tiny_flux_folder, tmp_path):
    process = _start(tiny_flux_folder, tmp_path)
    _wait_for_a_shard(process, tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in errors and "Traceback" not in errors
    assert not list(tmp_path.glob(".*.tmp"))
    assert len(SampleStore(tmp_path)) < NUM_SAMPLES


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.path=none", "out=somewhere"], "is no pipeline folder"),
        ([], r"out is not set"),
        (["out=somewhere", "num_samples=none"], "num_samples='none'; choose a whole number, 1 or more"),
        (["out=somewhere", "prompts.source=text", "prompts.path=none.txt"], r"none\.txt cannot be read"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(tmp_path, capsys, overrides, message):
    register_resolvers(ROOT)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("generate", overrides=[f"root={tmp_path}", *overrides])
    with pytest.raises(SystemExit, match="2"), user_errors():
        generate(config)
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_config_prompts_are_found_under_the_root(tmp_path):
    (tmp_path / "mine.txt").write_text("a cat\n")
    register_resolvers(ROOT)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("generate", overrides=[f"root={tmp_path}", "prompts=text", "prompts.path=mine.txt"])
    assert build_prompts(config.prompts, config.root).prompts(0, 2) == ["a cat", "a cat"]


def test_the_stock_pipeline_makes_a_stored_sample_again(tiny_flux_folder, whole_store):
    store = SampleStore(whole_store)
    rows = [store.row(position) for position in range(len(store))]
    assert any(row["prompt"] == "" for row in rows) and {row["guidance"] for row in rows} == {1.5, 3.5}
    pipeline = FluxPipeline.from_pretrained(tiny_flux_folder)
    pipeline.set_progress_bar_config(disable=True)
    for row in (rows[0], rows[17], next(row for row in rows if row["height"] == 48)):
        packed = pipeline(
            row["prompt"],
            height=row["height"],
            width=row["width"],
            num_inference_steps=row["num_inference_steps"],
            guidance_scale=row["guidance"],
            max_sequence_length=row["max_sequence_length"],
            generator=torch.Generator().manual_seed(row["seed"]),
            output_type="latent",
        ).images
        latents = pipeline._unpack_latents(packed, row["height"], row["width"], pipeline.vae_scale_factor)[0]
        torch.testing.assert_close(latents.bfloat16(), row["latents"], rtol=2**-7, atol=1e-4)
        embeddings = pipeline.encode_prompt(row["prompt"], None, max_sequence_length=row["max_sequence_length"])
        torch.testing.assert_close(embeddings[0][0].bfloat16(), row["prompt_embeds"], rtol=2**-7, atol=1e-4)
        torch.testing.assert_close(embeddings[1][0].bfloat16(), row["pooled_prompt_embeds"], rtol=2**-7, atol=1e-4)


def test_runs_side_by_side_make_no_sample_twice(tiny_flux_folder, tmp_path):
    def run(own: Teacher) -> int:
        return generate_samples(own, SOURCE, _settings(), tmp_path, num_samples=12, progress=False)

    teachers = [load_teacher(tiny_flux_folder, dtype="float32", device="cpu") for _ in range(2)]
    with ThreadPoolExecutor(2) as runs:
        assert sorted(runs.map(run, teachers)) == [0, 12]


def test_rows_say_how_they_were_made(teacher, whole_store):
    store = SampleStore(whole_store)
    assert store.indices.tolist() == list(range(NUM_SAMPLES))
    row = store.row(3)
    assert (row["teacher"], row["revision"], row["weight_hash"]) == ("tiny_flux", None, teacher.weight_hash)
    assert (row["seed"], row["num_inference_steps"], row["max_sequence_length"]) == (8, 12, 16)
    shapes = {(row["height"], row["width"], row["latents"].shape) for row in map(store.row, range(NUM_SAMPLES))}
    assert shapes == {(32, 48, (4, 8, 12)), (48, 32, (4, 12, 8))}
    assert set(store.layouts[:8].tolist()) == {0, 1}


def test_a_store_grows_without_touching_what_is_there(teacher, whole_store, tmp_path):
    arguments = {"progress": False, "num_samples": 8}
    assert generate_samples(teacher, SOURCE, _settings(), tmp_path, **arguments) == 8
    assert generate_samples(teacher, SOURCE, _settings(shard_size=5), tmp_path, **arguments | {"num_samples": 14}) == 6
    grown, whole = SampleStore(tmp_path), SampleStore(whole_store)
    assert grown.indices.tolist() == list(range(14))
    for position in range(14):
        one, other = grown.row(position), whole.row(position)
        assert {key: one[key] for key in ("prompt", "seed", "guidance", "height")} == {
            key: other[key] for key in ("prompt", "seed", "guidance", "height")
        }
        torch.testing.assert_close(one["latents"], other["latents"], rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 3}, r"generation\.num_inference_steps=12, not 3"),
        ({"seed": 6}, r"generation\.seed=5, not 6"),
        ({"guidance_scale": 1.0}, r"generation\.guidance_values=\[1\.5, 3\.5\], not \[1\.0\]"),
    ],
)
def test_a_store_of_other_settings_is_not_continued(teacher, whole_store, changes, message):
    with pytest.raises(LinearizeError, match=message):
        generate_samples(teacher, SOURCE, _settings(**changes), whole_store, num_samples=50)


def test_a_store_of_other_prompts_or_with_a_damaged_shard_is_not_continued(teacher, tmp_path):
    generate_samples(teacher, SOURCE, _settings(), tmp_path, num_samples=4, progress=False)
    with pytest.raises(LinearizeError, match=r"generation\.buckets=33 is no whole number"):
        generate_samples(teacher, SOURCE, _settings(buckets=[{"height": 33, "width": 32}]), tmp_path, num_samples=6)
    with pytest.raises(LinearizeError, match=r"prompts\.split=train, not held_out"):
        generate_samples(
            teacher, prompt_source({"source": "scenes", "split": "held_out"}), _settings(), tmp_path, num_samples=6
        )
    shard = tmp_path / ShardRange(0, 4).file_name
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(LinearizeError, match=f"{shard.name} is truncated or corrupt"):
        generate_samples(teacher, SOURCE, _settings(), tmp_path, num_samples=6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"generation\.batch_size=0"),
        ({"shard_size": "many"}, r"generation\.shard_size='many'"),
        ({"prompt_dropout": 1.5}, r"prompt_dropout=1\.5 is a share"),
        ({"dtype": "int8"}, "use one of bfloat16, float16, float32"),
        ({"buckets": []}, "must list one or more"),
        ({"buckets": [{"height": 32}]}, "must list one or more"),
        ({"buckets": [{"height": 32, "width": -8}]}, "must list one or more"),
        ({"guidance_scale": {"low": 1}}, "is no range"),
        ({"guidance_scale": {"low": 1, "high": 2, "num_values": 0}}, "num_values=0; choose a whole number, 1 or more"),
    ],
)
def test_bad_settings_are_clear_errors(changes, message):
    with pytest.raises(LinearizeError, match=message):
        _settings(**changes)


def test_draws_follow_their_weights_and_shares():
    specs = sample_specs(_settings(), SOURCE, ShardRange(0, 3000))
    assert 0.62 < sum(spec.height == 32 for spec in specs) / 3000 < 0.71
    assert 0.17 < sum(spec.prompt == "" for spec in specs) / 3000 < 0.23
    assert 0.46 < sum(spec.guidance == 1.5 for spec in specs) / 3000 < 0.54
    assert specs[1000:1010] == sample_specs(_settings(), SOURCE, ShardRange(1000, 1010))


def test_more_samples_than_a_store_has_are_made_in_the_cache(teacher, whole_store, tmp_path):
    before = {file.name: file.stat().st_mtime_ns for file in whole_store.iterdir()}
    arguments = {"path": whole_store, "cache": tmp_path / "cache", "progress": False}
    enough = ensure_samples(teacher, SOURCE, _settings(), num_samples=NUM_SAMPLES - 1, **arguments)
    assert enough == [whole_store] and not (tmp_path / "cache").exists()
    more = ensure_samples(teacher, SOURCE, _settings(), num_samples=NUM_SAMPLES + 5, **arguments)
    assert more[0] == whole_store and more[1].parent == tmp_path / "cache"
    assert shard_ranges(more[1])[0].start == NUM_SAMPLES
    store = SampleStore(*more)
    assert store.indices.tolist() == list(range(NUM_SAMPLES + 5))
    assert store.row(NUM_SAMPLES)["seed"] == SETTINGS["seed"] + NUM_SAMPLES
    assert {file.name: file.stat().st_mtime_ns for file in whole_store.iterdir()} == before
    assert ensure_samples(teacher, SOURCE, _settings(), num_samples=NUM_SAMPLES + 5, **arguments) == more


def test_samples_of_another_teacher_are_refused(teacher, make_store, tmp_path):
    arguments = {"cache": tmp_path, "num_samples": None}
    with pytest.raises(LinearizeError, match=f"teacher random .* is tiny_flux .weights {teacher.weight_hash[:12]}"):
        ensure_samples(teacher, SOURCE, _settings(), path=make_store(4), **arguments)
    with pytest.raises(LinearizeError, match=r"set data\.num_samples"):
        ensure_samples(teacher, SOURCE, _settings(), path=None, **arguments)


def test_a_disk_without_room_is_found_out_before_the_work(teacher, tmp_path):
    with pytest.raises(LinearizeError, match="GB free"):
        generate_samples(teacher, SOURCE, _settings(), tmp_path, num_samples=10**13)
