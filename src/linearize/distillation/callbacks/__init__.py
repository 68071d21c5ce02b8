"""What happens beside the training steps: checkpoints, the progress bar, pictures, random features."""

from linearize.distillation.callbacks.checkpointing import Checkpointing
from linearize.distillation.callbacks.pictures import Pictures
from linearize.distillation.callbacks.progress import Progress
from linearize.distillation.callbacks.redrawing import Redrawing

__all__ = ["Checkpointing", "Pictures", "Progress", "Redrawing"]
