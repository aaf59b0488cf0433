# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: every process holds a slice of the packed weights (Megatron, 1909.08053).

Attention and feed-forward are cut in pairs. What widens (q, k, v; up) is cut by output channels
(the *column* rule) and needs nothing from the others; what narrows (out; down) is cut by input
channels (the *row* rule) and sums partial products over the processes, once a layer. Everything
else stays whole everywhere.

A token's scale belongs to the whole token, so the row rule takes the largest magnitude over all
processes first. The codes are then those of one process, and where products are integers so is
the sum: the output is bit-identical.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_processor import Attention
from safetensors import safe_open
from torch import Tensor, nn

from dtq.checkpoint.config import DTQConfig
from dtq.checkpoint.reader import CHECKSUMS, Reader
from dtq.errors import InputError
from dtq.formats import FORMATS, TensorSpec
from dtq.formats.activations import (
    ACTIVATION_FORMATS,
    ActivationFormat,
    activation_format_of,
    fake_quantize,
    row_codes,
    scale_of,
)
from dtq.formats.grid import doubled
from dtq.io.safe_parse import read_json
from dtq.kernels.ops_gemm import int_matmul
from dtq.kernels.table import LinearProblem, pick
from dtq.models.linears import shape_of
from dtq.nn.linear import HOOKS, QuantLinear
from dtq.nn.storage import aligned, from_disk
from dtq.nn.swap import finalize, swap_empty
from dtq.pipelines.loading import model_class, translate_errors
from dtq.pipelines.validation import check_folder

Group = Any
"""A ``torch.distributed`` process group; None is the default one."""

COLUMN, ROW, WHOLE = "column", "row", "replicate"
_AXIS = {COLUMN: 0, ROW: 1}  # of the weight (N, K)

_WIDENS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_NARROWS = ("to_out.0", "to_add_out")
_NORMS = {
    "norm_q": "to_q",
    "norm_k": "to_k",
    "norm_added_q": "add_q_proj",
    "norm_added_k": "add_k_proj",
}


@dataclass(frozen=True)
class Cut:
    """What happens to a quantized linear.

    Attributes:
        rule: ``column``, ``row`` or ``replicate``.
        max_tp: the largest number of processes that it can be cut for.
        why: the reason, if it is replicated.
    """

    rule: str
    max_tp: int = 1
    why: str = ""


@dataclass(frozen=True)
class Pair:
    """Linears that are cut together: the outputs of some are the inputs of the others.

    Attributes:
        name: of the attention or feed-forward module.
        module: itself.
        widens: linears cut by output channels, by dotted name.
        narrows: linears cut by input channels.
        sections: equal runs of output channels that are cut one by one; a gated feed-forward has 2.
        heads: of attention; 0 for a feed-forward.
    """

    name: str
    module: nn.Module
    widens: dict[str, nn.Module]
    narrows: dict[str, nn.Module]
    sections: int = 1
    heads: int = 0

    def rules(self) -> dict[str, str]:
        return dict.fromkeys(self.widens, COLUMN) | dict.fromkeys(self.narrows, ROW)

    def problem(self, world: int) -> str:
        """Why it cannot be cut for so many processes; empty if it can."""
        layers = self.widens | self.narrows
        floats = [name for name, layer in layers.items() if not isinstance(layer, QuantLinear)]
        if floats or not self.narrows:
            absent = f"{floats[0]} is not quantized" if floats else "it has no output projection"
            return f"{self.name}: {absent}, and the layers of a pair are cut together"
        if self.heads % world:
            return f"{self.name}: {self.heads} heads do not split into {world}"
        for name, rule in self.rules().items():
            layer = layers[name]
            assert isinstance(layer, QuantLinear)
            width = shape_of(layer)[0] // self.sections
            # grouped queries: fewer heads of keys and values than of queries
            unit = self._head() if rule == COLUMN and self.heads else 1
            if rule == COLUMN and width // unit % world:
                return f"{name}: {width // unit} heads or channels do not split into {world}"
            try:
                sliced(layer, rule, world)
            except InputError as error:
                return f"{name}: {error}"
        return ""

    def max_tp(self) -> int:
        """The largest number of processes that it can be cut for."""
        most = self.heads or math.gcd(*(shape_of(x)[1] for x in self.narrows.values()))
        divisors = (n for n in range(most, 1, -1) if most % n == 0)
        return next((n for n in divisors if not self.problem(n)), 1)

    def _head(self) -> int:
        return shape_of(next(iter(self.widens.values())))[0] // self.heads


