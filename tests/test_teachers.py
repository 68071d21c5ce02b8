"""Teachers from folders, from a hub and at random; and what is said when they cannot be had."""

import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from linearize.config import build_teacher, register_resolvers
from linearize.errors import LinearizeError
from linearize.files import read_json, state_hash, write_json
from linearize.teachers import load_teacher, resolve_device, resolve_dtype

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copied_folder(tiny_flux_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_flux_folder, tmp_path / "teacher"))


def test_a_folder_gives_a_frozen_teacher(tiny_flux_folder):
    teacher = load_teacher(tiny_flux_folder, dtype="bfloat16", device="cpu")
    assert (teacher.name, teacher.revision, teacher.backbone.name) == ("tiny_flux", None, "flux")
    modules = [part for part in teacher.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) == 4
    for module in modules:
        assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    assert teacher.pipeline.transformer.dtype == torch.bfloat16
    single = load_teacher(tiny_flux_folder, dtype=torch.float32, device="cpu")
    assert single.weight_hash == teacher.weight_hash == state_hash(single.pipeline.transformer.state_dict())
    embeddings = single.encode(["a red circle", ""], 8)
    assert {name: tuple(tensor.shape) for name, tensor in embeddings.items()} == {
        "prompt_embeds": (2, 8, 32),
        "pooled_prompt_embeds": (2, 32),
    }


def _edit_index(folder: Path, **changes) -> None:
    write_json(folder / "model_index.json", {**read_json(folder / "model_index.json"), **changes})


def test_missing_folders_and_sources_are_errors(tmp_path):
    with pytest.raises(LinearizeError, match=r"No teacher is given: set teacher\.path"):
        load_teacher()
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(LinearizeError, match=r"is no pipeline folder .*set teacher\.path"):
            load_teacher(folder)


def test_other_architectures_are_errors(copied_folder):
    _edit_index(copied_folder, _class_name="StableDiffusion3Pipeline")
    with pytest.raises(LinearizeError, match=r"is a StableDiffusion3Pipeline, which has no backbone: .* FluxPipeline"):
        load_teacher(copied_folder)
    _edit_index(copied_folder, _class_name="FluxPipeline", transformer=["diffusers", "SD3Transformer2DModel"])
    with pytest.raises(LinearizeError, match="has the transformer SD3Transformer2DModel, not FluxTransformer2DModel"):
        load_teacher(copied_folder)


