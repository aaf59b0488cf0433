# SPDX-License-Identifier: Apache-2.0
"""Find the linears of any diffusers transformer, which share an input, and what each one does.

One forward is traced; on the meta device it costs nothing, so a plan for a 12-billion model is
made in seconds and without its weights. A convolution with a 1 x 1 kernel is a linear too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dtq.models.base import Family, InputGroup, Linear, Scan, sibling_key
from dtq.models.linears import is_linear, shape_of

# what precedes a name in a regular expression: the start of the path or of a component
_AT = r"(?:^|\.)"
_ATTENTION_PATH = re.compile(rf"{_AT}\w*(attn|attention|mha)\w*\.", re.I)
_FEED_FORWARD_PATH = re.compile(
    rf"{_AT}(\w*_)?(ff|ffn|mlp|feed_?forward|dense\w*dense|\w*experts?|transition)(_\w+)?\.", re.I
)
# (regular expression on the path below the block, role); the first that matches decides
_IN_BLOCK: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.I), role)
    for pattern, role in (
        (rf"{_AT}\w*(embedder|embedding|embed|emb)(\.|$)", "embed"),
        (r"adaln|ada_ln|modulation|film|_mod(\.|$)", "adaln"),
        (rf"{_AT}norm\w*\.(linear|linear_\d|proj)$", "adaln"),
    )
)
_IN_ATTENTION: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"{_AT}({pattern})$", re.I), part)
    for pattern, part in (
        (r"(to_|add_|c_)?q(uery)?(_proj|_linear|_t)?|wq", "q"),
        (r"(to_|add_|c_)?k(ey)?(_proj|_linear|_t)?|wk", "k"),
        (r"(to_|add_|c_)?v(alue)?(_proj|_linear|_t)?|wv", "v"),
        (r"\w*qkv\w*", "qkv"),
        (r"(\w*_)?kv(_\w+)?", "kv"),
        (
            r"to_out(\.0)?|to_out_t|to_add_out|out_proj|o_proj|proj_attn|\w*attn_proj|wo|c_proj",
            "out",
        ),
    )
)
_IN_FEED_FORWARD: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"{_AT}({pattern})$", re.I), role)
    for pattern, role in (
        (r"net\.0\.proj|fc1|linear_in|linear_1|linear_3|in_layer|proj_in|wi\w*|w1|w3", "ffn.up"),
        (r"up|gate|(up|gate|gate_up)_(proj|layer)|proj|ff\.0|ffn\.0|mlp\.0", "ffn.up"),
        (r"net\.2|\w*fc2|linear_out|linear_2|out_layer|out_projection|proj_out|wo|w2", "ffn.down"),
        (r"down|out|down_(proj|layer)", "ffn.down"),
        (r"\w*inverted\w*(\.conv)?", "ffn.up"),
        (r"\w*point\w*(\.conv)?", "ffn.down"),
    )
)
# what feed-forwards are called where they have no module of their own
_LOOSE: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^(proj_mlp|ff_in|(up|gate|gate_up)_proj)$"), "ffn.up"),
    (re.compile(r"^(proj_out|ff_out|down_proj)$"), "ffn.down"),
)
_OUTSIDE: tuple[tuple[str, str], ...] = (
    (r"^(all_)?(proj_out|norm_out|final|head|out_proj|out_layer|last|lm_head)", "head"),
    (r"", "embed"),
)
_EMBEDS = re.compile(r"embed|embd|_emb(\.|$)|projection|projector|guidance_layer|conditioner", re.I)
_STACK = 0.1
"""Share of all weights from which a list of modules without attention counts as blocks."""


@dataclass
class _Seen:
    """One traced linear: identity, rank and rows of its input."""

    input: int
    rank: int
    rows: int


@dataclass
class _Trace:
    """What a forward showed."""

    seen: dict[str, _Seen] = field(default_factory=dict)
    batch: int = 1
    alive: list[Tensor] = field(default_factory=list)
    """Identities stay unique only while the tensors live."""


def scan(model: nn.Module, family: Family | None, run: Callable[[nn.Module], object]) -> Scan:
    """Trace one forward and sort the linears into sites.

    An expert that no token chose has the sites and roles of its siblings.

    Args:
        model: the transformer, on any device, meta included.
        family: overrides, if the class is known.
        run: calls the model once, or as often as a whole picture needs.

    Returns:
        The scan; ``traced`` is True.
    """
    trace = _Trace()
    hooks = [model.register_forward_pre_hook(_note_batch(trace), with_kwargs=True)]
    for name, module in linears_of(model):
        hooks.append(module.register_forward_pre_hook(_watch(name, trace)))
    try:
        with torch.no_grad():
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    seen = trace.seen
    blocks = blocks_of(model)
    groups: dict[tuple[int, str], list[str]] = {}
    for name, what in seen.items():
        groups.setdefault((what.input, _block(name, blocks)), []).append(name)
    idle = _idle_experts(model, seen)
    for name, sibling in idle.items():
        groups.setdefault((seen[sibling].input, name.rpartition(".")[0]), []).append(name)
    together = [*groups.values()]
    roles = _roles(model, family, blocks, trace, together)
    roles |= {name: roles[sibling] for name, sibling in idle.items()}
    sites = tuple(_site(model, names, roles) for names in together)
    rows = {name: what.rows for name, what in seen.items()}
    never = tuple(sorted({n for n, _ in linears_of(model)} - set(seen) - set(idle)))
    name = family.name if family else "generic"
    return Scan(name, sites, never, rows=rows, unsupported=unsupported(model, blocks))


def scan_names(model: nn.Module, family: Family | None) -> Scan:
    """Sort the linears by name alone; each is a site of its own. For models that cannot be run."""
    names = [[name] for name, _ in linears_of(model)]
    blocks = blocks_of(model)
    roles = _roles(model, family, blocks, _Trace(), names)
    sites = tuple(_site(model, name, roles) for name in names)
    family_name = family.name if family else "generic"
    return Scan(family_name, sites, traced=False, unsupported=unsupported(model, blocks))


def linears_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linears and 1 x 1 convolutions by dotted name, in model order."""
    return ((name, module) for name, module in model.named_modules() if is_linear(module))


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the repeated blocks, ``transformer_blocks.3.`` for example.

    Blocks are elements of the outermost lists of modules that have attention in them; lists
    without attention count when they hold a good part of the weights and are no embedders.
    """
    total = sum(math.prod(shape_of(m)) for _, m in linears_of(model))
    found: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for key, child in module.named_children():
            name = f"{prefix}{key}"
            listed = isinstance(child, nn.ModuleList | nn.Sequential) and _is_stack(child, name)
            if listed:
                found.extend(f"{name}.{each}." for each, _ in child.named_children())
            else:
                visit(child, f"{name}.")

    def _is_stack(listed: nn.Module, name: str) -> bool:
        inner = [*linears_of(listed)]
        # below the element's number there must be a module: a bare list of linears is no stack
        deep = [(n, m) for n, m in inner if "." in n]
        if any(_part(n) in ("q", "qkv") for n, _ in deep):
            return True
        weights = sum(math.prod(shape_of(m)) for _, m in deep)
        return not _EMBEDS.search(name) and weights > _STACK * total

    visit(model, "")
    return tuple(found)


def unsupported(model: nn.Module, blocks: tuple[str, ...]) -> dict[str, str]:
    """Weights in blocks that dtq cannot quantize, and what they are."""
    found = {}
    for name, module in model.named_modules():
        if not _block(f"{name}.", blocks) or is_linear(module):
            continue
        for key, weight in module.named_parameters(recurse=False):
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and key == "weight":
                kernel = "x".join(map(str, module.kernel_size))
                found[f"{name}.{key}"] = f"convolution with a {kernel} kernel"
            elif weight.ndim == 3 and min(weight.shape) > 1:
                shape = "x".join(map(str, weight.shape))
                found[f"{name}.{key}"] = f"matrices packed in one parameter of {shape}"
    return found


def _note_batch(trace: _Trace) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim:
                trace.batch = value.shape[0]
                return
            if isinstance(value, list) and value and isinstance(value[0], Tensor):
                trace.batch = len(value)
                return

    return hook


def _watch(name: str, trace: _Trace) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and name not in trace.seen:
            x = args[0]
            trace.alive.append(x)
            trace.seen[name] = _Seen(id(x), x.ndim, x.numel() // shape_of(module)[1])

    return hook


def _block(name: str, blocks: tuple[str, ...]) -> str:
    """The repeated block a linear lives in; empty outside blocks."""
    return next((prefix for prefix in blocks if name.startswith(prefix)), "")


def _idle_experts(model: nn.Module, seen: Mapping[str, _Seen]) -> dict[str, str]:
    """Experts that were not called, each with a sibling that was."""
    called = {sibling_key(name): name for name in seen if "expert" in name}
    found = {}
    for name, _ in linears_of(model):
        sibling = called.get(sibling_key(name))
        if name not in seen and sibling is not None:
            found[name] = sibling
    return found


def _roles(
    model: nn.Module,
    family: Family | None,
    blocks: tuple[str, ...],
    trace: _Trace,
    together: list[list[str]],
) -> dict[str, str]:
    roles = {name: _role(name, module, family, blocks, trace) for name, module in linears_of(model)}
    crossed = _crossed(roles, trace.seen)
    for name, role in roles.items():
        if role.startswith("attn.") and name in crossed:
            roles[name] = f"x{role}"
        elif role == "attn.kv":  # of self-attention that fuses keys and values only
            roles[name] = "attn.qkv"
    # gates of a feed-forward read what its other inputs read, whatever they are called
    for names in together:
        ups = {n.rpartition(".")[0] for n in names if roles[n] == "ffn.up"}
        for name in names:
            if roles[name] in ("ffn.down", "other") and name.rpartition(".")[0] in ups:
                roles[name] = "ffn.up"
    return roles


def _role(
    name: str, module: nn.Module, family: Family | None, blocks: tuple[str, ...], trace: _Trace
) -> str:
    for pattern, role in family.roles if family else ():
        if re.search(pattern, name):
            return role
    block = _block(name, blocks)
    if not block:
        return next(role for pattern, role in _OUTSIDE if re.search(pattern, name))
    inner = name[len(block) :]
    if found := next((role for pattern, role in _IN_BLOCK if pattern.search(inner)), ""):
        return found
    feeding = _FEED_FORWARD_PATH.search(inner)
    if not feeding and (part := _part(inner)):
        return f"attn.{part}"
    rules = _IN_FEED_FORWARD if feeding else _LOOSE
    if found := next((role for pattern, role in rules if pattern.search(inner)), ""):
        return found
    # no rule knows the name: one row per picture is modulation, a wide side is a feed-forward
    seen = trace.seen.get(name)
    if seen is not None and seen.rank == 2 and seen.rows <= trace.batch:
        return "adaln"
    out, columns = shape_of(module)
    if _ATTENTION_PATH.search(inner) or max(out, columns) < 2 * min(out, columns):
        return "other"
    return "ffn.up" if out > columns else "ffn.down"


def _part(inner: str) -> str:
    """What a linear does in an attention; empty for others."""
    if found := next((part for pattern, part in _IN_ATTENTION if pattern.search(inner)), ""):
        return found
    ends = re.search(rf"{_AT}(proj|out|out_layer|dense)$", inner)
    return "out" if ends and _ATTENTION_PATH.search(inner) else ""


def _crossed(roles: Mapping[str, str], seen: Mapping[str, _Seen]) -> set[str]:
    """Linears of attentions whose keys read another tensor than their queries do.

    In a joint attention each stream has projections of its own (``add_``, ``txt``, ``_t``) and is
    judged by itself.
    """
    modules: dict[str, dict[str, str]] = {}
    for name, role in roles.items():
        if role.startswith("attn."):
            module = re.sub(r"\.(to_out\.0|[^.]+)$", "", name)
            modules.setdefault(module, {})[name] = role.removeprefix("attn.")
    found: set[str] = set()
    for parts in modules.values():
        streams: dict[bool, dict[str, str]] = {}
        for name, part in parts.items():
            streams.setdefault(_second(name), {})[name] = part
        main = _inputs(streams.get(False, {}), seen, "q", "qkv")
        for members in streams.values():
            queries = _inputs(members, seen, "q", "qkv") or main
            keys = _inputs(members, seen, "k", "v", "kv")
            if queries and keys and not queries & keys:
                found |= set(members)
    return found


def _second(name: str) -> bool:
    """Whether a projection belongs to the second stream of a joint attention."""
    leaf = re.sub(r"\.0$", "", name).rpartition(".")[2]
    return bool(re.search(r"(^|_)(add|txt)(_|$)|_t$", leaf))


def _inputs(members: Mapping[str, str], seen: Mapping[str, _Seen], *parts: str) -> set[int]:
    return {seen[n].input for n, part in members.items() if part in parts and n in seen}


def _site(model: nn.Module, names: list[str], roles: Mapping[str, str]) -> InputGroup:
    linears = []
    for name in names:
        module: Any = model.get_submodule(name)
        linears.append(Linear(name, roles[name], shape_of(module), module.bias is not None))
    return InputGroup(names[0], tuple(linears))
