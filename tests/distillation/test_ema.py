import torch
from torch import nn

from linearize.distillation.ema import ExponentialMovingAverage


def moved(parameter: nn.Parameter, ema: ExponentialMovingAverage, values: list[float]) -> None:
    for value in values:
        parameter.data.fill_(value)
        ema.update()


def test_the_average_follows_its_rule() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    ema = ExponentialMovingAverage({"weight": parameter}, decay=0.3)
    moved(parameter, ema, [1.0, 2.0, 3.0])
    expected = 0.0
    for number, value in enumerate([1.0, 2.0, 3.0], start=1):
        decay = min(0.3, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.average["weight"], torch.full((2, 3), expected))


def test_a_decay_of_zero_keeps_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    ema = ExponentialMovingAverage({"weight": parameter}, decay=0.0)
    moved(parameter, ema, [1.0, 5.0])
    assert ema.state_dict() == {"num_updates": 2, "average": {}}
    with ema.applied():
        assert torch.equal(parameter.detach(), torch.full((3,), 5.0))


def test_applied_puts_the_average_in_place_and_takes_it_away() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    ema = ExponentialMovingAverage({"weight": parameter}, decay=0.9)
    moved(parameter, ema, [1.0, 2.0])
    storage, average = parameter.data_ptr(), ema.average["weight"].clone()
    with ema.applied():
        assert torch.equal(parameter.detach(), average)
        assert parameter.data_ptr() == storage
    assert torch.equal(parameter.detach(), torch.full((3,), 2.0))
    assert torch.equal(ema.average["weight"], average)


def test_state_goes_round() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    ema = ExponentialMovingAverage({"weight": parameter}, decay=0.9)
    moved(parameter, ema, [1.0, 2.0])
    other = ExponentialMovingAverage({"weight": nn.Parameter(torch.full((3,), 2.0))}, decay=0.9)
    other.load_state_dict(ema.state_dict())
    moved(parameter, ema, [4.0])
    moved(other.parameters["weight"], other, [4.0])
    assert torch.equal(ema.average["weight"], other.average["weight"])
