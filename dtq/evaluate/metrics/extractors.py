# SPDX-License-Identifier: Apache-2.0
"""``EXTRACTORS``: networks that turn pictures into features, bundled, local or from the hub.

An extractor is a function of float pictures (B, 3, H, W) in [0, 1] that returns what it has of
``pool`` (B, D), ``spatial`` (B, S) and ``logits`` (B, C). Features of different extractors, or of
different resizers, give figures that cannot be compared, so both are named beside every figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from dtq import demo
from dtq.demo.classifier import EmojiClassifier
from dtq.errors import InputError
from dtq.evaluate import optional_packages
from dtq.evaluate.metrics.fid import FeatureMoments
from dtq.evaluate.metrics.images import as_bytes

Features = dict[str, Tensor]

SPATIAL = 7
"""Channels of the map that sFID looks at (2103.03841, as in the ADM suite)."""

IMAGENET_NORMAL = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_NORMAL = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Extractor:
    """A network ready to use.

    Attributes:
        name: said beside every figure, with what it was loaded from.
        resizer: what happens to the pictures before it.
        call: pictures to features.
        real: moments of the training pictures' pooled features, where they are known.
    """

    name: str
    resizer: str
    call: Callable[[Tensor], Features]
    real: FeatureMoments | None = None

    @torch.no_grad()
    def __call__(self, pictures: Tensor, batch: int = 64) -> Features:
        """Features of any number of pictures, float32 on the CPU."""
        parts = [self.call(part) for part in pictures.split(batch)]
        return {key: torch.cat([p[key].float().cpu() for p in parts]) for key in parts[0]}


def resized(pictures: Tensor, size: int) -> Tensor:
    """Float pictures (B, 3, size, size), bicubic with antialiasing, clamped to [0, 1]."""
    if pictures.shape[-2:] == (size, size):
        return pictures
    out = F.interpolate(pictures, (size, size), mode="bicubic", antialias=True)
    return out.clamp(0, 1)


def normal(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures (B, 3, H, W) shifted and scaled as a network was trained with."""
    shift, scale = (pictures.new_tensor(t)[:, None, None] for t in (mean, std))
    return (pictures - shift) / scale


def emoji(where: str) -> Extractor:
    """The bundled classifier of the bundled models' pictures."""
    folder = Path(where) if where else demo.folder() / "classifier"
    tensors = load_file(folder / "model.safetensors")
    real = None
    if "real.mean" in tensors:
        real = FeatureMoments(tensors.pop("real.mean").double(), tensors.pop("real.cov").double())
    model = EmojiClassifier(tensors["head.weight"].shape[0])
    model.load_state_dict({k: v.float() for k, v in tensors.items()})
    model.eval()

    def call(pictures: Tensor) -> Features:
        x = pictures * 2 - 1
        for stage in model.stages:
            x = stage(x)
        pool = F.silu(x).mean((2, 3))
        return {"pool": pool, "spatial": x[:, :SPATIAL].flatten(1), "logits": model.head(pool)}

    return Extractor("emoji", "none", call, real)


def random(where: str) -> Extractor:
    """A convolutional network of fixed random weights: tests the plumbing, says little else."""
    if where:
        raise InputError("the extractor random has no weights to load")
    g = torch.Generator().manual_seed(0)
    stages = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 32), (32, 64), (64, 64)))
    head = nn.Linear(64, 10)
    for parameter in [*stages.parameters(), *head.parameters()]:
        wide = parameter[0].numel() if parameter.ndim > 1 else len(parameter)
        parameter.data = torch.randn(parameter.shape, generator=g) / wide**0.5

    def call(pictures: Tensor) -> Features:
        x = resized(pictures, 64) * 2 - 1
        for stage in stages:
            x = F.silu(stage(x))
        pool = x.mean((2, 3))
        return {"pool": pool, "spatial": x[:, :SPATIAL].flatten(1), "logits": head(pool)}

    return Extractor("random (plumbing only)", "bicubic-antialias 64", call)


def inception(where: str) -> Extractor:
    """Inception-v3 of the FID paper: torch-fidelity's weights, or a TorchScript file.

    ``pt_inception-2015-12-05-*.pth`` needs the package torch-fidelity and gives all three kinds of
    features; spatial ones are the first 7 channels of the first branch of ``Mixed_6d``, which is
    ``mixed_6/conv`` of the TensorFlow graph. A ``.pt`` or ``.ts`` file is called as
    ``model(uint8 pictures, return_features=True)`` and gives pooled features alone.
    """
    path = _file(where, "inception", "pt_inception-2015-12-05-6726825d.pth")
    if path.suffix in (".pt", ".ts"):
        script = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]

        def scripted(pictures: Tensor) -> Features:
            return {"pool": script(as_bytes(pictures), return_features=True)}

        return Extractor(f"inception {path.name}", "in the file", scripted)
    module = optional_packages.need(
        "torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity"
    )
    model = module.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    ).eval()
    seen: list[Tensor] = []
    branch = model.Mixed_6d.branch1x1
    branch.register_forward_hook(lambda _m, _i, out: seen.append(out))

    def call(pictures: Tensor) -> Features:
        seen.clear()
        pool, logits = model(as_bytes(pictures))
        spatial = seen.pop()[:, :SPATIAL].flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": logits}

    return Extractor(f"inception {path.name}", "TF1 bilinear 299", call)


def dinov2(where: str) -> Extractor:
    """DINOv2 class token (FD-DINOv2, 2306.04675: ViT-L/14), a transformers folder or hub id."""
    transformers = optional_packages.need("transformers", "transformers")
    name = where or "facebook/dinov2-large"
    model = optional_packages.pretrained(transformers.AutoModel, name, "dinov2").eval()

    def call(pictures: Tensor) -> Features:
        x = normal(resized(pictures, 224), *IMAGENET_NORMAL)
        return {"pool": model(pixel_values=x).last_hidden_state[:, 0]}

    return Extractor(f"dinov2 {name}", "bicubic-antialias 224", call)


def clip(where: str) -> Extractor:
    """CLIP image embeddings (CMMD: ViT-L/14 at 336), a transformers folder or hub id."""
    transformers = optional_packages.need("transformers", "transformers")
    name = where or "openai/clip-vit-large-patch14-336"
    model = optional_packages.pretrained(
        transformers.CLIPVisionModelWithProjection, name, "clip"
    ).eval()
    size = model.config.image_size

    def call(pictures: Tensor) -> Features:
        return {
            "pool": model(pixel_values=normal(resized(pictures, size), *CLIP_NORMAL)).image_embeds
        }

    return Extractor(f"clip {name}", f"bicubic-antialias {size}", call)


EXTRACTORS: dict[str, Callable[[str], Extractor]] = {
    "emoji": emoji,
    "random": random,
    "inception": inception,
    "dinov2": dinov2,
    "clip": clip,
}
"""By name; each takes a local path or hub id, or ``""`` for its own default."""


def load(name: str, where: str = "") -> Extractor:
    """An extractor by name.

    Raises:
        InputError: no such extractor, its package or its weights are not there.
    """
    if name not in EXTRACTORS:
        raise InputError(f"unknown extractor {name!r}; there are {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](where)


def _file(where: str, name: str, example: str) -> Path:
    if not where:
        raise InputError(f"{name} needs its weights: --extractor {name}=FOLDER/{example}")
    if not Path(where).is_file():
        raise InputError(f"{where}: no such file; {name} needs its weights, for example {example}")
    return Path(where)
