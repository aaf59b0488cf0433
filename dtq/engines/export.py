# SPDX-License-Identifier: Apache-2.0
"""``dtq.export``: from a quantized model to a file of another engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dtq.checkpoint import reader
from dtq.checkpoint.config import DTQConfig
from dtq.engines import find_target
from dtq.engines.original import (
    KeyMap,
    config_of,
    fusion_reasons,
    key_map,
    tables,
    to_original,
)
from dtq.engines.target import Contents, StoredLayer, Target, stored_bytes
from dtq.errors import InputError
from dtq.nn.attention import int8_attention_modules
from dtq.nn.conv import QuantConv
from dtq.nn.linear import QuantLinear
from dtq.nn.weight_only import WeightOnly
from dtq.pipelines.contents import (
    Components,
    diffusion_transformers,
    diffusion_transformers_on_disk,
    folder_kind,
)
from dtq.pipelines.loading import load_model

log = logging.getLogger("dtq")

NAMES = ("auto", "original", "diffusers")
"""Of the tensors in a file; see :func:`export`."""


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        target: its name.
        file: the file, or the folder.
        component: the transformer of the pipeline.
        layers: weight format of each exported layer, by name.
        as_float: why, for each layer that was stored as floats because the engine cannot hold it.
        nbytes: size of the file.
        names: of the tensors, ``original`` or ``diffusers``; ``layers`` has the same names.
    """

    target: str
    file: Path
    component: str
    layers: dict[str, str] = field(default_factory=dict)
    as_float: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0
    names: str = "diffusers"

    def to_json(self) -> dict[str, Any]:
        """Plain data, for ``dtq export --json``."""
        return {**vars(self), "file": str(self.file)}


def export(
    source: Any,
    to: str,
    output: str | Path,
    *,
    component: Components = "auto",
    variant: str | None = None,
    unsupported: str = "refuse",
    names: str = "auto",
    overwrite: bool = False,
) -> ExportReport:
    """Write a quantized transformer as a file of another engine.

    The numbers are those of the checkpoint: nothing is rounded again.

    Args:
        source: folder of a dtq checkpoint, or a quantized pipeline or transformer.
        to: name of a target, a key of ``dtq.engines.TARGETS``.
        output: the file to write, or the folder; its suffix is that of the target.
        component: the transformer of a pipeline with several.
        variant: of the files of a folder.
        unsupported: ``refuse`` a model with layers that the engine cannot hold, or store those as
            ``float``, in the compute dtype.
        names: ``original``: those of the model's original files, by which most engines know a
            model, with q, k and v in one tensor where they are. ``diffusers``. ``auto``: original
            ones for families with a table in ``dtq/engines/original/names``.
        overwrite: replace an existing file.

    Returns:
        What was written, and what was stored as floats.

    Raises:
        InputError: no such target; several transformers and no ``component``; layers that the
            engine cannot hold, each with its reason; the file exists; original names are asked for
            and not known.
        CheckpointError: the checkpoint is damaged.
    """
    target = find_target(to)
    output = Path(output)
    if target.missing:
        raise InputError(
            f"{target.name} is written with {' and '.join(target.missing)}: "
            f"pip install 'dtq[engines]'"
        )
    if target.suffix and output.suffix != target.suffix:
        raise InputError(f"{output}: {target.name} writes a {target.suffix} file; name it so")
    there = [path for path in target.paths(output) if path.exists()]
    if there and not overwrite:
        raise InputError(f"{there[0]} exists; give another name, or --overwrite (overwrite=True)")
    if unsupported not in ("refuse", "float"):
        raise InputError(f"unsupported={unsupported!r}: expected 'refuse' or 'float'")
    if names not in NAMES:
        raise InputError(f"names={names!r}: expected one of {', '.join(NAMES)}")
    name, model = _transformer(source, component, variant)
    if modules := int8_attention_modules(model):
        log.warning(
            "%s: the file does not say that %d modules compute their attention in int8",
            output, len(modules),
        )  # fmt: skip
    if names == "original" and not target.original_names:
        raise InputError(f"{to} files have the names of diffusers: --names diffusers")
    keep = names == "diffusers" or not target.original_names
    original = None if keep else _original_names(model, names == "original")
    contents, as_float = holdable(model, target, unsupported == "float", original)
    if original:
        contents = to_original(contents, original)
    target.write(contents, output)
    layers = {key: layer.spec.weight_format for key, layer in contents.layers.items()}
    size, written = (
        sum(map(stored_bytes, target.paths(output))),
        "original" if original else "diffusers",
    )
    return ExportReport(target.name, output, name, layers, as_float, size, written)


def _original_names(model: nn.Module, required: bool) -> KeyMap | None:
    """The map to original names; None for a family without a table.

    Raises:
        InputError: there is none, and it is required, or diffusers does not read such a model.
    """
    found = key_map(config_of(model))
    if found is None and required:
        families = ", ".join(table.family for table in tables())
        raise InputError(
            f"dtq has no original names for {type(model).__name__}; it has those of {families}. "
            f"Keep the names of diffusers: --names diffusers"
        )
    return found


