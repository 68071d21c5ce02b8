import io
import json

import pytest
from rich.console import Console

from linearize.errors import LinearizeError
from linearize.evaluation.report import write_reports
from linearize.evaluation.tables import format_value, markdown_table, print_summary


def _numbers(accuracy, error):
    part = {"value": accuracy, "n": 512, "interval": [accuracy - 0.02, accuracy + 0.02]}
    return {
        "scene_accuracy": {**part, "attributes": {"shape": 0.99, "colour": 1.0}, "num_objects": {"1": part, "2": part}},
        "caption_log_probability": -1.25,
        "psnr_to_teacher": 21.5,
        "velocity_error": error,
        "frechet_distance": None,
    }


@pytest.fixture
def summary():
    return {
        "teacher": _numbers(0.9, 0.0),
        "untrained": _numbers(0.3, 0.5),
        "student": _numbers(0.875, 0.0625),
        "attention_flops_ratio": 0.24,
        "train_seconds": 321.0,
        "samples_per_second": 12.5,
        "trainable_parameters": 1234567,
        "teacher_source": {"name": "scenes", "revision": None, "weight_hash": "ab" * 32},
        "versions": {"python": "3.12.1", "torch": "2.13.0", "lightning": None},
        "machine": "1 x NVIDIA H100",
        "command": "python train.py mixer=clear window=8 experiment=scenes_clear",
        "commit": "0123456789ab",
    }


def test_values_read_as_people_write_them():
    assert format_value(None) == "-"
    assert format_value(1234567) == "1,234,567"
    assert format_value(0.0) == "0"
    assert format_value(0.123456) == "0.1235"
    interval = {"value": 0.875, "n": 512, "interval": [0.8434, 0.9009]}
    assert format_value(interval) == "87.5 % [84.3, 90.1] n=512"


def test_markdown_table_is_one():
    assert markdown_table(["", "a"], [["x", "1"]]) == "|  | a |\n| --- | ---: |\n| x | 1 |"


def test_terminal_table_shows_every_number(summary):
    stream = io.StringIO()
    print_summary(summary, Console(file=stream, width=160))
    text = stream.getvalue()
    for part in ("velocity error", "0.0625", "87.5 %", "PSNR", "21.5", "1,234,567", "0.24"):
        assert part in text


def test_pages_stand_beside_their_summaries_with_their_source(run_script, summary, tmp_path):
    (tmp_path / "scenes_clear.json").write_text(json.dumps(summary))
    done = run_script("report.py", tmp_path, str(tmp_path))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "scenes_clear.md").read_text()
    for part in (
        summary["command"],
        "- Commit: 0123456789ab",
        summary["machine"],
        "torch 2.13.0",
        "scenes_clear.json",
        "| 2 objects |",
        "| colour |",
    ):
        assert part in page
    assert "lightning" not in page
    assert "| velocity error ↓ | 0 | 0.5 | 0.0625 |" in page


def test_a_summary_without_judge_makes_a_page_too(summary, tmp_path):
    for model in ("teacher", "untrained", "student"):
        summary[model]["scene_accuracy"] = summary[model]["caption_log_probability"] = None
    (tmp_path / "run.json").write_text(json.dumps(summary))
    (page,) = write_reports(tmp_path)
    assert "| scene accuracy ↑ | - | - | - |" in page.read_text()


def test_folders_without_summaries_and_other_json_are_told(run_script, tmp_path):
    with pytest.raises(LinearizeError, match=r"holds no \*.json summary"):
        write_reports(tmp_path)
    (tmp_path / "other.json").write_text('{"teacher": 1}')
    with pytest.raises(LinearizeError, match=r"other.json is no summary"):
        write_reports(tmp_path)
    done = run_script("report.py", tmp_path, str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: ")
