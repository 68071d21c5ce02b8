"""What happens beside the training steps: checkpoints, the progress bar, pictures."""

from linearize.distillation.callbacks.checkpointing import Checkpointing
from linearize.distillation.callbacks.pictures import Pictures
from linearize.distillation.callbacks.progress import Progress

__all__ = ["Checkpointing", "Pictures", "Progress"]
