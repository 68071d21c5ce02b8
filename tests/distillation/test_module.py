from functools import partial
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from distillation.conftest import MakeModule
from linearize.distillation.losses import AttentionOutput, FlowMatching, Prediction, Transfer
from linearize.distillation.module import DistillationModule
from linearize.distillation.noise import Uniform, draw_noise
from linearize.errors import LinearizeError


def losses_of(module: DistillationModule, batch: dict[str, Any]) -> dict[str, Tensor]:
    keys = [(0, 0, 0, int(index)) for index in batch["index"]]
    noise, sigma = draw_noise(batch["latents"], keys, Uniform())
    return module.observer.compute_terms(module.stages[0].terms, batch, noise, sigma)


def gradients_of(module: DistillationModule, batch: dict[str, Any]) -> dict[str, Tensor]:
    module.zero_grad()
    torch.stack(list(losses_of(module, batch).values())).sum().backward()
    return {name: value.grad.clone() for name, value in module.trained.items() if value.grad is not None}


@pytest.mark.parametrize("token_order", ["any", "tile"])
def test_a_softmax_student_has_no_loss_against_its_teacher(
    make_module: MakeModule, batch: dict[str, Any], token_order: str
) -> None:
    batch["latents"] = torch.randn(2, 4, 18, 40)  # 9 x 20 tokens: several ragged tiles
    losses = losses_of(make_module("softmax", token_order=token_order), batch)
    assert losses["flow_matching"] > 0.1
    for name in ("prediction", "attention_output", "transfer"):
        assert losses[name] < 1e-11, name


def test_a_local_student_has_every_loss(make_module: MakeModule, batch: dict[str, Any]) -> None:
    losses = losses_of(make_module("clear", window=2), batch)
    assert all(value > 1e-6 for value in losses.values()), losses


def test_each_term_sees_its_own_layers_beside_others(make_module: MakeModule, batch: dict[str, Any]) -> None:
    terms = {
        f"{kind.__name__} {layers}": kind(layers=[layers])
        for kind in (AttentionOutput, Transfer)
        for layers in ("transformer_blocks.*", "single_transformer_blocks.*", "*.0.attn")
    }
    together = losses_of(make_module("clear", window=2, terms=terms), batch)
    for name, term in terms.items():
        (alone,) = losses_of(make_module("clear", window=2, terms={name: term}), batch).values()
        assert together[name] == alone
    assert len({value.item() for value in together.values()}) == len(terms)


@pytest.mark.parametrize("mixer", ["softmax", "clear"])
def test_the_teacher_in_the_module_is_the_stock_one(make_module: MakeModule, batch: dict[str, Any], mixer: str) -> None:
    module = make_module(mixer)
    stock = module.backbone.transformer_class.from_config(module.teacher.config)
    stock.load_state_dict(module.teacher.state_dict())
    sigma = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        ours = module.backbone.predict(module.teacher, batch["latents"], sigma, batch)
        theirs = module.backbone.predict(stock.eval(), batch["latents"], sigma, batch)
    torch.testing.assert_close(ours, theirs, **({"rtol": 0, "atol": 0} if mixer == "softmax" else {}))


def test_frozen_tensors_are_shared_and_only_planned_projections_train(
    make_module: MakeModule, batch: dict[str, Any]
) -> None:
    module = make_module("clear", window=2)
    module.train()
    before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    teacher = dict(module.teacher.named_parameters())
    gradients = gradients_of(module, batch)
    assert gradients.keys() == module.trained.keys()
    for name, parameter in module.student.named_parameters():
        assert parameter.requires_grad == (name in module.trained)
        assert (parameter is teacher.get(name)) == (name not in module.trained), name
    optimization = module.configure_optimizers()
    optimization["optimizer"].step()
    assert not module.teacher.training and module.student.training
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in module.teacher.parameters())


def test_gradient_checkpointing_changes_nothing(make_module: MakeModule, batch: dict[str, Any]) -> None:
    plain = make_module("clear", window=2)
    checkpointed = make_module("clear", window=2, options={"activation_memory_gib": 0})
    first, second = gradients_of(plain.train(), batch), gradients_of(checkpointed.train(), batch)
    assert (plain.activations.num_recomputed, checkpointed.activations.num_recomputed) == (0, 4)
    for name, value in losses_of(plain, batch).items():
        assert torch.equal(value, losses_of(checkpointed, batch)[name]), name
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], atol=1e-7, rtol=1e-5)


