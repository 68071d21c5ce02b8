"""The recipes of configs/loss: their stages and terms, and a few steps of each on the tiny teacher."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from distillation.conftest import MakeModule, fit
from linearize.backbones.flux_family import FluxBackbone
from linearize.distillation.losses import Variance
from linearize.distillation.module import DistillationModule
from linearize.distillation.noise import add_noise
from linearize.distillation.stages import Stage
from linearize.errors import LinearizeError
from linearize.surgery import is_mixer_parameter
from linearize.train import build_stages
from runs import compose_train

# Mixer of each recipe; steps, rate and what trains of its first stage; terms of its last one.
HEADS = {"before_projection": True, "normalise": True}
SECOND = {"prediction": 1.0, "flow_matching": 0.0}
RECIPES: dict[str, Any] = {
    "lolcats": ("lolcats", (4, 1e-2, "mixer", HEADS), SECOND),
    "lizard": ("lizard", (4, 1e-3, "mixer", HEADS), SECOND),
    "lawcat": ("lawcat", (4, 1e-2, "mixer", HEADS), SECOND),
    "lit": ("linear", None, {"flow_matching": 1.0, "prediction": 0.5, "variance": 0.05}),
    "grafting": ("mhla", (3, 5e-4, "all", {"before_projection": False}), {"flow_matching": 1.0}),
}


def stages_of(recipe: str, folder: Path) -> list[Stage]:
    return build_stages(compose_train(f"loss={recipe}", "trainer.max_steps=8", run_dir=folder))


class Recorder(lightning.Callback):
    """Terms, learning rate and parameters as every optimizer step leaves them."""

    def __init__(self) -> None:
        self.terms: list[set[str]] = []
        self.rates: list[float] = []
        self.parameters: list[dict[str, Tensor]] = []
        self.metrics: dict[str, Tensor] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._note(pl_module)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *unused: Any) -> None:
        if trainer.global_step == len(self.parameters):
            self._note(pl_module)
            # Metrics of an earlier stage stay; those of this step are new numbers, but for a variance, which stays 0.
            new = {name for name, value in trainer.logged_metrics.items() if value != self.metrics.get(name)}
            self.terms.append(new - {"train/loss", "train/learning_rate", "train/variance"})
            self.metrics = dict(trainer.logged_metrics)
            self.rates.append(float(trainer.logged_metrics["train/learning_rate"]))

    def _note(self, module: DistillationModule) -> None:
        self.parameters.append({name: value.detach().clone() for name, value in module.trained.items()})

    def moved(self, start: int, stop: int) -> set[str]:
        before, after = self.parameters[start], self.parameters[stop]
        return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_in_its_stages(
    make_module: MakeModule, batch: dict[str, Any], tmp_path: Path, recipe: str
) -> None:
    mixer, first, weights = RECIPES[recipe]
    stages = stages_of(recipe, tmp_path)
    assert {name: term.weight for name, term in stages[-1].terms.items()} == weights
    num_first = first[0] if first else 0
    assert [(stage.name, stage.num_steps) for stage in stages] == [
        *([("transfer", num_first)] if first else []),
        ("distill", 8 - num_first),
    ]
    module = make_module(mixer, stages=stages)
    recorder = Recorder()
    fit(module, batch, 8, recorder)
    active = {f"train/{name}" for name, weight in weights.items() if weight > 0 and name != "variance"}
    assert recorder.metrics.get("train/variance") == (0 if "variance" in weights else None)
    assert recorder.terms == [{"train/transfer"}] * num_first + [active] * (8 - num_first)
    assert recorder.rates[num_first:] == pytest.approx([1e-3] * (8 - num_first))
    assert any(not is_mixer_parameter(name) for name in recorder.moved(num_first, 8))
    if first:
        _, rate, trains, settings = first
        (term,) = stages[0].terms.values()
        assert {name: getattr(term, name) for name in settings} == settings
        assert recorder.rates[:num_first] == pytest.approx([rate] * num_first)
        moved = recorder.moved(0, num_first)
        assert moved and all(map(is_mixer_parameter, moved)) == (trains == "mixer")


def joined(output: Any) -> Tensor:
    return torch.cat(output, dim=1) if isinstance(output, tuple) else output


@pytest.mark.parametrize("recipe", ["lolcats", "grafting"])
def test_the_transfer_of_a_recipe_is_its_formula(
    make_module: MakeModule, batch: dict[str, Any], tmp_path: Path, recipe: str
) -> None:
    """Against layers that are called by hand: heads' outputs by squares, or layers' outputs by L1."""
    (term,) = stages_of(recipe, tmp_path)[0].terms.values()
    module = make_module("clear", terms={"transfer": term}, window=2)
    noise, sigma = torch.randn(batch["latents"].shape), torch.tensor([0.2, 0.7])
    value = module.observer.compute_terms({"transfer": term}, batch, noise, sigma)["transfer"]
    students, errors = module.backbone.sites(module.student), []

    def compare(name: str) -> Any:
        def hook(teacher: Any, arguments: Any, keywords: Any, output: Any) -> None:
            heads: list[Tensor] = []
            for site in (students[name], teacher):
                handle = site.mixer.register_forward_hook(
                    lambda mixer, given, output: heads.append(
                        output.transpose(1, 2).flatten(2)[:, given[-1].layout.index_to(None)]
                    )
                )
                whole = joined(site.forward(*arguments, **keywords))
                handle.remove()
                if recipe == "grafting":
                    heads[-1] = whole
            y, t = (states.double() for states in heads)
            difference = (y - t) / t.square().mean().sqrt()
            errors.append(difference.abs().mean() if recipe == "grafting" else difference.square().mean())

        return hook

    handles = [
        site.register_forward_hook(compare(name), with_kwargs=True)
        for name, site in module.backbone.sites(module.teacher).items()
    ]
    with torch.no_grad():
        module.backbone.predict(module.teacher, add_noise(batch["latents"], noise, sigma), sigma, batch)
    for handle in handles:
        handle.remove()
    assert len(errors) == 4
    torch.testing.assert_close(value.double(), torch.stack(errors).mean(), rtol=1e-5, atol=0)


class LearnedVariance(FluxBackbone):
    """FLUX with twice the output channels, the second half of which is taken for the variance."""

    def predict_with_variance(
        self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        velocity, variance = self.predict(transformer, latents, sigma, conditioning).chunk(2, dim=1)
        return velocity, variance


def test_the_variance_of_a_teacher_that_predicts_one_is_distilled(
    make_module: MakeModule, batch: dict[str, Any]
) -> None:
    module = make_module("linear", terms={"variance": Variance()})
    channels = module.teacher.proj_out.out_features
    head = torch.nn.Linear(module.teacher.proj_out.in_features, 2 * channels).requires_grad_(False)
    module.teacher.proj_out = module.student.proj_out = head
    module.backbone = module.observer.backbone = LearnedVariance()
    noise, sigma = torch.randn(batch["latents"].shape), torch.tensor([0.2, 0.7])
    value = module.observer.compute_terms(module.stages[0].terms, batch, noise, sigma)["variance"]
    latents = add_noise(batch["latents"], noise, sigma)
    with torch.no_grad():
        student, teacher = (
            module.backbone.predict(model, latents, sigma, batch)[:, 4:].double()
            for model in (module.student, module.teacher)
        )
    assert student.shape == batch["latents"].shape
    torch.testing.assert_close(value.double(), (student - teacher).square().mean(), rtol=1e-5, atol=0)
    value.backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in module.trained.values())


def test_a_stage_of_the_mixers_alone_needs_mixers_with_parameters(make_module: MakeModule, tmp_path: Path) -> None:
    with pytest.raises(LinearizeError, match="transfer_trains=mixer trains nothing"):
        make_module("clear", stages=stages_of("lolcats", tmp_path))
