# SPDX-License-Identifier: Apache-2.0
"""The error of quantized text encoders, on the prompts of an evaluation."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from dtq.nn.linear import QuantLinear
from dtq.nn.weight_only import WeightOnly
from dtq.pipelines import prompts
from dtq.pipelines.contents import text_encoders
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.recorded_calls import embedding
from dtq.pipelines.sampling import batch_starts, run_text_encoders
from dtq.pipelines.settings import SamplingSettings


def quantized_text_encoders(loaded: LoadedModel) -> dict[str, nn.Module]:
    """The text encoders of a pipeline that have quantized layers, by component."""
    names = [] if loaded.pipeline is None else text_encoders(loaded.pipeline)
    models: dict[str, nn.Module] = {name: getattr(loaded.pipeline, name) for name in names}
    return {name: model for name, model in models.items() if is_quantized(model)}


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has quantized layers of dtq, or was quantized by another library."""
    own = any(isinstance(module, QuantLinear | WeightOnly) for module in model.modules())
    return own or getattr(model, "is_quantized", False)


@torch.no_grad()
def embedding_errors(
    candidate: LoadedModel,
    reference: LoadedModel,
    requests: prompts.Requests,
    settings: SamplingSettings,
) -> dict[str, float]:
    """Relative squared error of the embeddings of all prompts, for each quantized text encoder.

    Args:
        candidate: the quantized pipeline.
        reference: the float pipeline, which encodes the prompts.
        requests: of the evaluation.
        settings: of the evaluation.

    Returns:
        Component to error; empty if no text encoder is quantized.
    """
    models = quantized_text_encoders(candidate)
    error, size = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)

    def compare(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        want = embedding(output).double()
        got = embedding(models[name](*args, **kwargs)).double()
        error[name] += float((got - want).square().sum())
        size[name] += float(want.square().sum())

    with ExitStack() as hooks:
        for name in models:
            encoder = getattr(reference.pipeline, name)
            hook = partial(compare, name)
            hooks.enter_context(encoder.register_forward_hook(hook, with_kwargs=True))
        for start in batch_starts(reference.pipeline, requests, settings) if models else ():
            run_text_encoders(reference.pipeline, requests, settings, start)
    return {name: error[name] / size[name] for name in models if size[name]}
