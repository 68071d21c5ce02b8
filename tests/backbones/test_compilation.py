"""Compiled blocks: how many graphs there are, when there is a new one, and what it computes."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from linearize.backbones import find_backbone
from linearize.backbones.recording import Recorder
from linearize.compilation import compile_backend, compile_blocks
from linearize.errors import LinearizeError
from linearize.mixers import mixer_names
from linearize.surgery import linearize

SIZE, OTHER_SIZE = (9, 19), (13, 33)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compiled(transformer, mixer, *, backend="eager", **arguments):
    """A student and its compiled copy; a window's attention is its definition, the halo form being eager anyhow."""
    plain = copy.deepcopy(transformer)
    if mixer is not None:
        linearize(plain, mixer, **arguments)
    for module in plain.modules():
        if hasattr(type(module), "backend") and mixer == "clear":
            module.backend = "naive"
    student = copy.deepcopy(plain)
    compile_blocks(student, backend)
    return plain, student


def graphs():
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
@pytest.mark.parametrize("mixer", [None, "clear"], ids=["teacher", "clear"])
def test_one_graph_for_each_kind_of_block_and_resolution(deep, predict, mixer):
    plain, student = compiled(deep, mixer)
    for size in (SIZE, OTHER_SIZE):
        torch.testing.assert_close(predict(student, *size), predict(plain, *size), rtol=1e-4, atol=1e-5)
    assert graphs() == 2 * 2
    assert not counters["graph_break"]
    for size in (OTHER_SIZE, SIZE):
        predict(student, *size, seed=1)
    assert graphs() == 2 * 2


@torch.no_grad()
@pytest.mark.parametrize("mixer", sorted(set(mixer_names()) - {"softmax", "clear", "neighborhood", "tile_window"}))
def test_a_block_is_one_graph_with_any_of_these_mixers(untouched, predict, mixer):
    student = copy.deepcopy(untouched)
    # Without its window, which is eager on a CPU.
    linearize(student, mixer, **({"branches": "linear"} if mixer == "liger" else {}))
    expected = predict(student)
    student.single_transformer_blocks[0].compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(predict(student), expected, rtol=1e-3, atol=1e-4)
    assert graphs() == 1


def test_gradients_add_one_graph_for_the_input_that_has_none(deep, predict):
    """The first block's input requires no gradient; all others are alike, checkpointed or not."""
    plain, student = compiled(deep, "clear", window=3, backend="aot_eager")
    parameters = [site.to_q.weight for site in find_backbone(plain).sites(plain).values()]
    expected = torch.autograd.grad(predict(plain).sum(), parameters)
    for model in (plain, student):
        model.requires_grad_(False)
        for site in find_backbone(model).sites(model).values():
            site.to_q.requires_grad_(True)
    trained = [site.to_q.weight for site in find_backbone(student).sites(student).values()]
    for _ in range(2):
        found = torch.autograd.grad(predict(student).sum(), trained)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert graphs() == 3
    assert not counters["graph_break"]


@torch.no_grad()
def test_recorders_of_all_layers_share_the_graphs(deep, predict):
    plain, student = compiled(deep, "clear", window=3)
    kept = {}
    for model in (plain, student):
        sites = find_backbone(model).sites(model)
        for site in sites.values():
            site.recorder = Recorder(keeps_attention=True)
        predict(model)
        kept[model] = [site.recorder.attention for site in sites.values()]
    assert graphs() == 2 and not counters["graph_break"]
    torch.testing.assert_close(kept[student], kept[plain], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_copies_are_not_compiled(deep, predict):
    _, student = compiled(deep, "softmax")
    predict(copy.deepcopy(student))
    assert not graphs()
    predict(student)
    assert graphs() == 2


@torch.no_grad()
def test_a_mistake_stays_one_sentence(deep, predict):
    _, student = compiled(deep, "clear", window=3)
    for site in find_backbone(student).sites(student).values():
        site.mixer.backend = "nonsense"
    with pytest.raises(LinearizeError, match=r"^unknown backend 'nonsense', choose one of "):
        predict(student)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_a_local_student_has_no_graph_breaks(gpu_transformer):
    student = gpu_transformer
    linearize(student, "clear", window=5)
    conditioning = {"prompt_embeds": torch.randn(1, 128, 32).cuda(), "pooled_prompt_embeds": torch.randn(1, 24).cuda()}
    # 32 x 40 tokens: whole tiles, as are the text's.
    inputs = (torch.randn(1, 4, 64, 80).cuda(), torch.tensor([0.5]).cuda(), conditioning)
    backbone = find_backbone(student)
    expected = backbone.predict(student, *inputs)
    counters.clear()
    compile_blocks(student, compile_backend("auto", "cuda"))
    found = [backbone.predict(student, *inputs) for _ in range(3)][-1]
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert graphs() == 2 and not counters["graph_break"]


def test_settings():
    assert compile_backend("auto", "cpu") is None
    assert compile_backend("auto", "cuda") == "inductor"
    assert compile_backend(True, "cpu") == "inductor"
    assert compile_backend(False, "cuda") is None
    assert compile_backend("aot_eager", "cpu") == "aot_eager"
    with pytest.raises(LinearizeError, match=r"compile=sometimes is unknown: use auto, true, false or .*inductor"):
        compile_backend("sometimes", "cpu")
