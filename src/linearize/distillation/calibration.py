"""Lets mixers set themselves from one batch of the teacher's attention, and says how far from it they then start."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linearize.distillation.capture import join_outputs
from linearize.distillation.module import DistillationModule
from linearize.distillation.noise import add_noise, draw_noise
from linearize.distillation.observing import conditioning_of

# Given a student's site and what tells its error for the teacher's present input, the error to report.
Visit = Callable[[Any, Callable[[], float]], float]


@torch.no_grad()
def calibrate(
    module: DistillationModule, batch: Mapping[str, Any], others: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Calibrates every planned site of the student in the order of the forward pass.

    Each site is given the teacher's own input. Noise and noise levels follow from the module's seed and the samples'
    indices, so that all processes that are given one batch set the same parameters.

    Args:
        module: Teacher and student, before training.
        batch: Samples of one layout, as training is fed with.
        others: Further samples, on which the start errors are measured: mixers that are fitted to a batch are nearer to
            the teacher on it than elsewhere. Without them it is the batch itself.

    Returns:
        The start error of each site, calibrated and before any step of training: squared error over squared norm of
        the layer's output for the teacher's input.
    """
    errors = _errors_beside_teacher(module, batch, _calibrate_site)
    module.ema.reset()
    return errors if others is None else _errors_beside_teacher(module, others, lambda site, error: error())


def _errors_beside_teacher(module: DistillationModule, batch: Mapping[str, Any], visit: Visit) -> dict[str, float]:
    """Runs the teacher on a noisy batch and visits every planned site with the input of the teacher's."""
    names = [name for rule in module.identity["plan"] for name in rule["layers"]]
    teacher_sites, sites = module.backbone.sites(module.teacher), module.backbone.sites(module.student)
    errors: dict[str, float] = {}
    hooks = [
        teacher_sites[name].register_forward_hook(_visit_beside(name, sites[name], visit, errors), with_kwargs=True)
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
    return errors


def _visit_beside(name: str, site: nn.Module, visit: Visit, errors: dict[str, float]) -> Any:
    """A hook on the teacher's site that lets the student's be visited with its input, and keeps the error."""

    def hook(teacher_site: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        target = join_outputs(output).float()
        errors[name] = visit(site, lambda: _relative_error(join_outputs(site(*arguments, **keywords)).float(), target))

    return hook


def _calibrate_site(site: Any, error: Callable[[], float]) -> float:
    """Calibrates a site's mixer on its next call; what that set is kept only where it brings the layer nearer."""

    def calibrate_mixer(mixer: Any, arguments: tuple[Any, ...]) -> None:
        mixer.calibrate(*arguments)

    mixer = site.mixer
    before = error()
    initial = {key: value.clone() for key, value in mixer.state_dict().items()}
    handle = mixer.register_forward_pre_hook(calibrate_mixer)
    try:
        after = error()
    finally:
        handle.remove()
    if not after <= before:
        mixer.load_state_dict(initial)
    return min(before, after)


def _relative_error(output: Tensor, target: Tensor) -> float:
    return ((output - target).square().sum() / target.square().sum()).item()
