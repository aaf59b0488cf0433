# SPDX-License-Identifier: Apache-2.0
"""Fusion in the graphs of ``torch.compile``: ops around quantized linears become part of them.

    torch.compile(pipe.transformer, backend="dtq")

compiles with inductor, after five rewrites that match patterns in the graph of any model:

- LayerNorm, ``* (1 + scale) + shift``, quantize: one pass over a token (``norm_quantize_rows``);
- a quantized GEMM and GELU: GELU is the epilogue, before the output is rounded
  (``..._epilogue_linear``);
- a quantized GEMM and ``gate * y + residual``: likewise;
- an input that is quantized, or viewed, several times in the same way: only once;
- a float linear of a few rows, as in the embeddings of timesteps: ``float_linear`` on a CPU.

Intermediate results are no longer rounded to the model's dtype, so outputs differ by these
roundings. A pattern is fused only if the fused op is compiled for the device and, on a GPU,
estimated faster than its parts (``dtq/kernels/gpu_fusion.py``), its intermediate results have no
other user, no node in between writes to a tensor, and no gradient is required.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dynamo.backends import registry

from dtq.integrations.fx_graph import (
    CASTS,
    DIVISIONS,
    FLOATS,
    VIEWS,
    Graph,
    input_with_same_rows,
    is_like,
    is_row_vector,
    is_tensor,
    name_of,
    operands,
    path_between,
    same_sizes,
    shape_of,
    skip,
    value_of,
)
from dtq.kernels import gpu_fusion
from dtq.kernels.libraries import LIBRARIES

_log = logging.getLogger(__name__)

ops = torch.ops.dtq

_QUANTIZE = {"dtq::quantize_rows", "dtq::binned_quantize_rows"}
"""Ops that quantize to int8, for which there is a fused op with LayerNorm."""
_QUANTIZE_ANY = {*_QUANTIZE, "dtq::e2m1_quantize_rows", "dtq::fp4_quantize_rows", "dtq::round_rows"}
_EPILOGUES = {f"dtq::{kind}_linear": f"{kind}_epilogue_linear" for kind in ("w8a8", "w4a8")}
"""GEMM op to the same op with an epilogue."""
_OPERANDS = {"dtq::w8a8_epilogue_linear": 4, "dtq::w4a8_epilogue_linear": 5, "dtq::fp4_linear": 6}
"""GEMM ops with an epilogue, and the number of arguments before the bias."""

FEW_ROWS = 16
"""Rows up to which ``float_linear`` has a kernel."""


@dataclass
class Fused:
    """Number of rewrites of each kind.

    Attributes:
        norms: LayerNorms fused with a quantize op.
        gelus: GELUs fused with a GEMM.
        gates: ``gate * y + residual`` fused with a GEMM.
        shared: quantize ops replaced by an earlier one.
        few: float linears of a few rows.
    """

    norms: int = 0
    gelus: int = 0
    gates: int = 0
    shared: int = 0
    few: int = 0


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
    """The compiler backend: :func:`fuse`, then inductor.

    Args:
        module: the graph.
        inputs: example inputs.
        mode: of inductor, such as ``reduce-overhead``.
        options: config options of inductor.

    Returns:
        The compiled function.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    fuse(module)
    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    return compile_fx(module, inputs, config_patches=patches or None)


def fuse(module: fx.GraphModule) -> Fused:
    """Rewrite a graph of Dynamo in place; returns the number of rewrites."""
    graph, fused = Graph(module.graph), Fused()
    fused.shared = _share(graph)
    for node in graph.nodes():
        if name_of(node) in _QUANTIZE and _fuse_norm(graph, node):
            fused.norms += 1
        elif name_of(node) in ("gelu", "dtq::gelu") and _fuse_gelu(graph, node):
            fused.gelus += 1
        elif name_of(node) == "add" and _fuse_gate(graph, node):
            fused.gates += 1
        elif name_of(node) == "linear" and _replace_few_rows(graph, node):
            fused.few += 1
    module.graph.lint()
    module.recompile()
    _log.info("dtq: %s", fused)
    return fused


# ------------------------------------------------------------------------------------- rewrites


def _share(graph: Graph) -> int:
    """Replace views and quantize ops by earlier ones with the same arguments."""
    known: dict[str, fx.Node] = {}
    shared = 0
    for node in graph.nodes():
        if name_of(node) not in VIEWS | _QUANTIZE_ANY | {"getitem"}:
            continue
        key = f"{name_of(node)} {node.args} {node.kwargs}"
        first = known.setdefault(key, node)
        if first is not node and graph.can_replace(first, node):
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)
            shared += name_of(first) in _QUANTIZE_ANY
        else:
            known[key] = node
    return shared


