"""FID, KID, LPIPS and CLIP score against real pictures; needs the `eval` extra and networks that it fetches."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from linearize.errors import LinearizeError
from linearize.evaluation.metrics import GivenFeatures, gaussian_distance
from linearize.extras import require

# Pictures [batch, 3, height, width] as uint8 to features [batch, num_features].
FeatureFunction = Callable[[Tensor], Tensor]
_KID_SUBSETS = 100
_KID_SUBSET_SIZE = 1000


@dataclasses.dataclass(frozen=True)
class RealData:
    """Real pictures and the networks that compare with them.

    Attributes:
        path: A folder of pictures (captions in its metadata.jsonl), or anything `datasets` loads.
        split: Split of the dataset.
        image_column: Column of the pictures.
        caption_column: Column of the captions, which become the prompts; ignored where the data has none.
        max_images: Real pictures that are read at most.
        inception_weights: File of the FID Inception weights; None fetches them.
        lpips_network: alex, vgg or squeeze.
        clip_model: Hub id or folder of a CLIP model.
    """

    path: str
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    max_images: int = 10_000
    inception_weights: str | None = None
    lpips_network: str = "alex"
    clip_model: str = "openai/clip-vit-base-patch16"


def require_eval_extra() -> None:
    """Checks that the packages of the `eval` extra are there.

    Raises:
        LinearizeError: one is not.
    """
    require("torchvision", "torch_fidelity", purpose="real_data")


def open_real_data(data: RealData) -> Any:
    """The dataset, cut to `max_images`.

    Raises:
        LinearizeError: it cannot be read or has no such column of pictures.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(data.path, split=data.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise LinearizeError(
            f"real_data={data.path} (split {data.split}) cannot be read ({str(error).splitlines()[0]}): "
            "give a folder of pictures or the name of a dataset."
        ) from error
    if data.image_column not in dataset.column_names:
        raise LinearizeError(
            f"real_data={data.path} has no column {data.image_column!r}: "
            f"set real.image_column to one of {', '.join(dataset.column_names)}."
        )
    return dataset.select(range(min(len(dataset), data.max_images)))


def captions(dataset: Any, data: RealData) -> list[str] | None:
    """The dataset's captions, or None where it has none."""
    return list(dataset[data.caption_column]) if data.caption_column in dataset.column_names else None


def real_batches(dataset: Any, data: RealData, height: int, width: int, batch_size: int) -> Iterator[Tensor]:
    """Real pictures as uint8 [batch, 3, height, width]: the centre of the wanted aspect, resized."""
    for start in range(0, len(dataset), batch_size):
        images = dataset[start : start + batch_size][data.image_column]
        yield torch.stack([_to_tensor(image, height, width) for image in images])


def _to_tensor(image: Image.Image, height: int, width: int) -> Tensor:
    fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).reshape(height, width, 3).permute(2, 0, 1)


