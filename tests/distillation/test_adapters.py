"""LoRA beside the teacher's projections: what trains, what it computes, and what is left once it is merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from distillation.conftest import MakeModule, fit
from linearize.adapters import LoraSettings, has_adapters, is_adapter_parameter, merge_lora
from linearize.backbones import find_backbone
from linearize.distillation.checkpoint import read_checkpoint
from linearize.distillation.losses import Prediction
from linearize.errors import LinearizeError
from linearize.export import load_pipeline
from linearize.surgery import is_mixer_parameter, share_student, surgery_report, trained_parameters
from linearize.train import train
from runs import compose_train, tiny_overrides

PLAN = [{"layers": "*", "mixer": "lolcats", "window": 2}]
SETTINGS = LoraSettings(rank=3, alpha=6.0)


@pytest.fixture
def teacher(tiny_flux_folder: Path) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(tiny_flux_folder, subfolder="transformer")


def randomized(student: torch.nn.Module) -> torch.nn.Module:
    """Adapters away from their zero start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained_parameters(student).items():
            if is_adapter_parameter(name):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return student


def test_adapters_train_in_the_place_of_projections_and_share_them(teacher: FluxTransformer2DModel) -> None:
    student = share_student(teacher.bfloat16(), PLAN, SETTINGS)
    trained, frozen = trained_parameters(student), {id(value) for value in teacher.parameters()}
    adapters = [name for name in trained if is_adapter_parameter(name)]
    assert len(adapters) == 2 * (2 * 4 + 2 * 3)
    assert all(is_mixer_parameter(name) != is_adapter_parameter(name) for name in trained)
    for name, parameter in student.named_parameters():
        assert (id(parameter) in frozen) == (name not in trained), name
        assert parameter.requires_grad == (name in trained)
        assert name not in trained or parameter.dtype == torch.float32
    width = 32
    mixers = sum(value.numel() for name, value in trained.items() if is_mixer_parameter(name))
    assert surgery_report(student).trained_parameters == mixers + len(adapters) * SETTINGS.rank * width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_layers_compute_what_adapted_ones_did(
    teacher: FluxTransformer2DModel, batch: dict[str, Any], dtype: torch.dtype, make_module: MakeModule
) -> None:
    teacher.to(dtype)
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    student = randomized(share_student(teacher, PLAN, SETTINGS))
    plain = share_student(teacher, PLAN)
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    layer = student.get_submodule("transformer_blocks.0.attn.to_out.0")
    adapted = layer.float()(states) if dtype == torch.float32 else None
    expected: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(student).items():
        if "lora_A" in name:
            down, up = parameter.double(), student.get_parameter(name.replace("lora_A", "lora_B")).double()
            base = name.partition(".lora_A")[0]
            weight = before[f"{base}.weight"].float() + (up @ down * SETTINGS.alpha / SETTINGS.rank).float()
            expected[f"{base}.weight"] = weight
    merge_lora(student)
    assert not has_adapters(student) and not hasattr(student, "peft_config")
    assert student.state_dict().keys() == plain.state_dict().keys()
    merged = dict(student.named_parameters())
    for name, weight in expected.items():
        assert merged[name].dtype == dtype
        torch.testing.assert_close(
            merged[name].float(), weight, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6
        )
        assert not torch.equal(merged[name], before[name])
    if adapted is not None:
        again = student.get_submodule("transformer_blocks.0.attn.to_out.0")(states)
        torch.testing.assert_close(again, adapted, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in teacher.named_parameters())


def test_adapters_start_as_the_plain_student_and_learn(make_module: MakeModule, batch: dict[str, Any]) -> None:
    module = make_module("clear", window=2, adapter=SETTINGS)
    plain = make_module("clear", window=2)
    sigma = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        velocities = [one.backbone.predict(one.student, batch["latents"], sigma, batch) for one in (module, plain)]
    assert torch.equal(*velocities)
    start = {name: value.detach().clone() for name, value in module.trained.items()}
    frozen = {name: value.clone() for name, value in module.teacher.named_parameters()}
    fit(module, batch, 3)
    assert module.trained and all(map(is_adapter_parameter, module.trained))
    assert all(not torch.equal(value, start[name]) for name, value in module.trained.items())
    assert all(torch.equal(value, frozen[name]) for name, value in module.teacher.named_parameters())
    assert any(not torch.equal(module.ema.average[name], value) for name, value in module.trained.items())


def test_float32_adapters_learn_beside_bfloat16_layers(make_module: MakeModule, batch: dict[str, Any]) -> None:
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        module = make_module("lolcats", terms={"prediction": Prediction()}, window=2, adapter=SETTINGS)
        randomized(module.student)
        for parameter in module.student.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(dtype)
        noise, sigma = torch.zeros_like(batch["latents"]), torch.tensor([0.3, 0.8])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = module.observer.compute_terms(module.stages[0].terms, batch, noise, sigma)["prediction"]
        value.backward()
        losses.append(value.detach())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in module.trained.values()]))
        assert gradients[-1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=0.05, atol=0)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_adapters_and_merged_layers_agree_in_bfloat16(
    teacher: FluxTransformer2DModel, batch: dict[str, Any], device: str
) -> None:
    student = randomized(share_student(teacher.bfloat16().to(device), PLAN, SETTINGS))
    assert {parameter.device.type for parameter in student.parameters()} == {device}
    sigma = torch.tensor([0.3, 0.8], device=device)
    batch = {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}

    def velocity() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return find_backbone(student).predict(student, batch["latents"], sigma, batch)

    adapted = velocity()
    adapted.square().mean().backward()
    assert all(parameter.grad is not None for parameter in trained_parameters(student).values())
    merge_lora(student)
    with torch.no_grad():
        difference = velocity() - adapted
    assert difference.norm() < 0.03 * adapted.norm()