class Slice(QuantLinear):
    """What one process holds of a quantized linear. For inference.

    Args:
        whole: the linear, its parts on any device, meta included.
        rule: ``column`` or ``row``.
        rank: of this process.
        world: number of processes.
        group: the processes.
        sections: see :class:`Pair`.
    """

    def __init__(
        self, whole: QuantLinear, rule: str, rank: int, world: int, group: Group, sections: int = 1
    ) -> None:
        rows, columns = shape_of(whole)
        rows, columns = (rows // world, columns) if rule == COLUMN else (rows, columns // world)
        super().__init__(
            columns,
            rows,
            whole.bias is not None,
            whole.spec,
            bins=whole.bins,
            compute_dtype=whole.compute_dtype,
            device="meta",
        )
        self.rule, self.rank, self.world, self.group = rule, rank, world, group
        self.sections, self._whole = sections, whole.tensor_specs()
        self.set_clock(whole.clock)

    def take(self, part: str, tensor: Any) -> Tensor:
        """This process' slice of a stored part, on-disk dtype, or of ``bias``.

        Args:
            part: its name.
            tensor: the whole of it, or what ``safetensors`` gives to read slices of.
        """
        if part == "bias":
            return self._section(tensor, 0) if self.rule == COLUMN else tensor[:]
        if self.tensor_specs()[part].shape == self._whole[part].shape:
            return tensor[:]
        return self._section(tensor, _AXIS[self.rule])

    def _section(self, tensor: Any, axis: int) -> Tensor:
        shape = tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape()
        section = shape[axis] // self.sections
        size = section // self.world
        pieces = []
        for i in range(self.sections):
            at = slice(i * section + self.rank * size, i * section + (self.rank + 1) * size)
            pieces.append(tensor[at] if axis == 0 else tensor[:, at])
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)).contiguous()

    def _forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError("a sharded model is for inference: run it under torch.no_grad()")
        return super()._forward(x)

    def gelu(self, x: Tensor) -> Tensor | None:
        return super().gelu(x) if self.rule == COLUMN else None

    def _gemm(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        if self.rule == COLUMN:
            return super()._gemm(rows, bias)
        partial, scales = self._product(rows)
        y = self._all(partial, dist.ReduceOp.SUM).float()
        for scale in scales:  # the epilogue of the integer kernels, in their order
            y = y * scale
        y = (y if bias is None else y + bias.float()).to(rows.dtype)
        if self.spec.rank:
            down, up = (self.packed_tensor(n).to(rows.dtype) for n in ("proj_down", "proj_up"))
            y = y + F.linear(self._all(F.linear(rows, down), dist.ReduceOp.SUM), up)
        return y

    def _product(self, rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """This process' share of the product (M, N), and what multiplies the sum."""
        acts, fmt = self._acts(), self.problem.weight_format
        weight = {name: self.packed_tensor(name) for name in fmt.tensor_specs(self._shape)}
        x = self._changed(rows)
        if acts.bits == 16:
            return F.linear(x.to(rows.dtype), fmt.unpack(weight).to(rows.dtype)).float(), ()
        peak = x.abs().amax(-1, keepdim=True)  # (M, 1)
        if not acts.static:
            peak = self._all(peak, dist.ReduceOp.MAX)
        if acts.block_format and not acts.int8:
            return fake_quantize(x, acts, peak) @ fmt.unpack(weight).T, ()
        codes, scale = self._codes(acts, x, peak)
        task = LinearProblem(fmt, acts)
        expand = pick(task).expand
        if expand is None:
            return codes @ fmt.unpack(weight).T, (scale,)
        w8, w_scale = expand(task, weight)
        return int_matmul(codes.to(torch.int8), w8), (scale, w_scale.T)

    def _codes(
        self, activations: ActivationFormat, x: Tensor, peak: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Codes as float (M, K), and the scales of the tokens (M, 1)."""
        if not activations.integer:
            return doubled(x, peak)
        scale = (
            self.step_scale().expand_as(peak)
            if activations.static
            else scale_of(peak, activations.qmax)
        )
        return row_codes(x, scale, activations.qmax), scale

    def _changed(self, rows: Tensor) -> Tensor:
        if not self.spec.pre_quant and self.spec.hadamard_block_size == 1:
            return rows.float()
        scale = self.packed_tensor("pre_quant_scale").reshape(-1) if self.spec.pre_quant else None
        x: Tensor = torch.ops.dtq.transform_rows(
            rows, scale, None, self.spec.hadamard_block_size, 1
        )
        return x

    def _acts(self) -> ActivationFormat:
        clock, own = self.clock, self.problem.activation_format
        if clock is None or not clock.modes or own.bits == 16:
            return own
        return activation_format_of(clock.modes[int(clock.mode)], own.name)

    def _all(self, tensor: Tensor, how: Any) -> Tensor:
        dist.all_reduce(tensor, how, self.group)
        return tensor


class WholeNorm(nn.Module):
    """A norm over all heads where every process has some of them: gathers, norms, takes its own."""

    def __init__(self, norm: nn.Module, rank: int, world: int, group: Group) -> None:
        super().__init__()
        self.norm, self.rank, self.world, self.group = norm, rank, world, group

    def forward(self, x: Tensor) -> Tensor:
        """(..., C / world) to the same."""
        every = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(every, x.contiguous(), self.group)
        y: Tensor = self.norm(torch.cat(every, -1))  # (..., C)
        return y.chunk(self.world, -1)[self.rank].contiguous()


def tp_plan(model: nn.Module, world: int) -> dict[str, Cut]:
    """What :func:`shard` would do to each quantized linear of a model.

    Raises:
        InputError: the model has no quantized linear, or ``world`` is no number of processes.
    """
    if world < 1:
        raise InputError(f"world must be at least 1, is {world}")
    layers = [name for name, m in model.named_modules() if isinstance(m, QuantLinear)]
    if not layers:
        raise InputError(
            "the model has no layer quantized by dtq: dtq.quantize it first; diffusers splits "
            "float models itself (enable_parallelism)"
        )
    plan = dict.fromkeys(layers, Cut(WHOLE, why="not between two layers that are cut together"))
    for pair in pairs(model):
        why, most = pair.problem(world), pair.max_tp()
        for name, rule in pair.rules().items():
            if name in plan:
                plan[name] = Cut(WHOLE if why else rule, most, why)
    return plan


def shard(model: nn.Module, rank: int, world: int, group: Group = None) -> nn.Module:
    """Replace quantized linears by this process' slices, in place; returns the model.

    Args:
        model: quantized by dtq, the same in every process.
        rank: of this process, in ``group``.
        world: processes in ``group``.
        group: a process group of ``torch.distributed``; None is the default one.

    Raises:
        InputError: no layer can be cut so, the processes are not there, or the model is cut or
            hooked already.
    """
    _check(model, rank, world, group)
    for name, piece in _cut(model, rank, world, group).items():
        whole = model.get_submodule(name)
        assert isinstance(whole, QuantLinear)
        for part, tensor in whole.packed_tensors().items():
            _put(piece, part, piece.take(part, tensor))
        if whole.bias is not None:
            _put(piece, "bias", piece.take("bias", whole.bias.detach()))
        model.set_submodule(name, piece)
    return model


def load_sharded(folder: str | Path, rank: int, world: int, group: Group = None) -> nn.Module:
    """Load this process' slices of a transformer; other slices are never read.

    Checksums are of whole tensors, so those of slices are not compared; ``dtq inspect`` does.

    Args:
        folder: of the transformer, with its ``config.json``.
        rank, world, group: as for :func:`shard`.

    Raises:
        InputError: as :func:`shard`; or the folder is no model quantized by dtq.
        CheckpointError: a file is damaged or incomplete.
    """
    folder = Path(folder)
    check_folder(folder)
    config = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != "dtq":
        raise InputError(f"{folder} is no transformer quantized by dtq (no quantization_config)")
    settings = DTQConfig(**config)
    plan, kind = settings.load_plan(), model_class(folder)
    with translate_errors(folder), init_empty_weights():
        model: nn.Module = kind.from_config(kind.load_config(folder))
    files = sorted(folder.glob("*.safetensors"))
    reader = Reader(files)
    reader.check_plan(plan, model)
    swap_empty(model, plan, settings.compute_dtype or torch.float32)
    _check(model, rank, world, group)
    for name, piece in _cut(model, rank, world, group).items():
        model.set_submodule(name, piece)
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in set(opened.keys()) - {CHECKSUMS}:
                name, _, part = key.rpartition(".")
                module = model.get_submodule(name)
                if isinstance(module, Slice):
                    tensor = module.take(part, opened.get_slice(key))
                else:
                    tensor = opened.get_tensor(key)
                reader.check_values(key, tensor)
                _put(module, part, tensor)
    finalize(model, plan.edges, plan.policy)
    return model.eval()


def pairs(model: nn.Module) -> Iterator[Pair]:
    """The attentions and feed-forwards of a model whose parts have the usual names."""
    for name, module in model.named_modules():
        if isinstance(module, Attention | AttentionModuleMixin):
            heads = getattr(module, "heads", 0)
            widens, narrows = _found(name, module, _WIDENS), _found(name, module, _NARROWS)
            if heads and widens:
                yield Pair(name, module, widens, narrows, heads=heads)
        elif isinstance(module, FeedForward):
            up = _found(name, module, ("net.0.proj",))
            down = _found(name, module, ("net.2",))
            if up and down:
                wide, narrow = (shape_of(next(iter(x.values()))) for x in (up, down))
                yield Pair(name, module, up, down, sections=wide[0] // narrow[1])


def sliced(layer: QuantLinear, rule: str, world: int) -> dict[str, TensorSpec]:
    """The parts of a slice.

    Raises:
        InputError: the layer cannot be cut so; says why.
    """
    runtime, shape, axis = layer.spec, shape_of(layer), _AXIS[rule]
    if layer.spatial:
        raise InputError("it is a convolution")
    if shape[axis] % world:
        raise InputError(f"{shape[axis]} channels do not split into {world}")
    rows, columns = shape
    local = (rows // world, columns) if rule == COLUMN else (rows, columns // world)
    if rule == ROW:
        if runtime.permutation:
            raise InputError("its input channels change places across the cut (pre_quant_perm)")
        if runtime.num_rotations > 1:
            raise InputError("its second rotation mixes channels from both sides of the cut")
        if local[1] % runtime.hadamard_block_size:
            raise InputError(
                f"a rotation block of {runtime.hadamard_block_size} channels would cross the cut at {local[1]}"
            )
        if ACTIVATION_FORMATS[runtime.activation_format].block_format:
            FORMATS[ACTIVATION_FORMATS[runtime.activation_format].block_format].tensor_specs(
                (1, local[1])
            )
    parts, whole = runtime.tensor_specs(local, layer.bins), layer.tensor_specs()
    for name, spec in whole.items():
        mine = parts.get(name, spec)
        if mine.shape != spec.shape and mine.shape[axis] * world != spec.shape[axis]:
            raise InputError(f"{runtime.weight_format}: {name} does not split into {world}")
    return parts


def _cut(model: nn.Module, rank: int, world: int, group: Group) -> dict[str, Slice]:
    """Empty slices by name, for a model that is told about its share of the heads."""
    pieces = {}
    for pair in [*pairs(model)]:
        if world == 1 or pair.problem(world):
            continue
        layers = pair.widens | pair.narrows
        for name, rule in pair.rules().items():
            sections = pair.sections if rule == COLUMN else 1
            layer = layers[name]
            assert isinstance(layer, QuantLinear)
            pieces[name] = Slice(layer, rule, rank, world, group, sections)
        if not pair.heads:
            continue
        for norm, linear in _NORMS.items():
            if (whole := getattr(pair.module, norm, None)) is not None:
                width = layers[f"{pair.name}.{linear}"].out_features
                if math.prod(_normed(whole)) == width:
                    setattr(pair.module, norm, WholeNorm(whole, rank, world, group))
        pair.module.heads = pair.heads // world  # type: ignore[assignment]
    model.save_pretrained = _refuse_to_save  # type: ignore[assignment]
    return pieces


def _normed(norm: nn.Module) -> tuple[int, ...]:
    """Shape that a norm takes statistics over."""
    shape: Any = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", ())
    return tuple(shape) if isinstance(shape, tuple) else ()


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Store a part, with on-disk dtype, or any other tensor of a module."""
    if isinstance(module, QuantLinear) and name in module.tensor_specs():
        tensor = from_disk(tensor)
    if name in module._buffers:
        module._buffers[name] = aligned(tensor)
    else:
        module._parameters[name] = nn.Parameter(aligned(tensor), requires_grad=False)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise InputError("this process holds slices of the model: save it before it is sharded")


def _found(name: str, module: nn.Module, below: tuple[str, ...]) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for path in below:
        found: Any = module
        for step in path.split("."):
            inside = getattr(found, "_modules", {})
            found = inside.get(step)
        if isinstance(found, nn.Linear):
            layers[f"{name}.{path}"] = found
    return layers


def _check(model: nn.Module, rank: int, world: int, group: Group) -> None:
    if any(isinstance(m, Slice) for m in model.modules()):
        raise InputError("the model is sharded already; load it again")
    if not 0 <= rank < world:
        raise InputError(f"rank must be one of 0..{world - 1}, is {rank}")
    plan = tp_plan(model, world)
    if all(cut.rule == WHOLE for cut in plan.values()):
        reasons = "\n".join(f"  - {why}" for why in dict.fromkeys(c.why for c in plan.values()))
        most = max(cut.max_tp for cut in plan.values())
        raise InputError(
            f"no layer of the model can be cut for {world} processes. Use at most {most}, or "
            f"quantize with smaller groups or rotation blocks:\n{reasons}"
        )
    hooked = [n for n in plan if any(hasattr(model.get_submodule(n), h) for h in HOOKS)]
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