def test_a_capture_holds_nothing_afterwards(make_module: MakeModule, batch: dict[str, Any]) -> None:
    module = make_module("clear", window=2, options={"activation_memory_gib": 0}).train()
    both = (*module.backbone.sites(module.student).values(), *module.backbone.sites(module.teacher).values())
    with module.observer._student_capture.recording() as (attention, calls):
        velocity = module.backbone.predict(module.student, batch["latents"], torch.tensor([0.4, 0.6]), batch)
    assert list(attention) == list(module.backbone.sites(module.student)) and not calls
    assert {tuple(value.shape) for value in attention.values()} == {(2, 65, 32)}
    velocity.mean().backward()  # runs the blocks once more, which record as they did
    gradients_of(module, batch)
    assert all(site.recorder.attention is None and site.recorder.call is None for site in both)
    with torch.no_grad():
        module.backbone.predict(module.student, batch["latents"], torch.tensor([0.4, 0.6]), batch)
    assert all(site.recorder.attention is None for site in both)


def test_transfer_trains_every_layer_alone(make_module: MakeModule, batch: dict[str, Any]) -> None:
    module = make_module("clear", terms={"transfer": Transfer()}, window=2)
    before = gradients_of(module, batch)
    first_layer = [name for name in module.trained if name.startswith("transformer_blocks.0.")]
    with torch.no_grad():
        for name in first_layer:
            module.trained[name].mul_(1.5)
    after = gradients_of(module, batch)
    for name in module.trained:
        assert torch.equal(before[name], after[name]) == (name not in first_layer), name


def test_terms_run_only_what_they_need(make_module: MakeModule, batch: dict[str, Any]) -> None:
    for terms, expected in (
        ({"flow_matching": FlowMatching()}, {"teacher": 0, "student": 1}),
        ({"prediction": Prediction()}, {"teacher": 1, "student": 1}),
        ({"transfer": Transfer()}, {"teacher": 1, "student": 0}),
        ({"attention_output": AttentionOutput()}, {"teacher": 1, "student": 1}),
    ):
        module = make_module("clear", terms=terms, window=2)
        calls = {"teacher": 0, "student": 0}
        for name in calls:
            getattr(module, name).register_forward_hook(lambda *_, name=name, calls=calls: calls.update({name: 1}))
        losses_of(module, batch)
        assert calls == expected, terms


def test_layers_are_chosen_by_globs(make_module: MakeModule, batch: dict[str, Any]) -> None:
    terms = {"attention_output": AttentionOutput(layers=["single_transformer_blocks.*"])}
    module = make_module("clear", terms=terms, window=2)
    everything = make_module("clear", terms={"attention_output": AttentionOutput()}, window=2)
    assert losses_of(module, batch)["attention_output"] != losses_of(everything, batch)["attention_output"]
    with pytest.raises(LinearizeError, match="nothing_like_it"):
        make_module("clear", terms={"transfer": Transfer(layers=["nothing_like_it"])}, window=2)


def test_compiled_blocks_have_the_same_losses(make_module: MakeModule, batch: dict[str, Any]) -> None:
    torch._dynamo.reset()
    eager = losses_of(make_module("clear", layers="single*.1.*", window=2), batch)
    module = make_module("clear", layers="single*.1.*", window=2, options={"compile_backend": "eager"})
    compiled = losses_of(module, batch)
    for name, value in eager.items():
        torch.testing.assert_close(value, compiled[name], atol=1e-6, rtol=1e-5, msg=name)


def test_the_average_is_validated(make_module: MakeModule) -> None:
    module = make_module("clear", window=2)
    name, parameter = next(iter(module.trained.items()))
    module.ema.average[name] = torch.full_like(parameter, 0.25)
    value = parameter.detach().clone()
    module.on_validation_start()
    assert torch.equal(parameter.detach(), torch.full_like(parameter, 0.25))
    module.on_validation_end()
    assert torch.equal(parameter.detach(), value)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_for_fused_optimizers_in_mixed_precision(
    make_module: MakeModule, batch: dict[str, Any], algorithm: str
) -> None:
    module = make_module(options={"ema_decay": 0.0})
    module.make_optimizer = partial(torch.optim.SGD, lr=1.0, fused=True)
    before = {name: value.detach().clone() for name, value in module.trained.items()}
    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=1e-3,
        gradient_clip_algorithm=algorithm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    moves = [(value - before[name]).detach() for name, value in module.trained.items()]
    size = torch.stack([move.norm() if algorithm == "norm" else move.abs().max() for move in moves])
    found = size.norm() if algorithm == "norm" else size.max()
    assert found.item() == pytest.approx(1e-3, rel=1e-2)