def test_nothing_is_imported_by_a_name_found_in_a_folder(copied_folder, tmp_path, monkeypatch):
    (tmp_path / "intruder.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    _edit_index(copied_folder, vae=["intruder", "AutoencoderKL"])
    with pytest.raises(LinearizeError, match=r"takes its vae from intruder\.AutoencoderKL"):
        load_teacher(copied_folder)
    assert "intruder" not in sys.modules


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2"])
def test_truncated_weights_are_an_error_that_names_the_file(copied_folder, part):
    file = next((copied_folder / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LinearizeError, match=rf"{part}/{file.name} is truncated or corrupt"):
        load_teacher(copied_folder)


def test_incomplete_folders_are_errors(copied_folder):
    file = next((copied_folder / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    save_file({name: weights[name] for name in sorted(weights)[3:]}, file)
    with pytest.raises(LinearizeError, match=r"(lacks 3 tensors|does not load)") as caught:
        load_teacher(copied_folder)
    assert "\n" not in str(caught.value)
    shutil.rmtree(copied_folder / "vae")
    save_file(weights, file)
    with pytest.raises(LinearizeError, match="vae is missing or empty"):
        load_teacher(copied_folder)
    (copied_folder / "vae").mkdir()
    (copied_folder / "vae" / "config.json").write_text("{")
    with pytest.raises(LinearizeError, match="does not load as a pipeline"):
        load_teacher(copied_folder)
    file.unlink()
    with pytest.raises(LinearizeError, match=r"transformer holds no \*\.safetensors"):
        load_teacher(copied_folder)


def test_names_of_dtypes_and_devices():
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) == torch.float32 and resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(LinearizeError, match=r"dtype=fp8 is unknown: use one of auto, float32"):
        resolve_dtype("fp8", cpu)
    with pytest.raises(LinearizeError, match="device=tpu0 does not exist"):
        resolve_device("tpu0")


def _config(*overrides: str):
    register_resolvers(ROOT)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("generate", overrides=list(overrides))


SMALL = [
    "teacher.device=cpu",
    "teacher.random.transformer.num_layers=1",
    "teacher.random.transformer.num_single_layers=1",
    "teacher.random.transformer.num_attention_heads=2",
    "teacher.random.transformer.attention_head_dim=16",
    "teacher.random.transformer.axes_dims_rope=[4,6,6]",
    "teacher.random.transformer.joint_attention_dim=24",
    "teacher.random.transformer.pooled_projection_dim=12",
    "teacher.random.vae.block_out_channels=[8,8,8,8]",
    "teacher.random.vae.norm_num_groups=4",
    "teacher.random.vae.layers_per_block=1",
]


def test_a_random_teacher_is_the_same_every_time_and_samples():
    before = torch.get_rng_state()
    one, two = (build_teacher(_config("teacher=flux_dev_random", *SMALL)) for _ in range(2))
    other = build_teacher(_config("teacher=flux_dev_random", *SMALL, "teacher.random.seed=1"))
    assert torch.equal(before, torch.get_rng_state()) and torch.get_default_dtype() == torch.float32
    assert one.weight_hash == two.weight_hash != other.weight_hash
    assert one.name == "flux_dev_random" and not one.has_text_encoder
    assert {parameter.dtype for parameter in one.pipeline.transformer.parameters()} == {torch.bfloat16}
    conditioning = one.encode(["a cat", "a dog", "a cat"], 6)
    embeddings = conditioning["prompt_embeds"]
    assert embeddings.shape == (3, 6, 24) and conditioning["pooled_prompt_embeds"].shape == (3, 12)
    assert torch.equal(embeddings[0], embeddings[2]) and not torch.equal(embeddings[0], embeddings[1])
    latents = one.backbone.sample(
        one.pipeline, conditioning, seeds=[1, 2, 1], height=32, width=48, num_inference_steps=2, guidance_scale=3.5
    )
    assert latents.shape == (3, 16, 4, 6) and torch.isfinite(latents).all()
    assert one.backbone.decode(one.pipeline, latents).shape == (3, 3, 32, 48)


def test_the_random_architecture_has_the_size_of_flux_dev():
    config = _config("teacher=flux_dev_random").teacher.random.transformer
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**config)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 11_901_408_320


def test_an_unknown_backbone_is_an_error():
    with pytest.raises(LinearizeError, match=r"backbone=wan is unknown: use one of .*flux"):
        build_teacher(_config("teacher=flux_dev_random", "teacher.random.backbone=wan", *SMALL))


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download takes, for one pipeline folder, one gated model and nothing else."""

    folder: Path

    def log_message(self, *_):
        """Keeps quiet."""

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        path = self.path.partition("?")[0]
        if "me/gated" in path and "resolve" in path:
            self._send(b"", 403, {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/me/tiny/tree/"):
            self._send(json.dumps([self._entry(file) for file in self._files()]).encode())
        elif path.startswith("/api/models/me/tiny"):
            siblings = [{"rfilename": str(file)} for file in self._files()]
            self._send(
                json.dumps({"id": "me/tiny", "modelId": "me/tiny", "sha": COMMIT, "siblings": siblings}).encode()
            )
        elif path.startswith("/me/tiny/resolve/"):
            _, _, name = path.removeprefix("/me/tiny/resolve/").partition("/")
            file = self.folder / name
            if file.is_file():
                self._send(file.read_bytes(), 200, {"ETag": f'"{self._digest(file)}"'})
            else:
                self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(b"", 404, {"X-Error-Code": "RepoNotFound"})

    def _files(self) -> list[Path]:
        return sorted(file.relative_to(self.folder) for file in self.folder.rglob("*") if file.is_file())

    def _digest(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def _entry(self, file: Path) -> dict:
        place = self.folder / file
        return {"type": "file", "path": str(file), "size": place.stat().st_size, "oid": self._digest(place)}

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture(scope="module")
def hub_address(tiny_flux_folder) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("TinyHub", (Hub,), {"folder": tiny_flux_folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _ask_hub(cache: Path, address: str, *ids: str, **environment: str) -> subprocess.Popen:
    """Loads teachers by id in a process of its own, since the client reads its address when it is imported."""
    code = """
import json, sys
from linearize.errors import LinearizeError
from linearize.teachers import load_teacher
for hub_id in sys.argv[1:]:
    try:
        teacher = load_teacher(hub_id=hub_id, dtype="float32", device="cpu")
        print(json.dumps({"name": teacher.name, "revision": teacher.revision, "weight_hash": teacher.weight_hash}))
    except LinearizeError as error:
        print(json.dumps({"error": str(error)}))
"""
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT / "src"), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *ids],
        env={"PATH": "", "OMP_NUM_THREADS": "1", "NO_PROXY": "*", "HOME": str(cache), **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _answers(process: subprocess.Popen) -> list[dict]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_a_teacher_from_the_hub_and_what_is_said_when_there_is_none(hub_address, tiny_flux_folder, tmp_path):
    nowhere = "http://127.0.0.1:9"
    # The client tries for some time before it gives up, so this process runs beside the others.
    unreachable = _ask_hub(tmp_path / "empty", nowhere, "me/tiny")
    loaded, gated, missing = _answers(_ask_hub(tmp_path, hub_address, "me/tiny", "me/gated", "me/none"))
    local = load_teacher(tiny_flux_folder, device="cpu")
    assert loaded == {"name": "me/tiny", "revision": COMMIT, "weight_hash": local.weight_hash}
    assert "me/gated is gated: accept its licence" in gated["error"] and "hf auth login" in gated["error"]
    assert "me/none is no public model" in missing["error"]
    again, unknown = _answers(_ask_hub(tmp_path, nowhere, "me/tiny", "me/other", HF_HUB_OFFLINE="1"))
    assert again == loaded
    assert "The hub cannot be reached and me/other is not in the local cache" in unknown["error"]
    (answer,) = _answers(unreachable)
    assert "The hub cannot be reached and me/tiny is not in the local cache" in answer["error"]
    assert "\n" not in answer["error"]


def test_encoders_rest_outside_the_pipeline_and_still_encode(tiny_flux_folder):
    teacher = load_teacher(tiny_flux_folder, dtype="float32", device="cpu")
    before = teacher.encode(["a red circle"], 8)
    encoders = {name: getattr(teacher.pipeline, name) for name in ("text_encoder", "text_encoder_2")}
    with teacher.resting_encoders():
        assert teacher.pipeline.text_encoder is None and teacher.pipeline.text_encoder_2 is None
        assert teacher.has_text_encoder
        for name, tensor in teacher.encode(["a red circle"], 8).items():
            assert torch.equal(tensor, before[name])
        assert teacher.pipeline.text_encoder_2 is None
        sampling = {"height": 48, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0}
        assert teacher.backbone.sample(teacher.pipeline, before, seeds=[0], **sampling).isfinite().all()
    assert encoders == {name: getattr(teacher.pipeline, name) for name in encoders}
