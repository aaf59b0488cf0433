# SPDX-License-Identifier: Apache-2.0
"""``KERNELS``: who multiplies, in order of preference. The last row always fits.

A kernel is chosen once, when a layer is built, never per call. ``explain.py`` gives the reason of
every refusal; ``dtq inspect --kernels`` prints them. A row is one arithmetic on every device: its
ops run compiled where the dispatcher has an implementation, as torch reference elsewhere, with the
same numbers, so that a layer may move between devices. Exceptions, on a GPU: the int8 rows leave
products that are too small for them to float, and FP4 is multiplied by hardware that can
(``dtq/kernels/dispatch.py``); integers with float scales in a row are multiplied decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dtq.formats import FORMATS, Format, PackedTensors
from dtq.formats.activations import ActivationFormat
from dtq.formats.floats import MxFp4, NvFp4
from dtq.formats.grid import Grid
from dtq.formats.integer import Int, TwoLevelInt
from dtq.formats.lut import UNITS, Lut
from dtq.kernels import gpu_dispatch
from dtq.kernels.compile import cuda
from dtq.kernels.libraries import LIBRARIES
from dtq.kernels.ops_gemm import by_table

ops = torch.ops.dtq


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def compiled(device: str) -> bool:
    """Whether there are compiled kernels for a device; the first question loads them."""
    return device in LIBRARIES and LIBRARIES[device].load()


@dataclass(frozen=True)
class Task:
    """What a layer asks of a kernel: formats, and the rotation that its input gets first.

    Attributes:
        block: Hadamard block.
        turns: block rotations, see ``dtq.transforms.hadamard.rotate``.
    """

    weights: Format
    acts: ActivationFormat
    block: int = 1
    turns: int = 1


Call = Callable[[Task, Tensor, PackedTensors, Tensor | None], Tensor]
"""``(task, x (M, K), parts, bias (N,)) -> (M, N)`` in the dtype of x.

``parts`` are the layer's, by name, with on-disk dtypes; ``input_scale`` is the one of this step.
"""


Weight = tuple[Tensor, ...]
"""What a product of codes asks for between the scales of the tokens and the bias."""


@dataclass(frozen=True)
class Then:
    """What follows the bias of a product.

    Attributes:
        gelu: GELU, tanh form.
        branch: ``low`` (M, R) and ``up`` (N, R) of a low-rank branch, added before it; or None.
    """

    gelu: bool = False
    branch: tuple[Tensor, Tensor] | None = None


def branch_joins(x: Tensor, rank: int) -> bool:
    """Whether the compiled product for ``x`` adds a low-rank branch, as those of a GPU do."""
    halves = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and halves and rank % 16 == 0 and compiled("cuda")


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    Attributes:
        name: shown by ``dtq inspect``.
        fits: None when the kernel can do the task, else why not.
        call: does it.
        ops: those whose compiled form it runs where a library has them all.
        then: does it and goes on before the one rounding, if it can; its result is None where
            something else than the product of codes runs.
        gpu: the row whose way it goes on a GPU, where its own has no kernel there.
        expand: the int8 matrix (N, K) that its products are of, and the scale of its rows (N, 1).
        by_shape: what it does on a GPU with a weight (N, K), in words.
    """

    name: str
    fits: Callable[[Task], str | None]
    call: Call
    ops: tuple[str, ...] = ()
    then: Callable[[Task, Tensor, PackedTensors, Tensor | None, Then], Tensor | None] | None = None
    gpu: str = ""
    expand: Callable[[Task, PackedTensors], tuple[Tensor, Tensor]] | None = None
    by_shape: Callable[[Task, tuple[int, int]], str] | None = None


def _acts_refused(task: Task) -> str | None:
    if task.acts.int8:
        return None
    return f"activations are {task.acts.name}, not int8 or e2m1 with one scale per token"


def _unless(fits: bool, task: Task, wanted: str) -> str | None:
    return None if fits else f"weights are {task.weights.name}, not {wanted}"


def _int8_fits(task: Task) -> str | None:
    fits = task.weights.name == "int8-row"
    return _acts_refused(task) or _unless(fits, task, "int8-row")


def _int8(task: Task, parts: PackedTensors) -> Weight:
    return parts["weight"], parts["weight_scale"]


