# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: every process holds a slice of the packed weights (Megatron, 1909.08053).

The linears of an attention or feed-forward are split in pairs. The first of a pair (q, k, v; up) is
split by output channels, the *column* rule, and needs nothing from the other processes. The second
(out; down) is split by input channels, the *row* rule; its partial products are summed over the
processes, once per pair. All other layers are replicated. See :class:`dtq.nn.slice.Slice`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_processor import Attention
from safetensors import safe_open
from torch import Tensor, nn

from dtq.checkpoint.config import DTQConfig, is_dtq
from dtq.checkpoint.reader import CHECKSUMS, Reader
from dtq.errors import InputError
from dtq.io.safe_parse import read_json
from dtq.models.linears import is_hooked, shape_of
from dtq.nn.linear import QuantLinear
from dtq.nn.slice import COLUMN, ROW, Group, Slice, slice_specs
from dtq.nn.storage import aligned, from_disk
from dtq.nn.swap import finalize, swap_empty
from dtq.pipelines.contents import model_class
from dtq.pipelines.loading import translate_errors
from dtq.pipelines.validation import check_folder
from dtq.pipelines.weight_files import weight_files

WHOLE = "replicate"

_INPUTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_OUTPUTS = ("to_out.0", "to_add_out")
_NORMS = {
    "norm_q": "to_q",
    "norm_k": "to_k",
    "norm_added_q": "add_q_proj",
    "norm_added_k": "add_k_proj",
}


@dataclass(frozen=True)
class Cut:
    """How a quantized linear is split.

    Attributes:
        rule: ``column``, ``row`` or ``replicate``.
        max_tp: largest number of processes that it can be split for.
        why: reason for ``replicate``; empty otherwise.
    """

    rule: str
    max_tp: int = 1
    why: str = ""


@dataclass(frozen=True)
class Pair:
    """Linears that are split together: the outputs of the first are the inputs of the second.

    Attributes:
        name: of the attention or feed-forward module.
        module: the attention or feed-forward.
        first: linears split by output channels, by dotted name.
        second: linears split by input channels, by dotted name.
        sections: equal ranges of output channels that are each split; 2 for a gated feed-forward.
        heads: of attention; 0 for a feed-forward.
    """

    name: str
    module: nn.Module
    first: dict[str, nn.Module]
    second: dict[str, nn.Module]
    sections: int = 1
    heads: int = 0

    def rules(self) -> dict[str, str]:
        """Rule of every linear of the pair, by dotted name."""
        return dict.fromkeys(self.first, COLUMN) | dict.fromkeys(self.second, ROW)

    def problem(self, world: int) -> str:
        """Why the pair cannot be split for that many processes; empty if it can."""
        layers = self.first | self.second
        floats = [name for name, layer in layers.items() if not isinstance(layer, QuantLinear)]
        if floats or not self.second:
            absent = f"{floats[0]} is not quantized" if floats else "it has no output projection"
            return f"{self.name}: {absent}, and the layers of a pair are split together"
        if self.heads % world:
            return f"{self.name}: {self.heads} heads do not split into {world}"
        first_width = shape_of(next(iter(self.first.values())))[0]
        for name, rule in self.rules().items():
            layer = layers[name]
            assert isinstance(layer, QuantLinear)
            width = shape_of(layer)[0] // self.sections
            # with grouped queries, keys and values have fewer heads than queries
            unit = first_width // self.heads if rule == COLUMN and self.heads else 1
            if rule == COLUMN and width // unit % world:
                return f"{name}: {width // unit} heads or channels do not split into {world}"
            try:
                slice_specs(layer, rule, world)
            except InputError as error:
                return f"{name}: {error}"
        return ""

    def max_tp(self) -> int:
        """The largest number of processes that the pair can be split for."""
        limit = self.heads or math.gcd(*(shape_of(x)[1] for x in self.second.values()))
        divisors = (n for n in range(limit, 1, -1) if limit % n == 0)
        return next((n for n in divisors if not self.problem(n)), 1)


