# SPDX-License-Identifier: Apache-2.0
"""FX graphs of Dynamo: names and values of nodes, and whether a node writes to a tensor."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

CASTS = {"to", "type_as", "float", "bfloat16", "half", "type"}
VIEWS = {"reshape", "view", "contiguous", "flatten", "squeeze", "unsqueeze"}
DIVISIONS = {"truediv", "div"}
"""``x / y``. Under a ``TorchFunctionMode``, as of int8 attention, Dynamo calls it ``div``."""
FLOATS = {torch.float32, torch.bfloat16, torch.float16}
"""Dtypes between which casts are ignored when a pattern is matched."""

_PURE = {*CASTS, *VIEWS, *DIVISIONS, *("add", "mul", "dropout", "layer_norm", "gelu", "getitem")}
"""Ops without side effects, in addition to those of dtq: such a node may be removed if its value is
unused."""


class Graph:
    """A graph with the order of its nodes and the positions of writes.

    Args:
        graph: of Dynamo; every node that holds a tensor has an ``example_value``.

    Attributes:
        position: index of each node in the order of execution.
        writes: positions of the nodes that may write to a tensor.
        switches_grad_mode: whether gradients are enabled or disabled somewhere in the graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.writes = [i for node, i in self.position.items() if _writes(node)]
        self.switches_grad_mode = any("grad_enabled" in name_of(node) for node in self.position)

    def nodes(self) -> Iterator[fx.Node]:
        """The present nodes, without those that are erased during the iteration."""
        return (node for node in list(self.graph.nodes) if not node._erased)

    def no_writes_between(self, first: fx.Node, last: fx.Node) -> bool:
        """Whether no node after ``first`` and before ``last`` writes to a tensor."""
        return not any(self.position[first] < i < self.position[last] for i in self.writes)

    def can_replace(self, first: fx.Node, node: fx.Node) -> bool:
        """Whether ``first`` may replace the later ``node``, which has the same op and arguments.

        It may not if one of them may be written to, or is an output, which the caller may write to;
        nor if only one of them may require a gradient.
        """
        is_output = any(user.op == "output" for n in (first, node) for user in n.users)
        written = any(self.position[first] < i for i in self.writes)
        return not (is_output or written or self.switches_grad_mode)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Replace ``old`` by ``new``, which stands before it."""
        new.meta, self.position[new] = dict(old.meta), self.position[old]
        old.replace_all_uses_with(new)
        self.drop(old)

    def drop(self, node: fx.Node) -> None:
        """Erase an unused node, and its inputs that are then unused and have no side effects."""
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        for each in inputs:
            if not each.users and (name_of(each) in _PURE or name_of(each).startswith("dtq::")):
                self.drop(each)


def skip(node: Any, names: set[str], *, upcasts_only: bool = False) -> Any:
    """Follow the inputs of a value back through the named views and casts.

    Args:
        node: the value.
        names: ops to skip; only those that keep the length of rows are skipped.
        upcasts_only: whether to stop at casts to a narrower dtype.

    Returns:
        The first value that is not the result of such an op.
    """
    while isinstance(node, fx.Node) and name_of(node) in names:
        source = input_with_same_rows(node)
        if source is None:
            break
        if upcasts_only and value_of(source).dtype.itemsize > value_of(node).dtype.itemsize:
            break
        node = source
    return node


def path_between(node: fx.Node, source: fx.Node) -> list[fx.Node]:
    """The views and casts that lead from ``source`` to ``node``, the last one first."""
    path = []
    while node is not source:
        path.append(node)
        node = cast("fx.Node", node.args[0])
    return path


def input_with_same_rows(node: fx.Node) -> fx.Node | None:
    """The first input of a view or cast, if its rows have the same length and values; else None."""
    source: Any = node.args[0] if node.args else None
    if not is_tensor(source) or not is_tensor(node) or not value_of(source).dim():
        return None
    if value_of(source).device != value_of(node).device:
        return None
    if value_of(source).dtype != value_of(node).dtype:
        # casts to integers or to smaller floats lose values
        floats = {value_of(source).dtype, value_of(node).dtype} <= FLOATS
        if not floats or name_of(node) == "view":  # view(dtype) reinterprets the bits
            return None
    result: fx.Node = source
    return result if same(shape_of(result)[-1], shape_of(node)[-1]) else None


def operands(node: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """The two operands of the op ``name``, a sum or product, in both orders; none for others."""
    if name_of(node) == name and len(node.args) == 2 and not node.kwargs and is_tensor(node):
        yield node.args[0], node.args[1]
        yield node.args[1], node.args[0]


def is_row_vector(node: Any, like: Tensor) -> bool:
    """Whether a value has one row per image of ``like`` (images, tokens, channels), or just one."""
    if not is_tensor(node) or like.dim() != 3:
        return False
    images, *tokens, width = (1,) * (like.dim() - value_of(node).dim()) + tuple(shape_of(node))
    return (
        value_of(node).dim() > 1
        and same(width, like.shape[-1])
        and (same(images, 1) or same(images, like.shape[0]))
        and all(same(size, 1) for size in tokens)
    )


def is_like(node: Any, like: Tensor) -> bool:
    """Whether a value has the shape and the dtype of ``like``."""
    if not is_tensor(node):
        return False
    value = value_of(node)
    return value.dtype == like.dtype and same_sizes(value.shape, like.shape)


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two shapes are equal for all values of dynamic sizes."""
    return len(a) == len(b) and all(map(same, a, b))


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for all values of dynamic sizes."""
    return bool(statically_known_true(a == b))


def is_tensor(node: Any) -> bool:
    """Whether a value of the graph is a tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("example_value"), Tensor)


def value_of(node: fx.Node) -> Any:
    """The fake tensor of a node, with its shape, dtype and device."""
    return node.meta["example_value"]


def shape_of(node: fx.Node) -> Any:
    """The shape of a node's tensor; sizes may be symbolic."""
    return value_of(node).shape


def name_of(node: Any) -> str:
    """Name of the called op: ``add``, ``reshape``, ``dtq::quantize_rows``; empty for others."""
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
    """Whether a node may write to a tensor that others read; unknown ops count as writing."""
    name, target = name_of(node), node.target
    if node.op == "call_module" or isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if node.op == "call_method":
        return name.startswith("__i") or name == "__setitem__" or _named_in_place(name)
    if node.op != "call_function":
        return False
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = (getattr(target, overload) for overload in target.overloads())
        return any(overload._schema.is_mutable for overload in overloads)
    if getattr(target, "__module__", "") in ("_operator", "operator"):
        return name in ("setitem", "delitem") or (name.startswith("i") and name not in _NO_WRITES)
    return _named_in_place(name) or node.kwargs.get("out") is not None or _inplace_argument(node)


_NO_WRITES = {"inv", "invert", "index", "indexOf", "is_", "is_not", "itemgetter"}
"""Functions of ``operator`` that start with an i, but do not work in place."""


def _named_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _inplace_argument(node: fx.Node) -> bool:
    try:
        bound = inspect.signature(cast("Any", node.target)).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # a built-in function, whose name shows whether it writes
        return node.kwargs.get("inplace") is True
    return bound.arguments.get("inplace") is True
