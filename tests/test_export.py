"""A student on disk is the student in memory, however it was saved and however it is loaded."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoModel,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
)
from safetensors.torch import load_file, save_file

import linearize
from linearize import LinearFluxTransformer2DModel, load_pipeline
from linearize.errors import LinearizeError
from linearize.export import export_student
from linearize.mixers.clear import ClearMixer
from linearize.model_card import model_card
from linearize.mounting import export_mixer, mount_mixer
from linearize.surgery import trained_parameters

CALL = {"prompt": "a red circle", "height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": 16}
CALL |= {"guidance_scale": 3.5}  # the ControlNet pipeline has another default
LAYERS = ["transformer_blocks.*", "single_transformer_blocks.0.attn"]
NUM_SITES = 3


def draw(pipeline: DiffusionPipeline, **extra: torch.Tensor) -> str:
    """The SHA-256 of one picture's floats: equal hashes are equal pictures, to the bit.

    Weights are copied first: sums on a CPU depend on the alignment of memory, and mapped files have their own.
    """
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        for parameter in part.parameters():
            parameter.data = parameter.data.clone()
    generator = torch.Generator().manual_seed(0)
    image = pipeline(**CALL, **extra, generator=generator, output_type="pt").images.float()
    assert image.shape == (1, 3, 64, 96) and image.isfinite().all()
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


def num_mixers(pipeline: DiffusionPipeline) -> int:
    return sum(isinstance(module, ClearMixer) for module in pipeline.transformer.modules())


def make_student(folder: Path) -> FluxPipeline:
    """A linearized pipeline whose trained weights have moved."""
    pipeline = FluxPipeline.from_pretrained(folder)
    linearize.linearize(pipeline, mixer="clear", window=2, layers=LAYERS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(pipeline.transformer).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipeline


@pytest.fixture(scope="module")
def student(tiny_flux_folder) -> FluxPipeline:
    return make_student(tiny_flux_folder)


@pytest.fixture(scope="module")
def picture(student) -> str:
    return draw(student)


@pytest.fixture(scope="module")
def folders(student, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    return {form: export_student(student, root / form, form=form) for form in ("local", "standalone")}


@pytest.fixture
def copied(folders, tmp_path) -> Path:
    """A copy of the local form that a test may damage."""
    return Path(shutil.copytree(folders["local"], tmp_path / "student"))


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Loading in this process


def test_the_student_differs_from_its_teacher(tiny_pipeline, picture):
    assert draw(tiny_pipeline) != picture


@pytest.mark.parametrize("form", ["local", "standalone"])
def test_load_pipeline_takes_both_forms(folders, form, picture):
    pipeline = load_pipeline(folders[form])
    assert type(pipeline) is FluxPipeline and type(pipeline.transformer) is LinearFluxTransformer2DModel
    assert num_mixers(pipeline) == NUM_SITES
    assert draw(pipeline) == picture


def test_a_stock_pipeline_takes_the_student_as_its_transformer(folders, tiny_flux_folder, picture, tmp_path):
    transformer = LinearFluxTransformer2DModel.from_pretrained(folders["local"] / "transformer")
    pipeline = AutoPipelineForText2Image.from_pretrained(tiny_flux_folder, transformer=transformer)
    assert draw(pipeline) == picture
    pipeline.save_pretrained(tmp_path / "again")
    assert draw(load_pipeline(tmp_path / "again")) == picture


def test_from_pipe_needs_the_transformer_named(student):
    """diffusers carries over components by exact type, so the student has to be passed."""
    pipeline = FluxImg2ImgPipeline.from_pipe(student, transformer=student.transformer)
    assert num_mixers(pipeline) == NUM_SITES


def test_a_bfloat16_student_comes_back_bit_for_bit(tiny_flux_folder, tmp_path):
    """What trains is float32 in memory and stored in the dtype of the rest."""
    pipeline = make_student(tiny_flux_folder).to(torch.bfloat16)
    expected = draw(pipeline)
    trained = trained_parameters(pipeline.transformer)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    export_student(pipeline, tmp_path / "student")
    loaded = load_pipeline(tmp_path / "student", torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.transformer.parameters()} == {torch.bfloat16}
    assert draw(loaded) == expected
    stored = load_file(tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


def test_big_students_are_sharded(student, picture, tmp_path):
    folder = export_student(student, tmp_path / "student", max_shard_size="100KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    assert draw(load_pipeline(folder)) == picture


def test_a_student_without_text_encoders(student, tmp_path):
    """A random full-size teacher has none; its student is drawn from embeddings."""
    absent = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    pipeline = FluxPipeline(**{**student.components, **absent})
    loaded = load_pipeline(export_student(pipeline, tmp_path / "student"))
    assert loaded.text_encoder is None and num_mixers(loaded) == NUM_SITES
    generator = torch.Generator().manual_seed(0)
    embeddings = {
        "prompt_embeds": torch.randn(1, 16, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
    }
    call = {**CALL, **embeddings, "prompt": None, "output_type": "pt"}
    first, second = (one(**call, generator=torch.Generator().manual_seed(0)).images for one in (pipeline, loaded))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


# Saved by anybody's save_pretrained


def test_a_pipeline_whose_transformer_was_linearized_saves_the_student(tiny_pipeline, tmp_path):
    """Row H: the pipeline has noted the stock class when it was loaded, and a stale note would load as softmax."""
    linearize.linearize(tiny_pipeline.transformer, mixer="clear", window=2)
    expected = draw(tiny_pipeline)
    tiny_pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"] == [
        "linearize",
        "LinearFluxTransformer2DModel",
    ]
    for loaded in (DiffusionPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        assert num_mixers(loaded) == 4
        assert draw(loaded) == expected


def test_a_compiled_student_is_saved_as_the_student(student, picture, tmp_path):
    compiled = FluxPipeline(**student.components)
    compiled.transformer = torch.compile(student.transformer, backend="eager")
    compiled.save_pretrained(tmp_path / "saved")
    export_student(compiled, tmp_path / "exported")
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        assert draw(load_pipeline(folder)) == picture


def test_a_transformer_alone_is_saved_as_the_student(student, tmp_path):
    student.transformer.save_pretrained(tmp_path)
    again = LinearFluxTransformer2DModel.from_pretrained(tmp_path)
    assert sum(isinstance(module, ClearMixer) for module in again.modules()) == NUM_SITES
    with pytest.raises((ValueError, AttributeError, OSError)):  # diffusers has no class of this name
        AutoModel.from_pretrained(tmp_path)


def test_what_would_not_load_is_not_saved(tiny_pipeline, tiny_flux_folder, tmp_path):
    linearize.linearize(tiny_pipeline, mixer="clear", window=2)
    with pytest.raises(LinearizeError, match="only safetensors"):
        tiny_pipeline.transformer.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    stock = FluxPipeline.from_pretrained(tiny_flux_folder).transformer
    tiny_pipeline.transformer.transformer_blocks[0].attn = stock.transformer_blocks[0].attn
    for save in (tiny_pipeline.save_pretrained, lambda folder: export_student(tiny_pipeline, folder)):
        with pytest.raises(LinearizeError, match="no longer what its plan says"):
            save(tmp_path / "replaced")
    assert not list(tmp_path.rglob("transformer/*")) and not list(tmp_path.rglob("model_index.json"))


def test_lora_of_the_teacher_loads_fuses_and_unloads(student, picture):
    """Row N: adapters go into the projections and leave the mixers alone."""
    from peft import LoraConfig

    pipeline = FluxPipeline(**student.components)
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert num_mixers(pipeline) == NUM_SITES
    assert draw(pipeline) != picture
    with pytest.raises(LinearizeError, match="unload or fuse adapters"):
        export_student(pipeline, "never_written")
    pipeline.unload_lora_weights()
    assert draw(pipeline) == picture


def test_controlnet_made_from_the_student_runs_with_it(student):
    """Row O: a ControlNet starts with zero residuals, so the picture stays what it was."""
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    controlnet = FluxControlNetModel.from_transformer(student.transformer, **sizes).eval()
    parts = {name: part for name, part in student.components.items() if part is not None}
    pipeline = FluxControlNetPipeline(**parts, controlnet=controlnet)
    generator = torch.Generator().manual_seed(2)
    latents, control = torch.randn(1, 8 * 12, 16, generator=generator), torch.rand(1, 3, 64, 96, generator=generator)
    assert draw(pipeline, latents=latents, control_image=control) == draw(student, latents=latents)


def test_ip_adapter_is_refused_and_changes_nothing(student, picture):
    """Row P: it would put softmax processors where the mixers are."""
    pipeline = FluxPipeline(**student.components)
    weights = {"image_proj": {"proj.weight": torch.zeros(8, 4)}, "ip_adapter": {"0.to_k_ip.weight": torch.zeros(8, 8)}}
    with pytest.raises(LinearizeError, match="IP-Adapter"):
        pipeline.load_ip_adapter(weights, weight_name="none", image_encoder_pretrained_model_name_or_path=None)
    assert num_mixers(pipeline) == NUM_SITES and draw(pipeline) == picture


# Fresh processes, with nothing but the wheel


@pytest.fixture(scope="module")
def wheel_site(tmp_path_factory) -> Path:
    """A folder with the built wheel unpacked, as pip installs it."""
    root = Path(__file__).parents[1]
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


# Mistakes


def test_only_students_are_exported(tiny_pipeline, tmp_path):
    with pytest.raises(LinearizeError, match="FluxTransformer2DModel, which is no student"):
        export_student(tiny_pipeline, tmp_path / "student")
    with pytest.raises(LinearizeError, match="use local or standalone"):
        export_student(tiny_pipeline, tmp_path / "student", form="zip")
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_the_old_one(student, picture, tmp_path):
    folder = export_student(student, tmp_path / "student")
    with pytest.raises(ValueError, match="no size"):
        export_student(student, folder, max_shard_size="no size")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert draw(load_pipeline(folder)) == picture


def test_no_room_on_the_disk_is_said_before_anything_is_written(student, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(LinearizeError, match="MB free"):
        export_student(student, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_student(tmp_path, tiny_flux_folder):
    with pytest.raises(LinearizeError, match="it has no model_index"):
        load_pipeline(tmp_path / "absent")
    with pytest.raises(LinearizeError, match="holds no student but a FluxTransformer2DModel"):
        load_pipeline(tiny_flux_folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "transformer/config.json",
            {"linearize_plan": [{"layers": [], "mixer": "os.path", "arguments": {}}]},
            "os.path",
        ),
        ("transformer/config.json", {"linearize_plan": None}, "no plan"),
        ("transformer/config.json", {"num_layers": 3}, "missing keys"),
        ("transformer/config.json", {"num_layers": 1}, "transformer_blocks"),
        ("transformer/config.json", {"joint_attention_dim": 48}, "damaged|does not fit"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ("model_index.json", {"vae": ["antigravity", "AutoencoderKL"]}, "antigravity"),
        ("model_index.json", {"text_encoder": ["diffusers", "NoSuchClass"]}, "damaged"),
    ],
    ids=["mixer", "no plan", "more blocks", "fewer blocks", "other base", "other pipeline", "foreign import", "class"],
)
def test_a_student_folder_that_does_not_fit(copied, file, changes, message):
    edit_json(copied / file, **changes)
    with pytest.raises(LinearizeError, match=message):
        load_pipeline(copied)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("component", ["transformer/diffusion_pytorch_model", "text_encoder/model"])
def test_truncated_weights(copied, component):
    file = copied / f"{component}.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LinearizeError, match="truncated or corrupt"):
        load_pipeline(copied)
    file.unlink()
    with pytest.raises(LinearizeError, match="damaged or incomplete"):
        load_pipeline(copied)


# The model card


def test_the_model_card_says_how_to_load_and_which_mixers(folders):
    for form, line in (("local", "load_pipeline"), ("standalone", "trust_remote_code=True")):
        card = (folders[form] / "README.md").read_text()
        assert line in card
        assert "`clear(window=2" in card and "in 3 layers" in card
        assert card.startswith("---\nlibrary_name: diffusers\n")


def test_the_model_card_has_the_numbers_of_the_summary(student):
    accuracy = {"value": 0.5, "interval": [0.25, 0.75], "n": 8}
    numbers = {
        "scene_accuracy": accuracy,
        "caption_log_probability": -1.5,
        "psnr_to_teacher": 20.25,
        "velocity_error": 0.125,
        "frechet_distance": None,
    }
    facts = {
        "attention_flops_ratio": 0.375,
        "trainable_parameters": 1234,
        "train_seconds": 60.5,
        "samples_per_second": 2.5,
    }
    summary = {**dict.fromkeys(("teacher", "untrained", "student"), numbers), **facts}
    card = model_card(student.transformer, "FluxPipeline", form="local", summary=summary)
    for number in ("50.0 % [25.0, 75.0] n=8", "-1.5", "20.25", "0.125", "0.375", "1,234", "60.5", "2.5"):
        assert f"| {number} |" in card


# The mixer alone


@pytest.fixture
def mixer_folder(student, tmp_path) -> Path:
    return export_mixer(student, tmp_path / "mixer", base_model="tiny")


def test_a_mounted_mixer_is_the_student(mixer_folder, tiny_pipeline, picture):
    assert sorted(file.name for file in mixer_folder.iterdir()) == ["mixer.json", "mixer.safetensors"]
    report = mount_mixer(tiny_pipeline, mixer_folder)
    assert len(report.sites) == num_mixers(tiny_pipeline) == NUM_SITES
    assert draw(tiny_pipeline) == picture
    with pytest.raises(LinearizeError, match="student already"):
        mount_mixer(tiny_pipeline, mixer_folder)


def test_a_mixer_is_mounted_on_its_base_alone(mixer_folder, tiny_pipeline, picture):
    with torch.no_grad():
        tiny_pipeline.transformer.proj_out.bias += 1
    with pytest.raises(LinearizeError, match="not those of tiny"):
        mount_mixer(tiny_pipeline, mixer_folder)
    assert num_mixers(tiny_pipeline) == 0
    mount_mixer(tiny_pipeline, mixer_folder, same_base=False)
    assert num_mixers(tiny_pipeline) == NUM_SITES
    assert draw(tiny_pipeline) != picture


def test_a_mixer_mounts_on_its_base_in_another_dtype(mixer_folder, tiny_flux_folder):
    pipeline = FluxPipeline.from_pretrained(tiny_flux_folder, dtype=torch.bfloat16)
    mount_mixer(pipeline, mixer_folder)
    assert num_mixers(pipeline) == NUM_SITES


def _drop(tensors):
    tensors.popitem()


def _add(tensors):
    tensors["proj_out.weight"] = torch.zeros(1)


def _reshape(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name][..., :-1].clone()


@pytest.mark.parametrize(
    ("damage", "message"), [(_drop, "lacks the tensor"), (_add, "that its plan has not"), (_reshape, "of shape")]
)
def test_mixer_tensors_are_strict(mixer_folder, tiny_pipeline, damage, message):
    tensors = load_file(mixer_folder / "mixer.safetensors")
    damage(tensors)
    save_file(tensors, mixer_folder / "mixer.safetensors")
    with pytest.raises(LinearizeError, match=message):
        mount_mixer(tiny_pipeline, mixer_folder)
    assert type(tiny_pipeline.transformer).__name__ == "FluxTransformer2DModel"


def test_mixer_folders_that_do_not_fit(mixer_folder, tiny_pipeline, tmp_path):
    with pytest.raises(LinearizeError, match="no folder"):
        mount_mixer(tiny_pipeline, tmp_path / "absent")
    spec = json.loads((mixer_folder / "mixer.json").read_text())
    base = {**spec["base"], "architecture": {**spec["base"]["architecture"], "num_layers": 19}}
    edit_json(mixer_folder / "mixer.json", base=base)
    with pytest.raises(LinearizeError, match="num_layers=2 and the mixer was trained for tiny with num_layers=19"):
        mount_mixer(tiny_pipeline, mixer_folder)
    edit_json(mixer_folder / "mixer.json", **spec)
    file = mixer_folder / "mixer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(LinearizeError, match="missing or damaged"):
        mount_mixer(tiny_pipeline, mixer_folder)
    edit_json(mixer_folder / "mixer.json", format=99)
    with pytest.raises(LinearizeError, match="no mixer export of format 1"):
        mount_mixer(tiny_pipeline, mixer_folder)
    assert num_mixers(tiny_pipeline) == 0
