# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's IR by its CPU plugin."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dtq.engines.onnx_graph import ARGUMENTS
from dtq.engines.runtimes.engine import Engine, EngineFile
from dtq.engines.runtimes.graph import Graph, as_model

TYPES = {
    "f32": torch.float32,
    "i64": torch.int64,
    "i32": torch.int32,
    "boolean": torch.bool,
}
HINTS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Precision of what is not quantized, by the dtype of the model; otherwise OpenVINO may choose
bfloat16 on a CPU that has it."""


class Compiled:
    """An IR, compiled for the CPU.

    Args:
        path: the ``.xml`` file, or a model of OpenVINO.
        dtype: of what is not quantized.
        options: more properties of the plugin.
    """

    def __init__(
        self, path: Path, dtype: torch.dtype = torch.float32, options: dict[str, str] | None = None
    ) -> None:
        import openvino

        properties = {
            "INFERENCE_PRECISION_HINT": HINTS[dtype],
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            **(options or {}),
        }
        self.model = openvino.Core().compile_model(path, "CPU", properties)
        types = {port.any_name: port.element_type for port in self.model.inputs}
        self.inputs = {name: TYPES[kind.get_type_name()] for name, kind in types.items()}

    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        """The first output, from a tensor for each of ``inputs``."""
        given = {name: tensor.numpy() for name, tensor in tensors.items()}
        return torch.from_numpy(self.model(given)[0])


def load(file: EngineFile) -> nn.Module:
    """The model whose forward is the IR, with the options in it."""
    compiled = Compiled(file.path, file.dtype)
    constants = file.contents.config.get(ARGUMENTS, {})
    return as_model(Graph(compiled.inputs, compiled, constants), file.model)


ENGINE = Engine("openvino", ("openvino",), {"openvino": "openvino"}, load)
