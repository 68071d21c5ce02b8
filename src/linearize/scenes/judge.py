"""The judge: reads every attribute of a scene off its picture."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from linearize.errors import LinearizeError
from linearize.files import atomic_file, write_json
from linearize.scenes.world import ALONE, ATTRIBUTES, BACKGROUNDS, RELATIONS, SceneBatch

RESOLUTION = 128
HEADS: dict[str, int] = {"relation": len(RELATIONS), "background": len(BACKGROUNDS)} | {
    f"{name}_{slot}": len(values) for slot in range(2) for name, values in ATTRIBUTES.items()
}


@dataclass(frozen=True)
class JudgeScore:
    """What the judge says of a batch of pictures, each against the scene it should show.

    Attributes:
        correct: [batch] True where everything is right.
        attributes: For shape, colour, texture, size, relation and background, [batch] True where it is right
            (for both objects, where there are two). ``relation`` includes the number of objects.
        log_probability: [batch] log-probability of the scene's attributes in nats.
    """

    correct: Tensor
    attributes: dict[str, Tensor]
    log_probability: Tensor


class _Block(nn.Module):
    """Halves the resolution, then one residual pair of convolutions."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.residual = nn.Sequential(
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = functional.relu(self.down(hidden))
        return functional.relu(hidden + self.residual(hidden))


class Judge(nn.Module):
    """A small convolutional network with one classification head per attribute.

    Labels are order-free: slot 0 is always the left or upper object (see ``world.SceneBatch``).

    Args:
        channels: Width of each of the four stages.
        num_features: Width of the last hidden layer, which ``features`` returns.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 112, 128), num_features: int = 96) -> None:
        super().__init__()
        self.config = {"channels": list(channels), "num_features": num_features}
        self.num_features = num_features
        widths = (3, *channels)
        self.stages = nn.Sequential(*[_Block(a, b) for a, b in itertools.pairwise(widths)])
        side = RESOLUTION // 2 ** len(channels)
        self.squeeze = nn.Conv2d(channels[-1], 32, 1)
        self.hidden = nn.Linear(32 * side * side, 256)
        self.project = nn.Linear(256, num_features)
        self.heads = nn.ModuleDict({name: nn.Linear(num_features, size) for name, size in HEADS.items()})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.project.weight.device

    def features(self, images: Tensor) -> Tensor:
        """Features for a Fréchet distance.

        Args:
            images: [batch, 3, height, width] in [0, 1]; the centred square is read.

        Returns:
            [batch, num_features].
        """
        hidden = self.stages(_square(images).to(self.project.weight.dtype) * 2 - 1)
        hidden = functional.relu(self.hidden(functional.relu(self.squeeze(hidden)).flatten(1)))
        return self.project(hidden)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [batch, classes] of every head, by name."""
        hidden = functional.relu(self.features(images))
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.no_grad()
    def score(self, images: Tensor, scenes: SceneBatch) -> JudgeScore:
        """Compares pictures with the scenes they should show.

        Args:
            images: [batch, 3, height, width] in [0, 1].
            scenes: The scenes, one per picture.
        """
        logits = {name: value.float() for name, value in self(images.to(self.device)).items()}
        return score(logits, scenes.to(self.device))

    def save(self, folder: str | Path) -> None:
        """Writes ``config.json`` and half-precision ``model.safetensors``."""
        folder = Path(folder)
        state = {name: tensor.detach().cpu().half().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_file(folder / "model.safetensors") as temporary:
            save_file(state, temporary)
        write_json(folder / "config.json", self.config)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> "Judge":
        """Reads a judge written by ``save``, in float32 and evaluation mode.

        Raises:
            LinearizeError: If the folder holds no readable judge.
        """
        folder = Path(folder)
        try:
            judge = cls(**json.loads((folder / "config.json").read_text()))
            judge.load_state_dict(load_file(folder / "model.safetensors"))
        except Exception as error:
            raise LinearizeError(
                f"No judge can be read from {folder} ({error}); "
                "restore it from the repository or train one with scripts/pretrain_teacher.py stages=[judge]."
            ) from error
        return judge.to(device).eval()


def labels(scenes: SceneBatch) -> dict[str, Tensor]:
    """The class of every head for every scene, [batch] each."""
    result = {"relation": scenes.relation, "background": scenes.background}
    for slot in range(2):
        for index, name in enumerate(ATTRIBUTES):
            result[f"{name}_{slot}"] = scenes.objects[:, slot, index]
    return result


def counts(name: str, scenes: SceneBatch) -> Tensor:
    """[batch] False where a head says nothing about a scene: the second object's, of a scene with one."""
    return scenes.relation != ALONE if name.endswith("_1") else torch.ones_like(scenes.relation, dtype=torch.bool)


def score(logits: dict[str, Tensor], scenes: SceneBatch) -> JudgeScore:
    """Turns the heads' logits [batch, classes] into a score against ``scenes``."""
    attributes: dict[str, Tensor] = {}
    log_probability = torch.zeros(len(scenes), device=scenes.relation.device)
    for name, label in labels(scenes).items():
        asked = counts(name, scenes)
        picked = logits[name].log_softmax(-1).gather(1, label[:, None]).squeeze(1)
        log_probability = log_probability + picked * asked
        right = (logits[name].argmax(-1) == label) | ~asked
        key = name.rsplit("_", 1)[0]
        attributes[key] = attributes[key] & right if key in attributes else right
    correct = torch.stack(list(attributes.values())).all(dim=0)
    return JudgeScore(correct, attributes, log_probability)


def _square(images: Tensor) -> Tensor:
    """The centred square of each picture at the judge's resolution."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[..., top : top + side, left : left + side]
    if side == RESOLUTION:
        return square
    return functional.interpolate(square, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
