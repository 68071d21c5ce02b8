from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from linearize.distillation.losses import AttentionOutput, FlowMatching, LossTerm, Prediction, Transfer
from linearize.distillation.module import DistillationModule
from linearize.distillation.stages import Stage
from linearize.surgery import share_student

MakeModule = Callable[..., DistillationModule]


def all_terms() -> dict[str, LossTerm]:
    return {
        "flow_matching": FlowMatching(),
        "prediction": Prediction(),
        "attention_output": AttentionOutput(),
        "transfer": Transfer(),
    }


@pytest.fixture
def make_module(tiny_flux_folder: Path) -> MakeModule:
    """Builds a module around the tiny transformer: `make_module(mixer="clear", window=2, terms=..., **arguments)`."""

    def make(
        mixer: str = "clear",
        layers: str = "*",
        terms: Mapping[str, LossTerm] | None = None,
        options: Mapping[str, Any] | None = None,
        **mixer_arguments: Any,
    ) -> DistillationModule:
        teacher = FluxTransformer2DModel.from_pretrained(tiny_flux_folder, subfolder="transformer")
        student = share_student(teacher, [{"layers": layers, "mixer": mixer, **mixer_arguments}])
        return DistillationModule(
            teacher,
            student,
            stages=[Stage("distill", terms or all_terms(), 10)],
            optimizer=partial(torch.optim.AdamW, lr=1e-3),
            **(options or {}),
        )

    return make


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two samples of 6 x 10 tokens with five text tokens."""
    generator = torch.Generator().manual_seed(3)
    return {
        "latents": torch.randn(2, 4, 12, 20, generator=generator),
        "prompt_embeds": torch.randn(2, 5, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(2, 32, generator=generator),
        "guidance": torch.tensor([3.5, 1.0]),
        "prompt": ["one", "two"],
        "index": torch.tensor([4, 7]),
    }
