import copy
import dataclasses

import pytest
import torch

from linearize.errors import LinearizeError
from linearize.evaluation.paired import PairedProtocol
from linearize.evaluation.reference import reference_name, teacher_reference

PROMPTS = ["a red circle", "a green square"]


@pytest.fixture(scope="module")
def protocol(teacher, settings):
    return PairedProtocol(teacher, PROMPTS, settings)


def test_a_kept_reference_is_what_would_be_sampled_again(protocol, tmp_path):
    sampled = teacher_reference(protocol, tmp_path, save=True)
    assert [file.name for file in tmp_path.iterdir()] == [reference_name(protocol)]
    kept = teacher_reference(protocol, tmp_path)
    assert torch.equal(kept.latents, sampled.latents) and torch.equal(kept.second_latents, sampled.second_latents)
    assert torch.equal(teacher_reference(protocol).latents, sampled.latents)
    assert not torch.equal(sampled.latents, sampled.second_latents)


def test_a_kept_reference_is_read_and_not_sampled(protocol, tmp_path):
    teacher_reference(protocol, tmp_path, save=True)
    moved = dataclasses.replace(protocol, settings=dataclasses.replace(protocol.settings, num_rows=1, batch_size=1))
    with torch.random.fork_rng():
        calls = []
        handle = protocol.teacher.pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
        teacher_reference(moved, tmp_path)
        handle.remove()
    assert calls == []


def test_other_prompts_settings_or_weights_have_another_name(protocol):
    others = [
        dataclasses.replace(protocol, prompts=PROMPTS[::-1]),
        dataclasses.replace(protocol, settings=dataclasses.replace(protocol.settings, seed=1)),
        dataclasses.replace(protocol, settings=dataclasses.replace(protocol.settings, num_inference_steps=3)),
        dataclasses.replace(protocol, teacher=dataclasses.replace(protocol.teacher, weight_hash="0" * 64)),
    ]
    names = {reference_name(protocol), *(reference_name(other) for other in others)}
    assert len(names) == 5


def test_another_scheduler_or_dtype_has_another_name(protocol):
    """They paint other pictures with the same weights."""
    names = {reference_name(protocol)}
    for change in (lambda pipe: pipe.scheduler.register_to_config(shift=9.0), lambda pipe: pipe.to(torch.bfloat16)):
        pipeline = copy.deepcopy(protocol.teacher.pipeline)
        change(pipeline)
        teacher = dataclasses.replace(protocol.teacher, pipeline=pipeline)
        names.add(reference_name(dataclasses.replace(protocol, teacher=teacher)))
    assert len(names) == 3


def test_nothing_is_written_unless_asked(protocol, tmp_path):
    teacher_reference(protocol, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_reference_is_told(protocol, tmp_path):
    file = tmp_path / reference_name(protocol)
    teacher_reference(protocol, tmp_path, save=True)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(LinearizeError, match=r"truncated or corrupt.*delete it"):
        teacher_reference(protocol, tmp_path)


def test_a_model_that_diverged_is_told(protocol):
    student = copy.deepcopy(protocol.teacher.pipeline.transformer)
    student.proj_out.bias.data.fill_(torch.nan)
    with pytest.raises(LinearizeError, match="not finite numbers"):
        protocol.sample(student)
