# SPDX-License-Identifier: Apache-2.0
"""Roles of linears, from their dotted names and from the inputs that a traced forward showed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dtq.models.base import Family
from dtq.models.linears import input_of, linears_of, shape_of

# start of a name in a regular expression: the start of the path, or of a component of it
_AT = r"(?:^|\.)"
_ATTENTION_PATH = re.compile(rf"{_AT}\w*(attn|attention|mha)\w*\.", re.I)
_FEED_FORWARD_PATH = re.compile(
    rf"{_AT}(\w*_)?(ff|ffn|mlp|feed_?forward|dense\w*dense|\w*experts?|transition)(_\w+)?\.", re.I
)
# of U-Nets: linears in ResNets, and those into and out of the transformers of an attention
_BETWEEN_PARTS = re.compile(
    rf"{_AT}resnet\w*\.|{_AT}(\w*attentions|motion_modules)\.\d+\.proj_(in|out)$", re.I
)
Rules = tuple[tuple[str, str], ...]
"""(regular expression on the path below the block, role); the first match is used."""


def _leaves(*rules: tuple[str, str]) -> Rules:
    """Rules for the end of a path, from the start of a component of it."""
    return tuple((rf"(?i){_AT}({pattern})$", role) for pattern, role in rules)


_IN_BLOCK: Rules = (
    (rf"(?i){_AT}\w*(embedder|embedding|embed|emb)(\.|$)", "embed"),
    (r"(?i)adaln|ada_ln|modulation|film|_mod(\.|$)", "adaln"),
    (rf"(?i){_AT}norm\w*\.(linear|linear_\d|proj)$", "adaln"),
    (rf"{_AT}time_emb_proj$", "adaln"),
)
_IN_ATTENTION = _leaves(
    (r"(to_|add_|c_)?q(uery)?(_proj|_linear|_t)?|wq", "q"),
    (r"(to_|add_|c_)?k(ey)?(_proj|_linear|_t)?|wk", "k"),
    (r"(to_|add_|c_)?v(alue)?(_proj|_linear|_t)?|wv", "v"),
    (r"\w*qkv\w*", "qkv"),
    (r"(\w*_)?kv(_\w+)?", "kv"),
    (
        r"to_out(\.0)?|to_out_t|to_add_out|out_proj|o(_proj)?|proj_attn|\w*attn_proj|wo|c_proj",
        "out",
    ),
)
_IN_FEED_FORWARD = _leaves(
    (r"net\.0\.proj|fc1|linear_in|linear_1|linear_3|in_layer|proj_in|wi\w*|w1|w3", "ffn.up"),
    (r"up|gate|(up|gate|gate_up)_(proj|layer)|proj|(ff|ffn|mlp|feed_forward)\.0", "ffn.up"),
    (r"net\.2|\w*fc2|linear_out|linear_2|out_layer|out_projection|proj_out|wo|w2", "ffn.down"),
    (r"down|out|down_(proj|layer)|feed_forward\.2", "ffn.down"),
    (r"\w*inverted\w*(\.conv)?", "ffn.up"),
    (r"\w*point\w*(\.conv)?", "ffn.down"),
)
# feed-forward linears that lie in the block itself, not in a module of their own
_DIRECTLY_IN_BLOCK: Rules = (
    (r"^(proj_mlp|ff_in|(up|gate|gate_up)_proj)$", "ffn.up"),
    (r"^(proj_out|ff_out|down_proj)$", "ffn.down"),
)
_OUTSIDE: Rules = (
    (r"^(all_)?(proj_out|norm_out|final|head|out_proj|out_layer|last|lm_head)", "head"),
    (r"", "embed"),
)


@dataclass(frozen=True)
class TracedInput:
    """The input of a linear in a traced forward.

    Attributes:
        tensor: identity of the tensor.
        rank: number of its axes.
        rows: number of its rows (M).
    """

    tensor: int
    rank: int
    rows: int


@dataclass
class Trace:
    """The inputs of linears in a traced forward, by name, its embeddings, and the batch size.

    The tensors are kept, because identities are unique only among living objects.
    """

    inputs: dict[str, TracedInput] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    batch: int = 1
    tensors: list[Tensor] = field(default_factory=list)

    def see_batch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of the model: the batch size is that of its first tensor, or list of tensors."""
        for value in (*args, *kwargs.values()):
            tensor = isinstance(value, Tensor) and value.ndim
            if tensor or (isinstance(value, list) and value and isinstance(value[0], Tensor)):
                self.batch = len(value)
                return

    def see_input(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Hook of a linear: its first input counts.

        Args:
            name: of the linear.
            module: the linear.
            args: of its call.
            kwargs: of its call.
        """
        x = input_of(args, kwargs)
        if isinstance(x, Tensor) and name not in self.inputs:
            self.tensors.append(x)
            self.inputs[name] = TracedInput(id(x), x.ndim, x.numel() // shape_of(module)[1])


def block_of(name: str, blocks: Sequence[str]) -> str:
    """The prefix of the repeated block that a linear lies in; empty outside of blocks."""
    return next((prefix for prefix in blocks if name.startswith(prefix)), "")


def assign_roles(
    model: nn.Module,
    family: Family | None,
    blocks: Sequence[str],
    groups: Sequence[Sequence[str]],
    trace: Trace,
) -> dict[str, str]:
    """The role of every linear of a model.

    Args:
        model: the transformer.
        family: its family, whose own rules are tried first.
        blocks: prefixes of the repeated blocks.
        groups: names of linears with the same input.
        trace: inputs of the linears; empty for a model that cannot be run.

    Returns:
        Dotted name to a key of ``ROLES``.
    """
    roles = {name: _role(name, module, family, blocks, trace) for name, module in linears_of(model)}
    crossed = _cross_attention(roles, trace.inputs)
    for name, role in roles.items():
        if role.startswith("attn.") and name in crossed:
            roles[name] = f"x{role}"
        elif role == "attn.kv":  # of a self-attention that fuses only keys and values
            roles[name] = "attn.qkv"
    # the gate of a feed-forward reads the same input as its up projection, whatever its name is
    for names in groups:
        ups = {n.rpartition(".")[0] for n in names if roles[n] == "ffn.up"}
        for name in names:
            if roles[name] in ("ffn.down", "other") and name.rpartition(".")[0] in ups:
                roles[name] = "ffn.up"
    return roles


def _role(
    name: str, module: nn.Module, family: Family | None, blocks: Sequence[str], trace: Trace
) -> str:
    if family and (role := _first_match(family.roles, name)):
        return role
    block = block_of(name, blocks)
    if not block:
        return _first_match(_OUTSIDE, name)
    path = name[len(block) :]
    if role := _first_match(_IN_BLOCK, path):
        return role
    in_feed_forward = _FEED_FORWARD_PATH.search(path)
    if not in_feed_forward and (projection := attention_projection(path)):
        return f"attn.{projection}"
    if role := _first_match(_IN_FEED_FORWARD if in_feed_forward else _DIRECTLY_IN_BLOCK, path):
        return role
    # no rule matches the name: one row per image is modulation, a wide side a feed-forward
    traced = trace.inputs.get(name)
    if traced is not None and traced.rank == 2 and traced.rows <= trace.batch:
        return "adaln"
    rows, columns = shape_of(module)
    if _BETWEEN_PARTS.search(path):
        return "proj"
    if _ATTENTION_PATH.search(path) or max(rows, columns) < 2 * min(rows, columns):
        return "other"
    return "ffn.up" if rows > columns else "ffn.down"


def _first_match(rules: Rules, path: str) -> str:
    return next((role for pattern, role in rules if re.search(pattern, path)), "")


def attention_projection(path: str) -> str:
    """Which projection of an attention a linear is: ``q k v qkv kv out``; empty for others."""
    if projection := _first_match(_IN_ATTENTION, path):
        return projection
    ends = re.search(rf"{_AT}(proj|out|out_layer|dense)$", path)
    return "out" if ends and _ATTENTION_PATH.search(path) else ""


def _cross_attention(roles: Mapping[str, str], inputs: Mapping[str, TracedInput]) -> set[str]:
    """Linears of attentions whose keys read another tensor than their queries do.

    In a joint attention each stream has projections of its own (``add_``, ``txt``, ``_t``), and the
    streams are checked separately.
    """
    streams: dict[tuple[str, bool], dict[str, str]] = {}
    for name, role in roles.items():
        if role.startswith("attn."):
            module = re.sub(r"\.(to_out\.0|[^.]+)$", "", name)
            stream = streams.setdefault((module, _in_second_stream(name)), {})
            stream[name] = role.removeprefix("attn.")
    crossed: set[str] = set()
    for (module, _), stream in streams.items():
        main = _tensors_read(streams.get((module, False), {}), inputs, "q", "qkv")
        queries = _tensors_read(stream, inputs, "q", "qkv") or main
        keys = _tensors_read(stream, inputs, "k", "v", "kv")
        if queries and keys and not queries & keys:
            crossed |= set(stream)
    return crossed


def _in_second_stream(name: str) -> bool:
    """Whether a projection belongs to the second stream of a joint attention."""
    leaf = re.sub(r"\.0$", "", name).rpartition(".")[2]
    return bool(re.search(r"(^|_)(add|txt)(_|$)|_t$", leaf))


def _tensors_read(
    stream: Mapping[str, str], inputs: Mapping[str, TracedInput], *projections: str
) -> set[int]:
    return {inputs[n].tensor for n, p in stream.items() if p in projections and n in inputs}
