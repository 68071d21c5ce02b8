"""Stores of random tensors, for what needs no teacher."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from linearize.data.shards import write_shard
from linearize.files import write_json

StoreMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> StoreMaker:
    """A function that writes a store with samples of several picture sizes, drawn at random."""

    def make(
        num_samples: int, *, shard_size: int = 7, sizes: int = 1, start: int = 0, weight_hash: str = "a" * 64
    ) -> Path:
        folder = tmp_path_factory.mktemp("store")
        generator = torch.Generator().manual_seed(num_samples)
        write_json(folder / "store.json", {"format": 1, "teacher": "random", "weight_hash": weight_hash})
        for first in range(start, start + num_samples, shard_size):
            rows, latents, embeddings = [], [], []
            for index in range(first, min(first + shard_size, start + num_samples)):
                size = 2 + int(torch.randint(sizes, (), generator=generator))
                rows.append(
                    {
                        "index": index,
                        "prompt": f"prompt {index}",
                        "seed": index,
                        "guidance": 3.5,
                        "height": 8 * size,
                        "width": 24,
                        "num_inference_steps": 2,
                        "max_sequence_length": 4,
                        "teacher": "random",
                        "revision": None,
                        "weight_hash": weight_hash,
                    }
                )
                latents.append(torch.randn(4, size, 3, generator=generator))
                embeddings.append(torch.randn(4, 8, generator=generator))
            tensors = {
                "latents": latents,
                "prompt_embeds": embeddings,
                "pooled_prompt_embeds": [e[0] for e in embeddings],
            }
            write_shard(folder, rows, tensors, "bfloat16")
        return folder

    return make


@pytest.fixture(scope="session")
def small_store(make_store: StoreMaker) -> Path:
    """Thirty samples of one size."""
    return make_store(30)
