"""The benchmark of attention at tiny sizes: rows, the parity gate, files."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from linearize.benchmark.attention import LayerSizes, attention_rows, check_parity
from linearize.benchmark.parity import PARITY
from linearize.benchmark.runner import benchmark
from linearize.benchmark.visited import VISITED, exact_pairs
from linearize.config import register_resolvers
from linearize.errors import LinearizeError
from linearize.layout import TILE, Grid, Layout
from linearize.ops.backends import BACKENDS, Backend
from linearize.ops.naive import dense_sight, naive_attention
from linearize.ops.regions import REGIONS, Disc

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sizes() -> LayerSizes:
    return LayerSizes(2, 16, 5, 1, torch.float32, torch.device("cpu"), warmup=0, repeats=3)


def test_rows_compare_with_dense_attention_of_the_same_size_and_pass(sizes):
    axes = {
        "sides": [8, 12],
        "windows": [2, 4],
        "backends": ["naive", "halo"],
        "passes": ["forward", "forward_backward"],
    }
    rows = list(attention_rows(sizes, **axes))
    assert len(rows) == 2 * 2 * (1 + 2 * 2)
    dense = {(row["side"], row["pass"]): row["median_seconds"] for row in rows if row["kernel"] == "dense"}
    for row in rows:
        assert 0 < row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"]
        assert row["dense_seconds"] == dense[row["side"], row["pass"]]
        assert row["ratio_to_dense"] == row["dense_seconds"] / row["median_seconds"]
        assert row["graphed"] is False
    visited = {row["kernel"]: row["visited_over_exact"] for row in rows if row["side"] == 12 and row["window"] == 2}
    assert visited["naive"] > visited["halo"] >= 1


@pytest.mark.gpu
def test_both_passes_are_timed_on_a_gpu_by_replaying_their_graph():
    sizes = LayerSizes(2, 64, 128, 1, torch.bfloat16, torch.device("cuda"), warmup=1, repeats=3)
    axes = {"sides": [32], "windows": [4], "backends": ["triton"], "passes": ["forward", "forward_backward"]}
    forward, both = (row for row in attention_rows(sizes, **axes) if row["kernel"] == "triton")
    assert forward["hopper"] == both["hopper"]
    assert not forward["hopper"] or torch.cuda.get_device_capability()[0] == 9
    assert forward["graphed"] and both["graphed"]
    assert 0 < forward["peak_memory_gib"] < both["peak_memory_gib"]


@pytest.mark.parametrize("region", ["neighborhood", "tiles"])
def test_other_regions_are_measured_with_their_own_pairs(sizes, region):
    sizes = dataclasses.replace(sizes, region=region)
    axes = {"sides": [20], "windows": [3], "passes": ["forward"]}
    dense, halo, natten, clear = attention_rows(sizes, backends=["halo", "natten", "clear_raster_flex"], **axes)
    assert (dense["region"], halo["region"]) == (None, region)
    assert halo["median_seconds"] > 0 and halo["visited_over_exact"] >= 1
    layout = Layout(sizes.num_text_tokens, (Grid(20, 20),), tile=TILE)
    sight = int(dense_sight(layout, REGIONS[region](3)).sum())
    pairs = sight + 20 * 20 * 5 + 5 * layout.num_tokens
    operations = 4 * sizes.num_heads * sizes.head_dim * pairs
    assert halo["tflops_exact"] == pytest.approx(operations / halo["median_seconds"] / 1e12)
    reason = "it needs a GPU" if region == "neighborhood" else "it knows the region 'neighborhood' alone"
    assert reason in natten["error"]
    assert clear["error"].endswith(f"not '{region}': set attention.region=disc")


@pytest.mark.gpu
def test_natten_is_measured():
    natten = pytest.importorskip("natten")
    if not natten.HAS_LIBNATTEN:
        pytest.skip("natten is installed without its kernels")
    device = torch.device("cuda")
    sizes = LayerSizes(2, 64, 128, 1, torch.bfloat16, device, warmup=1, repeats=3, region="neighborhood")
    rows = attention_rows(sizes, sides=[32], windows=[4], backends=["natten"], passes=["forward", "forward_backward"])
    assert all(row["median_seconds"] > 0 for row in rows if row["kernel"] == "natten")


def test_tokens_that_memory_does_not_hold_are_rows_that_say_so(sizes):
    sizes = dataclasses.replace(sizes, num_heads=1 << 24)
    (dense,) = attention_rows(sizes, sides=[5000], windows=[], backends=[], passes=["forward"])
    choices = "choose smaller attention.sides, or fewer heads or pictures"
    assert dense["error"] == f"out of memory: it needs more than this machine has; {choices}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_passes_the_parity_gate(sizes, dtype):
    typed = LayerSizes(**{**sizes.__dict__, "dtype": dtype})
    for backend in ("naive", "halo", "auto"):
        assert 0 < check_parity(typed, 6, backend) <= PARITY[dtype]


def test_no_speed_of_a_backend_that_computes_something_else(sizes, monkeypatch):
    def smaller_disc(*states, region, **options):
        return naive_attention(*states, region=Disc(region.window - 1), **options)

    monkeypatch.setitem(BACKENDS, "wrong", Backend(smaller_disc, BACKENDS["naive"].refusal))
    dense, wrong = attention_rows(sizes, sides=[8], windows=[3], backends=["wrong"], passes=["forward"])
    assert "median_seconds" in dense and "median_seconds" not in wrong
    assert re.search(r"backend wrong at window=3 .* no speed of it is reported", wrong["error"])


@pytest.mark.parametrize("window", [3, 16])
@pytest.mark.parametrize("side", [16, 37])
def test_visited_pairs_hold_the_exact_ones(window, side):
    """Counted on the dense mask: blocks of consecutive tokens that hold a pair, whole."""
    layout, region = Layout(128, (Grid(side, side),), tile=TILE), Disc(window)
    exact = exact_pairs(layout, region)
    sight = dense_sight(layout, region)
    assert exact == int(sight.sum()) + side**2 * 128
    blocks = torch.nn.functional.pad(sight, (0, -len(sight) % 128, 0, -len(sight) % 128)).unflatten(0, (-1, 128))
    touched = blocks.any(dim=1).unflatten(1, (-1, 128)).any(dim=2).sum(dim=1)
    sizes = torch.tensor([len(part) for part in torch.arange(len(sight)).split(128)])
    blocks_with_a_pair = int((sizes * (touched + 1) * 128).sum())
    assert VISITED["flex"](layout, region) >= blocks_with_a_pair
    if side % 16 == 0:
        assert VISITED["flex"](layout, region) == blocks_with_a_pair
    raster = layout.with_tile(None)
    assert VISITED["flex"](raster, region) >= exact_pairs(raster, region) == exact
    for backend in ("halo", "triton", "dense"):
        assert VISITED[backend](layout, region) >= exact


def test_a_backend_that_the_machine_lacks_is_a_row_with_the_reason(sizes):
    axes = {"sides": [8], "windows": [3], "passes": ["forward", "forward_backward"]}
    thin = dataclasses.replace(sizes, head_dim=8)
    rows = list(attention_rows(thin, backends=["clear_raster_flex", "halo"], **axes))
    errors = [row.get("error") for row in rows if row["kernel"] == "clear_raster_flex"]
    assert len(errors) == 2 and all("flex" in error for error in errors)
    assert all("median_seconds" in row for row in rows if row["kernel"] == "halo")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"backends": ["tritton", "halo"]}, "attention.backends names 'tritton': choose from auto, naive, dense, "),
        ({"backends": ["clear_raster_flex"]}, "None of attention.backends=[clear_raster_flex] runs here: "),
        ({"region": "circle"}, "attention.region names 'circle': choose from disc, tiles, neighborhood."),
        ({"passes": ["backward"]}, "attention.passes names 'backward': choose from forward, forward_backward."),
    ],
)
def test_nothing_is_measured_for_backends_that_cannot_be_compared(sizes, changed, sentence):
    axes = {"sides": [8], "windows": [3], "backends": ["halo"], "passes": ["forward"], **changed}
    sizes = dataclasses.replace(sizes, head_dim=8, region=axes.pop("region", "disc"))
    with pytest.raises(LinearizeError, match=re.escape(sentence)):
        next(attention_rows(sizes, **axes))


def test_a_run_leaves_json_page_and_plot(tmp_path):
    register_resolvers(ROOT)
    overrides = ["device=cpu", f"out={tmp_path}/layer", "attention.sides=[8,12]", "attention.windows=[3]"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose(
            "benchmark", [*overrides, "attention.repeats=1", "attention.num_heads=2", "attention.head_dim=16"]
        )
    result = benchmark(cfg)
    assert json.loads((tmp_path / "layer.json").read_text()) == json.loads(json.dumps(result))
    assert {"machine", "versions", "commit", "command", "settings", "rows"} <= set(result)
    page = (tmp_path / "layer.md").read_text()
    assert page.count("| halo |") == 4 + 1
    assert "| side | pass | window | dense | halo |" in page and "(1x)" in page
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")
    cfg.extend = True
    cfg.attention.sides, cfg.attention.passes = [12, 5], ["forward"]
    again = benchmark(cfg)["rows"]
    subjects = [[(row["kernel"], row["side"], row["pass"]) for row in rows] for rows in (result["rows"], again)]
    assert subjects[1] == [*subjects[0], ("dense", 5, "forward"), ("halo", 5, "forward")]
    is_new = [row != older for row, older in zip(again, result["rows"], strict=False)]
    assert is_new == [(side, kind) == (12, "forward") for _, side, kind in subjects[0]]
    assert json.loads((tmp_path / "layer.json").read_text())["rows"] == json.loads(json.dumps(again))
    assert "| side | pass |" in (tmp_path / "layer.md").read_text()
    cfg.attention.region, cfg.attention.sides = "tiles", [12]
    tiles = benchmark(cfg)["rows"]
    assert [row["kernel"] for row in tiles[len(again) :]] == ["halo"]
    assert all(row["ratio_to_dense"] == row["dense_seconds"] / row["median_seconds"] for row in tiles)
    page = (tmp_path / "layer.md").read_text()
    assert "| side | pass | region | window |" in page and "| dense ms |" in page
    assert all(f"| 12 | forward | {region} | 3 |" in page for region in ("disc", "tiles"))
    cfg.attention.batch = 2
    assert len(benchmark(cfg)["rows"]) == len(tiles) + 2
    page = (tmp_path / "layer.md").read_text()
    assert "| side | batch | pass |" in page and "| 12 | 2 | forward |" in page and "| 12 | 1 | forward |" in page
    for key, value, sentence in (
        ("attention.head_dim", 32, "rows of head_dim=16"),
        ("attention.num_text_tokens", 0, "rows of num_text_tokens=32"),
        ("dtype", "bfloat16", "another dtype"),
        ("suite", "scans", "another suite"),
    ):
        other = copy.deepcopy(cfg)
        OmegaConf.update(other, key, value)
        with pytest.raises(LinearizeError, match=f"extend=true finds {sentence}"):
            benchmark(other)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("attention.sides=[abc]", "attention.sides='abc'; choose a whole number, 1 or more"),
        ("attention.sides=[]", "attention.sides=[] is no list of numbers: set attention.sides=[<number>]."),
        ("attention.windows=8", "attention.windows=8 is no list of numbers: set attention.windows=[<number>]."),
        ("attention.windows=[8,0]", "attention.windows=0; choose a whole number, 1 or more"),
        ("attention.batch=0", "attention.batch=0; choose a whole number, 1 or more"),
        ("attention.warmup=-1", "attention.warmup=-1; choose a whole number, 0 or more"),
        ("dtype=float8", "dtype names 'float8': choose from auto, float32, bfloat16, float16."),
    ],
)
def test_settings_that_count_are_checked_before_anything_is_measured(tmp_path, override, sentence):
    register_resolvers(ROOT)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("benchmark", [override, "device=cpu", f"out={tmp_path}/layer"])
    with pytest.raises(LinearizeError, match=re.escape(sentence)):
        benchmark(cfg)
    assert not list(tmp_path.iterdir())
