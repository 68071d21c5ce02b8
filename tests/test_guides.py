"""The guides for adding a mixer or a backbone, and the page on local attention, run as a reader would follow them."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import linearize.mixers
from contexts import SHAPE, flux_context, random_tokens
from linearize.benchmark.attention import PEERS
from linearize.benchmark.runner import SUITES
from linearize.config import register_resolvers
from linearize.layout import Grid, Layout
from linearize.mixers import build_mixer, mixer_defaults, mixer_names
from linearize.ops.backends import BACKENDS

DOCS = Path(__file__).parents[1] / "docs"


def blocks(guide, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / guide).read_text(), flags=re.DOTALL)


@pytest.fixture
def row_mixer(tmp_path, monkeypatch):
    """The guide's mixer, in a folder that the package looks into."""
    (tmp_path / "row.py").write_text(blocks("adding_a_mixer.md", "python")[0])
    monkeypatch.setattr(linearize.mixers, "__path__", [*linearize.mixers.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield "row"
    sys.modules.pop("linearize.mixers.row", None)


def test_the_guides_mixer_is_found_and_its_yaml_repeats_its_defaults(row_mixer):
    assert row_mixer in mixer_names()
    config = OmegaConf.create(blocks("adding_a_mixer.md", "yaml")[0])
    assert OmegaConf.to_container(config.mixer, resolve=True) == {"name": "row", **mixer_defaults(row_mixer)}


def test_the_guides_mixer_does_what_it_says(row_mixer):
    layout = Layout(2, (Grid(5, 7),))
    query, key, value = random_tokens(layout)
    mixer = build_mixer(row_mixer, SHAPE, {"reach": 1})
    output = mixer(query, key, value, flux_context(layout))
    output[:, :, 2 + 7].sum().backward()
    assert value.grad[0, 0, :, 0].ne(0).tolist() == [True] * 2 + [True] * 21 + [False] * 14
    assert mixer.flops(layout) == 4 * 2 * 16 * (2 * (37 + 35) + (5 + 8) * 7 * 7)
    everything = build_mixer(row_mixer, SHAPE, {"reach": 4})
    assert everything.flops(layout) == build_mixer("softmax", SHAPE, {}).flops(layout)


def test_the_guides_calls_run(row_mixer, tiny_pipeline, capsys):
    exec(blocks("adding_a_backbone.md", "python")[0], {"pipeline": tiny_pipeline})
    exec(blocks("adding_a_mixer.md", "python")[1], {"pipeline": tiny_pipeline})
    printed = capsys.readouterr().out
    assert "flux ['transformer_blocks.0.attn'" in printed
    assert "row(reach=1) in 4" in printed
    picture = tiny_pipeline("a red circle", height=32, width=48, num_inference_steps=1, output_type="pt").images
    assert torch.isfinite(picture).all()


def test_the_page_on_local_attention_shows_what_runs(capsys):
    exec(blocks("local_attention.md", "python")[0], {})
    assert capsys.readouterr().out.rstrip().endswith("not dense: window=8 does not cover the whole picture")


@pytest.mark.parametrize("page", ["local_attention.md", "speed.md"])
def test_pages_show_benchmarks_that_compose(page):
    root = DOCS.parent
    register_resolvers(root)
    commands = [line for block in blocks(page, "bash") for line in block.replace("\\\n", "").splitlines()]
    assert len(commands) > 1
    for command in commands:
        _, script, *overrides = shlex.split(command)
        assert (root / script).is_file()
        with initialize_config_dir(str(root / "configs"), version_base="1.3"):
            config = compose("benchmark", overrides=overrides)
        assert config.suite in SUITES
        assert set(config.attention.backends) <= {*BACKENDS, *PEERS}


@pytest.mark.parametrize(("script", "config_name"), [("scripts/generate_data.py", "generate"), ("train.py", "train")])
def test_the_page_on_clusters_shows_jobs_that_compose(script, config_name):
    lines = [line for block in blocks("clusters.md", "bash") for line in block.splitlines()]
    (job,) = [shlex.split(line) for line in lines if line.startswith(f"srun python {script} ")]
    register_resolvers(DOCS.parent)
    with initialize_config_dir(str(DOCS.parent / "configs"), version_base="1.3"):
        config = compose(config_name, overrides=job[3:], return_hydra_config=True)
    assert config.teacher.hub_id == "black-forest-labs/FLUX.1-dev"
    if config_name == "train":
        assert config.data.batch_size % (config.trainer.devices * config.trainer.num_nodes) == 0
        assert config.data.batch_size * config.trainer.accumulate_grad_batches == 32
