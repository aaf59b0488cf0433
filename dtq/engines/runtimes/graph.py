# SPDX-License-Identifier: Apache-2.0
"""A graph of a whole model, called as the diffusers model that it was made of."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from dtq.engines.onnx_graph import constants_of
from dtq.errors import InputError


@dataclass(frozen=True)
class Graph:
    """A compiled graph.

    Attributes:
        inputs: dtype of each input.
        run: the first output, from a tensor for each input.
        constants: of the traced call, see :func:`dtq.engines.onnx_graph.constants_of`.
    """

    inputs: Mapping[str, torch.dtype]
    run: Callable[[dict[str, Tensor]], Tensor]
    constants: Mapping[str, Any]


def as_model(graph: Graph, model: nn.Module) -> nn.Module:
    """A copy of a diffusers model whose forward is a graph; it shares the tensors of the model.

    Args:
        graph: of such a model.
        model: with the config, attributes and dtype that a pipeline asks for.
    """
    kind = type(model)
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}
    made = copy.deepcopy(model, memo=dict(tensors))
    dtype = model.dtype
    signature = inspect.signature(kind.forward)

    @functools.wraps(kind.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(made, *args, **kwargs).arguments
        given.pop(next(iter(signature.parameters)))
        as_dict = given.get("return_dict", True)
        output = graph.run(_tensors(graph, given)).to(dtype)  # type: ignore[arg-type]
        return Transformer2DModelOutput(sample=output) if as_dict else (output,)

    made.forward = forward  # type: ignore[method-assign]
    return made


def _tensors(graph: Graph, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs of the graph in the arguments of a call.

    Raises:
        InputError: the call has other arguments than the traced one.
    """
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    if tensors.keys() != graph.inputs.keys():
        more, fewer = tensors.keys() - graph.inputs.keys(), graph.inputs.keys() - tensors.keys()
        words = [f"passes {', '.join(sorted(more))}, which is no input of it"] if more else []
        words += [f"does not pass its input {', '.join(sorted(fewer))}"] if fewer else []
        raise InputError(f"the graph was made with other arguments: the call {'; '.join(words)}")
    fixed = constants_of(given)
    if fixed != graph.constants:
        raise InputError(
            f"the call passes {fixed or 'no constants'}, and the graph was made with "
            f"{dict(graph.constants) or 'none'}, which are a part of it"
        )
    return {name: tensors[name].to(dtype) for name, dtype in graph.inputs.items()}
