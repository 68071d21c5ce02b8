"""Which parameters a loss leaves out: by its graph, not by gradients, which may be zeros."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from linearize.distillation.unreached import unreached


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_parameter_is_left_out_by_the_graph_and_not_by_a_gradient_of_zeros(recomputes):
    """As at LoRA's first step, where one factor is zero and the gradient of the other is."""
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    nn.init.zeros_(layers[1].weight)
    states = torch.randn(5, 3, requires_grad=True)
    for layer in layers[:2]:
        states = checkpoint(layer, states, use_reentrant=False) if recomputes else layer(states)
    loss = states.square().sum()
    assert [id(one) for one in unreached(loss, layers.parameters())] == [id(one) for one in layers[2:].parameters()]
    loss.backward()
    assert (layers[0].weight.grad == 0).all()


def test_a_constant_reaches_nothing():
    parameters = list(nn.Linear(2, 2).parameters())
    assert unreached(torch.zeros(()), parameters) == parameters
