"""Softmax attention within whole tiles: all those that a window touches."""

from linearize.mixers._local import LocalMixer


class TileWindowMixer(LocalMixer):
    """Every token of a 16 x 8 tile sees all tiles that the disc of some token of the tile touches.

    The smallest region of whole tiles that holds CLEAR's disc of radius `window`: nothing inside is masked, so a kernel
    that visits tiles wastes none of its work. Compare Sliding Tile Attention, Zhang et al., arXiv 2502.04507.

    Args:
        shape: Sizes of the layer.
        window: Radius of the disc that the tiles hold, in tokens.
    """

    region = "tiles"
