# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs by ONNX Runtime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtq.engines.onnx import GRAPH
from dtq.engines.onnx_graph import ARGUMENTS
from dtq.engines.runtimes.engine import Engine, EngineFile
from dtq.engines.runtimes.graph import Graph, as_model

TYPES = {
    "tensor(float)": torch.float32,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


class Session:
    """A graph in ONNX Runtime.

    Args:
        path: the file of the graph.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self.inputs = {each.name: TYPES[each.type] for each in self.session.get_inputs()}

    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        """The first output, from a tensor for each of ``inputs``."""
        given: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        return torch.from_numpy(self.session.run(None, given)[0])


def load(file: EngineFile) -> nn.Module:
    """The model whose forward is the graph."""
    session = Session(file.path / GRAPH)
    constants = file.contents.config.get(ARGUMENTS, {})
    return as_model(Graph(session.inputs, session, constants), file.model)


ENGINE = Engine("onnx", ("onnx",), {"onnxruntime": "onnxruntime"}, load)
