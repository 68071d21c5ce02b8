import pytest
import torch

from linearize.distillation.losses import AttentionOutput, FlowMatching, Observation, Prediction, Transfer, Variance
from linearize.errors import LinearizeError


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


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_attention_output_is_as_exact_as_its_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 300, 40, generator=generator).to(dtype) for dtype in dtypes)
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    expected = (exact - teacher.double()).square().mean()
    value = AttentionOutput()(
        Observation(torch.zeros(1), teacher_attention={"a": teacher}, student_attention={"a": student})
    )
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-4, atol=0)
    (found,), (gradient,) = torch.autograd.grad(value, [student]), torch.autograd.grad(expected, [exact])
    assert found.dtype == student.dtype
    torch.testing.assert_close(found.double(), gradient, rtol=2**-7, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_transfer_does_not_depend_on_the_scale_of_a_layer(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, error = torch.randn(2, 2, 9, 4, generator=generator)
    calls = {"small": (teacher + error, teacher), "large": (scale * (teacher + error), scale * teacher)}
    value = Transfer()(Observation(torch.zeros(1), transfer=calls))
    torch.testing.assert_close(value, error.square().mean() / teacher.square().mean())


ELEMENTWISE = {
    "squared": lambda x, delta: x**2,
    "absolute": lambda x, delta: x.abs(),
    "huber": lambda x, delta: torch.where(x.abs() <= delta, x**2 / 2, delta * (x.abs() - delta / 2)),
}


@pytest.mark.parametrize("error", list(ELEMENTWISE))
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("delta", [0.3, 1.0])
def test_transfer_is_its_formula(error: str, normalise: bool, delta: float) -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = {
        name: tuple(scale * torch.randn(2, 7, 6, generator=generator, dtype=torch.float64) for _ in range(2))
        for name, scale in (("a", 0.1), ("b", 20.0))
    }
    for student, _ in pairs.values():
        student.requires_grad_()
    expected = []
    for student, teacher in pairs.values():
        r = teacher.square().mean().sqrt() if normalise else 1.0
        expected.append(ELEMENTWISE[error]((student - teacher) / r, delta).mean())
    term = Transfer(error=error, normalise=normalise, delta=delta)
    value = term(Observation(torch.zeros(1), transfer=pairs))
    torch.testing.assert_close(value.double(), sum(expected) / 2, rtol=1e-5, atol=0)
    students = [student for student, _ in pairs.values()]
    for ours, theirs in zip(
        torch.autograd.grad(value, students), torch.autograd.grad(sum(expected) / 2, students), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    other = Transfer(error=error, normalise=normalise, delta=delta, before_projection=True)
    assert torch.equal(other(Observation(torch.zeros(1), transfer_attention=pairs)), value)


@pytest.mark.parametrize("error", list(ELEMENTWISE))
def test_a_layer_that_is_right_has_no_transfer_loss_and_a_gradient(error: str) -> None:
    teacher = torch.zeros(1, 3, 4)
    student = torch.zeros(1, 3, 4, requires_grad=True)
    value = Transfer(error=error)(Observation(torch.zeros(1), transfer={"a": (student, teacher)}))
    value.backward()
    assert value == 0 and student.grad is not None and student.grad.isfinite().all()


def test_wrong_settings_of_a_transfer_loss() -> None:
    with pytest.raises(LinearizeError, match="error=l3 is unknown: use squared, absolute, huber"):
        Transfer(error="l3")
    with pytest.raises(LinearizeError, match="delta=0"):
        Transfer(error="huber", delta=0)


def test_variances_are_compared_where_the_teacher_predicts_one() -> None:
    target, teacher, student = (torch.randn(2, 3, 4, 6, dtype=torch.float64) for _ in range(3))
    seen = Observation(target, teacher_variance=teacher, student_variance=student)
    torch.testing.assert_close(Variance()(seen).double(), (student - teacher).square().mean(), atol=1e-6, rtol=1e-5)
    assert Variance()(Observation(target, teacher_velocity=teacher, student_velocity=student)) == 0


def test_bfloat16_outputs_are_compared_in_float32() -> None:
    teacher = torch.ones(1, 1000, 16, dtype=torch.bfloat16)
    student = teacher + 2**-7
    seen = Observation(torch.zeros(1), teacher_attention={"a": teacher}, student_attention={"a": student})
    value = AttentionOutput()(seen)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(2**-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_output_has_the_gradients_of_its_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    teacher, student = (torch.randn(2, 7, 4).to(dtype) for _ in range(2))
    student.requires_grad_()
    seen = Observation(torch.zeros(1), teacher_attention={"a": teacher}, student_attention={"a": student})
    (found,) = torch.autograd.grad(3 * AttentionOutput()(seen), student)
    expected = 3 * 2 * (student.double() - teacher.double()) / student.numel()
    torch.testing.assert_close(found.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