def _two_level_fits(task: Task) -> str | None:
    fits = isinstance(task.weights, TwoLevelInt) and task.weights.bits == 4
    return _acts_refused(task) or _unless(fits, task, "4-bit two-level")


def _two_level(task: Task, parts: PackedTensors) -> Weight:
    return parts["weight"], parts["weight_scale"], parts["weight_scale_2"]


def _row_fits(task: Task) -> str | None:
    fits = isinstance(task.weights, Int) and task.weights.bits == 4 and not task.weights.group
    return _acts_refused(task) or _unless(fits, task, "4-bit integers with one scale per row")


def _row(task: Task, parts: PackedTensors) -> Weight:
    """A group as wide as the row, whose scale2 is 1: its byte is the zero."""
    assert isinstance(task.weights, Int)
    zero = parts.get("weight_zero_point")
    if zero is None:
        middle = 2 ** (task.weights.bits - 1)
        zero = torch.full_like(parts["weight_scale"], middle, dtype=torch.int8)
    return parts["weight"], parts["weight_scale"], zero


def _three_fits(task: Task) -> str | None:
    match task.weights:
        case TwoLevelInt(bits=3) | Int(bits=3, group=None):
            fits = True
        case _:
            fits = False
    return _acts_refused(task) or _unless(fits, task, "3-bit, two-level or with a scale per row")


def _three(task: Task, parts: PackedTensors) -> Weight:
    return (_two_level if isinstance(task.weights, TwoLevelInt) else _row)(task, parts)


def _table_fits(task: Task) -> str | None:
    match task.weights:
        case Grid(levels=levels, group=None):
            fits = levels.bits == 4 and levels.integers is not None
        case Lut() as lut:
            fits = lut.integers
        case _:
            fits = False
    wanted = "4-bit codes of int8 levels with a scale per row"
    return _acts_refused(task) or _unless(fits, task, wanted)


def _table(task: Task, parts: PackedTensors) -> Weight:
    weight, scale = parts["weight"], parts["weight_scale"]
    if isinstance(task.weights, Grid):
        assert task.weights.levels.integers is not None
        values, unit = task.weights.levels.integers
        levels = torch.tensor(values, dtype=torch.int8, device=weight.device)
    else:
        unit = 1 / UNITS
        levels = (parts["weight_lut"] * UNITS).to(torch.int8)
    tables = levels.reshape(1, 1, 16).expand(len(weight), 1, 16).contiguous()
    return weight, scale * unit, tables  # unit: a power of two


def _by_codes(
    op: str,
    weight: Callable[[Task, PackedTensors], Weight],
    task: Task,
    x: Tensor,
    parts: PackedTensors,
    bias: Tensor | None,
) -> Tensor:
    if gpu_dispatch.answer(x, len(parts["weight"])) != "int8":
        return _small(task, x, parts, bias)
    codes = _codes(task, x, parts)
    y: Tensor = getattr(ops, op)(*codes, *weight(task, parts), bias, x.dtype)
    return y


def _and_then(
    op: str,
    weight: Callable[[Task, PackedTensors], Weight],
    task: Task,
    x: Tensor,
    parts: PackedTensors,
    bias: Tensor | None,
    then: Then,
) -> Tensor | None:
    if gpu_dispatch.answer(x, len(parts["weight"])) != "int8":
        return None
    given = *_codes(task, x, parts), *weight(task, parts), bias
    gated = None, None
    y: Tensor = getattr(ops, op)(*given, then.gelu, *gated, x.dtype, *(then.branch or ()))
    return y


def _expanded(
    weight: Callable[[Task, PackedTensors], Weight],
    int8: Callable[..., Tensor],
    task: Task,
    parts: PackedTensors,
) -> tuple[Tensor, Tensor]:
    codes, scale, *more = weight(task, parts)
    return int8(codes, *more), scale


def _by_size(task: Task, shape: tuple[int, int]) -> str:
    if gpu_dispatch.INT8_ONLY:
        return "int8 at every size: DTQ_CUDA_INT8=1"
    found = [c for c in cuda.capabilities() if c >= cuda.OLDEST]
    said = [
        f"sm_{major}{minor}: {gpu_dispatch.sentence((major, minor), *shape)}"
        for major, minor in found or [(9, 0)]
    ]
    return "; ".join(said)


