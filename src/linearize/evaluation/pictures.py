"""Pictures side by side, with titles above and captions below."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from linearize.files import write_bytes

_MARGIN = 16
_INK = (32, 33, 36)
_PAPER = (255, 255, 255)
# Pictures are at least this wide in a grid, so that small ones and their captions can be read.
_MIN_SIDE = 256
# Small differences would be black in true brightness.
_DIFFERENCE_GAIN = 4


def to_pil(image: Tensor) -> Image.Image:
    """A picture [3, height, width] in [0, 1] as an 8-bit PIL image."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_png(image: Image.Image, path: str | Path) -> None:
    """Writes a whole PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def comparison_grid(
    columns: Mapping[str, Tensor], captions: Sequence[str], difference: tuple[str, str] | None = ("teacher", "student")
) -> Image.Image:
    """Lays pictures out: one titled column a model, one row a prompt, the prompt under its row.

    Args:
        columns: Pictures [rows, 3, height, width] in [0, 1] by title.
        captions: One per row.
        difference: Two titles whose absolute difference, four times as bright, becomes a last column; None for none.

    Raises:
        ValueError: a column has another number of pictures than there are captions.
    """
    shown = {title: images.detach().float().cpu() for title, images in columns.items()}
    if difference is not None:
        first, second = difference
        shown[f"difference x {_DIFFERENCE_GAIN}"] = _DIFFERENCE_GAIN * (shown[second] - shown[first]).abs()
    wrong = [title for title, images in shown.items() if len(images) != len(captions)]
    if wrong:
        raise ValueError(f"columns {wrong} do not have one picture for each of the {len(captions)} captions")
    return _draw(shown, captions)


def _draw(columns: Mapping[str, Tensor], captions: Sequence[str]) -> Image.Image:
    width, height = _display_size(next(iter(columns.values())))
    title_font, caption_font = ImageFont.load_default(20), ImageFont.load_default(16)
    total_width = _MARGIN + len(columns) * (width + _MARGIN)
    per_line = max(1, int((total_width - 2 * _MARGIN) / caption_font.getlength("n")))
    wrapped = [textwrap.wrap(caption, per_line) or [""] for caption in captions]
    line_height, title_height = 22, 28
    row_heights = [height + line_height * len(lines) + _MARGIN for lines in wrapped]
    canvas = Image.new("RGB", (total_width, _MARGIN + title_height + sum(row_heights)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    top = _MARGIN + title_height
    for row, lines in enumerate(wrapped):
        for column, (title, images) in enumerate(columns.items()):
            left = _MARGIN + column * (width + _MARGIN)
            if row == 0:
                draw.text((left + width / 2, _MARGIN), title, _INK, title_font, anchor="ma")
            picture = to_pil(images[row])
            canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
            draw.rectangle((left - 1, top - 1, left + width, top + height), outline=(200, 200, 200))
        for index, line in enumerate(lines):
            draw.text((_MARGIN, top + height + 5 + index * line_height), line, _INK, caption_font)
        top += row_heights[row]
    return canvas


def _display_size(images: Tensor) -> tuple[int, int]:
    """Width and height of a picture in the grid: its own, or a whole multiple of it where that is small."""
    height, width = images.shape[-2:]
    factor = max(1, -(-_MIN_SIDE // width))
    return width * factor, height * factor
