# SPDX-License-Identifier: Apache-2.0
"""``LiveBytes``: the most bytes of tensors that are alive at once while code runs.

The code may run on fake tensors (``torch._subclasses.FakeTensorMode``), which have shapes and
storages but no memory: so the peak of a model is found without its weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations allocate, until nothing refers to them any more.

    A view counts nothing: it shares the storage of its base. Tensors that are older than the mode
    count only if an operation returns them (in place), which :meth:`ignore` prevents.

    Attributes:
        live: bytes alive now.
        peak: the most so far, with the workspace of an operation while it runs.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Never count the storages of these tensors: weights, which are counted elsewhere."""
        for tensor in tensors:
            self._add(tensor, 0)

    def add(self, value: object) -> None:
        """Count the tensors in nested containers, each storage once."""
        for tensor in tree_iter(value):
            if isinstance(tensor, Tensor):
                self._add(tensor, None)
        self.peak = max(self.peak, self.live)

    def _add(self, tensor: Tensor, size: int | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes() if size is None else size
        self._storages[key] = weakref.ref(storage, lambda _: self._remove(key)), size
        self.live += size

    def _remove(self, key: int) -> None:
        self.live -= self._storages.pop(key)[1]

    def __torch_dispatch__(
        self,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        self.add(result)
        workspace = WORKSPACES.get(func.overloadpacket)
        if workspace is not None:
            self.peak = max(self.peak, self.live + workspace(result, *args))
        return result


CHANNEL_BLOCK = 16
"""Channels of a block in oneDNN's layout of float32 and bfloat16 images on a CPU with AVX-512."""


def convolution_workspace(out: Tensor, x: Tensor, weight: Tensor, *rest: object) -> int:
    """Bytes that a convolution of a CPU holds in addition to its input and output.

    oneDNN computes on blocked channels: torch copies the input into that layout, and then the
    output back out of it. Measured with torch 2.13 for 2-D and 3-D kernels of 3, float32 and
    bfloat16; float32 kernels of one element need none. cuDNN chooses a workspace at run time, or
    none: the same bytes are assumed.
    """
    if weight.shape[2:].numel() == 1 and x.dtype == torch.float32:
        return 0
    whole = out.numel() * out.element_size()
    return max(_blocked(x) + _blocked(out) - whole, _blocked(out))


def _blocked(x: Tensor) -> int:
    """Bytes of an image (B, C, *spatial) with its channels padded to whole blocks."""
    channels = -(-x.shape[1] // CHANNEL_BLOCK) * CHANNEL_BLOCK
    return x.numel() // max(x.shape[1], 1) * channels * x.element_size()


WORKSPACES: dict[Any, Callable[..., int]] = {aten.convolution: convolution_workspace}
"""Operations with temporary memory of their own: to its bytes, from its result and arguments."""