def _integers(
    name: str,
    fits: Callable[[Task], str | None],
    weight: Callable[[Task, PackedTensors], Weight],
    int8: Callable[..., Tensor],
    op: str,
    then_op: str = "",
) -> Kernel:
    """A row whose products are of codes, by ``op``; ``then_op`` is the one that goes on with it.

    ``int8`` makes the int8 matrix of what ``weight`` gives, without the scale.
    """
    # partial, not functions of their own: layers, which hold a row, are pickled
    return Kernel(
        name,
        fits,
        partial(_by_codes, op, weight),
        ("quantize_rows", op),
        partial(_and_then, then_op, weight) if then_op else None,
        expand=partial(_expanded, weight, int8),
        by_shape=_by_size,
    )


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _small(task: Task, x: Tensor, parts: PackedTensors, bias: Tensor | None) -> Tensor:
    """The product in float, of packed or of decoded weights, as the dispatcher says."""
    few = gpu_dispatch.answer(x, len(parts["weight"])) == "few"
    multiply = ops.weight_linear if few else ops.resident_linear
    y: Tensor = multiply(_changed(task, x, parts), *_stored(task, parts), bias)
    return y


def _weight_only_fits(task: Task) -> str | None:
    if task.acts.bits != 16:
        return f"activations are {task.acts.name}, not float"
    return _float_fits(task)


def _float_fits(task: Task) -> str | None:
    return _unless(FORMATS.get(task.weights.name) is task.weights, task, "of the table of formats")


