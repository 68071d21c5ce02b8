"""Muon for the hidden matrices and AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer with one learning rate for both rules.

    Muon (Jordan et al., 2024) orthogonalises the momentum of matrices; its step is scaled to AdamW's root mean square
    (Liu et al., 2025, "Muon is scalable for LLM training"), so that both take the same learning rate.

    Args:
        matrices: Two-dimensional hidden weights, for Muon.
        others: Embeddings, input and output layers, biases, norms, for AdamW.
        lr: Learning rate of both.
        weight_decay: Decoupled weight decay of the matrices.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.01
    ) -> None:
        matrices, others = list(matrices), list(others)
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        super().__init__([*matrices, *others], {"lr": lr})
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Both rules, once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores both states."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]


def muon_adamw(module: nn.Module, lr: float, weight_decay: float = 0.01) -> MuonAdamW:
    """Gives Muon the matrices inside the blocks of a transformer or text encoder, AdamW the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        hidden = parameter.ndim == 2 and any(part.isdigit() for part in name.split(".")) and "relative" not in name
        (matrices if hidden else others).append(parameter)
    return MuonAdamW(matrices, others, lr, weight_decay)
