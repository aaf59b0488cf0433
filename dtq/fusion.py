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

import inspect
import logging
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dynamo.backends import registry
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dtq.kernels.ops import LIBRARIES

_log = logging.getLogger(__name__)

ops = torch.ops.dtq

_CASTS = {"to", "type_as", "float", "bfloat16", "half", "type"}
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}
_VIEWS = {"reshape", "view", "contiguous", "flatten", "squeeze", "unsqueeze"}
_PURE = {
    *_CASTS,
    *_VIEWS,
    *("add", "mul", "truediv", "dropout", "layer_norm", "gelu", "getitem"),
}
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
    """Make ``backend="dtq"`` known to ``torch.compile``."""
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
    graph, done = _Graph(module.graph), Fused()
    done.shared = _share(graph)
    for node in graph.nodes():
        if _name(node) in _ROWS and _fuse_norm(graph, node):
            done.norms += 1
        elif _name(node) in ("gelu", "dtq::gelu") and _fuse_gelu(graph, node):
            done.gelus += 1
        elif _name(node) == "add" and _fuse_gate(graph, node):
            done.gates += 1
    module.graph.lint()
    module.recompile()
    _log.info("dtq: %s", done)
    return done


class _Graph:
    """A graph that knows the order of its nodes, and where something is written to."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.writes = [i for node, i in self.place.items() if _writes(node)]
        self.switches = any("grad_enabled" in _name(node) for node in self.place)

    def nodes(self) -> Iterator[fx.Node]:
        """Those that are there now, as long as they are."""
        for node in list(self.graph.nodes):
            if not node._erased:
                yield node

    def quiet(self, first: fx.Node, last: fx.Node) -> bool:
        """Whether nothing is written to after the one and before the other."""
        return not any(self.place[first] < i < self.place[last] for i in self.writes)

    def alike(self, first: fx.Node, node: fx.Node) -> bool:
        """Whether the one may stand for the other, which is computed of the same.

        Either may be a copy that is written to or given back as the caller's own, and one may
        know a gradient that the other does not.
        """
        given_back = any(user.op == "output" for each in (first, node) for user in each.users)
        after = any(self.place[first] < i for i in self.writes)
        return not (given_back or after or self.switches)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """``new``, which stands before ``old``, takes its users."""
        new.meta, self.place[new] = dict(old.meta), self.place[old]
        old.replace_all_uses_with(new)
        self.drop(old)

    def drop(self, node: fx.Node) -> None:
        """Erase a node that nobody uses, and those that were there for it alone."""
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        for each in inputs:
            if not each.users and (_name(each) in _PURE or _name(each).startswith("dtq::")):
                self.drop(each)


# ------------------------------------------------------------------------------------- rewrites


def _share(graph: _Graph) -> int:
    """Views and codes that were asked for before."""
    known: dict[str, fx.Node] = {}
    shared = 0
    for node in graph.nodes():
        if _name(node) not in _VIEWS | _CODES | {"getitem"}:
            continue
        key = f"{_name(node)} {node.args} {node.kwargs}"
        first = known.setdefault(key, node)
        if first is not node and graph.alike(first, node):
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)
            shared += _name(first) in _CODES
        else:
            known[key] = node
    return shared


def _fuse_norm(graph: _Graph, rows: fx.Node) -> bool:
    given = _modulated(_through(rows.args[0], _VIEWS | _CASTS))
    if given is None or not _compiled(given.x, "norm_quantize_rows"):
        return False
    if not _only_rows(given.last):
        return False
    if not graph.quiet(min(given.skipped, key=graph.place.__getitem__), rows):
        return False
    width = int(_shape(given.x)[-1])
    with graph.graph.inserting_before(rows):
        x, *vectors = (
            graph.graph.call_method("reshape", (each, -1, width))
            for each in (given.x, given.scale, given.shift)
        )
        if _value(given.scale).dtype != _value(given.shift).dtype:
            vectors = [graph.graph.call_method("float", (each,)) for each in vectors]
        vectors = [graph.graph.call_method("contiguous", (each,)) for each in vectors]
        rest: tuple[Any, ...] = rows.args[1:]
        if _name(rows) == "dtq::quantize_rows":
            pre_scale, block, scale, *levels = rest
            rest = pre_scale, None, block, 1, scale, None, *levels
        new = graph.graph.call_function(ops.norm_quantize_rows, (x, *vectors, given.eps, *rest))
    graph.replace(rows, new)
    return True


def _fuse_gelu(graph: _Graph, node: fx.Node) -> bool:
    if _name(node) == "gelu" and node.kwargs.get("approximate") != "tanh":
        return False
    product = _product(node.args[0] if node.args else node.kwargs.get("input"))
    if product is None or product.gelu or product.gate is not None:
        return False
    product.gelu = True
    return _put(graph, node, product)


def _fuse_gate(graph: _Graph, node: fx.Node) -> bool:
    for gated, residual in _pairs(node, "add"):
        for gate, given in _pairs(gated, "mul"):
            product, like = _product(given), _value(node)
            if product is None or product.gate is not None or len(gated.users) != 1:
                continue
            if not (_is_like(given, like) and _is_like(residual, like)) or residual is gated:
                continue
            if not _is_vector(gate, like):
                continue
            if not like.dtype == _value(gate).dtype == product.dtype:
                continue
            product.gate, product.residual = gate, residual
            return _put(graph, node, product)
    return False


def _put(graph: _Graph, node: fx.Node, product: _Product) -> bool:
    """The product goes on and stands where ``node`` was."""
    # kernels know no gradients
    if _value(node).requires_grad or not graph.quiet(product.node, node):
        return False
    if not _compiled(node, product.op):
        return False
    width = int(_shape(node)[-1])
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
    for product, shift in _pairs(last, "add"):
        for normed, raised in _pairs(product, "mul"):
            norm = _through(normed, _CASTS)
            if _name(norm) != "layer_norm" or any(len(n.users) > 1 for n in (product, norm)):
                continue
            found = _norm_of(norm)
            for scale, one in _pairs(raised, "add"):
                if found is None or not isinstance(one, int | float) or one != 1:
                    continue
                x, given, eps = found
                if _are_modulation(scale, shift, _value(norm)):
                    skipped = [raised, norm, *_between(given, x)]
                    return _Modulated(x, scale, shift, eps, last, skipped)
    return None


def _are_modulation(scale: Any, shift: Any, like: Tensor) -> bool:
    """Whether these are a scale and a shift for each image of ``like``, or one for all."""
    if not _is_vector(scale, like) or not _is_vector(shift, like):
        return False
    up, along = _value(scale), _value(shift)
    alike = up.shape[0] == along.shape[0] and up.device == along.device == like.device
    return alike and {up.dtype, along.dtype} <= _FLOATS


def _between(node: fx.Node, source: fx.Node) -> list[fx.Node]:
    """The views and casts that a value went through, the last one first."""
    found = []
    while node is not source:
        found.append(node)
        node = cast("fx.Node", node.args[0])
    return found


def _norm_of(norm: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """Input before casts, input, epsilon of a LayerNorm over the last axis, without weights."""
    if not _is_tensor(norm):
        return None
    names = "input", "normalized_shape", "weight", "bias", "eps"
    given: dict[str, Any] = dict(zip(names, norm.args, strict=False)) | dict(norm.kwargs)
    x = _through(given["input"], _CASTS, upwards=True)
    plain = given.get("weight") is None and given.get("bias") is None
    if not plain or len(given["normalized_shape"]) != 1 or _value(x).dtype not in _FLOATS:
        return None
    return x, given["input"], given.get("eps", 1e-5)


def _only_rows(last: fx.Node) -> bool:
    """Whether a value is read by quantizers alone, through views and casts."""
    return all(
        _name(user) in _ROWS or (_name(user) in _VIEWS | _CASTS and _only_rows(user))
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
        name, args = _name(node), cast("tuple[Any, ...]", node.args)
        if name in _EPILOGUES or name in _OPERANDS:
            # without a view on the way the rows themselves are meant
            return _said(node, name, args, sizes) if sizes or node is given else None
        if not _changes_nothing(node):
            return None
        if sizes is None and name in ("reshape", "view"):
            if not _same_sizes(_shape(node), _shape(given)):
                return None
            sizes = args[1:]
        node = args[0]
    return None


def _said(node: fx.Node, name: str, args: tuple[Any, ...], sizes: Any) -> _Product:
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
    name = _name(node)
    source = _kept_rows(node)
    if source is None or _value(source).dtype != _value(node).dtype:
        return False
    if name == "dropout":
        names = "input", "p", "training"
        options: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        return options.get("p", 0.5) == 0 or options.get("training", True) is False
    if name == "truediv":
        return node.args[1:] == (1,)
    return name in _VIEWS | _CASTS


def _through(node: Any, names: set[str], *, upwards: bool = False) -> Any:
    """What a value was before views that keep its rows, and casts; ``upwards``: to wider types."""
    while isinstance(node, fx.Node) and _name(node) in names:
        source = _kept_rows(node)
        if source is None:
            break
        if upwards and _value(source).dtype.itemsize > _value(node).dtype.itemsize:
            break
        node = source
    return node


def _kept_rows(node: fx.Node) -> fx.Node | None:
    """What a tensor is made of, if that has rows of the same length."""
    source: Any = node.args[0] if node.args else None
    if not _is_tensor(source) or not _is_tensor(node) or not _value(source).dim():
        return None
    if _value(source).device != _value(node).device:
        return None
    if _value(source).dtype != _value(node).dtype:
        # integers, and smaller floats, would not come back
        floats = {_value(source).dtype, _value(node).dtype} <= _FLOATS
        if not floats or _name(node) == "view":  # or the bits as another type
            return None
    kept: fx.Node = source
    return kept if _same(_shape(kept)[-1], _shape(node)[-1]) else None


def _pairs(node: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """The two operands of a sum or product, both ways round."""
    if _name(node) == name and len(node.args) == 2 and not node.kwargs and _is_tensor(node):
        yield node.args[0], node.args[1]
        yield node.args[1], node.args[0]


def _is_vector(node: Any, like: Tensor) -> bool:
    """Whether a value is one row for each image of (images, tokens, channels), or one for all."""
    if not _is_tensor(node) or like.dim() != 3:
        return False
    images, *tokens, width = (1,) * (like.dim() - _value(node).dim()) + tuple(_shape(node))
    return (
        _value(node).dim() > 1
        and _same(width, like.shape[-1])
        and (_same(images, 1) or _same(images, like.shape[0]))
        and all(_same(size, 1) for size in tokens)
    )


def _is_like(node: Any, like: Tensor) -> bool:
    """Whether a value has a shape and type."""
    if not _is_tensor(node):
        return False
    value = _value(node)
    return value.dtype == like.dtype and _same_sizes(value.shape, like.shape)


def _same_sizes(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


def _same(a: Any, b: Any) -> bool:
    return bool(statically_known_true(a == b))


def _is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("example_value"), Tensor)


def _value(node: fx.Node) -> Any:
    return node.meta["example_value"]


def _shape(node: fx.Node) -> Any:
    return _value(node).shape


def _name(node: Any) -> str:
    """``add``, ``reshape``, ``dtq::quantize_rows``; empty for what is not called."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name)
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    return str(getattr(target, "__name__", target))


def _writes(node: fx.Node) -> bool:
    """Whether a node may write to what others read; those that cannot be asked do."""
    name, target = _name(node), node.target
    if node.op == "call_module" or isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if node.op == "call_method":
        return name.startswith("__i") or name == "__setitem__" or _in_place(name)
    if node.op != "call_function":
        return False
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = (getattr(target, overload) for overload in target.overloads())
        return any(overload._schema.is_mutable for overload in overloads)
    if getattr(target, "__module__", "") in ("_operator", "operator"):
        return hasattr(operator, f"__{name}__") and name.startswith("i") and name not in _PLAIN
    return _in_place(name) or node.kwargs.get("out") is not None or _asked_in_place(node)


_PLAIN = {"inv", "invert", "index", "is_", "is_not"}
"""Operators that begin with an i and write nothing."""


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _asked_in_place(node: fx.Node) -> bool:
    try:
        bound = inspect.signature(cast("Any", node.target)).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # built in: its name says so
        return node.kwargs.get("inplace") is True
    return bound.arguments.get("inplace") is True


def _compiled(node: fx.Node, op: str) -> bool:
    """Whether the library of the node's device has the op."""
    library = LIBRARIES.get(_value(node).device.type)
    return library is not None and op in library.ops and library.load()