def _float(task: Task, x: Tensor, parts: PackedTensors, bias: Tensor | None) -> Tensor:
    def multiply(rows: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = ops.weight_linear(rows, *_stored(task, parts), bias)
        return y

    return _in_float(multiply, task, x, parts, bias)


def _in_float(
    multiply: Callable[[Tensor, Tensor | None], Tensor],
    task: Task,
    x: Tensor,
    parts: PackedTensors,
    bias: Tensor | None,
) -> Tensor:
    """The product of decoded weights with what the activation format leaves of the input."""
    if task.acts.bits == 16:
        return multiply(_changed(task, x, parts), bias)
    # as every layer of a bfloat16 model multiplies, and codes are exact in it; what is changed may
    # leave the range of float16
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    if not task.acts.int8:
        change = _pre_scale(parts), _order(parts), task.block, task.turns
        rows = ops.round_rows(x, *change, task.acts.name, dtype)
        return multiply(rows, bias).to(x.dtype)
    codes, scale = _codes(task, x, parts)
    y = multiply(codes.to(dtype), None).float() * scale.unsqueeze(1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _fp4_fits(task: Task) -> str | None:
    match task.weights:
        case NvFp4():
            acts = "nvfp4"
        case MxFp4():
            acts = "mxfp4"
        case _:
            return f"weights are {task.weights.name}, not nvfp4 or mxfp4"
    return None if task.acts.name == acts else f"activations are {task.acts.name}, not {acts}"


def _fp4(task: Task, x: Tensor, parts: PackedTensors, bias: Tensor | None) -> Tensor:
    y = _fp4_then(task, x, parts, bias, Then())
    return _float(task, x, parts, bias) if y is None else y


def _fp4_then(
    task: Task, x: Tensor, parts: PackedTensors, bias: Tensor | None, then: Then
) -> Tensor | None:
    mx = isinstance(task.weights, MxFp4)
    if not gpu_dispatch.multiplies_fp4(x, mx):
        return None
    change = _pre_scale(parts), _order(parts), task.block, task.turns
    codes, code_scale, row_scale = ops.fp4_quantize_rows(x, *change, mx)
    weight, outer = (parts["weight"], parts["weight_scale"]), parts.get("weight_scale_2")
    gated = None, None
    given = codes, row_scale, *weight, code_scale, outer, bias, then.gelu, *gated, x.dtype
    y: Tensor = ops.fp4_linear(*given, *(then.branch or ()))
    return y


def _by_width(task: Task, shape: tuple[int, int]) -> str:
    whole = gpu_dispatch.FP4_COLUMNS[isinstance(task.weights, MxFp4)]
    if shape[1] % whole:
        return f"sm_120: no FP4 products, K {shape[1]} is not a multiple of {whole}"
    return "sm_120: FP4 products; before it decoded to float"


def _group_fits(task: Task) -> str | None:
    fits = isinstance(task.weights, Int) and task.weights.bits in (4, 8)
    return _acts_refused(task) or _unless(fits, task, "4- or 8-bit integers")


def _group(task: Task, x: Tensor, parts: PackedTensors, bias: Tensor | None) -> Tensor:
    assert isinstance(task.weights, Int)
    if gpu_dispatch.on_gpu(x):  # a float scale for every 64 channels is slower than bfloat16 there
        return _float(task, x, parts, bias)
    weight = parts["weight"], parts["weight_scale"], parts.get("weight_zero_point")
    codes, scale = _codes(task, x, parts)
    y: Tensor = ops.group_a8_linear(codes, scale, *weight, task.weights.bits, bias, x.dtype)
    return y


def _always(task: Task) -> str | None:
    return None


def _reference(task: Task, x: Tensor, parts: PackedTensors, bias: Tensor | None) -> Tensor:
    w = task.weights.unpack({n: t for n, t in parts.items() if n.startswith("weight")})

    def multiply(rows: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rows, w.to(rows.dtype), None if bias is None else bias.to(rows.dtype))

    return _in_float(multiply, task, x, parts, bias)


def _stored(task: Task, parts: PackedTensors) -> tuple[list[Tensor], list[str], str]:
    """The parts of the weight, their names, its format: what the ops ask for."""
    names = [name for name in parts if name.startswith("weight")]
    return [parts[name] for name in names], names, task.weights.name


def _codes(task: Task, x: Tensor, parts: PackedTensors) -> tuple[Tensor, Tensor]:
    """int8 (M, K) and row scales (M,) of the changed input."""
    static, levels, order = parts.get("input_scale"), task.acts.levels, _order(parts)
    if not task.acts.integer:
        codes, scale = ops.e2m1_quantize_rows(x, _pre_scale(parts), order, task.block, task.turns)
    elif order is None and task.turns == 1:
        codes, scale = ops.quantize_rows(x, _pre_scale(parts), task.block, static, levels)
    else:
        codes, scale = ops.binned_quantize_rows(
            x, _pre_scale(parts), order, task.block, task.turns, static, None, levels
        )
    return codes, scale


def _changed(task: Task, x: Tensor, parts: PackedTensors) -> Tensor:
    """The changed input in the dtype of ``x``."""
    if "pre_quant_scale" not in parts and task.block == 1:
        return x
    return _transformed(task, x, parts).to(x.dtype)


def _transformed(task: Task, x: Tensor, parts: PackedTensors) -> Tensor:
    y: Tensor = ops.transform_rows(x, _pre_scale(parts), _order(parts), task.block, task.turns)
    return y


def _order(parts: PackedTensors) -> Tensor | None:
    order = parts.get("pre_quant_order")
    return None if order is None else order.reshape(-1)


def _pre_scale(parts: PackedTensors) -> Tensor | None:
    scale = parts.get("pre_quant_scale")
    return None if scale is None else scale.reshape(-1)


_W4A8 = "w4a8_linear", "w4a8_epilogue_linear"
_EXPAND_3 = partial(TwoLevelInt.expand, bits=3)

KERNELS: tuple[Kernel, ...] = (
    _integers("w8a8", _int8_fits, _int8, _as_it_is, "w8a8_linear", "w8a8_epilogue_linear"),
    _integers("w4a8-two-level", _two_level_fits, _two_level, TwoLevelInt.expand, *_W4A8),
    _integers("w4a8-row", _row_fits, _row, TwoLevelInt.expand, *_W4A8),
    _integers("w3a8", _three_fits, _three, _EXPAND_3, "w3a8_linear"),
    _integers("w4a8-table", _table_fits, _table, by_table, "lut4a8_linear"),
    Kernel("weight-only", _weight_only_fits, _float, ("dequantize", "weight_linear")),
    Kernel(
        "fp4",
        _fp4_fits,
        _fp4,
        ("round_rows", "dequantize", "weight_linear"),
        _fp4_then,
        by_shape=_by_width,
    ),
    Kernel(
        "integer-groups",
        _group_fits,
        _group,
        ("quantize_rows", "group_a8_linear"),
        gpu="float-product",
    ),
    Kernel("float-product", _float_fits, _float, ("dequantize", "weight_linear")),
    Kernel("reference", _always, _reference),
)


def pick(task: Task) -> Kernel:
    """The first kernel of the table that fits."""
    return next(kernel for kernel in KERNELS if kernel.fits(task) is None)
