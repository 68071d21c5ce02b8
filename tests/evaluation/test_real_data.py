import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from linearize.errors import LinearizeError
from linearize.evaluation.metrics import gaussian_distance
from linearize.evaluation.real_data import (
    RealData,
    captions,
    clip_score,
    kernel_distance,
    load_clip,
    open_real_data,
    real_batches,
    real_data_metrics,
    require_eval_extra,
)
from linearize.scenes.tokenizers import build_clip_tokenizer

CPU = torch.device("cpu")
CAPTIONS = ["a red circle", "a green square", "a blue circle", "a red square", "a green circle"]


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory):
    """Five pictures of different sizes with captions, as an image folder."""
    folder = tmp_path_factory.mktemp("real")
    random = np.random.default_rng(0)
    lines = []
    for index, caption in enumerate(CAPTIONS):
        pixels = random.integers(0, 256, (20 + index, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tiny_clip():
    """A random CLIP of eight channels with a real processor."""
    tokenizer = build_clip_tokenizer(["a", "red", "green", "blue", "circle", "square"])
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8)
    )
    processor = CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer
    )
    return model.eval(), processor


def pooled_features(images):
    """Eight numbers of each uint8 picture: the means of its channels' halves and two more."""
    images = images.float() / 255
    halves = torch.nn.functional.adaptive_avg_pool2d(images, (1, 2)).flatten(1)
    return torch.cat([halves, images.amax((1, 2, 3))[:, None], images.amin((1, 2, 3))[:, None]], 1)


def test_a_folder_of_pictures_gives_captions_and_batches_of_one_size(picture_folder):
    data = RealData(str(picture_folder), max_images=4)
    dataset = open_real_data(data)
    assert captions(dataset, data) == CAPTIONS[:4]
    batches = list(real_batches(dataset, data, height=16, width=24, batch_size=3))
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 16, 24), (1, 3, 16, 24)]
    assert all(batch.dtype == torch.uint8 for batch in batches)


def test_wrong_real_data_is_told_in_one_sentence(picture_folder, tmp_path):
    with pytest.raises(LinearizeError, match=r"real_data=.*missing.*give a folder of pictures"):
        open_real_data(RealData(str(tmp_path / "missing")))
    with pytest.raises(LinearizeError, match=r"no column 'picture'.*image"):
        open_real_data(RealData(str(picture_folder), image_column="picture"))
    with pytest.raises(LinearizeError, match=r"real\.clip_model=.*cannot be loaded"):
        load_clip(str(tmp_path))


@pytest.mark.skipif(
    all(__import__("importlib").util.find_spec(name) for name in ("torchvision", "torch_fidelity")),
    reason="the eval extra is installed",
)
def test_without_the_extra_the_command_that_installs_it_is_named():
    with pytest.raises(LinearizeError, match=r"pip install 'linearize\[eval\]'"):
        require_eval_extra()


def test_kernel_distance_of_one_subset_has_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(6, 3, generator=generator).double(), torch.randn(6, 3, generator=generator).double() + 1

    def kernel(left, right):
        return (left @ right.T / 3 + 1) ** 3

    def within(points):
        gram = kernel(points, points)
        return (gram.sum() - gram.trace()) / (6 * 5)

    expected = within(first) + within(second) - 2 * kernel(first, second).mean()
    found = kernel_distance(first, second)
    assert found["mean"] == pytest.approx(expected.item(), rel=1e-6)
    assert found["std"] == pytest.approx(0, abs=1e-6)


def test_clip_score_is_the_cosine_of_the_model_s_own_features(tiny_clip):
    model, processor = tiny_clip
    images = torch.randint(0, 256, (3, 3, 20, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = CAPTIONS[:3]
    with torch.no_grad():
        inputs = processor(text=prompts, images=list(images), return_tensors="pt", padding=True)
        output = model(**inputs)
    cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
    found = clip_score(tiny_clip, list(images.split(2)), prompts, CPU)
    assert found == pytest.approx(max(0.0, 100 * cosine.mean().item()), abs=1e-3)


def test_all_models_are_measured_on_the_same_real_pictures(picture_folder, tiny_clip):
    data = RealData(str(picture_folder))
    generator = torch.Generator().manual_seed(0)
    teacher = torch.rand(5, 3, 16, 24, generator=generator)
    images = {"teacher": teacher, "student": (teacher + 0.3).clamp(0, 1)}

    def measure():
        batches = real_batches(open_real_data(data), data, 16, 24, batch_size=2)
        return real_data_metrics(
            images, CAPTIONS, batches, features=pooled_features, lpips=None, clip=tiny_clip, device=CPU, batch_size=2
        )

    found = measure()
    real = torch.cat(
        [pooled_features(batch) for batch in real_batches(open_real_data(data), data, 16, 24, batch_size=5)]
    )
    own = pooled_features((teacher * 255).round().to(torch.uint8))
    assert found["teacher"]["fid"] == pytest.approx(gaussian_distance(own, real), rel=1e-6)
    assert found["student"]["fid"] > found["teacher"]["fid"]
    assert found["student"]["lpips_to_teacher"] is None
    assert (found["student"]["n"], found["student"]["n_real"]) == (5, 5)
    assert measure() == found
