"""What only a GPU shows: local attention in its dtypes, and whole runs in mixed precision. Run by `make test-gpu`."""

import csv
from pathlib import Path

import pytest
import torch

from linearize.benchmark.attention import LayerSizes, check_parity
from linearize.benchmark.parity import PARITY
from linearize.mixers import mixer_names
from linearize.teachers import load_teacher
from linearize.train import train
from runs import compose_train, tiny_overrides

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", list(PARITY), ids=str)
@pytest.mark.parametrize("window", [4, 16])
@pytest.mark.parametrize("num_text_tokens", [33, 128], ids=["ragged text", "whole text"])
@pytest.mark.parametrize("backend", ["auto", "naive", "halo", "flex"])
def test_local_attention_computes_its_definition(backend, num_text_tokens, window, dtype):
    sizes = LayerSizes(4, 64, num_text_tokens, 2, dtype, torch.device("cuda"), warmup=0, repeats=1)
    assert check_parity(sizes, window, backend) <= PARITY[dtype]


@pytest.fixture(scope="module")
def on_gpu(tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a tiny run on the first GPU; its samples are generated once."""
    tiny = tiny_overrides(tiny_flux_folder, tmp_path_factory.mktemp("cache"))
    kept = [one for one in tiny if one != "trainer.accelerator=cpu" and not one.startswith("window")]
    size = ("teacher.height=64", "teacher.width=80")
    return [*kept, *size, "trainer.accelerator=gpu", "trainer.devices=1", "compile=false"]


def test_a_run_in_mixed_precision_exports_the_student_that_it_trained(on_gpu, tmp_path):
    metrics = train(compose_train(*on_gpu, "window=2", run_dir=tmp_path))
    assert metrics["summary"]["costs"]["training"]["peak_memory_gib"] > 0
    assert (tmp_path / "reloaded.png").is_file()


@pytest.mark.parametrize("name", mixer_names())
def test_every_mixer_calibrates_and_trains_in_both_stages(on_gpu, tmp_path, name):
    bare = (
        "evaluate=false",
        "export=null",
        "trainer.max_steps=4",
        "stages.transfer=2",
        "callbacks.redrawing.every_n_steps=1",
    )
    train(compose_train(*on_gpu, *bare, f"mixer={name}", run_dir=tmp_path))
    with open(next(tmp_path.glob("csv/version_0/metrics.csv"))) as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 4 and all(0 <= loss < 10 for loss in losses)


def test_twenty_steps_on_the_scenes_teacher_bring_the_student_nearer(tmp_path):
    overrides = [
        "experiment=scenes_mixers",
        "mixer=lolcats",
        "trainer.max_steps=20",
        "stages.transfer=5",
        "data=scenes",
    ]
    overrides += ["data.num_samples=null", "evaluation.num_prompts=16", "evaluation.num_inference_steps=4"]
    summary = train(compose_train(*overrides, "trainer.devices=1", run_dir=tmp_path))["summary"]
    assert all(0 < error < 1 for error in summary["start_errors"].values())
    assert summary["student"]["velocity_error"] < summary["untrained"]["velocity_error"]
    assert summary["samples_per_second"] > 0


def test_resting_encoders_leave_the_gpu(tiny_flux_folder):
    teacher = load_teacher(tiny_flux_folder)
    encoder = teacher.pipeline.text_encoder_2
    before = teacher.encode(["a red circle"], 8)
    with teacher.resting_encoders():
        assert encoder.device.type == "cpu"
        after = teacher.encode(["a red circle"], 8)
        assert encoder.device.type == "cpu"
    assert encoder.device.type == "cuda"
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name])
