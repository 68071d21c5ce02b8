"""Which parameters a loss leaves out, as processes that train together have to know."""

from collections.abc import Iterable

from torch import Tensor, nn


def unreached(loss: Tensor, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that a loss does not depend on: those that its graph does not lead to."""
    reached, seen, waiting = set[int](), set[object](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))
            waiting.extend(following for following, _ in node.next_functions)
    return [parameter for parameter in parameters if id(parameter) not in reached]
