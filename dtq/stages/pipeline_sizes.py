# SPDX-License-Identifier: Apache-2.0
"""Bytes of all weight files of a pipeline, before they are written: the least and the most."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dtq.allocate import parse_size
from dtq.errors import InputError
from dtq.models import is_text_encoder
from dtq.pipelines.loading import LoadedModel
from dtq.plan.layers import LayerPlan, Plan
from dtq.recipe.resolve import BNB_NF4
from dtq.stages.autoencoder import VAE_CHOICES, weights_plan
from dtq.stages.file_tensors import model_bytes
from dtq.stages.mixed_precision import in_option, members_of
from dtq.stages.run import Run
from dtq.stages.text_nf4 import nf4_bytes

log = logging.getLogger("dtq")

FLOAT = "float"
"""Option of a text encoder's layers and of the autoencoder: not quantized."""
VAE = "vae"
"""Component and item of the autoencoder."""


@dataclass
class PipelineBudget:
    """What all weight files of a pipeline may take together.

    Attributes:
        bytes: of all files.
        vae: what is done with the autoencoder, a key of ``VAE_CHOICES``; empty: the budget decides.
        nf4: whether the text encoders are stored in NF4 of bitsandbytes.
        outcome: what was chosen: ``budget``, ``bytes``, ``vae``, and for each of ``components`` its
            ``bytes``, ``error`` and ``error_share`` (None for a model that was not measured).
    """

    bytes: int
    vae: str = ""
    nf4: bool = False
    outcome: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, size: str | None, vae: str | None, text_encoder: object) -> PipelineBudget | None:
        """The budget that a user writes as a size, ``12GB``; None without one.

        Args:
            size: of all files.
            vae: as for :func:`dtq.quantize`.
            text_encoder: as for :func:`dtq.quantize`.

        Raises:
            InputError: it is no size.
        """
        if size is None:
            return None
        return cls(parse_size(size), vae or "", text_encoder == BNB_NF4)


@dataclass(frozen=True)
class Sizes:
    """Bytes of weight files: of models that the budget cannot change, and of the others at least.

    Attributes:
        fixed: by component.
        least: by component, with the narrowest formats.
        most: by component, with the widest formats.
    """

    fixed: dict[str, int]
    least: dict[str, int]
    most: dict[str, int]

    def smallest(self) -> int:
        """Bytes of the smallest pipeline that the formats allow."""
        return sum(self.fixed.values()) + sum(self.least.values())

    def largest(self) -> int:
        """Bytes of the largest pipeline: what a budget beyond that cannot use."""
        return sum(self.fixed.values()) + sum(self.most.values())


def sizes(
    runs: Sequence[Run], others: Mapping[str, tuple[nn.Module, int]], vae: str = "keep"
) -> Sizes:
    """What the files of a planned pipeline take.

    Args:
        runs: after the plan stage; models on the meta device will do.
        others: the models of the pipeline without a run, and the bytes of their float files.
        vae: a key of ``VAE_CHOICES``, or empty.
    """
    fixed = {name: size for name, (_, size) in others.items()}
    least: dict[str, int] = {}
    most: dict[str, int] = {}
    for run in runs:
        name, model, dtype = run.loaded.component, run.model, run.loaded.dtype
        if not run.shares_budget:
            fixed[name] = model_bytes(model, run.plan, dtype)
            continue
        plans = [in_option(run, option) for option in run.formats]
        if run.may_stay_float:
            plans.append(run.plan.with_layers({x.name: left_float(x) for x in run.plan.gemm()}))
        for chosen, pick in ((least, min), (most, max)):
            chosen[name] = model_bytes(model, _extreme(run, plans, pick), dtype)
    autoencoder, _ = others.get(VAE, (None, 0))
    if vae != "keep" and autoencoder is not None and can_change(autoencoder):
        small = autoencoder_bytes(autoencoder)
        if vae:
            fixed[VAE] = small
        else:
            least[VAE], most[VAE] = sorted((small, fixed.pop(VAE)))
    return Sizes(fixed, least, most)


