from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from diffusers import FluxTransformer2DModel

from linearize.adapters import LoraSettings
from linearize.distillation.losses import AttentionOutput, FlowMatching, LossTerm, Prediction, Transfer
from linearize.distillation.module import DistillationModule
from linearize.distillation.stages import Stage
from linearize.surgery import share_student

MakeModule = Callable[..., DistillationModule]


def fit(module: DistillationModule, batch: dict[str, Any], num_steps: int, *callbacks: lightning.Callback) -> None:
    """Trains for a few steps on one batch, with two micro steps each."""
    trainer = lightning.Trainer(
        max_steps=num_steps,
        accelerator="cpu",
        accumulate_grad_batches=2,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader([batch] * (2 * num_steps), batch_size=None))


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
        stages: Sequence[Stage] | None = None,
        adapter: LoraSettings | None = None,
        **mixer_arguments: Any,
    ) -> DistillationModule:
        teacher = FluxTransformer2DModel.from_pretrained(tiny_flux_folder, subfolder="transformer")
        student = share_student(teacher, [{"layers": layers, "mixer": mixer, **mixer_arguments}], adapter)
        return DistillationModule(
            teacher,
            student,
            stages=stages or [Stage("distill", terms or all_terms(), 10)],
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