def contents_of(model: nn.Module) -> Contents:
    """The tensors and the config of a quantized model; what is no linear is decoded to floats.

    Raises:
        InputError: it is not quantized by dtq, or has a step policy, which no other engine runs.
    """
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if not isinstance(config, DTQConfig):
        raise InputError(
            f"{type(model).__name__} is not quantized by dtq; run dtq quantize first, and give "
            f"dtq export its output folder"
        )
    if config.load_plan().policy is not None:
        raise InputError(
            "the model has a step policy, and other engines run every timestep in the same "
            "precision; quantize with --set step_policy.precisions=[]"
        )
    every = dict(model.named_modules())
    modules = {n: m for n, m in every.items() if isinstance(m, QuantLinear)}
    unpacked = {n: m for n, m in every.items() if isinstance(m, WeightOnly)}
    packed = {f"{n}.{key}" for n, m in modules.items() for key in m.tensor_specs()}
    packed |= {f"{n}.{key}" for n, m in unpacked.items() for key in m.tensor_specs()}
    others = {key: t.detach() for key, t in model.state_dict().items() if key not in packed}
    others |= {f"{name}.weight": m.dequantize() for name, m in unpacked.items()}
    layers = {
        name: StoredLayer(
            module.spec,
            (module.out_features, module.in_features),
            {key: t.detach() for key, t in module.packed_tensors().items()},
            module.spatial,
        )
        for name, module in modules.items()
    }
    dtypes = [str(m.compute_dtype).removeprefix("torch.") for m in modules.values()]
    return Contents(layers, others, config_of(model), config.recipe, dtypes[0] if dtypes else "")


def holdable(
    model: nn.Module, target: Target, as_float: bool, original: KeyMap | None = None
) -> tuple[Contents, dict[str, str]]:
    """The contents of a model, with the layers that a target cannot hold as floats.

    Args:
        model: quantized by dtq.
        target: the file format.
        as_float: whether to store such layers as floats; otherwise they are refused.
        original: original names that the file will have; layers that they join must fit together.

    Returns:
        The contents; why, for each layer that became float.

    Raises:
        InputError: there are such layers; every reason, with a layer and a way out.
    """
    contents = contents_of(model)
    found = {name: target.unsupported_reason(layer) for name, layer in contents.layers.items()}
    reasons = {name: reason for name, reason in found.items() if reason}
    floats = {
        name: "a convolution with 8-bit weights" if isinstance(m, QuantConv) else "a packed table"
        for name, m in model.named_modules()
        if isinstance(m, WeightOnly)
    }
    apart = {}
    if original:
        held = {name: x for name, x in contents.layers.items() if name not in reasons}
        apart = fusion_reasons(held, original)
        reasons |= apart
    if (reasons or floats) and not as_float:
        more = "; or keep each layer by itself: --names diffusers" if apart else ""
        raise InputError(_refusal(target, reasons | floats) + more)
    weights: dict[str, Tensor] = {}
    for name in reasons:
        module = model.get_submodule(name)
        assert isinstance(module, QuantLinear)
        weights[f"{name}.weight"] = module.unquantized().weight.detach()  # type: ignore[operator, union-attr]
    layers = {name: layer for name, layer in contents.layers.items() if name not in reasons}
    if not layers:
        why = _refusal(target, reasons) if reasons else "no layer is quantized"
        raise InputError(f"{why}; no layer would be left for {target.name}")
    held_as_float = reasons | floats
    return replace(contents, layers=layers, others=contents.others | weights), held_as_float


def _refusal(target: Target, reasons: dict[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    lines = "; ".join(
        f"{each[0]}{f' and {len(each) - 1} more' if len(each) > 1 else ''}: {reason}"
        for reason, each in names.items()
    )
    recipe = target.limits.recipe
    return (
        f"{target.name} cannot hold these layers: {lines}. Quantize with --recipe "
        f"{recipe} --to {target.name}, or store these layers as floats: --unsupported float"
    )


def _transformer(
    source: Any, component: Components, variant: str | None
) -> tuple[str, nn.Module]:  # its name in the pipeline, and the model
    if isinstance(source, nn.Module):
        return "transformer", source
    if isinstance(source, DiffusionPipeline):
        names = diffusion_transformers(source) if component == "auto" else _listed(component)
        name = _only(names, type(source).__name__)
        if not isinstance(getattr(source, name, None), nn.Module):
            raise InputError(f"{type(source).__name__} has no transformer {name!r}")
        return name, getattr(source, name)
    path = Path(source)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; dtq export reads the output of dtq quantize")
    if component == "auto" and folder_kind(path) == "pipeline":
        component = diffusion_transformers_on_disk(path)
    found = reader.verify(path, component, variant)
    name = _only(list(found), str(path))
    folder, own = found[name]
    return name, load_model(folder, variant=own)


def _listed(component: Components) -> list[str]:
    return [component] if isinstance(component, str) else list(component)


def _only(names: list[str], where: str) -> str:
    if len(names) == 1:
        return names[0]
    raise InputError(
        f"{where} has {len(names)} quantized transformers ({', '.join(names) or 'none'}); a file "
        f"holds one: name it with --component (component=)"
    )