def _fuse_norm(graph: Graph, quantize: fx.Node) -> bool:
    """Fuse a quantize op with the modulated LayerNorm that is its input."""
    norm = _match_modulated_norm(skip(quantize.args[0], VIEWS | CASTS))
    if norm is None or not _is_faster(norm.x, "norm_quantize_rows", "norm"):
        return False
    first = min(norm.fused, key=graph.position.__getitem__)
    if not _only_quantized(norm.result) or not graph.no_writes_between(first, quantize):
        return False
    width = int(shape_of(norm.x)[-1])
    with graph.graph.inserting_before(quantize):
        inputs = norm.x, norm.scale, norm.shift
        x, *vectors = (graph.graph.call_method("reshape", (each, -1, width)) for each in inputs)
        if value_of(norm.scale).dtype != value_of(norm.shift).dtype:
            vectors = [graph.graph.call_method("float", (vector,)) for vector in vectors]
        vectors = [graph.graph.call_method("contiguous", (vector,)) for vector in vectors]
        args: tuple[Any, ...] = quantize.args[1:]
        if name_of(quantize) == "dtq::quantize_rows":
            pre_scale, block, scale, *qmax = args
            args = pre_scale, None, block, 1, scale, None, *qmax
        new = graph.graph.call_function(ops.norm_quantize_rows, (x, *vectors, norm.eps, *args))
    graph.replace(quantize, new)
    return True


def _fuse_gelu(graph: Graph, node: fx.Node) -> bool:
    if name_of(node) == "gelu" and node.kwargs.get("approximate") != "tanh":
        return False
    gemm = _match_gemm(node.args[0] if node.args else node.kwargs.get("input"))
    if gemm is None or gemm.gelu or gemm.gate is not None:
        return False
    gemm.gelu = True
    return _replace_by_gemm(graph, node, gemm, "gelu")


def _fuse_gate(graph: Graph, node: fx.Node) -> bool:
    for gated, residual in operands(node, "add"):
        for gate, value in operands(gated, "mul"):
            gemm, like = _match_gemm(value), value_of(node)
            if gemm is None or gemm.gate is not None or len(gated.users) != 1:
                continue
            if not (is_like(value, like) and is_like(residual, like)) or residual is gated:
                continue
            if not is_row_vector(gate, like):
                continue
            if not like.dtype == value_of(gate).dtype == gemm.dtype:
                continue
            gemm.gate, gemm.residual = gate, residual
            return _replace_by_gemm(graph, node, gemm, "gate")
    return False


def _replace_by_gemm(graph: Graph, node: fx.Node, gemm: _Gemm, pattern: str) -> bool:
    """Replace ``node``, the end of a pattern, by a GEMM with an epilogue."""
    # kernels have no gradients
    if value_of(node).requires_grad or not graph.no_writes_between(gemm.node, node):
        return False
    if not _is_faster(node, gemm.op, pattern):
        return False
    width = int(shape_of(node)[-1])
    new, rows = graph.graph, []
    with new.inserting_before(node):
        for tensor in (gemm.gate, gemm.residual):
            flat = None if tensor is None else new.call_method("reshape", (tensor, -1, width))
            rows.append(None if flat is None else new.call_method("contiguous", (flat,)))
        epilogue = gemm.bias, gemm.gelu, *rows, gemm.dtype, *gemm.branch
        y = new.call_function(getattr(ops, gemm.op), (*gemm.operands, *epilogue))
        y.meta = dict(gemm.node.meta)
        graph.position[y] = graph.position[node]
        shaped = y if gemm.sizes is None else new.call_method("reshape", (y, *gemm.sizes))
    graph.replace(node, shaped)
    return True


def _replace_few_rows(graph: Graph, node: fx.Node) -> bool:
    """Replace a float linear of a few rows on a CPU, whose time is that of reading the weight."""
    args = _arguments(node, "input", "weight", "bias")
    x: Any = args.get("input")
    weight: Any = args.get("weight")
    if not all(map(is_tensor, (node, x, weight))) or value_of(node).device.type != "cpu":
        return False
    if value_of(node).requires_grad or not value_of(node).dim():
        return False
    if not value_of(x).dtype == value_of(weight).dtype == value_of(node).dtype in FLOATS:
        return False
    sizes = shape_of(node)
    if not all(isinstance(size, int) for size in sizes) or math.prod(sizes[:-1]) > FEW_ROWS:
        return False
    if not _is_compiled(node, "float_linear"):
        return False
    new = graph.graph
    with new.inserting_before(node):
        flat = new.call_method("reshape", (x, -1, int(shape_of(weight)[1])))
        y = new.call_function(ops.float_linear, (flat, weight, args.get("bias")))
        shaped = new.call_method("reshape", (y, *sizes))
    graph.replace(node, shaped)
    return True


# -------------------------------------------------------------------------------------- matching


@dataclass
class _ModulatedNorm:
    """``norm(x) * (1 + scale) + shift``.

    Attributes:
        x: input of the LayerNorm, before casts.
        scale: one row per image, or one for all.
        shift: likewise.
        eps: of the LayerNorm.
        result: the whole expression.
        fused: nodes of the pattern that the fused op replaces.
    """

    x: fx.Node
    scale: fx.Node
    shift: fx.Node
    eps: float
    result: fx.Node
    fused: list[fx.Node]


