"""Moments of one byte, and the optimizer's step within the backward pass."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distillation.conftest import MakeModule
from linearize.distillation.adamw8bit import AdamW8bit, dynamic_codes
from linearize.distillation.in_backward import StepInBackward
from linearize.errors import LinearizeError
from linearize.train import train
from runs import assert_same_training, compose_train, last, tiny_overrides

BARE = ("evaluate=false", "export=null", "logger=none")


def regression(make, steps: int = 60, in_backward: bool = False) -> tuple[list[float], nn.Module]:
    """Losses of a small regression on fixed data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 64))
    inputs, targets = torch.randn(256, 48), torch.randn(256, 64)
    optimizer = make(model.parameters())
    if in_backward:
        StepInBackward(optimizer, model.parameters())
    losses = []
    for _ in range(steps):
        loss = (model(inputs) - targets).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, model


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_eight_bits_train_as_thirty_two(weight_decay: float) -> None:
    plain, _ = regression(partial(torch.optim.AdamW, lr=3e-3, weight_decay=weight_decay))
    eight, _ = regression(partial(AdamW8bit, lr=3e-3, weight_decay=weight_decay))
    assert plain[-1] < 0.8 * plain[0]
    assert eight[-1] == pytest.approx(plain[-1], rel=0.02)
    assert eight[1:] != plain[1:]


def test_small_tensors_are_stepped_as_adamw_steps_them() -> None:
    first, second = nn.Parameter(torch.ones(7, 3)), nn.Parameter(torch.ones(7, 3))
    one, two = AdamW8bit([first], lr=0.1, weight_decay=0.1), torch.optim.AdamW([second], lr=0.1, weight_decay=0.1)
    for number in range(5):
        for parameter, optimizer in ((first, one), (second, two)):
            parameter.grad = torch.linspace(-1, 1, 21).view(7, 3) * (number - 1.5)
            optimizer.step()
    torch.testing.assert_close(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_steps_as_a_cpu_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(96, 128), (77, 100), (64,)]  # whole blocks, a part of one, too small for codes
    start = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    gradients = [[torch.randn(size, generator=generator).to(dtype) for size in sizes] for _ in range(4)]
    results = []
    for device in ("cpu", "cuda"):
        parameters = [nn.Parameter(value.to(device, copy=True)) for value in start]
        optimizer = AdamW8bit(parameters, lr=0.1, weight_decay=0.1)
        StepInBackward(optimizer, parameters)
        for step, each in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            sum((value * slope.to(device)).sum() for value, slope in zip(parameters, each, strict=True)).backward()
        results.append([parameter.detach().cpu() for parameter in parameters])
    for found, expected, before in zip(*reversed(results), start, strict=True):
        assert not torch.equal(expected, before)
        # Where a share lies between two codes, the last bit decides.
        assert torch.isclose(found, expected, rtol=torch.finfo(dtype).eps * 8, atol=1e-6).float().mean() > 0.999
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_sorted_and_fine(signed: bool) -> None:
    codes = dynamic_codes(signed)
    assert len(codes) == len(codes.unique()) == 256 and 0 in codes and codes.max() == 1
    assert torch.equal(codes, codes.sort().values)
    large = torch.rand(1000) * 0.9 + 0.1
    nearest = (large[:, None] - codes).abs().min(dim=1).values
    assert (nearest / large).max() < (0.08 if signed else 0.04)


def test_the_bytes_of_moments_are_known_before_the_first_step(make_module: MakeModule) -> None:
    sizes = [(100, 77), (64, 64), (7, 3), (4095,)]
    parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer = AdamW8bit(parameters)
    expected = optimizer.moment_bytes()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert sum(value.nbytes for value in states) == expected
    module = make_module("clear", window=2)
    module.make_optimizer = AdamW8bit
    module.build_optimizer()
    gradients = sum(value.nbytes for value in module.trained.values())
    assert module.activations.pending_bytes() == gradients + module._optimizer.moment_bytes()


def test_moments_take_a_byte_a_number_and_survive_a_state_dict() -> None:
    torch.manual_seed(1)
    shape, lr = (100, 77), 1e-2  # no multiple of a block
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = AdamW8bit([parameter], lr=lr)
    gradients = [torch.randn(shape) * 10.0**-number for number in range(4)]

    def step(optimizer: AdamW8bit, parameter: nn.Parameter, gradient: Tensor) -> None:
        parameter.grad = gradient
        optimizer.step()

    for gradient in gradients[:2]:
        step(optimizer, parameter, gradient)
    size = sum(value.nbytes for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
    assert size < 2.1 * parameter.numel()
    copied = nn.Parameter(parameter.detach().clone())
    other = AdamW8bit([copied], lr=1.0)
    other.load_state_dict(optimizer.state_dict())
    for gradient in gradients[2:]:
        step(optimizer, parameter, gradient)
        step(other, copied, gradient)
    assert torch.equal(parameter, copied) and parameter.isfinite().all()


@pytest.mark.parametrize("make", [torch.optim.AdamW, AdamW8bit, partial(torch.optim.SGD, momentum=0.9)])
def test_a_step_in_the_backward_pass_is_the_step_after_it(make) -> None:
    after, model = regression(partial(make, lr=1e-3), steps=5)
    within, other = regression(partial(make, lr=1e-3), steps=5, in_backward=True)
    assert within == after
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(value.grad is None for value in other.parameters())


def test_a_run_in_small_memory_goes_on_where_it_stopped(tiny_flux_folder: Path, tmp_path: Path) -> None:
    overrides = [*tiny_overrides(tiny_flux_folder, tmp_path / "cache"), *BARE, "experiment=small_memory"]
    train(compose_train(*overrides, run_dir=tmp_path / "whole"))
    stop = ("+callbacks.stop._target_=runs.InterruptAt", "+callbacks.stop.step=2")
    with pytest.raises(KeyboardInterrupt):
        train(compose_train(*overrides, *stop, run_dir=tmp_path / "halves"))
    assert last(tmp_path / "halves")["linearize"]["ema"]["average"] == {}
    train(compose_train(*overrides, "resume=last", run_dir=tmp_path / "halves"))
    assert_same_training(tmp_path / "whole", tmp_path / "halves")
    with pytest.raises(LinearizeError, match="holds no average, as it was trained with ema_decay=0"):
        train(compose_train(*overrides, f"resume={tmp_path / 'whole'}", "ema_decay=0.9", run_dir=tmp_path / "other"))


@pytest.mark.parametrize("setting", ["trainer.gradient_clip_val=1.0", "trainer.accumulate_grad_batches=2"])
def test_what_needs_all_gradients_is_refused(tiny_flux_folder: Path, tmp_path: Path, setting: str) -> None:
    overrides = [*tiny_overrides(tiny_flux_folder, tmp_path / "cache"), *BARE, "experiment=small_memory", setting]
    name, _, _ = setting.partition("=")
    with pytest.raises(LinearizeError, match=f"optimizer_in_backward=true never has all gradients .* set {name}="):
        train(compose_train(*overrides, run_dir=tmp_path / "run"))
