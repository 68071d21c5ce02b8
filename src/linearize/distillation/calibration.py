"""Lets mixers set themselves from one batch of the teacher's attention, and says how far from it they then start."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linearize.distillation.capture import join_outputs
from linearize.distillation.module import DistillationModule, conditioning_of
from linearize.distillation.noise import add_noise, draw_noise


@torch.no_grad()
def calibrate(module: DistillationModule, batch: Mapping[str, Any]) -> dict[str, float]:
    """Calibrates every planned site of the student in the order of the forward pass.

    Each site is given the teacher's own input. Noise and noise levels follow from the module's seed and the samples'
    indices, so that all processes that are given one batch set the same parameters.

    Args:
        module: Teacher and student, before training.
        batch: Samples of one layout, as training is fed with.

    Returns:
        The start error of each site, calibrated and before any step of training: squared error over squared norm of
        the layer's output for the teacher's input.
    """
    names = [name for rule in module.identity["plan"] for name in rule["layers"]]
    teacher_sites, sites = module.backbone.sites(module.teacher), module.backbone.sites(module.student)
    errors: dict[str, float] = {}
    hooks = [
        teacher_sites[name].register_forward_hook(_calibrate_beside(name, sites[name], errors), with_kwargs=True)
        for name in names
    ]
    parameter = next(module.teacher.parameters())
    moved = {key: value.to(parameter.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    keys = [("calibration", module.seed, int(index)) for index in moved["index"]]
    noise, sigma = draw_noise(moved["latents"], keys, module.sigma)
    inputs = (add_noise(moved["latents"].float(), noise, sigma), sigma, conditioning_of(moved))
    try:
        # Compiled blocks would keep the hooks of their first trace.
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.autocast(parameter.device.type, parameter.dtype, enabled=parameter.dtype != torch.float32):
            module.backbone.predict(module.teacher, *inputs)
    finally:
        for hook in hooks:
            hook.remove()
    module.ema.reset()
    return errors


def _calibrate_beside(name: str, site: nn.Module, errors: dict[str, float]) -> Any:
    """A hook on the teacher's site that gives its input to the student's, calibrates its mixer and measures it.

    What calibration set is kept only where it brings the layer nearer to the teacher.
    """

    def calibrate_mixer(mixer: Any, arguments: tuple[Any, ...]) -> None:
        mixer.calibrate(*arguments)

    def hook(teacher_site: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        mixer: Any = site.mixer
        target = join_outputs(output).float()
        before = _relative_error(join_outputs(site(*arguments, **keywords)).float(), target)
        initial = {key: value.clone() for key, value in mixer.state_dict().items()}
        handle = mixer.register_forward_pre_hook(calibrate_mixer)
        try:
            after = _relative_error(join_outputs(site(*arguments, **keywords)).float(), target)
        finally:
            handle.remove()
        if not after <= before:
            mixer.load_state_dict(initial)
        errors[name] = min(before, after)

    return hook


def _relative_error(output: Tensor, target: Tensor) -> float:
    return ((output - target).square().sum() / target.square().sum()).item()
