# SPDX-License-Identifier: Apache-2.0
"""Find the linears of any diffusers transformer, which share an input, and what each one does.

One forward is traced; on the meta device it costs nothing, so a plan for a 12-billion model is
made in seconds and without its weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtq.families.base import Family, Linear, Scan, Site

# (regular expression on the name below its block, role); the first that matches decides
_IN_BLOCK: tuple[tuple[str, str], ...] = (
    (r"(^|\.)\w*(embedder|embedding|embed|emb)(\.|$)", "embed"),
    (r"(adaln|ada_ln|modulation|(img|txt)_mod(\.|$))", "adaln"),
    (r"(^|\.)norm\w*\.(linear|linear_\d|proj)$", "adaln"),
    (r"\.(to_q|add_q_proj|q_proj|wq|query)$", "q"),
    (r"\.(to_k|add_k_proj|k_proj|wk|key)$", "k"),
    (r"\.(to_v|add_v_proj|v_proj|wv|value)$", "v"),
    (r"\.(to_qkv|qkv|to_kv|kv|to_added_qkv|qkv_proj|to_qkv_mlp_proj)$", "qkv"),
    (r"\.(to_out(\.0)?|to_add_out|out_proj|o_proj|wo|proj_attn)$", "out"),
    (
        r"(^|\.)\w*(ff|ffn|mlp|feed_forward)\w*\.(net\.0\.proj|fc1|linear_in|linear_1|up_proj|gate_proj|gate|w1|w3)$",
        "ffn.up",
    ),
    (
        r"(^|\.)\w*(ff|ffn|mlp|feed_forward)\w*\.(net\.2|fc2|linear_out|linear_2|down_proj|w2)$",
        "ffn.down",
    ),
    (r"(^|\.)(proj_mlp)$", "ffn.up"),
    (r"(^|\.)(proj_out)$", "ffn.down"),
)
_OUTSIDE: tuple[tuple[str, str], ...] = (
    (r"^(proj_out|norm_out|final|head|out_proj|last)", "head"),
    (r"", "embed"),
)
_BLOCK = re.compile(r"^(?:\w+\.)*?\w+\.\d+\.")
_ATTENTION = {"q", "k", "v", "qkv", "out"}


@dataclass
class _Seen:
    """One traced linear: identity, rank and rows of its input."""

    input: int
    rank: int
    rows: int


def scan(model: nn.Module, family: Family | None, run: Callable[[nn.Module], object]) -> Scan:
    """Trace one forward and sort the linears into sites.

    Args:
        model: the transformer, on any device, meta included.
        family: overrides, if the class is known.
        run: calls the model once, or as often as a whole picture needs.

    Returns:
        The scan; ``traced`` is True.
    """
    seen: dict[str, _Seen] = {}
    alive: list[Tensor] = []  # identities stay unique only while the tensors live
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(_watch(name, seen, alive)))
    try:
        with torch.no_grad():
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[tuple[int, str], list[str]] = {}
    for name, what in seen.items():
        groups.setdefault((what.input, _block(name)), []).append(name)
    roles = _roles(model, family, seen)
    sites = tuple(_site(model, names, roles) for names in groups.values())
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    rows = {name: what.rows for name, what in seen.items()}
    never = tuple(sorted(linears - set(seen)))
    return Scan(family.name if family else "generic", sites, never, rows=rows)


def scan_names(model: nn.Module, family: Family | None) -> Scan:
    """Sort the linears by name alone; each is a site of its own. For models that cannot be run."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    roles = _roles(model, family, {})
    sites = tuple(_site(model, [name], roles) for name in names)
    return Scan(family.name if family else "generic", sites, traced=False)


def _watch(name: str, seen: dict[str, _Seen], alive: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and name not in seen:
            alive.append(args[0])
            x = args[0]
            seen[name] = _Seen(id(x), x.ndim, x.numel() // x.shape[-1])

    return hook


def _block(name: str) -> str:
    """The repeated block a linear lives in, ``transformer_blocks.3.``; empty outside blocks."""
    match = _BLOCK.match(name)
    return match.group() if match else ""


def _roles(model: nn.Module, family: Family | None, seen: dict[str, _Seen]) -> dict[str, str]:
    roles = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            roles[name] = _role(name, family, seen)
    return roles


def _role(name: str, family: Family | None, seen: dict[str, _Seen]) -> str:
    for pattern, role in family.roles if family else ():
        if re.search(pattern, name):
            return role
    block = _block(name)
    if not block:
        return next(role for pattern, role in _OUTSIDE if re.search(pattern, name))
    for pattern, role in _IN_BLOCK:
        if re.search(
            pattern, "." + name[len(block) :] if pattern[0] == "\\" else name[len(block) :]
        ):
            return _attention(name, role, seen) if role in _ATTENTION else role
    # no rule knows the name: one row per picture is modulation, tokens are tokens
    return "adaln" if name in seen and seen[name].rank == 2 else "other"


def _attention(name: str, part: str, seen: dict[str, _Seen]) -> str:
    """Cross-attention is where keys read another tensor than queries."""
    module = re.sub(r"\.(to_out\.0|[^.]+)$", "", name)
    query, key = seen.get(f"{module}.to_q"), seen.get(f"{module}.to_k")
    crossed = query is not None and key is not None and query.input != key.input
    return f"{'xattn' if crossed else 'attn'}.{part}"


def _site(model: nn.Module, names: list[str], roles: dict[str, str]) -> Site:
    linears = []
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        shape = (module.out_features, module.in_features)
        linears.append(Linear(name, roles[name], shape, module.bias is not None))
    return Site(names[0], tuple(linears))
