"""The benchmark of scans at tiny sizes."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from linearize.benchmark import scans
from linearize.benchmark.runner import benchmark
from linearize.benchmark.scans import OPERATIONS, ScanSizes, check_parity, scan_rows
from linearize.config import register_resolvers
from linearize.errors import LinearizeError

ROOT = Path(__file__).resolve().parents[2]
PORTABLE = [name for name in OPERATIONS if not {"fla", "triton"} & set(name.split("_"))]


@pytest.fixture
def sizes() -> ScanSizes:
    return ScanSizes(2, 8, 1, 3, torch.float32, torch.device("cpu"), warmup=0, repeats=2)


def test_rows_tell_time_operations_and_bytes(sizes):
    rows = list(scan_rows(sizes, sides=[8, 16], kernels=PORTABLE, passes=["forward", "forward_backward"]))
    assert len(rows) == 2 * 2 * len(PORTABLE) == 2 * 2 * 4
    for row in rows:
        assert 0 < row["min_seconds"] <= row["median_seconds"]
        assert 0 < row["parity_error"] < 1e-4
        assert ("tflops_per_second" in row) == (row["pass"] == "forward")
        assert row["window"] == (3 if row["kernel"] == "window_with_complement" else None)


def test_no_speed_of_what_computes_something_else(sizes, monkeypatch):
    wrong = replace(OPERATIONS["heads_chunked"], compute=lambda leaves, *_: leaves.value * 1.1)
    monkeypatch.setitem(scans.OPERATIONS, "heads_chunked", wrong)
    with pytest.raises(LinearizeError, match=r"kernel heads_chunked .* no speed of it is reported"):
        check_parity(sizes, "heads_chunked", "forward")


def test_a_kernel_that_fails_is_a_row_that_says_so(sizes, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such GPU\nand more")

    monkeypatch.setitem(scans.OPERATIONS, "heads_chunked", replace(OPERATIONS["heads_chunked"], compute=fail))
    rows = list(scan_rows(sizes, sides=[8], kernels=["heads_chunked"], passes=["forward"]))
    assert [row["error"] for row in rows] == ["RuntimeError: no such GPU"]


def test_what_memory_does_not_hold_is_a_row_that_says_so(sizes):
    (row,) = scan_rows(sizes, sides=[1 << 21], kernels=["linear_attention"], passes=["forward"])
    assert row["error"].endswith("this machine has; choose smaller scans.sides, or fewer heads or pictures")


def test_unknown_names_tell_the_choices(sizes):
    with pytest.raises(LinearizeError, match=r"scans\.kernels names 'mamba': choose from fla_simple_gla, "):
        next(scan_rows(sizes, sides=[8], kernels=["mamba"], passes=["forward"]))
    with pytest.raises(LinearizeError, match=r"scans\.passes names 'backward': choose from forward, forward_backward"):
        next(scan_rows(sizes, sides=[8], kernels=[], passes=["backward"]))


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="it tells of a missing fla")
def test_a_missing_fla_is_one_sentence(sizes):
    with pytest.raises(LinearizeError, match=r"needs fla, .*linearize\[fla\]"):
        next(scan_rows(sizes, sides=[8], kernels=["heads_by_fla"], passes=["forward"]))


def test_the_suite_runs_from_its_config(tmp_path):
    register_resolvers(ROOT)
    settings = ["sides=[8]", "num_heads=2", "head_dim=8", "repeats=1", "window=3", "passes=[forward]"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose(
            "benchmark", ["suite=scans", "device=cpu", f"out={tmp_path}/scans", *(f"scans.{one}" for one in settings)]
        )
    result = benchmark(cfg)
    assert json.loads((tmp_path / "scans.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "scans.md").read_text().count("| forward |") == 4