class WholeNorm(nn.Module):
    """A norm over all heads, of which every process has some: it gathers the heads first.

    Args:
        norm: the norm of the whole model.
        rank: of this process.
        world: number of processes.
        group: the processes.
    """

    def __init__(self, norm: nn.Module, rank: int, world: int, group: Group) -> None:
        super().__init__()
        self.norm, self.rank, self.world, self.group = norm, rank, world, group

    def forward(self, x: Tensor) -> Tensor:
        """Normalize this process' heads, (..., C / world)."""
        heads = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(heads, x.contiguous(), self.group)
        y: Tensor = self.norm(torch.cat(heads, -1))  # (..., C)
        return y.chunk(self.world, -1)[self.rank].contiguous()


def tp_plan(model: nn.Module, world: int) -> dict[str, Cut]:
    """How :func:`shard` would split each quantized linear of a model, by dotted name.

    Raises:
        InputError: the model has no quantized linear, or ``world`` is less than 1.
    """
    if world < 1:
        raise InputError(f"world must be at least 1, is {world}")
    layers = [name for name, m in model.named_modules() if isinstance(m, QuantLinear)]
    if not layers:
        raise InputError(
            "the model has no layer quantized by dtq: dtq.quantize it first; diffusers splits "
            "float models itself (enable_parallelism)"
        )
    plan = dict.fromkeys(layers, Cut(WHOLE, why="not in a pair of layers that are split together"))
    for pair in pairs(model):
        why, max_tp = pair.problem(world), pair.max_tp()
        for name, rule in pair.rules().items():
            if name in plan:
                plan[name] = Cut(WHOLE if why else rule, max_tp, why)
    return plan


def shard(model: nn.Module, rank: int, world: int, group: Group = None) -> nn.Module:
    """Replace quantized linears by this process' slices, in place.

    Args:
        model: quantized by dtq, the same in every process.
        rank: of this process, in ``group``.
        world: number of processes in ``group``.
        group: a process group of ``torch.distributed``; None is the default one.

    Returns:
        The model.

    Raises:
        InputError: no layer can be split so, there is no such process group, or the model is
            sharded or offloaded already.
    """
    _check(model, rank, world, group)
    for name, piece in _split(model, rank, world, group).items():
        whole = model.get_submodule(name)
        assert isinstance(whole, QuantLinear)
        for tensor_name, tensor in whole.packed_tensors().items():
            _set_tensor(piece, tensor_name, piece.take(tensor_name, tensor))
        if whole.bias is not None:
            _set_tensor(piece, "bias", piece.take("bias", whole.bias.detach()))
        model.set_submodule(name, piece)
    return model


def load_sharded(folder: str | Path, rank: int, world: int, group: Group = None) -> nn.Module:
    """Load this process' slices of a transformer; other slices are not read.

    Checksums are of whole tensors, so those of slices are not verified; ``dtq inspect`` does that.

    Args:
        folder: of the transformer, with its ``config.json``.
        rank: as for :func:`shard`.
        world: as for :func:`shard`.
        group: as for :func:`shard`.

    Returns:
        The sharded model, in evaluation mode.

    Raises:
        InputError: as for :func:`shard`; or the folder does not hold a model quantized by dtq.
        CheckpointError: a file is damaged or incomplete.
    """
    folder = Path(folder)
    variants, _ = check_folder(folder, warn=rank == 0)
    config: Any = read_json(folder / "config.json").get("quantization_config")
    if not is_dtq(config):
        raise InputError(f"{folder} is no transformer quantized by dtq (no quantization_config)")
    settings = DTQConfig(**config)
    plan, kind = settings.load_plan(), model_class(folder)
    with translate_errors(folder), init_empty_weights():
        model: nn.Module = kind.from_config(kind.load_config(folder))
    files = weight_files(folder, variants.get(""))
    reader = Reader(files)
    reader.check_plan(plan, model)
    swap_empty(model, plan, settings.compute_dtype or torch.float32)
    _check(model, rank, world, group)
    for name, piece in _split(model, rank, world, group).items():
        model.set_submodule(name, piece)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in set(file.keys()) - {CHECKSUMS}:
                name, _, tensor_name = key.rpartition(".")
                module = model.get_submodule(name)
                if isinstance(module, Slice):
                    tensor = module.take(tensor_name, file.get_slice(key))
                else:
                    tensor = file.get_tensor(key)
                reader.check_values(key, tensor)
                _set_tensor(module, tensor_name, tensor)
    finalize(model, plan.edges, plan.policy)
    return model.eval()


