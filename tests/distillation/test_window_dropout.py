"""Windows that are left out in training steps, and nowhere else."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distillation.conftest import MakeModule
from linearize.distillation.losses import Prediction
from linearize.distillation.module import DistillationModule
from linearize.distillation.noise import Uniform, draw_noise
from linearize.distillation.window_dropout import WindowDropout
from linearize.errors import LinearizeError
from linearize.train import train
from runs import compose_train, tiny_overrides
from test_train import BARE, cli, last


def branches_of(module: DistillationModule) -> list[str]:
    return [site.mixer.branches for site in module.backbone.sites(module.student).values()]


class Recorder(lightning.Callback):
    """Branches of every layer in the forward pass of each micro step, and outside of them."""

    def __init__(self) -> None:
        self.within: list[list[str]] = []
        self.outside: list[list[str]] = []

    def on_before_backward(self, trainer: lightning.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.within.append(branches_of(pl_module))

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *unused: Any) -> None:
        self.outside.append(branches_of(pl_module))

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.outside.append(branches_of(pl_module))


def branches_of_a_run(
    make_module: MakeModule,
    batch: dict[str, Any],
    dropout: WindowDropout,
    num_steps: int = 6,
    first_step: int = 0,
    seed: int = 0,
) -> list[list[str]]:
    module = make_module(
        "lolcats", terms={"prediction": Prediction()}, window=2, options={"window_dropout": dropout, "seed": seed}
    )
    recorder = Recorder()
    trainer = lightning.Trainer(
        max_steps=num_steps,
        accelerator="cpu",
        accumulate_grad_batches=2,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if first_step:
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = first_step
    loader = torch.utils.data.DataLoader([batch] * 20, batch_size=None)
    trainer.fit(module, loader, torch.utils.data.DataLoader([batch], batch_size=None))
    assert {name for one in recorder.outside for name in one} == {"both"} and len(recorder.outside) > num_steps
    return recorder.within


def test_windows_are_left_out_by_seed_step_and_layer(make_module: MakeModule, batch: dict[str, Any]) -> None:
    dropout = WindowDropout(0.5)
    whole = branches_of_a_run(make_module, batch, dropout)
    assert len(whole) == 12 and whole[::2] == whole[1::2]
    assert len({tuple(one) for one in whole}) > 2
    assert all(set(one) <= {"both", "linear"} for one in whole)
    assert branches_of_a_run(make_module, batch, dropout, first_step=4) == whole[8:]
    assert branches_of_a_run(make_module, batch, dropout, num_steps=3, seed=1) != whole[:6]


def test_all_or_no_windows(make_module: MakeModule, batch: dict[str, Any]) -> None:
    schedule = branches_of_a_run(make_module, batch, WindowDropout(1.0, 0.0), num_steps=1)
    assert schedule == [["linear"] * 4] * 2
    assert branches_of_a_run(make_module, batch, WindowDropout(), num_steps=1) == [["both"] * 4] * 2


@given(st.floats(0, 1), st.floats(0, 1), st.integers(2, 1000))
def test_the_share_moves_on_a_line(first: float, last: float, num_steps: int) -> None:
    dropout = WindowDropout(first, last)
    shares = [dropout.at(step, num_steps) for step in (0, num_steps // 2, num_steps - 1, num_steps + 5)]
    middle = first + (last - first) * (num_steps // 2) / (num_steps - 1)
    assert shares == pytest.approx([first, middle, last, last])
    assert WindowDropout(first).at(num_steps // 2, num_steps) == first


def test_windows_are_left_out_as_often_as_asked() -> None:
    dropout = WindowDropout(0.2, 0.6)
    drawn = [
        dropout.is_dropped(layer, seed=0, step=step, num_steps=1000)
        for step in range(1000)
        for layer in ("a", "b", "c")
    ]
    assert sum(drawn[:600]) / 600 == pytest.approx(0.24, abs=0.05)
    assert sum(drawn[-600:]) / 600 == pytest.approx(0.56, abs=0.05)


@pytest.mark.parametrize("mixer", ["lolcats", "liger", "lizard", "lawcat", "sla"])
def test_a_layer_without_its_window_is_its_linear_branch(
    make_module: MakeModule, batch: dict[str, Any], mixer: str
) -> None:
    """The same parameters under `branches=linear` give the same loss; recomputed blocks give the same gradients."""
    knobs: dict[str, Any] = {"block_size": 2} if mixer == "sla" else {"window": 2}
    terms = {"prediction": Prediction()}
    options = {"window_dropout": WindowDropout(1.0)}
    dropped = make_module(mixer, terms=terms, options=options, **knobs)
    linear = make_module(mixer, terms=terms, branches="linear", **knobs)
    with torch.no_grad():
        for name, parameter in linear.trained.items():
            parameter.copy_(dropped.trained[name])
    noise, sigma = draw_noise(batch["latents"], [(0,), (1,)], Uniform())
    dropped.train().student.enable_gradient_checkpointing()
    values = []
    dropped._windows.drop(seed=0, step=0, num_steps=1)
    for module in (dropped, linear):
        value = module.observer.compute_terms(terms, batch, noise, sigma)["prediction"]
        value.backward()
        values.append(value.detach())
    torch.testing.assert_close(*values)
    for name, parameter in linear.trained.items():
        torch.testing.assert_close(dropped.trained[name].grad, parameter.grad, atol=1e-7, rtol=1e-4, msg=name)
    dropped._windows.restore()
    assert not torch.equal(dropped.observer.compute_terms(terms, batch, noise, sigma)["prediction"].detach(), values[0])


def test_mistakes(make_module: MakeModule) -> None:
    with pytest.raises(LinearizeError, match="finds no mixer with a window and a linear branch"):
        make_module("clear", window=2, options={"window_dropout": WindowDropout(0.5)})
    with pytest.raises(LinearizeError, match=r"window_dropout\.final_probability=1\.5 is no probability"):
        WindowDropout(0.5, 1.5)
    for value in ("half", None, True, float("nan")):
        with pytest.raises(
            LinearizeError, match=f"window_dropout.probability={value} is no probability: give a number"
        ):
            WindowDropout(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "recipe",
    [
        ("mixer=lizard", "loss=lizard", "window_dropout.probability=0.5"),
        ("stages.transfer=1", "transfer_loss.transfer.layers=[transformer_blocks.1.attn]"),
    ],
    ids=["windows_and_output_projections", "layers"],
)
def test_two_processes_train_on_what_a_step_leaves(
    tiny_flux_folder: Path, tmp_path: Path, recipe: tuple[str, ...]
) -> None:
    """What has no gradient keeps no process waiting."""
    overrides = [
        *(*tiny_overrides(tiny_flux_folder, tmp_path / "cache"), *BARE),
        *(*recipe, "optimizer=sgd", "+optimizer.weight_decay=0.1", "trainer.max_steps=2"),
        # The normaliser is that of a process's own share of the batch.
        "transfer_loss.transfer.normalise=false",
    ]
    train(compose_train(*overrides, run_dir=tmp_path / "one"))
    devices = ("trainer.devices=2", "trainer.strategy=ddp")
    with cli(*overrides, *devices, run_dir=tmp_path / "two") as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    one, two = last(tmp_path / "one")["state_dict"], last(tmp_path / "two")["state_dict"]
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-6, rtol=1e-5, msg=name)
