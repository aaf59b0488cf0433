# SPDX-License-Identifier: Apache-2.0
"""``PERCEPTUAL``: figures of single pictures that need a package, or weights, or large pictures.

Each is a function of the candidate's pictures, the float model's of the same seeds, what was
asked for, and where the weights are; it gives one value per picture. One that cannot run raises
``InputError``, and the run that asked for it is invalid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtq.errors import InputError
from dtq.evaluate import optional_packages
from dtq.evaluate.metrics.extractors import CLIP_NORMAL, normal, resized
from dtq.evaluate.metrics.images import as_image

Measure = Callable[[Tensor, Tensor, Sequence[str], str], Tensor]


def ms_ssim(got: Tensor, want: Tensor, prompts: Sequence[str], where: str) -> Tensor:
    """Multi-scale structural similarity: five scales, so sides above 160 pixels."""
    functional = optional_packages.need("torchmetrics.functional.image", "torchmetrics")
    if min(got.shape[-2:]) <= 160:
        raise InputError(
            f"MS-SSIM halves pictures four times and needs sides above 160 pixels; these are "
            f"{got.shape[-1]} x {got.shape[-2]}"
        )
    measure = functional.multiscale_structural_similarity_index_measure
    return torch.cat([
        measure(a[None], b[None], data_range=1.0).reshape(1) for a, b in zip(got, want, strict=True)
    ])  # fmt: skip


def lpips(got: Tensor, want: Tensor, prompts: Sequence[str], where: str) -> Tensor:
    """LPIPS (1801.03924) with AlexNet, package lpips; pictures go in as [-1, 1].

    ``where`` is torchvision's ``alexnet-owt-*.pth``; without it the file must be in the cache of
    torch.hub, and nothing is downloaded.
    """
    package = optional_packages.need("lpips", "lpips")
    path = Path(where) if where else None
    if path is None:
        held = sorted((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-owt-*.pth"))
        path = held[0] if held else None
    if path is None or not path.is_file():
        raise InputError(
            "lpips needs AlexNet's weights: --extractor lpips=FOLDER/alexnet-owt-*.pth"
        )
    model = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(path, map_location="cpu", weights_only=True)
    convolutions = {k.removeprefix("features."): v for k, v in state.items() if "features" in k}
    for part in (model.net.slice1, model.net.slice2, model.net.slice3, model.net.slice4,
                 model.net.slice5):  # fmt: skip
        part.load_state_dict({k: convolutions[k] for k in part.state_dict()})
    model.eval()
    with torch.no_grad():
        pairs = zip(got.split(8), want.split(8), strict=True)
        return torch.cat([model(a * 2 - 1, b * 2 - 1).reshape(-1) for a, b in pairs])


def clip_score(got: Tensor, want: Tensor, prompts: Sequence[str], where: str) -> Tensor:
    """CLIPScore (2104.08718): 100 times the cosine of picture and prompt, at least 0."""
    transformers = optional_packages.need("transformers", "transformers")
    name = where or "openai/clip-vit-large-patch14"
    model = optional_packages.pretrained(transformers.CLIPModel, name, "clip-score").eval()
    words = optional_packages.pretrained(transformers.AutoTokenizer, name, "clip-score")
    found = []
    with torch.no_grad():
        for pictures, texts in zip(got.split(16), _split(prompts, 16), strict=True):
            tokens = words(texts, padding=True, truncation=True, return_tensors="pt")
            size = model.config.vision_config.image_size
            out = model(pixel_values=normal(resized(pictures, size), *CLIP_NORMAL), **tokens)
            found.append(100 * (out.image_embeds * out.text_embeds).sum(1).clamp(min=0))
    return torch.cat(found)


def clip_iqa(got: Tensor, want: Tensor, prompts: Sequence[str], where: str) -> Tensor:
    """CLIP-IQA (2207.12396): how much rather "Good photo." than "Bad photo.", 0 to 1."""
    if not where:
        raise InputError("clip-iqa needs a local CLIP: --extractor clip-iqa=FOLDER")
    functional = optional_packages.need("torchmetrics.functional.multimodal", "torchmetrics")
    try:
        value = functional.clip_image_quality_assessment(got, where, data_range=1.0)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise InputError(f"clip-iqa from {where}: {error}") from error
    assert isinstance(value, Tensor)
    return value.reshape(-1)


def image_reward(got: Tensor, want: Tensor, prompts: Sequence[str], where: str) -> Tensor:
    """ImageReward (2304.05977), package image-reward; ``where`` is ``ImageReward.pt``."""
    if not Path(where).is_file():
        raise InputError(
            "image-reward needs its weights: --extractor image-reward=FOLDER/ImageReward.pt"
        )
    package: Any = optional_packages.need("ImageReward", "image-reward")
    config = Path(where).with_name("med_config.json")
    model = package.load(where, device="cpu", med_config=str(config))
    scores = [
        float(model.score(prompt, as_image(picture)))
        for prompt, picture in zip(prompts, got, strict=True)
    ]
    return torch.tensor(scores)


PERCEPTUAL: dict[str, Measure] = {
    "ms-ssim": ms_ssim,
    "lpips": lpips,
    "clip-score": clip_score,
    "clip-iqa": clip_iqa,
    "image-reward": image_reward,
}
"""By the name of their row in ``metrics.METRICS``."""

UNPAIRED = frozenset({"clip-score", "clip-iqa", "image-reward"})
"""Do not look at the float model's picture."""


def _split(items: Sequence[str], size: int) -> list[list[str]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