def inception_features(weights: str | None, device: torch.device) -> FeatureFunction:
    """The pooled 2048 features of the Inception network that FID and KID are defined with."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    if weights is not None and not Path(weights).is_file():
        raise LinearizeError(
            f"real.inception_weights={weights} is no file: give the path of the weights, or null to fetch them."
        )
    return NoTrainInceptionV3("inception-v3-compat", ["2048"], weights).to(device)


def real_data_metrics(
    images: Mapping[str, Tensor],
    prompts: Sequence[str],
    real: Iterator[Tensor],
    *,
    features: FeatureFunction,
    lpips: nn.Module | None,
    clip: tuple[nn.Module, Any],
    device: torch.device,
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    """The metrics of each model.

    Args:
        images: Pictures [prompts, 3, height, width] in [0, 1] by model; "teacher" is what LPIPS compares with.
        prompts: One per picture.
        real: Batches of real pictures as uint8 [batch, 3, height, width].
        features: What FID and KID compare.
        lpips: A metric of pairs of pictures in [0, 1]; None leaves `lpips_to_teacher` null.
        clip: CLIP model and processor.
        device: Where the networks run.
        batch_size: Pictures in one forward.

    Returns:
        {model: {fid, kid {mean, std}, lpips_to_teacher, clip_score, n, n_real}}.
    """
    references = torch.cat([_features(features, batch, device) for batch in real])
    results = {}
    for name, pictures in images.items():
        batches = [_to_bytes(batch) for batch in pictures.split(batch_size)]
        own = torch.cat([_features(features, batch, device) for batch in batches])
        results[name] = {
            "fid": gaussian_distance(own, references),
            "kid": kernel_distance(own, references),
            "lpips_to_teacher": None
            if lpips is None
            else _lpips(lpips, pictures, images["teacher"], device, batch_size),
            "clip_score": clip_score(clip, batches, prompts, device),
            "n": len(own),
            "n_real": len(references),
        }
    return results


def kernel_distance(features: Tensor, references: Tensor) -> dict[str, float]:
    """Kernel distance (Binkowski et al. 2018) of two sets of features, over random subsets drawn from a fixed seed."""
    from torchmetrics.image.kid import KernelInceptionDistance

    subset_size = min(_KID_SUBSET_SIZE, len(features), len(references))
    metric = KernelInceptionDistance(
        feature=GivenFeatures(features.shape[1]), subsets=_KID_SUBSETS, subset_size=subset_size, normalize=True
    )
    metric.update(references.cpu(), real=True)
    metric.update(features.cpu(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, std = metric.compute()
    return {"mean": float(mean), "std": float(std)}


class _ClipFeatures(nn.Module):
    """A CLIP model whose feature methods return bare tensors, as torchmetrics 1.9 wants; transformers 5 wraps them."""

    def __init__(self, model: Any):
        super().__init__()
        self.model: Any = model
        self.config = model.config

    def get_image_features(self, *arguments: Tensor) -> Tensor:
        return _bare(self.model.get_image_features(*arguments))

    def get_text_features(self, *arguments: Tensor) -> Tensor:
        return _bare(self.model.get_text_features(*arguments))


def _bare(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def clip_score(
    clip: tuple[nn.Module, Any], batches: Sequence[Tensor], prompts: Sequence[str], device: torch.device
) -> float:
    """CLIP score (Hessel et al. 2021), 100 times the mean cosine of picture and prompt, not below 0.

    Args:
        clip: CLIP model and processor.
        batches: Pictures as uint8 [batch, 3, height, width].
        prompts: One per picture.
        device: Where the model runs.
    """
    from torchmetrics.multimodal.clip_score import CLIPScore

    model, processor = clip
    metric = CLIPScore(model_name_or_path=lambda: (_ClipFeatures(model), processor)).to(device)
    start = 0
    with torch.no_grad():
        for batch in batches:
            metric.update(batch.to(device), list(prompts[start : start + len(batch)]))
            start += len(batch)
    return float(metric.compute())


def load_clip(name: str) -> tuple[nn.Module, Any]:
    """CLIP model and processor of a hub id or folder.

    Raises:
        LinearizeError: they cannot be had.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        return CLIPModel.from_pretrained(name, use_safetensors=True).eval(), CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LinearizeError(
            f"real.clip_model={name} cannot be loaded ({str(error).splitlines()[0]}): "
            "give the id or folder of a CLIP model."
        ) from error


def load_lpips(network: str, device: torch.device) -> nn.Module:
    """The LPIPS metric (Zhang et al. 2018) of one network."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    choices = ("alex", "vgg", "squeeze")
    if network not in choices:
        raise LinearizeError(f"real.lpips_network={network!r} is not known: choose one of {', '.join(choices)}.")
    return LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True).to(device)  # type: ignore[arg-type]


def _lpips(metric: Any, images: Tensor, references: Tensor, device: torch.device, batch_size: int) -> float:
    metric.reset()
    with torch.no_grad():
        for image, reference in zip(images.split(batch_size), references.split(batch_size), strict=True):
            metric.update(image.to(device), reference.to(device))
    return float(metric.compute())


@torch.no_grad()
def _features(features: FeatureFunction, images: Tensor, device: torch.device) -> Tensor:
    return features(images.to(device)).float().cpu()


def _to_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)
