"""The tokenizers know their words, survive everything else, and come back from disk as they were."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.scenes.tokenizers import build_clip_tokenizer, build_t5_tokenizer

# Overlapping words: a merge learnt on one must not break another.
WORDS = ["a", "an", "and", "red", "green", "greener", "reed", "circle", "Left", "of", "square", "in", "inside"]
CLIP, T5 = build_clip_tokenizer(WORDS), build_t5_tokenizer(WORDS)


@pytest.mark.parametrize(("tokenizer", "extra"), [(CLIP, 2), (T5, 1)], ids=["clip", "t5"])
def test_every_word_is_one_token_in_any_case(tokenizer, extra):
    for word in WORDS:
        lower, upper = tokenizer(word.lower()).input_ids, tokenizer(word.upper()).input_ids
        assert lower == upper
        assert len(lower) == 1 + extra
        assert tokenizer.unk_token_id not in lower[:1]
    words_only = tokenizer(" ".join(WORDS)).input_ids
    assert len(words_only) == len(set(words_only)) == len(WORDS) + extra


def test_special_tokens_are_where_the_text_models_expect_them():
    assert (T5.pad_token_id, T5.eos_token_id, T5.unk_token_id, T5.model_max_length) == (0, 1, 2, 512)
    assert T5("red", padding="max_length", max_length=4).input_ids[1:] == [1, 0, 0]
    ids = CLIP("red circle", padding="max_length", max_length=77).input_ids
    assert ids[0] == CLIP.bos_token_id and set(ids[3:]) == {CLIP.eos_token_id} and len(ids) == 77
    assert CLIP.eos_token_id != 2  # CLIPTextModel pools elsewhere for that id


def test_unknown_words():
    assert T5("zebra").input_ids[-2:] == [T5.unk_token_id, T5.eos_token_id]
    spelt = CLIP("zebra").input_ids
    assert len(spelt) == 2 + len("zebra") and CLIP.eos_token_id not in spelt[:-1]


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_no_text_fails(text):
    for tokenizer in (CLIP, T5):
        ids = tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids
        assert len(ids) == 77
        assert max(ids) < len(tokenizer)
        assert tokenizer.eos_token_id in ids


@pytest.mark.parametrize("tokenizer", [CLIP, T5], ids=["clip", "t5"])
def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    text = "A RED circle, left of (an unknown) square."
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.model_max_length == tokenizer.model_max_length
    assert len(again) == len(tokenizer)


def test_clip_pools_at_the_first_end_token(tiny_pipeline):
    tokens = tiny_pipeline.tokenizer(
        ["red circle", "a red circle"], padding="max_length", max_length=77, return_tensors="pt"
    )
    output = tiny_pipeline.text_encoder(tokens.input_ids)
    first_end = tokens.input_ids.eq(tiny_pipeline.tokenizer.eos_token_id).int().argmax(dim=1)
    assert first_end.tolist() == [3, 4]
    torch.testing.assert_close(
        output.pooler_output, output.last_hidden_state[torch.arange(2), first_end], rtol=0, atol=0
    )


def test_the_folder_is_an_ordinary_pipeline(tiny_flux_folder, tiny_pipeline):
    """A process that has imported nothing but diffusers draws the same picture."""
    script = f"""
import sys, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained({str(tiny_flux_folder)!r})
pipe.set_progress_bar_config(disable=True)
image = pipe("a red circle", height=64, width=96, num_inference_steps=2, max_sequence_length=16,
             generator=torch.Generator().manual_seed(0), output_type="pt").images
assert "linearize" not in sys.modules
print(type(pipe).__name__, tuple(image.shape), image.double().sum().item())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    image = tiny_pipeline(
        "a red circle",
        height=64,
        width=96,
        num_inference_steps=2,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert result.stdout.strip() == f"FluxPipeline (1, 3, 64, 96) {image.double().sum().item()}"
    assert "Expected types" not in result.stderr
