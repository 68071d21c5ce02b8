"""Softmax attention within a square that is shifted inward at the borders."""

from linearize.mixers._local import LocalMixer


class NeighborhoodMixer(LocalMixer):
    """NATTEN: "Neighborhood Attention Transformer", Hassani et al., arXiv 2204.07143, section 3.1.

    An image token sees the square of 2 window - 1 tokens a side around it. At the borders the square is shifted inward
    and not cut, so that every token sees as many.

    Args:
        shape: Sizes of the layer.
        window: Radius in tokens; the square is the smallest that holds CLEAR's disc of that radius.
    """

    region = "neighborhood"
