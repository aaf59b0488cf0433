# SPDX-License-Identifier: Apache-2.0
"""Which layer of the model each layer of an adapter file is.

Names that are those of the model, with or without a prefix, dotted or with underscores, are looked
up. For all others the LoRA loader of the pipeline is asked: it gets a LoRA of rank 1 with the
file's names, whose numbers tell where each row went. So every layout that diffusers converts for
LoRA, fused q, k, v included, is one for LoKr, LoHa and DoRA too, and dtq has no table of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

from dtq.errors import LIBRARY_ERRORS, InputError, first_line
from dtq.integrations.adapter_file import Factors, listed, split_key

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.",
            "unet.", "lora_unet_", "lora_transformer_", "lycoris_", "lora_")  # fmt: skip
"""What tools put before the name of a layer of the denoiser."""

TEXT = ("lora_te", "text_encoder", "text_encoders.", "conditioner.", "cond_stage_model.")
"""How names of the layers of text encoders begin."""


class Part(NamedTuple):
    """A layer of the model, and the rows of a layer of the file that are its own."""

    source: str
    rows: Tensor  # int64 (M,)


def find_layers(
    model: nn.Module, layers: Mapping[str, Factors], pipeline: Any = None
) -> dict[str, Part]:
    """Find the layer of the model for each layer of an adapter.

    Args:
        model: the transformer, with or without adapters.
        layers: by name in the file.
        pipeline: with ``lora_state_dict``, which knows other layouts; None for none.

    Returns:
        Name in the model to its part of the adapter.

    Raises:
        InputError: a name is not found, or the shapes differ; names up to five.
    """
    targets = _targets(model)
    found = _by_name(targets, layers)
    if len(found) < len(layers):
        tried: Mapping[str, Exception | None] = {
            "a pipeline with a LoRA loader would know more layouts; give the pipeline": None
        }
        if hasattr(pipeline, "lora_state_dict"):
            found, tried = _by_loader(pipeline, model, layers, found)
        sources = {part.source for part in found.values()}
        missing = [name for name in layers if name not in sources]
        if missing:
            what = f"{len(missing)} layers of the adapter are not in {type(model).__name__}"
            cause = next((error for error in tried.values() if error is not None), None)
            raise InputError(listed(f"{what} ({', '.join(missing[:5])})", [*tried])) from cause
    shapes = {n: (len(part.rows), layers[part.source].shape[1]) for n, part in found.items()}
    wrong = [
        f"{name} is {targets[name]}, {part.source} gives {shapes[name]}"
        for name, part in found.items()
        if shapes[name] != targets[name]
    ]
    if wrong:
        raise InputError(listed("the adapter is for layers of other shapes", wrong))
    return found


def _targets(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Shape (N, K) of every linear by its name without adapters."""
    return {
        name.replace(".base_layer", ""): (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _in_adapter(name)
    }


def _in_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _by_name(
    targets: Mapping[str, tuple[int, int]], layers: Mapping[str, Factors]
) -> dict[str, Part]:
    """Layers whose names are those of the model; a name may have underscores for dots.

    Raises:
        InputError: two layers of the file are one of the model.
    """
    flat = {name.replace(".", "_"): name for name in targets}
    found: dict[str, Part] = {}
    for source, factors in layers.items():
        bare = source
        while (prefix := next((p for p in PREFIXES if bare.startswith(p)), None)) is not None:
            if bare in targets or bare in flat:
                break
            bare = bare.removeprefix(prefix)
        name = bare if bare in targets else flat.get(bare)
        if name is None:
            continue
        if name in found:
            raise InputError(
                f"{found[name].source} and {source} are both {name}; remove one from the file"
            )
        found[name] = Part(source, torch.arange(factors.shape[0]))
    return found


def _by_loader(
    pipeline: Any, model: nn.Module, layers: Mapping[str, Factors], by_name: Mapping[str, Part]
) -> tuple[dict[str, Part], dict[str, Exception | None]]:
    """What the LoRA loader of the pipeline makes of the names; else why it does not.

    Layers that it leaves out may be found by name.

    Returns:
        Name in the model to its part, and reasons with the errors of the loader.
    """
    loader, targets = type(pipeline).__name__, _targets(model)
    problems: dict[str, Exception | None] = {}
    for probe in _probes(layers):
        options = {"unet_config": model.config} if hasattr(pipeline, "unet") else {}
        try:
            converted = pipeline.lora_state_dict(probe, **options)
        except LIBRARY_ERRORS as error:  # how converters end on names they do not know
            problems[f"{loader}: {first_line(error)}"] = error
            continue
        state = converted[0] if isinstance(converted, tuple) else converted
        if options:  # as diffusers does before it loads: to_out_lora.down is to_out.0.lora_A
            state = convert_unet_state_dict_to_peft(state)
        found = _traced(state, [*layers], targets)
        rows = dict.fromkeys(layers, 0)
        for part in found.values():
            rows[part.source] += len(part.rows)
        rest = {n: p for n, p in by_name.items() if rows[p.source] == 0 and n not in found}
        known = {p.source for p in rest.values()}
        if all(rows[n] == factors.shape[0] or n in known for n, factors in layers.items()):
            return {**rest, **found}, {}
        problems[f"{loader} does not know them"] = None
    return dict(by_name), problems


def _probes(layers: Mapping[str, Factors]) -> Iterator[dict[str, Tensor]]:
    """LoRA of rank 1 with the names of the file, in the ways that loaders tell apart.

    The one row of ``A`` is the number of the layer, from 1; ``B`` numbers the rows, from 1.
    """
    dotted = [name for name in layers if "." in name.removeprefix("diffusion_model.")]
    renamed = {name: name for name in layers}
    layouts = [renamed]
    if len(dotted) == len(layers):
        bare = {n: n.removeprefix("model.").removeprefix("diffusion_model.") for n in layers}
        layouts.append({n: f"diffusion_model.{b}" for n, b in bare.items()})
        layouts.append({n: "lora_unet_" + b.replace(".", "_") for n, b in bare.items()})
    for names in layouts:
        for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
            for alpha in (True, False):
                probe = {}
                for number, (name, factors) in enumerate(layers.items(), 1):
                    rows, columns = factors.shape
                    stem = names[name]
                    probe[f"{stem}.{down}.weight"] = torch.full((1, columns), float(number))
                    probe[f"{stem}.{up}.weight"] = torch.arange(1.0, rows + 1)[:, None]
                    if alpha:
                        probe[f"{stem}.alpha"] = torch.tensor(1.0)
                yield probe


def _traced(
    state: Mapping[str, Tensor], sources: list[str], targets: Mapping[str, tuple[int, int]]
) -> dict[str, Part]:
    """Read from a converted probe where the rows went; leaves out what cannot be read."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if split := split_key(key):
            pairs.setdefault(split[0], {})[split[1]] = tensor
    found = {}
    for stem, pair in pairs.items():
        name = next((stem.removeprefix(p) for p in ("", "transformer.", "unet.")
                     if stem.removeprefix(p) in targets), None)  # fmt: skip
        down, up = pair.get("lora_A"), pair.get("lora_B")
        if name is None or down is None or up is None or up.shape[1] != 1:
            continue
        number = float(down.flatten()[0])
        if bool((down == number).all()) and number in range(1, len(sources) + 1):
            found[name] = Part(sources[int(number) - 1], up.flatten().long() - 1)
    return found
