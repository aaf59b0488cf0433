# SPDX-License-Identifier: Apache-2.0
"""OpenVINO, and NNCF, its tool for quantization: candidates that run a whole model.

Each mode is set up as the documentation of OpenVINO recommends, for low latency, with bfloat16 for
what is not quantized. Where it recommends a range, the fastest value is taken.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtq.bench.cases import Inputs
from dtq.bench.compare import Candidate
from dtq.bench.packages import installed, versions
from dtq.evaluate.optional_packages import need

PACKAGES = ("openvino", "nncf")


@dataclass(frozen=True)
class Mode:
    """A way to run a model with OpenVINO.

    Attributes:
        about: in the words of OpenVINO.
        prepare: ``(ov.Model, inputs of calibration calls) -> ov.Model``.
        group: inputs of a linear that share a scale in dynamic quantization, given the width of the
            model; None: the activations are not quantized dynamically.
    """

    about: str
    prepare: Callable[[Any, Sequence[Any]], Any]
    group: Callable[[int], int] | None = None


def _post_training(model: Any, calls: Sequence[Any]) -> Any:
    nncf: Any = need("nncf", "nncf")
    data, kind = nncf.Dataset(calls), nncf.ModelType.TRANSFORMER
    return nncf.quantize(model, data, model_type=kind, subset_size=len(calls))


def _int8_weights(model: Any, calls: Sequence[Any]) -> Any:
    nncf: Any = need("nncf", "nncf")
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


def _int4_weights(model: Any, calls: Sequence[Any]) -> Any:
    nncf: Any = need("nncf", "nncf")
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=128)


MODES = {
    "openvino bf16": Mode("bfloat16", lambda model, calls: model),
    "openvino int8": Mode("int8 post-training quantization for transformers", _post_training),
    "openvino int8 dynamic": Mode(
        "int8 weights, activations quantized dynamically in groups of {group}",
        _int8_weights,
        lambda width: width,  # of 32, 64, 128 (documented) and the width, the width is fastest
    ),
    "openvino int4 dynamic": Mode(
        "int4 weights g128, activations quantized dynamically in groups of {group}",
        _int4_weights,
        lambda width: 128,
    ),
}
"""By the name of a row."""


class _Positional(nn.Module):
    """A model that takes tensors by position and returns a tensor, as OpenVINO converts it."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.names = model, tensor_names(inputs)
        self.rest = {k: v for k, v in inputs.items() if k not in self.names}

    def forward(self, *tensors: Tensor) -> Tensor:
        """The first output."""
        named = dict(zip(self.names, tensors, strict=True))
        output: Tensor = self.model(**named, **self.rest, return_dict=False)[0]
        return output


def tensor_names(inputs: Inputs) -> list[str]:
    """Names of the arguments that are tensors."""
    return [name for name, value in inputs.items() if isinstance(value, Tensor)]


def models(model: nn.Module, inputs: Inputs, calls: Sequence[Inputs]) -> Iterator[Candidate]:
    """A candidate for each mode; none if OpenVINO or NNCF is not installed.

    Args:
        model: float32, in evaluation mode.
        inputs: keyword arguments of its forward.
        calls: to calibrate on.
    """
    if not all(map(installed, PACKAGES)):
        return
    ov: Any = need("openvino", "openvino")
    need("nncf", "nncf").set_log_level(logging.ERROR)
    given, data = _arrays(inputs), [_arrays(call) for call in calls]
    wrapped = _Positional(model, inputs)
    example = tuple(inputs[name] for name in wrapped.names)
    width = Counter(m.in_features for m in model.modules() if isinstance(m, nn.Linear))
    for name, mode in MODES.items():
        # progress bars of NNCF do not belong into --json
        with contextlib.redirect_stdout(sys.stderr), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Converting a tensor to a Python")  # shapes are fixed
            converted = mode.prepare(ov.convert_model(wrapped, example_input=example), data)
        group = mode.group(width.most_common(1)[0][0]) if mode.group else 0
        options = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group)} if mode.group else {}
        run = _compiled(ov.Core(), converted, options, given)
        about = f"{versions(*PACKAGES)}: {mode.about.format(group=group)}"
        yield Candidate(name, run, None, about, _tensor)


def _compiled(
    core: Any, model: Any, options: dict[str, str], given: list[Any]
) -> Callable[[], object]:
    """A function that runs the model once, with as many threads as torch has."""
    common = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(model, "CPU", common | options).create_infer_request()
    return lambda: request.infer(given, share_inputs=True, share_outputs=True)


def _arrays(inputs: Inputs) -> list[Any]:
    return [inputs[name].contiguous().numpy() for name in tensor_names(inputs)]


def _tensor(result: Any) -> Tensor:
    return torch.from_numpy(next(iter(result.values())).copy())
