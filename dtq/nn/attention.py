# SPDX-License-Identifier: Apache-2.0
"""int8 attention in the modules of any model, on a CPU.

A module whose attention is int8 gets a subclass of its own class. Its ``forward`` runs under a
``TorchFunctionMode`` of torch that answers ``F.scaled_dot_product_attention`` with
``dtq::int8_attention``. Every transformer of diffusers ends there: by ``dispatch_attention_fn``
with the back end ``native``, or directly, as ``AttnProcessor2_0`` does. The registry of back ends
is an enumeration that cannot be extended from outside, and processors are different in every
model, so neither would serve all. A back end that a user sets by ``set_attention_backend`` does
not call torch's function, and runs as it is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dtq.errors import CheckpointError
from dtq.kernels.ops_attention import unsupported_reason

log = logging.getLogger("dtq")


def use_int8_attention(model: nn.Module, names: Collection[str]) -> None:
    """Let the named modules compute their attention in int8, and all others in float.

    Args:
        model: the transformer.
        names: dotted names of the modules that call attention.

    Raises:
        CheckpointError: the model has no module of that name.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            raise CheckpointError(f"config.json: int8_attention: the model has no module {name!r}")
    for name, module in modules.items():
        kind = _float_class(type(module))
        module.__class__ = _int8_class(cast(Any, kind)) if name in names else kind


def int8_attention_modules(model: nn.Module) -> list[str]:
    """Names of the modules whose attention is int8."""
    return [name for name, m in model.named_modules() if isinstance(m, _Int8Attention)]


def attention_modules(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """Names of the modules that call torch's attention, found by running the model.

    Args:
        model: the transformer.
        run: calls it.

    Returns:
        Of each call the innermost module; in the order of the first call of each. The model
        itself, which has no name, is not among them.
    """
    recorder = _Recorder()

    def enter(name: str, module: nn.Module, args: Any) -> None:
        recorder.stack.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        recorder.stack.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            before = module.register_forward_pre_hook(functools.partial(enter, name))
            hooks.enter_context(before)
            hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        with recorder:
            run()
    return [name for name in dict.fromkeys(recorder.names) if name]


@contextmanager
def float_attention(model: nn.Module) -> Iterator[None]:
    """Inside, no module of the model computes its attention in int8."""
    names = int8_attention_modules(model)
    use_int8_attention(model, ())
    try:
        yield
    finally:
        use_int8_attention(model, names)


@contextmanager
def int8_attention_everywhere() -> Iterator[None]:
    """Inside, int8 attention also runs where it has no kernel, to measure its error on a GPU."""
    before, _MODE.everywhere = _MODE.everywhere, True
    try:
        yield
    finally:
        _MODE.everywhere = before


class _Recorder(TorchFunctionMode):
    """Notes which module is running when torch's attention is called."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.names: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and self.stack:
            self.names.append(self.stack[-1])
        return func(*args, **(kwargs or {}))


class _Mode(TorchFunctionMode):
    """Answers torch's attention with int8 attention."""

    everywhere = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            out = _attend(self.everywhere, *args, **kwargs)
            if out is not None:
                return out
        return func(*args, **kwargs)


def _attend(
    everywhere: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """int8 attention with torch's arguments; None where float attention must run.

    It must with dropout, where a gradient is required, on other devices than a CPU, and for
    arguments that the op does not take.
    """
    inputs = [x for x in (query, key, value, attn_mask) if x is not None]
    if query.device.type != "cpu" and not everywhere:
        if query.device.type != "meta":
            _point_to_diffusers(query.device.type)
        return None
    if dropout_p or (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        return None
    if unsupported_reason(query, key, value, attn_mask):
        return None
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return None
    if is_causal and attn_mask is not None:  # torch refuses it
        return None
    if is_causal:
        shape = (query.shape[2], key.shape[2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = torch.ops.dtq.int8_attention(query, key, value, attn_mask, scale)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _point_to_diffusers(device: str) -> None:
    if device not in _POINTED:
        _POINTED.add(device)
        log.warning(
            "dtq: int8 attention is for CPUs; on %s attention runs in float. diffusers has "
            'quantized attention for GPUs: model.set_attention_backend("sage")',
            device,
        )


_MODE = _Mode()
_POINTED: set[str] = set()


class _Int8Attention(nn.Module):
    """Goes before the class of a module."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the module, with int8 attention."""
        with _MODE:
            return super().forward(*args, **kwargs)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _int8_class(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _CLASSES:  # the same name: diffusers and accelerate compare names of classes
        namespace = {"__module__": kind.__module__}
        _CLASSES[kind] = type(kind.__name__, (_Int8Attention, kind), namespace)
    return _CLASSES[kind]


def _float_class(kind: type[nn.Module]) -> type[nn.Module]:
    return kind.__bases__[1] if kind.__bases__[0] is _Int8Attention else kind
