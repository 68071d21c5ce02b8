import pytest
import torch

from linearize.distillation.capture import in_raster_order
from linearize.distillation.losses import AttentionOutput, FlowMatching, Observation, Prediction, Transfer
from linearize.layout import Grid, Layout


def test_velocities_are_compared_with_their_targets() -> None:
    target, teacher, student = (torch.randn(2, 3, 4, 6, dtype=torch.float64) for _ in range(3))
    seen = Observation(target, teacher_velocity=teacher, student_velocity=student)
    torch.testing.assert_close(FlowMatching()(seen).double(), (student - target).square().mean(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(Prediction()(seen).double(), (student - teacher).square().mean(), atol=1e-6, rtol=1e-5)


def test_attention_output_is_a_mean_over_layers() -> None:
    teacher = {"a": torch.zeros(2, 7, 4), "b": torch.zeros(2, 7, 8)}
    student = {"a": torch.full((2, 7, 4), 1.0), "b": torch.full((2, 7, 8), 3.0)}
    seen = Observation(torch.zeros(1), teacher_attention=teacher, student_attention=student)
    assert AttentionOutput()(seen).item() == pytest.approx((1 + 9) / 2)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_transfer_does_not_depend_on_the_scale_of_a_layer(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, error = torch.randn(2, 2, 9, 4, generator=generator)
    calls = {"small": (teacher + error, teacher), "large": (scale * (teacher + error), scale * teacher)}
    value = Transfer()(Observation(torch.zeros(1), transfer=calls))
    torch.testing.assert_close(value, error.square().mean() / teacher.square().mean())


def test_bfloat16_outputs_are_compared_in_float32() -> None:
    teacher = torch.ones(1, 1000, 16, dtype=torch.bfloat16)
    student = teacher + 2**-7
    seen = Observation(torch.zeros(1), teacher_attention={"a": teacher}, student_attention={"a": student})
    value = AttentionOutput()(seen)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(2**-14)


def test_raster_order_is_restored() -> None:
    layout = Layout(3, (Grid(9, 20), Grid(2, 5)))
    tokens = torch.arange(layout.num_tokens, dtype=torch.float64)[None, :, None].expand(2, -1, 4)
    tiled = tokens[:, layout.index_to((8, 16))]
    assert not torch.equal(tiled, tokens)
    assert torch.equal(in_raster_order(tiled, layout.with_tile((8, 16))), tokens)
    assert torch.equal(in_raster_order(tokens, layout), tokens)
