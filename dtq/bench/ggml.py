# SPDX-License-Identifier: Apache-2.0
"""ggml, the library of llama.cpp and stable-diffusion.cpp: linears with its quantized weights.

The package ``ggml-python`` binds the C interface of ggml. A weight lies where ggml repacks it for
the processor, if this build can repack its type. ggml takes float32 tokens and quantizes
them in the product.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dtq.bench.compare import Candidate
from dtq.bench.packages import installed, versions
from dtq.evaluate.optional_packages import need

TYPES = ("Q8_0", "Q4_0")
"""Types of weights: blocks of 32 with a float16 scale."""


def linears(layer: nn.Linear, x: Tensor) -> Iterator[Candidate]:
    """A candidate for each type of ``TYPES``; none if ggml-python is not installed.

    Args:
        layer: float, with a bias.
        x: (M, K).
    """
    if not installed("ggml"):
        return
    for name in TYPES:
        linear = _Linear(name, layer, x)
        about = f"{versions('ggml-python')}: {name}, {linear.place}, float32 tokens"
        yield Candidate(f"ggml {name}", linear.run, linear.bytes, about, linear.output)


class _Linear:
    """``x @ weight.T + bias`` as a graph of ggml, in memory of ggml."""

    def __init__(self, name: str, layer: nn.Linear, x: Tensor) -> None:
        self._api = api = need("ggml", "ggml-python").ggml
        (m, k), n = x.shape, layer.out_features
        self.shape = (m, n)
        self._backend = api.ggml_backend_cpu_init()
        self._owned: list[tuple[Any, Any]] = [(api.ggml_backend_free, self._backend)]
        weakref.finalize(self, _free, self._owned)
        api.ggml_backend_cpu_set_n_threads(self._backend, torch.get_num_threads())
        kind = getattr(api, f"GGML_TYPE_{name}")
        weight, self.place = self._weight(kind, layer.weight.detach().float().contiguous())
        self.bytes = api.ggml_nbytes(weight) + 4 * n
        context = self._context()
        tokens = api.ggml_new_tensor_2d(context, api.GGML_TYPE_F32, k, m)
        bias = api.ggml_new_tensor_1d(context, api.GGML_TYPE_F32, n)
        self._y = api.ggml_add(context, api.ggml_mul_mat(context, weight, tokens), bias)
        self._graph = api.ggml_new_graph(context)
        api.ggml_build_forward_expand(self._graph, self._y)
        self._own(api.ggml_backend_alloc_ctx_tensors(context, self._backend))
        self._set(tokens, x)
        self._set(bias, layer.bias)

    def run(self) -> None:
        """Compute the output in the memory of ggml."""
        status = self._api.ggml_backend_graph_compute(self._backend, self._graph)
        if status != 0:
            raise RuntimeError(f"ggml failed with status {status}")

    def output(self, _: object) -> Tensor:
        """The output of the last run: (M, N), float32."""
        y = torch.empty(self.shape)
        self._api.ggml_backend_tensor_get(self._y, y.data_ptr(), 0, y.nbytes)
        return y

    def _context(self) -> Any:
        api = self._api
        size = 16 * api.ggml_tensor_overhead() + api.ggml_graph_overhead()
        params = api.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=True)
        context = api.ggml_init(params)
        self._owned.append((api.ggml_free, context))
        return context

    def _own(self, buffer: Any) -> None:
        """Free a buffer with the object."""
        if not buffer:
            raise MemoryError("ggml could not allocate the tensors of a linear")
        self._owned.append((self._api.ggml_backend_buffer_free, buffer))

    def _set(self, tensor: Any, value: Tensor) -> None:
        value = value.detach().float().contiguous()
        self._api.ggml_backend_tensor_set(tensor, value.data_ptr(), 0, value.nbytes)

    def _weight(self, kind: int, weight: Tensor) -> tuple[Any, str]:
        """The quantized weight, (N, K), and in which form it lies in memory."""
        api, (n, k) = self._api, weight.shape
        for buffer in (*self._repacking(), None):
            context = self._context()
            tensor = api.ggml_new_tensor_2d(context, kind, k, n)
            if buffer is None:
                self._own(api.ggml_backend_alloc_ctx_tensors(context, self._backend))
                break
            self._own(api.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer))
            if tensor.contents.extra:  # a type that cannot be repacked has no functions there
                break
        size = api.ggml_row_size(kind, k) * n
        codes = (ctypes.c_uint8 * size)()
        floats = ctypes.cast(weight.data_ptr(), ctypes.POINTER(ctypes.c_float))
        target = ctypes.cast(codes, ctypes.c_void_p)
        api.ggml_quantize_chunk(kind, floats, target, 0, n, k, None)
        api.ggml_backend_tensor_set(tensor, target, 0, size)
        return tensor, "as in the file" if buffer is None else "repacked"

    def _repacking(self) -> Iterator[int]:
        """The buffer types of the CPU that change the order of a weight, best first."""
        api, registry = self._api, self._api.ggml_backend_cpu_reg()
        address = api.ggml_backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if not address:
            return
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        found = listed(api.ggml_backend_reg_dev_get(registry, 0))
        i = 0
        while found and found[i]:
            yield found[i]
            i += 1


def _free(owned: list[tuple[Any, Any]]) -> None:
    for free, what in reversed(owned):
        free(what)
