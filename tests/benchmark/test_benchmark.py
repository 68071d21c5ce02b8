"""The benchmark at tiny sizes: rows, the parity gate, files."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from linearize.benchmark import attention
from linearize.benchmark.attention import LayerSizes, attention_rows, check_parity
from linearize.benchmark.model import ModelSettings, model_rows
from linearize.benchmark.runner import benchmark
from linearize.config import register_resolvers
from linearize.errors import LinearizeError
from linearize.ops.backends import BACKENDS, Backend
from linearize.ops.naive import naive_attention
from linearize.ops.regions import Disc
from linearize.teachers import load_teacher

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sizes() -> LayerSizes:
    return LayerSizes(2, 16, 5, 1, torch.float32, torch.device("cpu"), warmup=0, repeats=3)


def test_rows_compare_with_dense_attention_of_the_same_size_and_pass(sizes):
    axes = {
        "sides": [8, 12],
        "windows": [2, 4],
        "backends": ["naive", "halo"],
        "passes": ["forward", "forward_backward"],
    }
    rows = list(attention_rows(sizes, **axes))
    assert len(rows) == 2 * 2 * (1 + 2 * 2)
    dense = {(row["side"], row["pass"]): row["median_seconds"] for row in rows if row["kernel"] == "dense"}
    for row in rows:
        assert 0 < row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"]
        assert row["ratio_to_dense"] == dense[row["side"], row["pass"]] / row["median_seconds"]
    visited = {row["kernel"]: row["visited_over_exact"] for row in rows if row["side"] == 12 and row["window"] == 2}
    assert visited["naive"] > visited["halo"] >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_passes_the_parity_gate(sizes, dtype):
    typed = LayerSizes(**{**sizes.__dict__, "dtype": dtype})
    for backend in ("naive", "halo", "auto"):
        assert 0 < check_parity(typed, 6, backend) <= attention.PARITY[dtype]


def test_no_speed_of_a_backend_that_computes_something_else(sizes, monkeypatch):
    def smaller_disc(*states, region, **options):
        return naive_attention(*states, region=Disc(region.window - 1), **options)

    monkeypatch.setitem(BACKENDS, "wrong", Backend(smaller_disc, BACKENDS["naive"].refusal))
    rows = attention_rows(sizes, sides=[8], windows=[3], backends=["wrong"], passes=["forward"])
    with pytest.raises(LinearizeError, match=r"backend wrong at window=3 .* no speed of it is reported"):
        next(rows)


@pytest.mark.parametrize("kind", ["transformer", "train_step", "sampling"])
def test_models_are_compared_with_the_teacher(tiny_flux_folder, kind):
    teacher = load_teacher(tiny_flux_folder, dtype="float32", device="cpu")
    settings = ModelSettings(batch=1, max_sequence_length=8, num_inference_steps=1, warmup=0, repeats=1)
    plans = {"clear_2": [{"layers": "*", "mixer": "clear", "window": 2}]}
    before = {name: value.clone() for name, value in teacher.pipeline.transformer.state_dict().items()}
    rows = list(model_rows(teacher, settings, kind=kind, sizes=[64], plans=plans))
    assert [row["model"] for row in rows] == ["teacher", "clear_2"]
    assert rows[1]["attention_gflops"] < rows[0]["attention_gflops"]
    assert all(torch.equal(value, before[name]) for name, value in teacher.pipeline.transformer.state_dict().items())


def test_a_run_leaves_json_page_and_plot(tmp_path):
    register_resolvers(ROOT)
    overrides = ["device=cpu", f"out={tmp_path}/layer", "attention.sides=[8,12]", "attention.windows=[3]"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose(
            "benchmark", [*overrides, "attention.repeats=1", "attention.num_heads=2", "attention.head_dim=16"]
        )
    result = benchmark(cfg)
    assert json.loads((tmp_path / "layer.json").read_text()) == json.loads(json.dumps(result))
    assert {"machine", "versions", "commit", "command", "settings", "rows"} <= set(result)
    page = (tmp_path / "layer.md").read_text()
    assert page.count("| halo |") == 4
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_suite_names_the_choices(tiny_flux_folder):
    teacher = load_teacher(tiny_flux_folder, dtype="float32", device="cpu")
    settings = ModelSettings(batch=1, max_sequence_length=8, num_inference_steps=1, warmup=0, repeats=1)
    with pytest.raises(LinearizeError, match="suite=speed is unknown: choose attention, transformer, "):
        next(model_rows(teacher, settings, kind="speed", sizes=[64], plans={}))
