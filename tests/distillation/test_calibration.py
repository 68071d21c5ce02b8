import pytest
import torch

from linearize.distillation.calibration import calibrate


@pytest.mark.parametrize("mixer", ["linear", "lolcats"])
def test_mixers_set_themselves_from_the_teachers_attention(make_module, batch, mixer):
    module = make_module(mixer)
    before = {name: value.detach().clone() for name, value in module.trained.items()}
    errors = calibrate(module, batch)
    assert list(errors) == [name for rule in module.identity["plan"] for name in rule["layers"]]
    moved = {name for name, value in module.trained.items() if not torch.equal(value, before[name])}
    assert all(name.endswith("log_scale") for name in moved)
    assert moved or mixer != "linear"
    assert all(torch.equal(module.ema.average[name], value.detach().float()) for name, value in module.trained.items())
    again = calibrate(module, batch)
    assert all(again[name] <= error * (1 + 1e-5) for name, error in errors.items())


def test_softmax_starts_at_the_teacher(make_module, batch):
    assert set(calibrate(make_module("softmax"), batch).values()) == {0.0}


def test_start_errors_are_those_of_samples_that_nothing_was_fitted_to(make_module, batch):
    one, other = ({key: value[some] for key, value in batch.items()} for some in (slice(0, 1), slice(1, 2)))
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(make_module("care"))
    fitted, measured = modules
    on_batch, on_others = calibrate(fitted, one), calibrate(measured, one, other)
    assert all(torch.equal(value, fitted.trained[name]) for name, value in measured.trained.items())
    assert list(on_others) == list(on_batch)
    assert sum(on_others.values()) > sum(on_batch.values())
