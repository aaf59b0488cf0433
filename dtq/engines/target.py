# SPDX-License-Identifier: Apache-2.0
"""What a target is: a file format of another engine, what it can hold, how it is written and read.

A target never rounds again. It stores the integers, scales and tables that dtq calibrated, in the
order and under the names that the other engine reads. What the engine has no place for is refused
with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from dtq.formats import PackedTensors
from dtq.plan.layers import LayerPlan, LayerSpec
from dtq.transforms.base import OnlineTransform


@dataclass(frozen=True)
class StoredLayer:
    """A quantized linear (N, K) as dtq stores it.

    Attributes:
        spec: formats, transform, rank.
        shape: (N, K).
        tensors: packed tensors with on-disk dtypes, without the bias.
        spatial: axes after the channels in place of a 1 x 1 convolution; 0 for a linear.
    """

    spec: LayerSpec
    shape: tuple[int, int]
    tensors: PackedTensors
    spatial: int = 0

    def weights(self) -> PackedTensors:
        """The tensors of the weight format."""
        return {name: t for name, t in self.tensors.items() if name.startswith("weight")}

    def transform(self) -> OnlineTransform | None:
        """The transform of the input; None if it changes nothing."""
        scale = self.tensors.get("pre_quant_scale")
        perm = self.tensors.get("pre_quant_perm")
        moves = perm is not None or self.spec.hadamard_block_size > 1
        if scale is None or not (moves or bool((scale != 1).any())):
            return None
        return OnlineTransform(
            scale.reshape(-1),
            self.spec.hadamard_block_size,
            None if perm is None else perm.reshape(-1),
            self.spec.num_rotations,
        )


@dataclass(frozen=True)
class Contents:
    """Everything in a file: quantized layers, other tensors, and what the model is.

    Attributes:
        layers: quantized linears by dotted name.
        others: every other tensor by name, biases of quantized linears among them.
        config: the diffusers config of the model, with ``_class_name``; empty if the file does not
            say.
        recipe: name of the recipe; empty if the file does not say.
        compute_dtype: of the quantized layers, as torch names it; empty if the file does not say.
        architecture: the family's name in GGUF files, if names are original ones; otherwise empty.
    """

    layers: dict[str, StoredLayer]
    others: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    compute_dtype: str = ""
    architecture: str = ""


INT4_GROUPS = {f"int4{asym}-g{group}": group for asym in ("", "-asym") for group in (32, 64, 128)}
"""4-bit integers with a scale, and perhaps a zero point, for every group of columns."""


def any_shape(spec: LayerSpec, shape: tuple[int, int]) -> str | None:
    """The ``shape_reason`` of an engine that holds every shape: None."""
    return None


def any_knobs(layer: LayerPlan) -> str | None:
    """The ``transform_reason`` of an engine that runs whatever its methods give: None."""
    return None


@dataclass(frozen=True)
class Limits:
    """What an engine can hold, in terms of a recipe; checked before anything is calibrated.

    Attributes:
        formats: weight format to the activation formats that it runs with.
        recipe: a shipped recipe that fits, for messages.
        transforms: methods whose transforms it runs.
        fallbacks: weight formats, best first, for layers whose format the recipe did not choose:
            modulation, and layers that the recipe's format does not fit.
        shape_reason: why a linear (N, K) cannot be stored with a spec that the other limits allow;
            None if it can.
        transform_reason: why the method of a layer, one of ``transforms``, may choose a transform
            that the engine does not run with the layer's formats; None if it cannot.
        branch: weight and activation format of the layers in which it runs a low-rank branch.
    """

    formats: Mapping[str, tuple[str, ...]]
    recipe: str
    transforms: tuple[str, ...] = ("none",)
    fallbacks: tuple[str, ...] = ()
    shape_reason: Callable[[LayerSpec, tuple[int, int]], str | None] = any_shape
    transform_reason: Callable[[LayerPlan], str | None] = any_knobs
    branch: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Loss:
    """What a file cannot hold of dtq's own formats, and what that costs.

    The costs are measured by ``python scripts/engines --lost``, and stand in docs/engines/README.md
    with their conditions: squared error of the recipe of ``Limits``, relative to that of ``own``.

    Attributes:
        lacks: what the file has no place for.
        own: the recipe of dtq's own formats that is nearest in bits.
        demo: the ratio on the bundled model; None: not measured.
        outliers: the ratio on the same model with outliers in its activations.
    """

    lacks: str
    own: str
    demo: float | None = None
    outliers: float | None = None


@dataclass(frozen=True)
class Target:
    """A row of the table of targets.

    Attributes:
        name: key of ``TARGETS``.
        about: one line for ``dtq export --list``.
        suffix: of its files; empty: it writes folders.
        limits: what a recipe may ask for.
        unsupported_reason: why the engine cannot hold a solved layer; None if it can.
        write: writes a file.
        read: reads a file; the inverse of ``write``. None: dtq does not read such files.
        recognizes: whether a file is one of this engine; looks at its header alone.
        describe: config and recipe in a file that dtq does not read, a graph.
        companions: suffixes of the files that a file has next to it.
        packages: modules that ``write`` needs beyond dtq's own dependencies.
        original_names: whether the engine knows a model by its original names; otherwise by those
            of diffusers.
        loss: against dtq's own formats.
    """

    name: str
    about: str
    suffix: str
    limits: Limits
    unsupported_reason: Callable[[StoredLayer], str | None]
    write: Callable[[Contents, Path], None]
    read: Callable[[Path], Contents] | None = None
    recognizes: Callable[[Path], bool] = lambda path: False
    describe: Callable[[Path], Contents] = lambda path: Contents({}, {})
    companions: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    original_names: bool = True
    loss: Loss = field(kw_only=True)

    @property
    def missing(self) -> list[str]:
        """Packages that ``write`` needs and that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]

    def paths(self, file: Path) -> list[Path]:
        """A file, or a folder, and its companions."""
        return [file, *map(file.with_suffix, self.companions)]


def stored_bytes(path: Path) -> int:
    """Size of a file, or of the files of a folder, in bytes."""
    files = path.iterdir() if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)


def file_in_checkpoint(component: str, target: Target) -> Path:
    """Where ``dtq quantize --to`` puts the file of a transformer, in its output folder.

    Args:
        component: name of the transformer in the pipeline.
        target: that the file is of.
    """
    return Path("engines", f"{component}-{target.name}{target.suffix}")


OF_THE_CHECKPOINT = ("quantization_config", "_name_or_path", "_pre_quantization_dtype")
"""Keys of a diffusers config that describe a checkpoint, not the model."""
CONVOLUTION = "it stands for a 1 x 1 convolution"
"""Why no target holds a layer of dtq that is not a linear of the model."""


def common_reason(layer: StoredLayer, limits: Limits) -> str | None:
    """Why an engine that runs plain linears cannot hold a layer; None if it can.

    Args:
        layer: the solved layer.
        limits: of the engine.
    """
    spec = layer.spec
    if layer.spatial:
        return CONVOLUTION
    if spec.weight_format not in limits.formats:
        return f"weights are {spec.weight_format}, not {' or '.join(limits.formats)}"
    runs = limits.formats[spec.weight_format]
    if spec.activation_format not in runs:
        return f"activations are {spec.activation_format}, not {' or '.join(runs)}"
    if spec.rank and (spec.weight_format, spec.activation_format) not in limits.branch:
        return "it has a low-rank branch"
    if limits.transforms == ("none",) and layer.transform() is not None:
        return "its input has a transform, and this format has no place for one"
    return limits.shape_reason(spec, layer.shape)
