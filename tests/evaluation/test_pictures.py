import io

import numpy as np
import pytest
import torch
from PIL import Image

from linearize.evaluation.pictures import comparison_grid, save_png, to_pil


def _columns(height, width, rows=2):
    teacher = torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(0))
    return {"teacher": teacher, "student": (teacher + 0.1).clamp(0, 1)}


def test_grid_holds_every_picture_whole_and_the_difference_last():
    columns = _columns(256, 320)
    grid = comparison_grid(columns, ["first", "second"])
    # Three columns of 320 and four margins of 16; a title line and two rows with one line of caption each.
    assert grid.size == (16 + 3 * (320 + 16), 16 + 28 + 2 * (256 + 22 + 16))
    pixels = np.asarray(grid)
    tops = [44, 44 + 256 + 22 + 16]
    for row, top in enumerate(tops):
        for column, images in enumerate(columns.values()):
            left = 16 + column * 336
            assert np.array_equal(pixels[top : top + 256, left : left + 320], np.asarray(to_pil(images[row])))
    difference = (4 * (columns["student"] - columns["teacher"])).clamp(0, 1)
    shown = pixels[tops[1] : tops[1] + 256, 16 + 2 * 336 : 16 + 2 * 336 + 320]
    assert np.array_equal(shown, np.asarray(to_pil(difference[1])))


def test_titles_and_captions_are_drawn():
    columns = _columns(256, 256, rows=1)
    with_text = np.asarray(comparison_grid(columns, ["a red circle"]))
    without = np.asarray(comparison_grid(columns, [""]))
    below = slice(44 + 256 + 2, None)
    assert (with_text[below] < 128).any() and not (without[below] < 128).any()
    assert (with_text[:42] < 128).any()


def test_small_pictures_are_enlarged_and_long_captions_wrapped():
    grid = comparison_grid(_columns(40, 64, rows=1), ["a long caption " * 20], difference=None)
    assert grid.width == 16 + 2 * (256 + 16)
    one_line = comparison_grid(_columns(40, 64, rows=1), ["a short caption"], difference=None)
    assert (grid.height - one_line.height) % 22 == 0 and grid.height > one_line.height


def test_grid_without_a_picture_for_each_caption_is_refused():
    with pytest.raises(ValueError, match="one picture for each of the 3 captions"):
        comparison_grid(_columns(32, 48), ["a", "b", "c"])


def test_png_is_whole_and_lossless(tmp_path):
    image = comparison_grid(_columns(32, 48), ["a", "b"])
    save_png(image, tmp_path / "new" / "samples.png")
    read = Image.open(io.BytesIO((tmp_path / "new" / "samples.png").read_bytes()))
    assert np.array_equal(np.asarray(read), np.asarray(image))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["samples.png"]
