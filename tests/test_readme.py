"""What the README tells people to type works."""

import re
import shlex
from pathlib import Path

import pytest
from diffusers import FluxPipeline
from hydra import compose, initialize_config_dir

from linearize.config import register_resolvers
from linearize.export import export_student
from linearize.surgery import linearize

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = {
    "train.py": "train",
    "scripts/generate_data.py": "generate",
    "scripts/evaluate.py": "evaluate",
    "scripts/sample.py": "sample",
    "scripts/benchmark.py": "benchmark",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    inline = re.findall(r"`(python [^`]+)`", README)
    return [line for line in [*lines, *inline] if line.startswith("python ")]


@pytest.mark.parametrize("command", commands())
def test_commands_compose(command):
    _, script, *overrides = shlex.split(command)
    assert (ROOT / script).is_file()
    register_resolvers(ROOT)
    overrides = [
        f"{key}='{value}'" if " " in value else f"{key}={value}"
        for key, _, value in (o.partition("=") for o in overrides)
    ]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        compose(CONFIGS[script], overrides=overrides, return_hydra_config=True)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert targets == ["train", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_snippets_run(tmp_path, monkeypatch, tiny_flux_folder):
    """Against a tiny teacher and its student, one after another, each in a namespace of its own."""
    (tmp_path / "data" / "teachers").mkdir(parents=True)
    (tmp_path / "data" / "teachers" / "scenes").symlink_to(tiny_flux_folder)
    pipeline = FluxPipeline.from_pretrained(tiny_flux_folder)
    linearize(pipeline, mixer="clear", window=8)
    export_student(pipeline, tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    snippets = blocks("python")
    assert len(snippets) == 3
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "picture.png").is_file()
    assert (tmp_path / "student_for_the_hub" / "transformer" / "linearize.py").is_file()
    assert (tmp_path / "mixer" / "mixer.safetensors").is_file()