def _match_modulated_norm(node: Any) -> _ModulatedNorm | None:
    for product, shift in operands(node, "add"):
        for normed, factor in operands(product, "mul"):
            norm = skip(normed, CASTS)
            if name_of(norm) != "layer_norm" or any(len(n.users) > 1 for n in (product, norm)):
                continue
            match = _match_layer_norm(norm)
            for scale, one in operands(factor, "add"):
                if match is None or not isinstance(one, int | float) or one != 1:
                    continue
                x, cast_x, eps = match
                if _are_modulation(scale, shift, value_of(norm)):
                    fused = [factor, norm, *path_between(cast_x, x)]
                    return _ModulatedNorm(x, scale, shift, eps, node, fused)
    return None


def _are_modulation(scale: Any, shift: Any, like: Tensor) -> bool:
    """Whether two values have a row for each image of ``like``, or one for all, in float."""
    if not is_row_vector(scale, like) or not is_row_vector(shift, like):
        return False
    a, b = value_of(scale), value_of(shift)
    match = a.shape[0] == b.shape[0] and a.device == b.device == like.device
    return match and {a.dtype, b.dtype} <= FLOATS


def _match_layer_norm(norm: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """Input before casts, input and epsilon of a LayerNorm over the last axis, without weights."""
    if not is_tensor(norm):
        return None
    args = _arguments(norm, "input", "normalized_shape", "weight", "bias", "eps")
    x = skip(args["input"], CASTS, upcasts_only=True)
    plain = args.get("weight") is None and args.get("bias") is None
    if not plain or len(args["normalized_shape"]) != 1 or value_of(x).dtype not in FLOATS:
        return None
    return x, args["input"], args.get("eps", 1e-5)


def _arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _only_quantized(node: fx.Node) -> bool:
    """Whether all users of a value are quantize ops, looking through views and casts."""
    return all(
        name_of(user) in _QUANTIZE or (name_of(user) in VIEWS | CASTS and _only_quantized(user))
        for user in node.users
    )


@dataclass
class _Gemm:
    """A quantized GEMM and its epilogue.

    Attributes:
        node: of the GEMM.
        sizes: arguments of the reshape after it; None without one.
        op: name of the op with an epilogue.
        operands: its arguments before the bias.
        bias: (N,) or None.
        gelu: whether GELU follows.
        gate: one row per image or one for all, multiplies the result; None without.
        residual: added to it; None without a gate.
        dtype: of the output.
        branch: arguments of the low-rank branch, if there is one.
    """

    node: fx.Node
    sizes: tuple[Any, ...] | None
    op: str
    operands: tuple[Any, ...]
    bias: Any
    gelu: bool
    gate: Any
    residual: Any
    dtype: torch.dtype
    branch: tuple[Any, ...] = ()


def _match_gemm(value: Any) -> _Gemm | None:
    """The quantized GEMM that alone produces a value, looking through views and no-ops."""
    node, sizes = value, None
    while isinstance(node, fx.Node) and len(node.users) == 1:
        name, args = name_of(node), cast("tuple[Any, ...]", node.args)
        if name in _EPILOGUES or name in _OPERANDS:
            # without a reshape, the value must be the rows of the GEMM themselves
            return _read_gemm(node, name, args, sizes) if sizes or node is value else None
        if not _is_no_op(node):
            return None
        if sizes is None and name in ("reshape", "view"):
            if not same_sizes(shape_of(node), shape_of(value)):
                return None
            sizes = args[1:]
        node = args[0]
    return None


def _read_gemm(node: fx.Node, name: str, args: tuple[Any, ...], sizes: Any) -> _Gemm:
    if name in _EPILOGUES:
        *before, bias, dtype = args
        return _Gemm(node, sizes, _EPILOGUES[name], tuple(before), bias, False, None, None, dtype)
    count = _OPERANDS[name]
    bias, gelu, gate, residual, dtype, *branch = args[count:]
    op = name.removeprefix("dtq::")
    return _Gemm(node, sizes, op, args[:count], bias, gelu, gate, residual, dtype, tuple(branch))


def _is_no_op(node: fx.Node) -> bool:
    """Whether a node has the values of its input, at most in another shape with the same rows."""
    name = name_of(node)
    source = input_with_same_rows(node)
    if source is None or value_of(source).dtype != value_of(node).dtype:
        return False
    if name == "dropout":
        args = _arguments(node, "input", "p", "training")
        return args.get("p", 0.5) == 0 or args.get("training", True) is False
    if name in DIVISIONS:
        return node.args[1:] == (1,) and not node.kwargs
    return name in VIEWS | CASTS


def _is_faster(node: fx.Node, op: str, pattern: str) -> bool:
    """Whether an op is compiled for the node's device, and estimated faster than its parts."""
    return _is_compiled(node, op) and gpu_fusion.is_fused(pattern, value_of(node))


def _is_compiled(node: fx.Node, op: str) -> bool:
    """Whether the library for the node's device has a compiled form of an op."""
    library = LIBRARIES.get(value_of(node).device.type)
    return library is not None and op in library.ops and library.load()
