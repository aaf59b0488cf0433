# SPDX-License-Identifier: Apache-2.0
"""Fusion in the graphs of ``torch.compile``: what stands between two quantized linears joins them.

    torch.compile(pipe.transformer, backend="dtq")

is inductor behind four rewrites, which find their places in the graph, whatever model it is of:

- LayerNorm, ``* (1 + scale) + shift``, quantize: one pass over a token (``norm_quantize_rows``);
- a product and the GELU after it: GELU before the one rounding (``..._epilogue_linear``);
- a product, ``gate * y + residual``: the same;
- codes or views that are asked for twice are made once.

What was rounded to the model's dtype in between no longer is, so outputs differ by such roundings.
A rewrite is made where the library of the device has the op compiled, and where nothing in between
writes to a tensor.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dynamo.backends import registry

from dtq.integrations.fx_graph import (
    CASTS,
    FLOATS,
    VIEWS,
    Graph,
    between,
    is_like,
    is_tensor,
    is_vector,
    kept_rows,
    name_of,
    pairs,
    same_sizes,
    shape_of,
    through,
    value_of,
)
from dtq.kernels.libraries import LIBRARIES

_log = logging.getLogger(__name__)

ops = torch.ops.dtq

_ROWS = {"dtq::quantize_rows", "dtq::binned_quantize_rows"}
_CODES = {*_ROWS, "dtq::e2m1_quantize_rows", "dtq::fp4_quantize_rows", "dtq::round_rows"}
_EPILOGUES = {
    "dtq::w8a8_linear": "w8a8_epilogue_linear",
    "dtq::w4a8_linear": "w4a8_epilogue_linear",
}
"""Products, and the op that goes on after the bias."""
_OPERANDS = {"dtq::w8a8_epilogue_linear": 4, "dtq::w4a8_epilogue_linear": 5, "dtq::fp4_linear": 6}
"""Such ops, and how many operands come before the bias."""


@dataclass
class Fused:
    """How many of each rewrite were made."""

    norms: int = 0
    gelus: int = 0
    gates: int = 0
    shared: int = 0


def register() -> None:
    """Add the backend "dtq" to ``torch.compile``. To import this file adds ``torch.ops.dtq``."""
    if "dtq" not in registry._COMPILER_FNS:
        registry.register_backend(backend, name="dtq")


def backend(
    module: fx.GraphModule,
    inputs: list[Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Inductor, on the graph that :func:`fuse` leaves; ``mode`` and ``options`` are inductor's."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    fuse(module)
    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    return compile_fx(module, inputs, config_patches=patches or None)


def fuse(module: fx.GraphModule) -> Fused:
    """Rewrite a graph of Dynamo in place; returns what was done."""
    graph, done = Graph(module.graph), Fused()
    done.shared = _share(graph)
    for node in graph.nodes():
        if name_of(node) in _ROWS and _fuse_norm(graph, node):
            done.norms += 1
        elif name_of(node) in ("gelu", "dtq::gelu") and _fuse_gelu(graph, node):
            done.gelus += 1
        elif name_of(node) == "add" and _fuse_gate(graph, node):
            done.gates += 1
    module.graph.lint()
    module.recompile()
    _log.info("dtq: %s", done)
    return done


# ------------------------------------------------------------------------------------- rewrites


def _share(graph: Graph) -> int:
    """Views and codes that were asked for before."""
    known: dict[str, fx.Node] = {}
    shared = 0
    for node in graph.nodes():
        if name_of(node) not in VIEWS | _CODES | {"getitem"}:
            continue
        key = f"{name_of(node)} {node.args} {node.kwargs}"
        first = known.setdefault(key, node)
        if first is not node and graph.alike(first, node):
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)
            shared += name_of(first) in _CODES
        else:
            known[key] = node
    return shared


def _fuse_norm(graph: Graph, rows: fx.Node) -> bool:
    given = _modulated(through(rows.args[0], VIEWS | CASTS))
    if given is None or not _compiled(given.x, "norm_quantize_rows"):
        return False
    if not _only_rows(given.last):
        return False
    if not graph.quiet(min(given.skipped, key=graph.place.__getitem__), rows):
        return False
    width = int(shape_of(given.x)[-1])
    with graph.graph.inserting_before(rows):
        x, *vectors = (
            graph.graph.call_method("reshape", (each, -1, width))
            for each in (given.x, given.scale, given.shift)
        )
        if value_of(given.scale).dtype != value_of(given.shift).dtype:
            vectors = [graph.graph.call_method("float", (each,)) for each in vectors]
        vectors = [graph.graph.call_method("contiguous", (each,)) for each in vectors]
        rest: tuple[Any, ...] = rows.args[1:]
        if name_of(rows) == "dtq::quantize_rows":
            pre_scale, block, scale, *levels = rest
            rest = pre_scale, None, block, 1, scale, None, *levels
        new = graph.graph.call_function(ops.norm_quantize_rows, (x, *vectors, given.eps, *rest))
    graph.replace(rows, new)
    return True


def _fuse_gelu(graph: Graph, node: fx.Node) -> bool:
    if name_of(node) == "gelu" and node.kwargs.get("approximate") != "tanh":
        return False
    product = _product(node.args[0] if node.args else node.kwargs.get("input"))
    if product is None or product.gelu or product.gate is not None:
        return False
    product.gelu = True
    return _put(graph, node, product)


def _fuse_gate(graph: Graph, node: fx.Node) -> bool:
    for gated, residual in pairs(node, "add"):
        for gate, given in pairs(gated, "mul"):
            product, like = _product(given), value_of(node)
            if product is None or product.gate is not None or len(gated.users) != 1:
                continue
            if not (is_like(given, like) and is_like(residual, like)) or residual is gated:
                continue
            if not is_vector(gate, like):
                continue
            if not like.dtype == value_of(gate).dtype == product.dtype:
                continue
            product.gate, product.residual = gate, residual
            return _put(graph, node, product)
    return False


def _put(graph: Graph, node: fx.Node, product: _Product) -> bool:
    """The product goes on and stands where ``node`` was."""
    # kernels know no gradients
    if value_of(node).requires_grad or not graph.quiet(product.node, node):
        return False
    if not _compiled(node, product.op):
        return False
    width = int(shape_of(node)[-1])
    new, rows = graph.graph, []
    with new.inserting_before(node):
        for each in (product.gate, product.residual):
            flat = None if each is None else new.call_method("reshape", (each, -1, width))
            rows.append(None if flat is None else new.call_method("contiguous", (flat,)))
        then = product.bias, product.gelu, *rows, product.dtype, *product.branch
        y = new.call_function(getattr(ops, product.op), (*product.operands, *then))
        y.meta = dict(product.node.meta)
        graph.place[y] = graph.place[node]
        shaped = y if product.sizes is None else new.call_method("reshape", (y, *product.sizes))
    graph.replace(node, shaped)
    return True


# -------------------------------------------------------------------------------------- matching


@dataclass
class _Modulated:
    """``norm(x) * (1 + scale) + shift``; ``last`` is the sum, others are no longer computed."""

    x: fx.Node
    scale: fx.Node
    shift: fx.Node
    eps: float
    last: fx.Node
    skipped: list[fx.Node]


def _modulated(last: Any) -> _Modulated | None:
    for product, shift in pairs(last, "add"):
        for normed, raised in pairs(product, "mul"):
            norm = through(normed, CASTS)
            if name_of(norm) != "layer_norm" or any(len(n.users) > 1 for n in (product, norm)):
                continue
            found = _norm_of(norm)
            for scale, one in pairs(raised, "add"):
                if found is None or not isinstance(one, int | float) or one != 1:
                    continue
                x, given, eps = found
                if _are_modulation(scale, shift, value_of(norm)):
                    skipped = [raised, norm, *between(given, x)]
                    return _Modulated(x, scale, shift, eps, last, skipped)
    return None


def _are_modulation(scale: Any, shift: Any, like: Tensor) -> bool:
    """Whether these are a scale and a shift for each image of ``like``, or one for all."""
    if not is_vector(scale, like) or not is_vector(shift, like):
        return False
    up, along = value_of(scale), value_of(shift)
    alike = up.shape[0] == along.shape[0] and up.device == along.device == like.device
    return alike and {up.dtype, along.dtype} <= FLOATS


def _norm_of(norm: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """Input before casts, input, epsilon of a LayerNorm over the last axis, without weights."""
    if not is_tensor(norm):
        return None
    names = "input", "normalized_shape", "weight", "bias", "eps"
    given: dict[str, Any] = dict(zip(names, norm.args, strict=False)) | dict(norm.kwargs)
    x = through(given["input"], CASTS, upwards=True)
    plain = given.get("weight") is None and given.get("bias") is None
    if not plain or len(given["normalized_shape"]) != 1 or value_of(x).dtype not in FLOATS:
        return None
    return x, given["input"], given.get("eps", 1e-5)


def _only_rows(last: fx.Node) -> bool:
    """Whether a value is read by quantizers alone, through views and casts."""
    return all(
        name_of(user) in _ROWS or (name_of(user) in VIEWS | CASTS and _only_rows(user))
        for user in last.users
    )


@dataclass
class _Product:
    """A product of codes, and what follows it before the one rounding."""

    node: fx.Node
    sizes: tuple[Any, ...] | None  # that its rows are given
    op: str
    operands: tuple[Any, ...]
    bias: Any
    gelu: bool
    gate: Any
    residual: Any
    dtype: torch.dtype
    branch: tuple[Any, ...] = ()


def _product(given: Any) -> _Product | None:
    """The product that is all there is to a value, through views and what changes nothing."""
    node, sizes = given, None
    while isinstance(node, fx.Node) and len(node.users) == 1:
        name, args = name_of(node), cast("tuple[Any, ...]", node.args)
        if name in _EPILOGUES or name in _OPERANDS:
            # without a view on the way the rows themselves are meant
            return _argument(node, name, args, sizes) if sizes or node is given else None
        if not _changes_nothing(node):
            return None
        if sizes is None and name in ("reshape", "view"):
            if not same_sizes(shape_of(node), shape_of(given)):
                return None
            sizes = args[1:]
        node = args[0]
    return None


def _argument(node: fx.Node, name: str, args: tuple[Any, ...], sizes: Any) -> _Product:
    if name in _EPILOGUES:
        *operands, bias, dtype = args
        op, then = _EPILOGUES[name], (False, None, None, dtype)
        return _Product(node, sizes, op, tuple(operands), bias, *then)
    count = _OPERANDS[name]
    bias, gelu, gate, residual, dtype, *branch = args[count:]
    then = gelu, gate, residual, dtype
    return _Product(
        node, sizes, name.removeprefix("dtq::"), args[:count], bias, *then, tuple(branch)
    )


def _changes_nothing(node: fx.Node) -> bool:
    name = name_of(node)
    source = kept_rows(node)
    if source is None or value_of(source).dtype != value_of(node).dtype:
        return False
    if name == "dropout":
        names = "input", "p", "training"
        options: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        return options.get("p", 0.5) == 0 or options.get("training", True) is False
    if name == "truediv":
        return node.args[1:] == (1,)
    return name in VIEWS | CASTS


def _compiled(node: fx.Node, op: str) -> bool:
    """Whether the library of the node's device has the op."""
    library = LIBRARIES.get(value_of(node).device.type)
    return library is not None and op in library.ops and library.load()
