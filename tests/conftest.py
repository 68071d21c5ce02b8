"""Fixtures that every test may use: a tiny random FluxPipeline, on disk once a session and freshly loaded per test."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from linearize.scenes.pipeline import build_flux_pipeline

WORDS = (
    "a an and the of on in left right above below red green blue small large circle square triangle plain background"
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under `-m gpu` imports only files with such tests: the image of a GPU may lack what all others need."""
    if config.getoption("markexpr") != "gpu" or collection_path.suffix != ".py":
        return None
    return "mark.gpu" not in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` on machines that have none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make test-gpu"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower on many threads, and sums in one order are the same in every run."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete random FluxPipeline folder: two double and two single blocks, two heads of 16, guidance embedded."""
    pipeline = build_flux_pipeline(
        WORDS.split(),
        transformer={
            "num_layers": 2,
            "num_single_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": (4, 6, 6),
            "guidance_embeds": True,
        },
        vae={"block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
        text={"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
        clip={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        seed=0,
    )
    folder = tmp_path_factory.mktemp("teachers") / "tiny_flux"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_pipeline(tiny_flux_folder: Path) -> FluxPipeline:
    """The tiny pipeline, loaded anew, so that a test may change it; its progress bar is off."""
    pipeline = FluxPipeline.from_pretrained(tiny_flux_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