def _extreme(run: Run, plans: Sequence[Plan], pick: Callable[..., list[LayerPlan]]) -> Plan:
    """The plan with the narrowest or widest option of each input group."""
    chosen: dict[str, LayerPlan] = {}
    dtype = run.loaded.dtype
    for names in members_of(run).values():
        tried = [[plan[name] for name in names] for plan in plans]
        layers = pick(tried, key=lambda xs: sum(x.nbytes(run.plan.bins, dtype) for x in xs))
        chosen |= {x.name: x for x in layers}
    return run.plan.with_layers(chosen)


def autoencoder_bytes(model: nn.Module) -> int:
    """Bytes of the file of an autoencoder with 8-bit weights."""
    plan = weights_plan(model, VAE_CHOICES["w8"])
    return model_bytes(model, plan, next(model.parameters()).dtype)


def other_models(runs: Sequence[Run], nf4: bool) -> dict[str, tuple[nn.Module, int]]:
    """The models of the pipeline that no run quantizes, and the bytes of their files.

    Args:
        runs: of the pipeline.
        nf4: whether the text encoders are stored in NF4 of bitsandbytes.
    """
    pipeline = runs[0].loaded.pipeline
    names = {run.loaded.component for run in runs}
    parts = {} if pipeline is None else pipeline.components
    models = {n: m for n, m in parts.items() if isinstance(m, nn.Module) and n not in names}
    return saved_files(models, nf4)


def saved_files(models: Mapping[str, nn.Module], nf4: bool) -> dict[str, tuple[nn.Module, int]]:
    """Models by name, and the bytes of the file that each of them is saved as.

    Args:
        models: on any device.
        nf4: whether text encoders are stored in NF4 of bitsandbytes.
    """
    files = {}
    for name, model in models.items():
        if nf4 and is_text_encoder(model):
            files[name] = model, nf4_bytes(LoadedModel(name, None, name, model))
        else:  # diffusers writes no file for a model without tensors
            size = model_bytes(model, None, _dtype_of(model)) if model.state_dict() else 0
            files[name] = model, size
    return files


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Dtype of the first floating tensor of a model; float32 for one that has none."""
    floats = (t.dtype for t in model.state_dict().values() if t.is_floating_point())
    return next(floats, torch.float32)


def check_budget(runs: Sequence[Run], budget: PipelineBudget) -> Sizes:
    """Refuse, before any work, a budget that no choice of formats meets.

    Args:
        runs: of the whole pipeline, after the plan stage.
        budget: what is asked for.

    Raises:
        InputError: with the smallest size, and what it is made of.
    """
    found = sizes(runs, other_models(runs, budget.nf4), budget.vae)
    refuse_too_small(budget.bytes, found, runs[0].loaded.name)
    return found


def refuse_too_small(budget: int, found: Sizes, name: str) -> None:
    """Refuse a budget below the smallest size.

    Raises:
        InputError: with the smallest size, and what it is made of.
    """
    if budget >= found.smallest():
        return
    parts = [f"{n} at least {size}" for n, size in found.least.items()]
    parts += [f"{n} {size} as it is" for n, size in found.fixed.items()]
    raise InputError(
        f"{name}: a budget of {budget} bytes is too small: all weight files take at least "
        f"{found.smallest()} bytes ({', '.join(parts)}). Raise it, take a recipe with narrower "
        f"formats (--set allocate.formats=[...]), or let the budget choose more components "
        f"(without --text-encoder and --vae)"
    )


def can_change(vae: nn.Module | None) -> bool:
    """Whether dtq can quantize a model as an autoencoder."""
    return vae is not None and hasattr(vae, "decode") and not getattr(vae, "is_quantized", False)


def left_float(layer: LayerPlan) -> LayerPlan:
    """The layer as the budget leaves it float."""
    note = "float: the budget has room for it"
    return replace(LayerPlan(layer.name, layer.role, layer.shape), note=note)
