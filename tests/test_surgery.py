import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import linearize as package
from linearize.backbones import find_backbone
from linearize.errors import LinearizeError
from linearize.layout import Grid, Layout
from linearize.surgery import linearize, resolve_plan, share_student, surgery_report, trained_parameters

SITES = [f"{kind}.{i}.attn" for kind in ("transformer_blocks", "single_transformer_blocks") for i in range(2)]


@pytest.fixture
def transformer(tiny_pipeline):
    return tiny_pipeline.transformer


def mixers_of(transformer):
    return {name: type(site.mixer).__name__ for name, site in find_backbone(transformer).sites(transformer).items()}


def velocity(transformer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    config, backbone = transformer.config, find_backbone(transformer)
    conditioning = {
        "prompt_embeds": torch.randn(2, 6, config.joint_attention_dim, generator=generator),
        "pooled_prompt_embeds": torch.randn(2, config.pooled_projection_dim, generator=generator),
        "guidance": torch.tensor([1.0, 3.0]),
    }
    latents = torch.randn(2, config.in_channels // 4, 14, 38, generator=generator)
    return backbone.predict(transformer, latents, torch.tensor([0.3, 0.8]), conditioning)


def test_a_pipeline_is_changed_in_place_and_saves_as_the_student(tiny_pipeline, tmp_path):
    transformer = tiny_pipeline.transformer
    report = linearize(tiny_pipeline, mixer="clear", window=3)
    assert tiny_pipeline.transformer is transformer
    assert type(transformer) is package.LinearFluxTransformer2DModel
    assert [site.name for site in report.sites] == SITES
    tiny_pipeline.save_pretrained(tmp_path)
    index = (tmp_path / "model_index.json").read_text()
    assert '"linearize",\n    "LinearFluxTransformer2DModel"' in index
    loaded = type(tiny_pipeline).from_pretrained(tmp_path)
    assert mixers_of(loaded.transformer) == dict.fromkeys(SITES, "ClearMixer")
    with torch.no_grad():
        assert torch.equal(velocity(loaded.transformer), velocity(transformer))


def test_parameters_stay_the_objects_that_they_were(transformer):
    before = dict(transformer.named_parameters())
    linearize(transformer, "clear", window=3)
    after = dict(transformer.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_the_report_says_what_was_done(transformer):
    layout = Layout(7, (Grid(20, 30),))
    report = linearize(transformer, "clear", layers=["transformer_blocks.*"], window=4, downsample=2, layout=layout)
    assert [site.name for site in report.sites] == SITES[:2]
    assert report.sites[0].arguments == {"window": 4, "downsample": 2}
    assert report.trained_parameters == sum(p.numel() for p in trained_parameters(transformer).values())
    softmax = 4 * 2 * 16 * layout.num_tokens**2
    site = find_backbone(transformer).sites(transformer)[SITES[0]]
    assert report.attention_flops_before == 4 * softmax
    assert report.attention_flops_after == 2 * softmax + 2 * site.mixer.flops(layout)
    assert 0.5 < report.attention_flops_ratio < 1
    text = str(report)
    assert "2 of 4 attention layers replaced" in text
    assert "clear(window=4, downsample=2) in 2: transformer_blocks.0.attn ... transformer_blocks.1.attn" in text
    assert "20x30 image and 7 text tokens" in text


def test_the_report_can_be_asked_for_again(transformer):
    report = linearize(transformer, "clear", window=3)
    assert surgery_report(transformer) == report


def test_globs_pick_layers_and_the_others_stay_softmax(transformer):
    linearize(transformer, "clear", layers="*.1.attn", window=3)
    assert [name for name, mixer in mixers_of(transformer).items() if mixer == "ClearMixer"] == [SITES[1], SITES[3]]


def test_a_plan_mixes_mixers(transformer):
    plan = [
        {"layers": ["transformer_blocks.0.attn"], "mixer": "clear", "window": 2},
        {"layers": ["transformer_blocks.1.attn"], "mixer": "softmax"},
        {"layers": ["single_*"], "mixer": "clear", "window": 5, "downsample": 2},
    ]
    linearize(transformer, plan=plan)
    sites = find_backbone(transformer).sites(transformer)
    assert [getattr(site.mixer, "window", None) for site in sites.values()] == [2, None, 5, 5]
    assert resolve_plan(transformer.config.linearize_plan, SITES) == transformer.config.linearize_plan
    assert velocity(transformer).isfinite().all()


def test_linearizing_again_replaces_the_plan(transformer):
    teacher = velocity(transformer).detach()
    linearize(transformer, "clear", window=2, downsample=2)
    linearize(transformer, "clear", layers=SITES[:1], window=3)
    assert mixers_of(transformer) == {SITES[0]: "ClearMixer"} | dict.fromkeys(SITES[1:], "SoftmaxMixer")
    linearize(transformer, "softmax")
    assert torch.equal(velocity(transformer), teacher)
    assert not [name for name in transformer.state_dict() if ".mixer." in name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["blocks.*"]}, r"glob 'blocks.\*' matches none of the \d+ sites: .* transformer_blocks\.0\.attn "),
        ({"layers": ["transformer_blocks.*", "single.*"]}, r"glob 'single.\*' matches none"),
        ({"layers": ["*"], "mixer": "cleer"}, "unknown mixer 'cleer'"),
        ({"radius": 3}, "no argument 'radius'"),
        ({"window": 0}, "got window=0"),
        ({"plan": [{"layers": "*", "mixer": "clear"}], "window": 3}, "plan= and window= exclude each other"),
        (
            {"plan": [{"layers": "*", "mixer": "clear"}, {"layers": ["*.0.attn"], "mixer": "softmax"}]},
            r"two rules claim transformer_blocks.0.attn: 'clear' in \* and 'softmax' in \*.0.attn",
        ),
    ],
)
def test_mistakes_are_named_and_change_nothing(transformer, arguments, message):
    kind, before = type(transformer), velocity(transformer)
    with pytest.raises(LinearizeError, match=message):
        linearize(transformer, **arguments)
    assert type(transformer) is kind
    assert "linearize_plan" not in transformer.config
    assert torch.equal(velocity(transformer), before)


