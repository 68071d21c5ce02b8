"""A student loads in a process that has the wheel, and nothing of the train extra."""

import subprocess
import sys
from pathlib import Path

import pytest

from export.conftest import CALL, NUM_SITES


@pytest.fixture(scope="module")
def wheel_site(tmp_path_factory) -> Path:
    """A folder with the built wheel unpacked, as pip installs it."""
    root = Path(__file__).parents[2]
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = tmp_path_factory.mktemp("wheels")
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(root)]
    subprocess.run(build, check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), *map(str, wheels.iterdir())], check=True)
    return site


PRELUDE = """
import sys

ABSENT = {"lightning", "pytorch_lightning", "hydra", "wandb", "datasets", "torchmetrics", "matplotlib", "rich"}

class Without:
    '''A finder that does not see the packages of the train extra.'''
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

sys.path.insert(0, SITE)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import hashlib, torch
torch.set_num_threads(1)
from diffusers import AutoModel, DiffusionPipeline

def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        for parameter in part.parameters():
            parameter.data = parameter.data.clone()
    image = pipeline(**CALL, generator=torch.Generator().manual_seed(0), output_type="pt").images.float()
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()

def check(pipeline):
    mixers = [module for module in pipeline.transformer.modules() if type(module).__name__ == "ClearMixer"]
    assert len(mixers) == NUM_SITES, mixers
    assert draw(pipeline) == PICTURE

def fails(function, text):
    try:
        function()
    except ValueError as error:
        assert text in str(error), error
        return
    raise AssertionError("nothing was raised")

def finish():
    import linearize
    assert linearize.__file__.startswith(SITE), linearize.__file__
    assert not ABSENT & set(sys.modules)
    print("done")
"""


def run_with_wheel_only(site: Path, picture: str, body: str, **names: str) -> None:
    names = {"SITE": str(site), "PICTURE": picture, **names}
    constants = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    constants += f"CALL = {CALL!r}\nNUM_SITES = {NUM_SITES}\n"
    script = constants + PRELUDE + body + "\nfinish()\n"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=site)
    assert result.returncode == 0 and result.stdout.strip() == "done", result.stderr[-3000:]


def test_local_form_in_a_fresh_process(folders, wheel_site, picture):
    body = """
fails(lambda: DiffusionPipeline.from_pretrained(LOCAL), "linearize")
import linearize
check(DiffusionPipeline.from_pretrained(LOCAL))
check(linearize.load_pipeline(LOCAL))
check(linearize.load_pipeline(STANDALONE))
fails(lambda: DiffusionPipeline.from_pretrained(STANDALONE), "trust_remote_code")
"""
    run_with_wheel_only(wheel_site, picture, body, LOCAL=str(folders["local"]), STANDALONE=str(folders["standalone"]))


def test_standalone_form_in_a_fresh_process(folders, wheel_site, picture):
    body = """
fails(lambda: DiffusionPipeline.from_pretrained(STANDALONE), "trust_remote_code")
pipeline = DiffusionPipeline.from_pretrained(STANDALONE, trust_remote_code=True)
check(pipeline)
pipeline.transformer = AutoModel.from_pretrained(STANDALONE + "/transformer", trust_remote_code=True)
check(pipeline)
"""
    run_with_wheel_only(wheel_site, picture, body, STANDALONE=str(folders["standalone"]))