def test_targets_are_those_that_the_mixers_train(teacher: FluxTransformer2DModel) -> None:
    student = share_student(teacher, PLAN, LoraSettings(targets=("to_v", "to_out")))
    layers = {name.partition(".lora_")[0] for name in trained_parameters(student) if is_adapter_parameter(name)}
    assert layers == {
        f"{kind}.{i}.attn.to_v" for kind in ("transformer_blocks", "single_transformer_blocks") for i in range(2)
    } | {f"transformer_blocks.{i}.attn.to_out.0" for i in range(2)}
    plan = [{"layers": "single*", "mixer": "clear"}]
    with pytest.raises(
        LinearizeError, match=r"targets=\[to_out\] names no projection that this student's mixers train"
    ):
        share_student(teacher, plan, LoraSettings(targets=("to_out",)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank=0; choose a whole number, 1 or more"),
        ({"rank": "four"}, "rank='four'; choose a whole number, 1 or more"),
        ({"alpha": 0.0}, "alpha=0.0 is no scale"),
        ({"alpha": "much"}, "alpha=much is no scale of an adapter: give a number above 0"),
        ({"dropout": 1.0}, "dropout=1.0 is no share"),
        ({"dropout": "some"}, "dropout=some is no share: give a number from 0"),
        ({"targets": ["to_q", "to_x"]}, r"targets=\[to_q, to_x\].*choose from to_q, to_k"),
        ({"targets": []}, r"targets=\[\]"),
        ({"targets": "to_x"}, r"targets=\[to_x\].*choose from to_q, to_k"),
        ({"targets": [1, None]}, r"targets=\[1, None\]"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(LinearizeError, match=words):
        LoraSettings.from_config({"targets": ["to_q"], **settings})


def test_one_name_is_a_list_of_one() -> None:
    assert LoraSettings.from_config({"rank": 2, "targets": "to_q"}) == LoraSettings(rank=2, targets=("to_q",))


def test_a_whole_run_with_adapters(tiny_flux_folder: Path, tmp_path: Path) -> None:
    """Two stages, an interrupt and a resumption, the merged export, and the numbers of the summary."""
    common = [
        *tiny_overrides(tiny_flux_folder, tmp_path / "cache"),
        *("mixer=lolcats", "loss=lolcats", "calibration_samples=2", "logger=none"),
        *("evaluation.sigmas=[0.5]", "trainer.val_check_interval=6"),
    ]
    overrides = [*common, "adapter=lora", "adapter.rank=2", "adapter.dropout=0.1"]
    train(compose_train(*overrides, run_dir=tmp_path / "whole"))
    stop = ("+callbacks.stop._target_=runs.InterruptAt", "+callbacks.stop.step=4")
    with pytest.raises(KeyboardInterrupt, match="Stopped after step 4 of 6"):
        train(compose_train(*overrides, *stop, run_dir=tmp_path / "halves"))
    with pytest.raises(LinearizeError, match=r"another adapter \(lora of rank 2 .*\) than this run \(none\)"):
        train(compose_train(*common, f"resume={tmp_path / 'halves'}", run_dir=tmp_path / "other"))
    train(compose_train(*overrides, "resume=last", "evaluate=false", "export=null", run_dir=tmp_path / "halves"))
    whole, halves = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.safetensors") for name in ("whole", "halves")
    )
    for state in (
        lambda checkpoint: checkpoint["state_dict"],
        lambda checkpoint: checkpoint["linearize"]["ema"]["average"],
    ):
        assert all(torch.equal(value, state(halves)[name]) for name, value in state(whole).items())
    average = whole["linearize"]["ema"]["average"]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["trainable_parameters"] == sum(value.numel() for value in average.values())
    assert summary["student"]["velocity_error"] < summary["untrained"]["velocity_error"]
    base = FluxTransformer2DModel.from_pretrained(tiny_flux_folder, subfolder="transformer")
    student = load_pipeline(tmp_path / "whole" / "student").transformer
    assert not has_adapters(student)
    for name, value in average.items():
        if is_mixer_parameter(name):
            assert torch.equal(student.get_parameter(name), value)
        elif "lora_A" in name:
            layer = name.partition(".lora_A")[0]
            delta = average[name.replace("lora_A", "lora_B")].double() @ value.double() * 16 / 2
            weight = base.get_parameter(f"{layer}.weight").double() + delta
            assert delta.norm() > 0
            torch.testing.assert_close(student.get_parameter(f"{layer}.weight").double(), weight, rtol=1e-6, atol=1e-7)