def pairs(model: nn.Module) -> Iterator[Pair]:
    """The attentions and feed-forwards of a model whose linears have diffusers' usual names."""
    for name, module in model.named_modules():
        if isinstance(module, Attention | AttentionModuleMixin):
            heads = getattr(module, "heads", 0)
            first, second = _linears(name, module, _INPUTS), _linears(name, module, _OUTPUTS)
            if heads and first:
                yield Pair(name, module, first, second, heads=heads)
        elif isinstance(module, FeedForward):
            up, down = (_linears(name, module, (path,)) for path in ("net.0.proj", "net.2"))
            if up and down:
                wide, narrow = (shape_of(next(iter(x.values()))) for x in (up, down))
                yield Pair(name, module, up, down, sections=wide[0] // narrow[1])


def _split(model: nn.Module, rank: int, world: int, group: Group) -> dict[str, Slice]:
    """Empty slices by name; changes the number of heads, norms over heads, and saving."""
    slices = {}
    for pair in [*pairs(model)]:
        if world == 1 or pair.problem(world):
            continue
        layers = pair.first | pair.second
        for name, rule in pair.rules().items():
            sections = pair.sections if rule == COLUMN else 1
            layer = layers[name]
            assert isinstance(layer, QuantLinear)
            slices[name] = Slice(layer, rule, rank, world, group, sections)
        if not pair.heads:
            continue
        for norm, linear in _NORMS.items():
            if (whole := getattr(pair.module, norm, None)) is not None:
                width = layers[f"{pair.name}.{linear}"].out_features
                if math.prod(_normalized_shape(whole)) == width:
                    setattr(pair.module, norm, WholeNorm(whole, rank, world, group))
        pair.module.heads = pair.heads // world  # type: ignore[assignment]
    model.save_pretrained = _refuse_to_save  # type: ignore[assignment]
    return slices


def _normalized_shape(norm: nn.Module) -> tuple[int, ...]:
    """Shape over which a norm computes its statistics."""
    shape: Any = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", ())
    return tuple(shape) if isinstance(shape, tuple) else ()


def _set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a packed tensor, with on-disk dtype, or any other tensor of a module."""
    if isinstance(module, QuantLinear) and name in module.tensor_specs():
        tensor = from_disk(tensor)
    if name in module._buffers:
        module._buffers[name] = aligned(tensor)
    else:
        module._parameters[name] = nn.Parameter(aligned(tensor), requires_grad=False)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise InputError("this process holds slices of the model: save it before it is sharded")


def _linears(name: str, module: nn.Module, paths: tuple[str, ...]) -> dict[str, nn.Module]:
    """The linears at some paths below a module, by dotted name; missing ones are left out."""
    children = dict(module.named_modules(remove_duplicate=False))
    linears = {path: children[path] for path in paths if path in children}
    return {f"{name}.{path}": x for path, x in linears.items() if isinstance(x, nn.Linear)}


def _check(model: nn.Module, rank: int, world: int, group: Group) -> None:
    """Raise :class:`InputError` unless the model can be split for the process group."""
    if any(isinstance(m, Slice) for m in model.modules()):
        raise InputError("the model is sharded already; load it again")
    if not 0 <= rank < world:
        raise InputError(f"rank must be one of 0..{world - 1}, is {rank}")
    plan = tp_plan(model, world)
    if all(cut.rule == WHOLE for cut in plan.values()):
        reasons = "\n".join(f"  - {why}" for why in dict.fromkeys(c.why for c in plan.values()))
        max_tp = max(cut.max_tp for cut in plan.values())
        raise InputError(
            f"no layer of the model can be split for {world} processes. Use at most {max_tp}, or "
            f"quantize with smaller groups or rotation blocks:\n{reasons}"
        )
    hooked = [n for n in plan if is_hooked(model.get_submodule(n))]
    if hooked:
        raise InputError(f"{hooked[0]} has hooks: shard before offloading or casting")
    if not dist.is_initialized():
        raise InputError(
            "torch.distributed is not initialized: call torch.distributed.init_process_group(), "
            "or start the script with torchrun"
        )
    if dist.get_world_size(group) != world or dist.get_rank(group) != rank:
        raise InputError(
            f"this is process {dist.get_rank(group)} of {dist.get_world_size(group)} in the group, "
            f"not {rank} of {world}"
        )
