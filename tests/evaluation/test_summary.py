import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from linearize.evaluation.environment import commit
from linearize.evaluation.metrics import MAX_PSNR, mean_psnr
from linearize.evaluation.paired import PairedProtocol
from linearize.evaluation.summary import compare, summarize_run, untrained_student
from linearize.export import load_pipeline
from linearize.surgery import share_student, trained_parameters

MODELS = ("teacher", "untrained", "student")
METRICS = {"scene_accuracy", "caption_log_probability", "psnr_to_teacher", "velocity_error", "frechet_distance"}


@pytest.fixture(scope="module")
def student(student_folder):
    return load_pipeline(student_folder).transformer.eval()


@pytest.fixture(scope="module")
def run(student, teacher, settings, judge, tmp_path_factory):
    """One summarized run: its folder and what was returned."""
    folder = tmp_path_factory.mktemp("run")
    training = {"train_seconds": 1.5, "samples_per_second": 8.0}
    return folder, summarize_run(student, teacher, settings, folder=folder, judge=judge, training=training)


def test_summary_has_every_number_and_says_where_it_comes_from(run, student, teacher):
    folder, summary = run
    assert json.loads((folder / "summary.json").read_text()) == summary
    for model in MODELS:
        assert set(summary[model]) == METRICS
        assert summary[model]["scene_accuracy"]["n"] == 5
        assert all(summary[model][metric] is not None for metric in METRICS)
    assert summary["teacher"]["velocity_error"] == 0
    assert 0 < summary["untrained"]["velocity_error"] != summary["student"]["velocity_error"] > 0
    assert 0 < summary["attention_flops_ratio"] < 1
    assert (summary["train_seconds"], summary["samples_per_second"]) == (1.5, 8.0)
    assert summary["trainable_parameters"] == sum(p.numel() for p in trained_parameters(student).values())
    assert summary["teacher_source"]["weight_hash"] == teacher.weight_hash
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["machine"] and summary["command"].startswith("python ")
    assert summary["commit"] == commit()


def test_samples_picture_shows_four_columns_and_the_first_rows(run, settings):
    folder, _ = run
    with Image.open(folder / "samples.png") as picture:
        picture.load()
        # Pictures of 48 x 32 pixels are shown six times as large.
        assert picture.width == 16 + 4 * (6 * settings.width + 16)
        assert picture.height > settings.num_rows * 6 * settings.height


def test_the_same_run_gives_the_same_numbers(run, student, teacher, settings, judge):
    _, summary = run
    again = compare(student, teacher, settings, judge=judge)
    assert again.numbers == {model: summary[model] for model in MODELS}


def test_pictures_of_teacher_and_student_share_their_seeds(student, teacher, settings):
    found = compare(student, teacher, settings)
    protocol = PairedProtocol(teacher, found.prompts, settings)
    call = {
        "height": settings.height,
        "width": settings.width,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "max_sequence_length": settings.max_sequence_length,
        "output_type": "pt",
    }
    for index in (0, 4):
        generator = torch.Generator().manual_seed(settings.seed + index)
        stock = teacher.pipeline(prompt=found.prompts[index], generator=generator, **call).images[0]
        torch.testing.assert_close(found.images["teacher"][index], stock, atol=2e-5, rtol=0)
    assert len(set(protocol.seeds() + protocol.seeds(second=True))) == 2 * len(found.prompts)
    assert found.numbers["student"]["psnr_to_teacher"] == mean_psnr(found.images["student"], found.images["teacher"])


def test_a_student_that_is_its_teacher_has_no_error(teacher, settings):
    twin = share_student(teacher.pipeline.transformer, [{"layers": ["*"], "mixer": "softmax"}])
    found = compare(twin, teacher, settings)
    for model in ("untrained", "student"):
        assert found.numbers[model]["velocity_error"] == 0
        assert found.numbers[model]["psnr_to_teacher"] == MAX_PSNR
        assert found.numbers[model]["scene_accuracy"] is None
        assert found.numbers[model]["frechet_distance"] is None
    assert found.numbers["teacher"]["psnr_to_teacher"] < MAX_PSNR


def test_velocity_error_is_its_definition_on_noised_teacher_samples(student, teacher, settings):
    prompts = ["a red circle", "a green square", "a blue circle"]
    protocol = PairedProtocol(teacher, prompts, settings)
    base = teacher.pipeline.transformer
    latents = protocol.sample(base)
    ratios = []
    with torch.no_grad():
        for index, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(settings.seed + 2_000_000 + index)
            noise = torch.randn((len(settings.sigmas), *latents.shape[1:]), generator=generator)
            conditioning = teacher.encode([prompt], settings.max_sequence_length)
            conditioning["guidance"] = torch.tensor([settings.guidance_scale])
            for level, sigma in enumerate(settings.sigmas):
                noised = (1 - sigma) * latents[index : index + 1] + sigma * noise[level]
                ours, theirs = (
                    teacher.backbone.predict(model, noised, torch.tensor([sigma]), conditioning)
                    for model in (student, base)
                )
                ratios.append((ours - theirs).double().square().sum() / theirs.double().square().sum())
    found = protocol.velocity_error(student, latents, protocol.velocities(base, latents))
    assert found == pytest.approx(torch.stack(ratios).mean().item(), rel=1e-4)


def test_pictures_of_other_prompts_are_not_judged(student, teacher, settings, judge):
    found = compare(student, teacher, settings, judge=judge, prompts=["a photo of a cat"] * 5)
    for model in MODELS:
        assert found.numbers[model]["scene_accuracy"] is None and found.numbers[model]["frechet_distance"] is None


def test_untrained_student_has_the_teacher_s_weights_and_the_student_s_plan(student, teacher):
    untrained = untrained_student(teacher, student, seed=0)
    assert untrained.config.linearize_plan == student.config.linearize_plan
    theirs, trained = teacher.pipeline.transformer.state_dict(), trained_parameters(untrained)
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in trained.items())
    moved = trained_parameters(student)
    assert not any(torch.equal(parameter, moved[name]) for name, parameter in trained.items())


def test_measuring_leaves_mode_and_gradients_alone(teacher, settings):
    trained = share_student(teacher.pipeline.transformer, [{"layers": ["*"], "mixer": "clear", "window": 2}])
    trained.train()
    compare(trained, teacher, settings, prompts=["a red circle"])
    assert trained.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained_parameters(trained).values())


def test_weights_of_two_dtypes_are_measured(tiny_flux_folder, settings):
    from linearize.teachers import load_teacher

    half = load_teacher(tiny_flux_folder, dtype="bfloat16", device="cpu")
    mixed = share_student(half.pipeline.transformer, [{"layers": ["*"], "mixer": "softmax"}])
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.float32, torch.bfloat16}
    found = compare(mixed, half, settings, prompts=["a red circle", "a green square"])
    assert found.numbers["student"]["velocity_error"] < 1e-3


def test_summary_of_a_run_without_judge_is_whole_json(student, teacher, settings, tmp_path: Path):
    summary = summarize_run(student, teacher, settings, folder=tmp_path, prompts=["a red circle"] * 2)
    assert summary["student"]["scene_accuracy"] is None and summary["train_seconds"] is None
    assert summary["settings"]["num_prompts"] == 2
    assert {file.name for file in tmp_path.iterdir()} == {"summary.json", "samples.png"}
