import lightning
import torch

from linearize.distillation.callbacks import Redrawing
from linearize.distillation.losses import Prediction


class Recorder(lightning.Callback):
    """Features of the first layer and all layers' first number as every micro step sees them."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        layers = [value for name, value in pl_module.student.named_buffers() if name.endswith("projection")]
        self.seen.append(torch.stack([layer[0, 0] for layer in layers]))


def features_of_a_run(make_module, batch, every_n_steps, num_steps, first_step=0):
    module = make_module("performer", terms={"prediction": Prediction()}, num_features=8)
    recorder = Recorder()
    trainer = lightning.Trainer(
        max_steps=num_steps,
        accelerator="cpu",
        accumulate_grad_batches=2,
        callbacks=[Redrawing(every_n_steps), recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if first_step:
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = first_step
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 16, batch_size=None))
    return torch.stack(recorder.seen)


def test_features_change_between_optimizer_steps_alone_and_differ_between_layers(make_module, batch):
    seen = features_of_a_run(make_module, batch, every_n_steps=2, num_steps=5)
    changes = (seen[1:] != seen[:-1]).any(dim=1).nonzero().flatten().tolist()
    assert len(seen) == 10 and changes == [3, 7]
    assert len(set(seen[-1].tolist())) == seen.shape[1] > 1


def test_features_depend_on_the_step_alone_and_stay_without_the_setting(make_module, batch):
    whole = features_of_a_run(make_module, batch, every_n_steps=2, num_steps=5)
    resumed = features_of_a_run(make_module, batch, every_n_steps=2, num_steps=5, first_step=3)
    assert torch.equal(resumed, whole[6:])
    still = features_of_a_run(make_module, batch, every_n_steps=0, num_steps=3)
    assert (still == still[0]).all()
