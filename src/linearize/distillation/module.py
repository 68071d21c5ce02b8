"""The LightningModule that distils a teacher into a student which shares its frozen tensors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning
import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from linearize.backbones import Backbone, find_backbone
from linearize.compilation import compile_blocks
from linearize.distillation.activations import ActivationBudget
from linearize.distillation.adamw8bit import AdamW8bit
from linearize.distillation.ema import ExponentialMovingAverage
from linearize.distillation.in_backward import StepInBackward
from linearize.distillation.noise import SigmaSampler, Uniform, add_noise, draw_noise, even_sigma
from linearize.distillation.observing import Observer, conditioning_of
from linearize.distillation.resume import (
    check_checkpoint,
    restore_rates,
    restore_rng,
    rng_state,
    student_state,
    tell_changed_schedule,
)
from linearize.distillation.schedules import constant
from linearize.distillation.stages import Stage, stage_at
from linearize.distillation.unreached import unreached
from linearize.distillation.window_dropout import WindowDropout, WindowSwitch
from linearize.errors import LinearizeError
from linearize.evaluation.metrics import relative_velocity_error
from linearize.surgery import is_mixer_parameter, share_student, trained_parameters


class DistillationModule(lightning.LightningModule):
    """Trains a student's mixers and attention projections against a frozen teacher.

    The teacher runs as a student with softmax in every site, which shares each of its parameters with the stock
    transformer, so that both are looked into in the same way, and tokens travel through both in one order. Where that
    is raster order, the teacher computes the stock bits.

    Args:
        teacher: The teacher's stock transformer, frozen.
        student: What `share_student(teacher, plan)` returned: what trains is float32, the rest the teacher's own.
        stages: One or more stages, run one after another; optimizer state, schedule and average start anew in each.
        optimizer: Makes the optimizer from a list of parameters.
        schedule: Learning-rate factor of (steps done in the stage, steps of the stage).
        sigma: Distribution of noise levels.
        seed: Seed of noise and noise levels.
        window_dropout: How often hybrid mixers train without their windows; never by default.
        ema_decay: Decay of the average of what trains; 0 evaluates and exports the plain weights.
        activation_memory_gib: What the student's blocks may keep for the backward pass; beyond it the first of them
            compute again. None takes what is free on the GPU, and keeps everything on a CPU.
        optimizer_in_backward: Steps each parameter as soon as its gradient is there, see `StepInBackward`.
        compile_backend: Backend for torch.compile of the blocks ("inductor"); None runs them eagerly.
        identity: What a checkpoint must agree with to be resumed, by name, for example the teacher's weight hash. JSON.
    """

    def __init__(
        self,
        teacher: ModelMixin,
        student: ModelMixin,
        *,
        stages: Sequence[Stage],
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        schedule: Callable[[int, int], float] = constant,
        sigma: SigmaSampler | None = None,
        seed: int = 0,
        window_dropout: WindowDropout | None = None,
        ema_decay: float = 0.999,
        activation_memory_gib: float | None = None,
        optimizer_in_backward: bool = False,
        compile_backend: str | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # A checkpoint holds what trains and nothing else; resume.py checks that it holds all of that.
        self.strict_loading = False
        self.backbone: Backbone = find_backbone(student)
        self.teacher = share_student(teacher, []).eval()
        self.student = student
        self.trained = trained_parameters(student)
        self.ema = ExponentialMovingAverage(self.trained, ema_decay)
        self.stages = list(stages)
        self.make_optimizer, self.schedule = optimizer, schedule
        self.optimizer_in_backward = optimizer_in_backward
        self.sigma, self.seed = sigma or Uniform(), seed
        self.identity = {**(identity or {}), "plan": student.config["linearize_plan"]}
        self._micro_step = 0
        self._optimizer: Optimizer | None = None
        self._rng: dict[str, Any] | None = None
        self._check_stages()
        dropout = window_dropout or WindowDropout()
        self._windows = WindowSwitch(self.backbone.sites(student), dropout)
        terms = [term for stage in self.stages for term in stage.terms.values()]
        self.observer = Observer(self.teacher, student, terms)
        self._left_out: list[nn.Parameter] = []
        blocks = [student.get_submodule(name.rpartition(".")[0]) for name in self.backbone.sites(student)]
        self.activations = ActivationBudget(blocks, activation_memory_gib, self._pending_bytes)
        student.enable_gradient_checkpointing(self.activations)
        for transformer in (student, self.teacher):
            compile_blocks(transformer, compile_backend)

    def _check_stages(self) -> None:
        for stage in self.stages:
            if stage.trains == "mixer" and not any(map(is_mixer_parameter, self.trained)):
                raise LinearizeError(
                    f"{stage.name}_trains=mixer trains nothing, for the mixers of this student have no parameters of "
                    f"their own: set {stage.name}_trains=all, or stages.{stage.name}=0."
                )

    def _pending_bytes(self) -> int:
        """Bytes that the step will still allocate: gradients, and at first two moments, as AdamW keeps them."""
        gradients = sum(value.nbytes for value in self.trained.values() if value.grad is None)
        gradients = 0 if self.optimizer_in_backward else gradients
        if self._optimizer is not None and self._optimizer.state:
            return gradients
        if isinstance(self._optimizer, AdamW8bit):
            return gradients + self._optimizer.moment_bytes()
        return gradients + 2 * sum(value.nbytes for value in self.trained.values())

    def train(self, mode: bool = True) -> "DistillationModule":
        """Sets the student's mode; the teacher always stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    @property
    def stage(self) -> Stage:
        """The stage of the next optimizer step."""
        return stage_at(self.stages, self.trainer.global_step)[0]

    def configure_optimizers(self) -> Any:
        """One optimizer over what trains, and the schedule of the stages.

        Raises:
            LinearizeError: the optimizer refuses its settings.
        """
        if self.optimizer_in_backward:
            self._check_step_in_backward()
        optimizer = self.build_optimizer()
        base = optimizer.defaults["lr"]
        if base == 0 and any(stage.lr for stage in self.stages):
            raise LinearizeError("optimizer.lr=0 scales no other rate: give it a number above 0, or transfer_lr=null.")

        def factor(step: int) -> float:
            stage, done = stage_at(self.stages, step)
            return (stage.lr / base if stage.lr else 1.0) * self.schedule(done, stage.num_steps)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def build_optimizer(self) -> Optimizer:
        """The optimizer over what trains; from here on it may step within the backward pass.

        Raises:
            LinearizeError: the optimizer refuses its settings.
        """
        try:
            self._optimizer = self.make_optimizer(list(self.trained.values()))
        except (TypeError, ValueError, IndexError) as error:
            raise LinearizeError(f"The optimizer refuses its settings ({error}): correct optimizer.*") from error
        if self.optimizer_in_backward:
            StepInBackward(self._optimizer, self.trained.values(), self._is_trained_in_stage)
        return self._optimizer

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Leaves windows out, the same in all micro steps of an optimizer step, until its backward pass is done."""
        num_steps = sum(stage.num_steps for stage in self.stages)
        self._windows.drop(seed=self.seed, step=self.trainer.global_step, num_steps=num_steps)

    def on_after_backward(self) -> None:
        """Puts the windows back: everything but training sees them."""
        self._windows.restore()

    def _check_step_in_backward(self) -> None:
        trainer = self.trainer
        for is_set, setting in (
            (trainer.gradient_clip_val, "trainer.gradient_clip_val=null"),
            (trainer.accumulate_grad_batches != 1, "trainer.accumulate_grad_batches=1"),
            (trainer.world_size > 1, "trainer.devices=1"),
        ):
            if is_set:
                raise LinearizeError(
                    f"optimizer_in_backward=true never has all gradients at once: set {setting}, or "
                    "optimizer_in_backward=false."
                )

    def _is_trained_in_stage(self, parameter: nn.Parameter) -> bool:
        if all(stage.trains == "all" for stage in self.stages) or self.stage.trains == "all":
            return True
        return any(value is parameter for name, value in self.trained.items() if is_mixer_parameter(name))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One micro step: draws noise, looks at teacher and student, and sums the terms of the stage's loss."""
        step = self.trainer.global_step
        keys = [(self.seed, step, self._micro_step, index) for index in _indices(batch)]
        self._micro_step += 1
        terms = {name: term for name, term in self.stage.terms.items() if term.weight > 0}
        noise, sigma = draw_noise(batch["latents"], keys, self.sigma)
        loss = torch.zeros((), device=batch["latents"].device)
        for name, value in self.observer.compute_terms(terms, batch, noise, sigma).items():
            self.log(f"train/{name}", value.detach(), batch_size=len(sigma))
            loss = loss + terms[name].weight * value
        self.log("train/loss", loss.detach(), batch_size=len(sigma))
        if self.trainer.world_size > 1:
            # Processes wait for the gradient of every parameter, of those that this step leaves out, too. All processes
            # and micro steps of a step leave out the same.
            self._left_out = unreached(loss, self.trained.values())
            loss = loss + sum(0.0 * parameter.flatten()[0] for parameter in self._left_out)
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=len(sigma))
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drops the gradients of what the stage or the step leaves alone, before they are clipped.

        An optimizer passes over what has no gradient, and decays what has one of zeros.
        """
        if self.stage.trains == "mixer":
            for name, parameter in self.trained.items():
                if not is_mixer_parameter(name):
                    parameter.grad = None
        for parameter in self._left_out:
            parameter.grad = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Lets trainer.max_time end no step between its micro steps: the gradients summed so far would be lost."""
        if self._micro_step:
            self.trainer.should_stop = False

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips what trains. Lightning would refuse fused optimizers, even where no loss is scaled."""
        if self.trainer.precision == "16-mixed":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
            clip(self.trained.values(), gradient_clip_val)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Steps, moves the average, and at the end of a stage clears what belongs to it."""
        before = self.stage
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.ema.update()
        self._micro_step = 0
        if stage_at(self.stages, self.trainer.global_step + 1)[0] is not before:
            optimizer.state.clear()
            self.ema.reset()

    def on_validation_start(self) -> None:
        """Puts the averaged weights in place."""
        self.ema.swap()

    def on_validation_end(self) -> None:
        """Puts the trained weights back."""
        self.ema.swap()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs val/velocity_error: |v_student - v_teacher|^2 / |v_teacher|^2 on held-out samples.

        Noise and noise level are functions of the sample's index: every run and every step is measured on the same.
        """
        indices = _indices(batch)
        noise, _ = draw_noise(batch["latents"], [("validation", index) for index in indices], self.sigma)
        sigma = torch.tensor([even_sigma(index) for index in indices], device=noise.device)
        inputs = (add_noise(batch["latents"].float(), noise, sigma), sigma, conditioning_of(batch))
        teacher = self.backbone.predict(self.teacher, *inputs)
        error = relative_velocity_error(self.backbone.predict(self.student, *inputs), teacher).mean()
        self.log("val/velocity_error", error, batch_size=len(sigma), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what trains and drops all that the teacher brings."""
        checkpoint["state_dict"] = {f"student.{name}": value.detach() for name, value in self.trained.items()}
        checkpoint["linearize"] = {**student_state(self), "rng": rng_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is of this student, and takes it over.

        Raises:
            LinearizeError: it is of another teacher, plan, optimizer or version, or is incomplete.
        """
        check_checkpoint(self, checkpoint)
        tell_changed_schedule(self, checkpoint)
        self.ema.load_state_dict(checkpoint["linearize"]["ema"])
        self._rng = checkpoint["linearize"]["rng"]

    def on_train_start(self) -> None:
        """Restores the state of the random number generators, after all else is built, and this run's own settings."""
        if self._rng is not None:
            restore_rng(self._rng)
            self._rng = None
            scheduler = cast(LambdaLR, self.trainer.lr_scheduler_configs[0].scheduler)
            restore_rates(self.trainer.optimizers[0], scheduler)


def _indices(batch: Mapping[str, Any]) -> list[int]:
    return [int(index) for index in batch["index"]]