def test_only_transformers_of_a_known_family_can_be_linearized(tiny_pipeline):
    with pytest.raises(LinearizeError, match="no backbone for AutoencoderKL"):
        linearize(tiny_pipeline.vae)


def test_a_saved_plan_with_a_foreign_name_builds_nothing(transformer, tmp_path):
    linearize(transformer, "clear", window=3)
    transformer.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"clear"', '"os.system"'))
    with pytest.raises(LinearizeError, match=r"unknown mixer 'os\.system'"):
        package.LinearFluxTransformer2DModel.from_pretrained(tmp_path)


PLAN = [{"layers": ["transformer_blocks.1.attn", "single_*"], "mixer": "clear", "window": 3, "downsample": 2}]


def test_a_shared_student_costs_only_what_trains(transformer):
    teacher = transformer.bfloat16()
    student = share_student(teacher, PLAN)
    trained, frozen = trained_parameters(student), dict(teacher.named_parameters())
    expected = {f"{name}.mixer.spatial_weight" for name in SITES[1:]}
    for name, projections in [(SITES[1], ("to_q", "to_k", "to_v", "to_out.0")), *((n, "qkv") for n in SITES[2:])]:
        for projection in projections:
            projection = f"to_{projection}" if len(projection) == 1 else projection
            expected |= {f"{name}.{projection}.weight", f"{name}.{projection}.bias"}
    assert trained.keys() == expected
    for name, parameter in student.named_parameters():
        if name in trained:
            assert parameter.dtype == torch.float32 and parameter.requires_grad
            assert name not in frozen or torch.equal(parameter.bfloat16(), frozen[name])
        else:
            assert parameter is frozen[name] and not parameter.requires_grad
    assert all(mine is theirs for mine, theirs in zip(student.buffers(), teacher.buffers(), strict=True))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert student.config.linearize_plan and "linearize_plan" not in teacher.config


def test_moving_and_training_a_shared_student_leaves_the_teacher_alone(transformer):
    before = velocity(transformer).detach()
    student = share_student(transformer, PLAN).to(torch.device("cpu"))
    optimizer = torch.optim.SGD(trained_parameters(student).values(), lr=1.0)
    velocity(student).square().mean().backward()
    assert all(parameter.grad is not None for parameter in trained_parameters(student).values())
    optimizer.step()
    shared = {id(parameter) for parameter in transformer.parameters()}
    assert sum(id(parameter) not in shared for parameter in student.parameters()) == len(trained_parameters(student))
    with torch.no_grad():
        assert torch.equal(velocity(transformer), before)
        assert not torch.allclose(velocity(student), before)


def test_a_shared_softmax_student_starts_as_the_teacher(transformer):
    student = share_student(transformer, [{"layers": "*", "mixer": "softmax"}])
    with torch.no_grad():
        assert torch.equal(velocity(student), velocity(transformer))


def test_students_can_be_shared_from_students(transformer):
    linearize(transformer, "softmax")
    student = share_student(transformer, PLAN)
    assert mixers_of(transformer) == dict.fromkeys(SITES, "SoftmaxMixer")
    assert mixers_of(student)[SITES[1]] == "ClearMixer"
    assert copy.deepcopy(student).config.linearize_plan == student.config.linearize_plan


def test_trained_parameters_need_a_linearized_transformer(transformer):
    with pytest.raises(LinearizeError, match="FluxTransformer2DModel is not linearized"):
        trained_parameters(transformer)


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import sys, linearize; heavy = {'torch', 'diffusers', 'lightning', 'hydra', 'wandb', 'datasets', "
        "'torchmetrics'} & set(sys.modules); assert not heavy, heavy; "
        "from linearize import linearize, LinearFluxTransformer2DModel as Student, ModelMixin; "
        "heavy = {'lightning', 'hydra', 'wandb', 'datasets', 'torchmetrics'} & set(sys.modules); "
        "assert not heavy, heavy; assert Student.__module__ == 'linearize' and issubclass(Student, ModelMixin)"
    )
    source = str(Path(package.__file__).parents[1])
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": source})


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'linearise'"):
        package.linearise  # noqa: B018
