# SPDX-License-Identifier: Apache-2.0
"""A graph of Dynamo, and what its nodes say: their names, values, and whether they write."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

CASTS = {"to", "type_as", "float", "bfloat16", "half", "type"}
VIEWS = {"reshape", "view", "contiguous", "flatten", "squeeze", "unsqueeze"}
FLOATS = {torch.float32, torch.bfloat16, torch.float16}
"""Types that casts are looked through between."""

_PURE = {
    *CASTS,
    *VIEWS,
    *("add", "mul", "truediv", "dropout", "layer_norm", "gelu", "getitem"),
}
"""What nothing but its value is lost of, dtq's own ops aside."""


class Graph:
    """A graph that knows the order of its nodes, and where something is written to."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.writes = [i for node, i in self.place.items() if _writes(node)]
        self.switches = any("grad_enabled" in name_of(node) for node in self.place)

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
            if not each.users and (name_of(each) in _PURE or name_of(each).startswith("dtq::")):
                self.drop(each)


def through(node: Any, names: set[str], *, upwards: bool = False) -> Any:
    """What a value was before views that keep its rows, and casts; ``upwards``: to wider types."""
    while isinstance(node, fx.Node) and name_of(node) in names:
        source = kept_rows(node)
        if source is None:
            break
        if upwards and value_of(source).dtype.itemsize > value_of(node).dtype.itemsize:
            break
        node = source
    return node


def between(node: fx.Node, source: fx.Node) -> list[fx.Node]:
    """The views and casts that a value went through, the last one first."""
    found = []
    while node is not source:
        found.append(node)
        node = cast("fx.Node", node.args[0])
    return found


def kept_rows(node: fx.Node) -> fx.Node | None:
    """What a tensor is made of, if that has rows of the same length."""
    source: Any = node.args[0] if node.args else None
    if not is_tensor(source) or not is_tensor(node) or not value_of(source).dim():
        return None
    if value_of(source).device != value_of(node).device:
        return None
    if value_of(source).dtype != value_of(node).dtype:
        # integers, and smaller floats, would not come back
        floats = {value_of(source).dtype, value_of(node).dtype} <= FLOATS
        if not floats or name_of(node) == "view":  # or the bits as another type
            return None
    kept: fx.Node = source
    return kept if same(shape_of(kept)[-1], shape_of(node)[-1]) else None


def pairs(node: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """The two operands of a sum or product, both ways round."""
    if name_of(node) == name and len(node.args) == 2 and not node.kwargs and is_tensor(node):
        yield node.args[0], node.args[1]
        yield node.args[1], node.args[0]


def is_vector(node: Any, like: Tensor) -> bool:
    """Whether a value is one row for each image of (images, tokens, channels), or one for all."""
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
    """Whether a value has a shape and type."""
    if not is_tensor(node):
        return False
    value = value_of(node)
    return value.dtype == like.dtype and same_sizes(value.shape, like.shape)


def same_sizes(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def same(a: Any, b: Any) -> bool:
    return bool(statically_known_true(a == b))


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("example_value"), Tensor)


def value_of(node: fx.Node) -> Any:
    return node.meta["example_value"]


def shape_of(node: fx.Node) -> Any:
    return value_of(node).shape


def name_of(node: Any) -> str:
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
    name, target = name_of(node), node.target
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
        return name in ("setitem", "delitem") or (name.startswith("i") and name not in _PLAIN)
    return _in_place(name) or node.kwargs.get("out") is not None or _asked_in_place(node)


_PLAIN = {"inv", "invert", "index", "indexOf", "is_", "is_not", "itemgetter"}
"""Operators that begin with an i and write nothing."""


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _asked_in_place(node: fx.Node) -> bool:
    try:
        bound = inspect.signature(cast("Any", node.target)).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # built in: its name says so
        return node.kwargs.get("inplace") is True
    return bound.arguments.get("inplace") is True
