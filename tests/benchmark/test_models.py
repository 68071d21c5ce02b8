"""The benchmark of models and training recipes at tiny sizes: rows, what is compared first, files."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch._dynamo.backends.common import aot_autograd

from linearize.benchmark import model
from linearize.benchmark.model import ModelSettings, model_rows
from linearize.benchmark.runner import benchmark
from linearize.benchmark.subjects import BASELINES
from linearize.benchmark.training import TrainSettings, train_rows
from linearize.compilation import compile_blocks
from linearize.config import register_resolvers
from linearize.errors import LinearizeError
from linearize.mixers.base import AttentionShape
from linearize.mixers.clear import ClearMixer
from linearize.ops.backends import BACKENDS, Backend
from linearize.ops.naive import naive_attention
from linearize.ops.regions import Disc
from linearize.teachers import load_teacher

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ModelSettings(batch=1, max_sequence_length=8, num_inference_steps=1, warmup=0, repeats=1)
RASTER = {"mixer": "clear", "window": 2, "measure": {"backend": "halo", "token_order": "raster"}}


@pytest.fixture
def teacher(tiny_flux_folder):
    return load_teacher(tiny_flux_folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("kind", ["transformer", "sampling"])
def test_models_are_compared_with_the_teacher(teacher, kind):
    students = {"clear_raster": RASTER, "clear_2": {"mixer": "clear", "window": 2}}
    before = {name: value.clone() for name, value in teacher.pipeline.transformer.state_dict().items()}
    rows = list(model_rows(teacher, SETTINGS, kind=kind, sizes=[64], students=students, baselines=list(BASELINES)))
    assert [row["model"] for row in rows] == ["teacher", "dense_own_block", "attention_removed", *students]
    flops = {row["model"]: row["attention_gflops"] for row in rows}
    assert flops["teacher"] == flops["dense_own_block"] > flops["clear_2"] == flops["clear_raster"] > 0
    assert flops["attention_removed"] == 0
    assert all(row["ratio_to_teacher"] > 0 and "error" not in row for row in rows)
    assert all(torch.equal(value, before[name]) for name, value in teacher.pipeline.transformer.state_dict().items())


def test_the_comparison_leaves_nothing_that_compiles_again():
    plain, named = ClearMixer(AttentionShape(2, 16, 32), window=2), ClearMixer(AttentionShape(2, 16, 32), window=2)
    named.backend = "naive"
    with model._backend("halo", [plain, named, None]):
        assert plain.backend == named.backend == "halo"
    assert "backend" not in vars(plain) and plain.backend == "auto" and named.backend == "naive"


def test_compiled_models_are_measured_after_their_parity(teacher):
    compiled = dataclasses.replace(SETTINGS, compile="eager")
    students = {"refused": {"mixer": "clear", "window": 2, "measure": {"backend": "natten"}}}
    baselines = ["dense_own_block", "attention_removed"]
    found = model_rows(teacher, compiled, kind="transformer", sizes=[64], students=students, baselines=baselines)
    rows = {row["model"]: row for row in found}
    assert rows["dense_own_block"]["parity_error"] < 1e-5
    assert rows["attention_removed"]["parity_error"] is None
    assert "median_seconds" not in rows["refused"] and "natten" in rows["refused"]["error"]
    earlier = [{"model": "teacher", "size": 64, "batch": 1, "median_seconds": 1.0}, rows["dense_own_block"]]
    again = {"sizes": [64], "students": {}, "baselines": ["dense_own_block"]}
    (row,) = model_rows(teacher, compiled, kind="transformer", **again, earlier=earlier)
    assert row["ratio_to_teacher"] == 1 / row["median_seconds"] and row["parity_error"] < 1e-5
    (row,) = model_rows(teacher, compiled, kind="transformer", **again, earlier=earlier[1:])
    assert row["ratio_to_teacher"] == 1
    earlier[1] |= {"size": 32}
    (row,) = model_rows(teacher, compiled, kind="transformer", **again, earlier=earlier)
    assert row["parity_error"] < 1e-5


@pytest.mark.parametrize("kind", ["transformer", "sampling"])
def test_no_speed_of_a_model_that_computes_something_else(teacher, kind, monkeypatch):
    def smaller_disc(*states, region, **options):
        return naive_attention(*states, region=Disc(1), **options)

    monkeypatch.setitem(BACKENDS, "wrong", Backend(smaller_disc, BACKENDS["naive"].refusal))
    students = {"wrong": {"mixer": "clear", "window": 3, "measure": {"backend": "wrong"}}}
    options = {"kind": kind, "sizes": [64, 80], "baselines": ["teacher"], "earlier": []}
    rows = list(model_rows(teacher, SETTINGS, students=students, **options))
    for row in rows:
        assert row["parity_error"] is not None and ("median_seconds" in row) == (row["model"] == "teacher")
    assert all("no speed of it is reported" in row["error"] for row in rows if row["model"] == "wrong")
    # Where it was compared as a whole, its first blocks tell all the same.
    options |= {"sizes": [80], "earlier": [{"model": "wrong", "size": 32, "batch": 1, "parity_error": 0.0}]}
    assert list(model_rows(teacher, SETTINGS, students=students, **options))[1]["error"]
    options |= {"baselines": [], "earlier": rows[3:]}
    students |= {"right": {"mixer": "clear", "window": 3}}
    assert list(model_rows(teacher, SETTINGS, students=students, **options))[1]["ratio_to_teacher"] is None


def test_settings_of_models_are_checked_before_anything_is_measured(teacher):
    def told(students, sizes):
        rows = model_rows(teacher, SETTINGS, kind="transformer", sizes=sizes, students=students)
        with pytest.raises(LinearizeError) as mistake:
            next(rows)
        return str(mistake.value)

    assert told({"a": {"mixer": "clear"}, "b": {"mixer": "claer"}}, [64]).startswith("model.mixers.b: unknown mixer 'c")
    assert "'clear' has no argument 'windw'" in told({"a": {"mixer": "clear", "windw": 3}}, [64])
    assert told({"a": 3}, [64]).startswith("model.mixers.a=3 is no student: set model.mixers.a={mixer: clear, ")
    near = "is no whole number of this teacher's tokens: choose"
    token = 2 * teacher.pipeline.vae_scale_factor
    assert told({}, [64, 5 * token + 1]) == f"model.sizes={5 * token + 1} {near} {5 * token} or {6 * token} pixels."
    assert told({}, [1]) == f"model.sizes=1 {near} {token} pixels."
    (row,) = model_rows(
        teacher,
        SETTINGS,
        kind="transformer",
        sizes=[64],
        students={"a": {"mixer": "clear", "window": 2, "measure": {"order": "raster"}}},
        baselines=[],
    )
    assert row["error"].startswith("measure names 'order', which clear lacks: choose backend, token_order.")


def test_students_and_recipes_are_added_on_the_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "--cfg", "job", f"hydra.run.dir={tmp_path}"]
    overrides = ["model.mixers={clear_4: {mixer: clear, window: 4}}", "train_step.recipes={a: {student: {mixer: gla}}}"]
    run = subprocess.run([*command, *overrides], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    config = OmegaConf.create(run.stdout)
    assert config.model.mixers.clear_4 == {"mixer": "clear", "window": 4} and "clear_8" in config.model.mixers
    assert config.train_step.recipes.a.student.mixer == "gla" and "ours" in config.train_step.recipes


def test_removed_attention_keeps_query_and_key(teacher):
    """What the limit leaves out is the attention call alone: the compiler finds use for all projections."""
    student = BASELINES["attention_removed"](teacher.pipeline.transformer)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compile_blocks(student, aot_autograd(fw_compiler=keep))
    with torch.no_grad():
        inputs = (torch.randn(1, 4, 8, 12), torch.tensor([0.5]))
        teacher.backbone.predict(student, *inputs, teacher.encode(["a"], 8) | {"guidance": torch.ones(1)})
    torch.compiler.reset()
    for graph in graphs:
        (call,) = (node for node in graph.graph.nodes if "value_alone" in str(node.target))
        assert len(set(call.args)) == 3
    assert len(graphs) == 2


def test_recipes_of_training_have_curves_and_rates(teacher):
    student = {"mixer": "clear", "window": 2}
    recipes = {
        "whole": {"student": RASTER, "shared": False, "compile": False, "activation_memory_gib": 0},
        "ours": {"student": student},
        "small": {"student": student, "optimizer": "adamw8bit", "optimizer_in_backward": True},
    }
    settings = TrainSettings(batch=2, max_sequence_length=8, learning_rate=1e-3, curve_steps=5, repeats=2)
    before = {name: value.clone() for name, value in teacher.pipeline.transformer.state_dict().items()}
    rows = {row["model"]: row for row in train_rows(teacher, settings, sizes=[64], recipes=recipes)}
    assert rows["whole"]["losses"] == pytest.approx(rows["ours"]["losses"], rel=1e-4)
    assert rows["small"]["losses"] == pytest.approx(rows["ours"]["losses"], rel=1e-2)
    assert rows["ours"]["losses"][0] != rows["ours"]["losses"][-1]
    for row in rows.values():
        assert row["samples_per_second"] == 2 / row["median_seconds"]
    assert rows["whole"]["ratio_to_first"] == 1
    assert all(torch.equal(value, before[name]) for name, value in teacher.pipeline.transformer.state_dict().items())


def test_no_speed_of_a_recipe_whose_first_loss_is_off(teacher, monkeypatch):
    def larger_disc(*states, region, **options):
        return naive_attention(*states, region=Disc(region.window + 4), **options)

    monkeypatch.setitem(BACKENDS, "wrong", Backend(larger_disc, BACKENDS["naive"].refusal))
    student = {"mixer": "clear", "window": 1}
    recipes = {
        "refused": {"student": {**student, "measure": {"backend": "natten"}}},
        "ours": {"student": student},
        "wrong": {"student": {**student, "measure": {"backend": "wrong"}}},
        "another": {"student": {"mixer": "clear", "window": 5}},
    }
    settings = TrainSettings(batch=1, max_sequence_length=8, learning_rate=1e-3, curve_steps=1, repeats=1)
    rows = {row["model"]: row for row in train_rows(teacher, settings, sizes=[64], recipes=recipes)}
    assert re.search(r"its first loss is .* no speed of it is reported", rows["wrong"]["error"])
    assert "natten" in rows["refused"]["error"] and all(
        "ratio_to_first" not in rows[name] for name in ("refused", "wrong")
    )
    assert rows["ours"]["ratio_to_first"] is None and rows["another"]["ratio_to_first"] is None
    earlier = list(json.loads(json.dumps(rows)).values())
    only = {"sizes": [64], "recipes": {"wrong": recipes["wrong"]}}
    (row,) = train_rows(teacher, settings, **only, earlier=earlier)
    assert "its first loss is" in row["error"]
    (row,) = train_rows(teacher, settings, sizes=[64], recipes={"another": recipes["another"]}, earlier=earlier[1:])
    assert row["ratio_to_first"] == row["samples_per_second"] / rows["ours"]["samples_per_second"]
    with pytest.raises(
        LinearizeError, match=r"train_step\.sizes=65 is no whole number of this teacher's tokens: choose"
    ):
        next(train_rows(teacher, settings, sizes=[65], recipes=recipes))
    with pytest.raises(LinearizeError, match=r"train_step\.recipes\.x\.student: unknown mixer 'claer'"):
        next(train_rows(teacher, settings, sizes=[64], recipes={"x": {"student": {"mixer": "claer"}}}))


@pytest.mark.parametrize(
    ("fields", "words"), [({"speed": 1}, "the recipe r of train_step is wrong"), ({"optimizer": "x"}, "choose adamw")]
)
def test_a_wrong_recipe_is_told(teacher, fields, words):
    settings = TrainSettings(1, 8, 1e-3, 1, 1)
    with pytest.raises(LinearizeError, match=words):
        next(train_rows(teacher, settings, sizes=[64], recipes={"r": {"student": {}, **fields}}))


def test_suites_of_models_leave_pages_and_plots(tiny_flux_folder, tmp_path):
    register_resolvers(ROOT)
    small = ["device=cpu", f"teacher.path={tiny_flux_folder}", "teacher.max_sequence_length=8"]
    sizes = ["model.sizes=[64]", "model.repeats=1", "train_step.sizes=[64]", "train_step.curve_steps=2"]
    sizes += ["model.profile=true", "train_step.profile=true"]
    for suite in ("transformer", "train_step"):
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg = compose("benchmark", [*small, *sizes, f"suite={suite}", f"out={tmp_path}/{suite}"])
        rows = benchmark(cfg)["rows"]
        assert all(row["model"] in (tmp_path / f"{suite}.md").read_text() for row in rows)
        assert (tmp_path / f"{suite}.png").read_bytes().startswith(b"\x89PNG")
        assert "## Where the time goes" in (tmp_path / f"{suite}.md").read_text()
    assert "flex" in rows[0]["error"]  # CLEAR's recipe trains in FlexAttention, which has no gradients on a CPU


def test_an_unknown_suite_or_baseline_names_the_choices(teacher):
    register_resolvers(ROOT)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("benchmark", ["suite=speed"])
    with pytest.raises(LinearizeError, match="suite=speed is unknown: choose attention, scans, mixers, transformer, "):
        benchmark(cfg)
    with pytest.raises(LinearizeError, match=r"model\.baselines names 'none': choose from teacher, "):
        next(model_rows(teacher, SETTINGS, kind="transformer", sizes=[64], students={}, baselines=["none"]))
