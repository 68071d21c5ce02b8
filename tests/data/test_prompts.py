"""All sources of prompts, and their errors."""

import json

import datasets
import pytest

from linearize.data.prompts import GRAMMAR_BLOCK, prompt_source
from linearize.errors import LinearizeError
from linearize.scenes.grammar import parse

PROMPTS = ["a red cat", "a blue dög", "a green bird"]


def test_scene_prompts_of_a_range_do_not_depend_on_how_it_is_cut():
    source = prompt_source({"source": "scenes", "split": "train", "seed": 1})
    stop = 2 * GRAMMAR_BLOCK + 10
    whole = source.prompts(0, stop)
    cut = [prompt for start in range(0, stop, 100) for prompt in source.prompts(start, min(start + 100, stop))]
    assert whole == cut and len(whole) == stop and len(set(whole)) > stop // 2
    assert all(parse(prompt) is not None for prompt in whole[:50])
    assert prompt_source({"source": "scenes", "seed": 2}).prompts(0, 20) != whole[:20]
    held_out = prompt_source({"source": "scenes", "split": "held_out", "seed": 1})
    assert not set(held_out.prompts(0, 200)) & set(whole)


@pytest.fixture
def prompt_files(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:]]) + "\n", encoding="utf-8")
    lines = [json.dumps({"prompt": prompt, "other": 1}) for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    dataset = datasets.Dataset.from_dict({"prompt": PROMPTS, "number": [1, 2, 3]})
    dataset.to_parquet(tmp_path / "prompts.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "name"),
    [("text", "prompts.txt"), ("jsonl", "prompts.jsonl"), ("dataset", "prompts.parquet"), ("dataset", "prompts.jsonl")],
)
def test_listed_prompts_start_over(prompt_files, source, name):
    listed = prompt_source({"source": source, "path": str(prompt_files / name)})
    assert listed.prompts(1, 5) == [PROMPTS[1], PROMPTS[2], PROMPTS[0], PROMPTS[1]]
    assert listed.description["num_prompts"] == 3 and listed.description["origin"] == name


def test_a_changed_file_is_another_source(prompt_files):
    config = {"source": "text", "path": str(prompt_files / "prompts.txt")}
    before = prompt_source(config).description
    (prompt_files / "prompts.txt").write_text("another")
    assert prompt_source(config).description != before


def test_a_folder_of_a_dataset_is_a_source(tmp_path):
    (tmp_path / "train.csv").write_text("text,number\na cat,1\na dog,2\n")
    source = prompt_source({"source": "dataset", "path": str(tmp_path), "key": "text"})
    assert source.prompts(0, 2) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"source": "image"}, r"source=image is unknown: use one of scenes, text, jsonl, dataset"),
        ({"source": "scenes", "split": "test"}, "split=test is unknown"),
        ({"source": "text"}, "needs a file: set prompts.path"),
        ({"source": "dataset"}, "needs a name: set prompts.path"),
        ({"source": "text", "path": "none.txt"}, r"none\.txt cannot be read"),
        ({"source": "text", "path": "empty.txt"}, "holds no prompt"),
        ({"source": "text", "path": "prompts.parquet"}, "is no UTF-8 text"),
        ({"source": "jsonl", "path": "prompts.txt"}, "line 1 is no JSON object with the key 'prompt'"),
        (
            {"source": "jsonl", "path": "prompts.jsonl", "key": "caption"},
            "line 1 is no JSON object with the key 'caption'",
        ),
        ({"source": "jsonl", "path": "prompts.jsonl", "key": "other"}, "holds 1 where a text is expected"),
        ({"source": "dataset", "path": "prompts.parquet", "key": "caption"}, "use one of prompt, number"),
        ({"source": "dataset", "path": "prompts.parquet", "key": "number"}, "holds 1 where a text is expected"),
        ({"source": "dataset", "path": "prompts.parquet", "split": "test"}, "split=test does not load"),
        ({"source": "dataset", "path": "none.parquet"}, "does not load as a dataset"),
        ({"source": "dataset", "path": "prompts.txt.csv"}, "does not load as a dataset|is no column"),
    ],
)
def test_mistakes_are_one_sentence(prompt_files, config, message, monkeypatch):
    (prompt_files / "empty.txt").write_text("\n \n")
    (prompt_files / "prompts.txt.csv").write_text("")
    monkeypatch.chdir(prompt_files)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(LinearizeError, match=message) as caught:
        prompt_source(config)
    assert "\n" not in str(caught.value)
