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
class LinearProblem:
    """What a layer asks of a kernel: formats, and the rotation that its input gets first.

    Attributes:
        block: Hadamard block.
        num_rotations: block rotations, see ``dtq.transforms.hadamard.rotate``.
    """

    weight_format: Format
    activation_format: ActivationFormat
    hadamard_block: int = 1
    num_rotations: int = 1


KernelFunction = Callable[[LinearProblem, Tensor, PackedTensors, Tensor | None], Tensor]
"""``(task, x (M, K), parts, bias (N,)) -> (M, N)`` in the dtype of x.

``parts`` are the layer's, by name, with on-disk dtypes; ``input_scale`` is the one of this step.
"""


Weight = tuple[Tensor, ...]
"""What a product of codes asks for between the scales of the tokens and the bias."""


@dataclass(frozen=True)
class Epilogue:
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
    unsupported_reason: Callable[[LinearProblem], str | None]
    call: KernelFunction
    ops: tuple[str, ...] = ()
    with_epilogue: (
        Callable[[LinearProblem, Tensor, PackedTensors, Tensor | None, Epilogue], Tensor | None]
        | None
    ) = None
    on_gpu: str = ""
    expand: Callable[[LinearProblem, PackedTensors], tuple[Tensor, Tensor]] | None = None
    by_shape: Callable[[LinearProblem, tuple[int, int]], str] | None = None


def _unsupported_activations(problem: LinearProblem) -> str | None:
    if problem.activation_format.int8:
        return None
    return f"activations are {problem.activation_format.name}, not int8 or e2m1 with one scale per token"


def _unless(fits: bool, problem: LinearProblem, wanted: str) -> str | None:
    return None if fits else f"weights are {problem.weight_format.name}, not {wanted}"


def _int8_fits(problem: LinearProblem) -> str | None:
    fits = problem.weight_format.name == "int8-row"
    return _unsupported_activations(problem) or _unless(fits, problem, "int8-row")


def _int8(problem: LinearProblem, tensors: PackedTensors) -> Weight:
    return tensors["weight"], tensors["weight_scale"]


def _two_level_fits(problem: LinearProblem) -> str | None:
    fits = isinstance(problem.weight_format, TwoLevelInt) and problem.weight_format.bits == 4
    return _unsupported_activations(problem) or _unless(fits, problem, "4-bit two-level")


def _two_level(problem: LinearProblem, tensors: PackedTensors) -> Weight:
    return tensors["weight"], tensors["weight_scale"], tensors["weight_scale_2"]


def _row_fits(problem: LinearProblem) -> str | None:
    fits = (
        isinstance(problem.weight_format, Int)
        and problem.weight_format.bits == 4
        and not problem.weight_format.group
    )
    return _unsupported_activations(problem) or _unless(
        fits, problem, "4-bit integers with one scale per row"
    )


def _row(problem: LinearProblem, tensors: PackedTensors) -> Weight:
    """A group as wide as the row, whose scale2 is 1: its byte is the zero."""
    assert isinstance(problem.weight_format, Int)
    zero = tensors.get("weight_zero_point")
    if zero is None:
        middle = 2 ** (problem.weight_format.bits - 1)
        zero = torch.full_like(tensors["weight_scale"], middle, dtype=torch.int8)
    return tensors["weight"], tensors["weight_scale"], zero


def _three_fits(problem: LinearProblem) -> str | None:
    match problem.weight_format:
        case TwoLevelInt(bits=3) | Int(bits=3, group=None):
            fits = True
        case _:
            fits = False
    return _unsupported_activations(problem) or _unless(
        fits, problem, "3-bit, two-level or with a scale per row"
    )


def _three(problem: LinearProblem, tensors: PackedTensors) -> Weight:
    return (_two_level if isinstance(problem.weight_format, TwoLevelInt) else _row)(
        problem, tensors
    )


def _table_fits(problem: LinearProblem) -> str | None:
    match problem.weight_format:
        case Grid(codebook=codebook, group=None):
            fits = codebook.bits == 4 and codebook.integers is not None
        case Lut() as lut:
            fits = lut.integers
        case _:
            fits = False
    wanted = "4-bit codes of int8 levels with a scale per row"
    return _unsupported_activations(problem) or _unless(fits, problem, wanted)


def _table(problem: LinearProblem, tensors: PackedTensors) -> Weight:
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if isinstance(problem.weight_format, Grid):
        assert problem.weight_format.codebook.integers is not None
        values, unit = problem.weight_format.codebook.integers
        levels = torch.tensor(values, dtype=torch.int8, device=weight.device)
    else:
        unit = 1 / UNITS
        levels = (tensors["weight_lut"] * UNITS).to(torch.int8)
    tables = levels.reshape(1, 1, 16).expand(len(weight), 1, 16).contiguous()
    return weight, scale * unit, tables  # unit: a power of two


def _by_codes(
    op: str,
    weight: Callable[[LinearProblem, PackedTensors], Weight],
    problem: LinearProblem,
    x: Tensor,
    tensors: PackedTensors,
    bias: Tensor | None,
) -> Tensor:
    if gpu_dispatch.answer(x, len(tensors["weight"])) != "int8":
        return _small(problem, x, tensors, bias)
    codes = _codes(problem, x, tensors)
    y: Tensor = getattr(ops, op)(*codes, *weight(problem, tensors), bias, x.dtype)
    return y


def _and_then(
    op: str,
    weight: Callable[[LinearProblem, PackedTensors], Weight],
    problem: LinearProblem,
    x: Tensor,
    tensors: PackedTensors,
    bias: Tensor | None,
    then: Epilogue,
) -> Tensor | None:
    if gpu_dispatch.answer(x, len(tensors["weight"])) != "int8":
        return None
    given = *_codes(problem, x, tensors), *weight(problem, tensors), bias
    gated = None, None
    y: Tensor = getattr(ops, op)(*given, then.gelu, *gated, x.dtype, *(then.branch or ()))
    return y


def _expanded(
    weight: Callable[[LinearProblem, PackedTensors], Weight],
    int8: Callable[..., Tensor],
    problem: LinearProblem,
    tensors: PackedTensors,
) -> tuple[Tensor, Tensor]:
    codes, scale, *more = weight(problem, tensors)
    return int8(codes, *more), scale


def _by_size(problem: LinearProblem, shape: tuple[int, int]) -> str:
    if gpu_dispatch.INT8_ONLY:
        return "int8 at every size: DTQ_CUDA_INT8=1"
    found = [c for c in cuda.capabilities() if c >= cuda.OLDEST]
    said = [
        f"sm_{major}{minor}: {gpu_dispatch.explanation((major, minor), *shape)}"
        for major, minor in found or [(9, 0)]
    ]
    return "; ".join(said)


def _integers(
    name: str,
    fits: Callable[[LinearProblem], str | None],
    weight: Callable[[LinearProblem, PackedTensors], Weight],
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


def _small(
    problem: LinearProblem, x: Tensor, tensors: PackedTensors, bias: Tensor | None
) -> Tensor:
    """The product in float, of packed or of decoded weights, as the dispatcher says."""
    few = gpu_dispatch.answer(x, len(tensors["weight"])) == "few"
    multiply = ops.weight_linear if few else ops.resident_linear
    y: Tensor = multiply(_changed(problem, x, tensors), *_stored(problem, tensors), bias)
    return y


def _weight_only_fits(problem: LinearProblem) -> str | None:
    if problem.activation_format.bits != 16:
        return f"activations are {problem.activation_format.name}, not float"
    return _float_fits(problem)


def _float_fits(problem: LinearProblem) -> str | None:
    return _unless(
        FORMATS.get(problem.weight_format.name) is problem.weight_format,
        problem,
        "of the table of formats",
    )


def _float(
    problem: LinearProblem, x: Tensor, tensors: PackedTensors, bias: Tensor | None
) -> Tensor:
    def multiply(rows: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = ops.weight_linear(rows, *_stored(problem, tensors), bias)
        return y

    return _in_float(multiply, problem, x, tensors, bias)


def _in_float(
    multiply: Callable[[Tensor, Tensor | None], Tensor],
    problem: LinearProblem,
    x: Tensor,
    tensors: PackedTensors,
    bias: Tensor | None,
) -> Tensor:
    """The product of decoded weights with what the activation format leaves of the input."""
    if problem.activation_format.bits == 16:
        return multiply(_changed(problem, x, tensors), bias)
    # as every layer of a bfloat16 model multiplies, and codes are exact in it; what is changed may
    # leave the range of float16
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    if not problem.activation_format.int8:
        change = _pre_scale(tensors), _order(tensors), problem.hadamard_block, problem.num_rotations
        rows = ops.round_rows(x, *change, problem.activation_format.name, dtype)
        return multiply(rows, bias).to(x.dtype)
    codes, scale = _codes(problem, x, tensors)
    y = multiply(codes.to(dtype), None).float() * scale.unsqueeze(1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _fp4_fits(problem: LinearProblem) -> str | None:
    match problem.weight_format:
        case NvFp4():
            acts = "nvfp4"
        case MxFp4():
            acts = "mxfp4"
        case _:
            return f"weights are {problem.weight_format.name}, not nvfp4 or mxfp4"
    return (
        None
        if problem.activation_format.name == acts
        else f"activations are {problem.activation_format.name}, not {acts}"
    )


def _fp4(problem: LinearProblem, x: Tensor, tensors: PackedTensors, bias: Tensor | None) -> Tensor:
    y = _fp4_then(problem, x, tensors, bias, Epilogue())
    return _float(problem, x, tensors, bias) if y is None else y


def _fp4_then(
    problem: LinearProblem, x: Tensor, tensors: PackedTensors, bias: Tensor | None, then: Epilogue
) -> Tensor | None:
    mx = isinstance(problem.weight_format, MxFp4)
    if not gpu_dispatch.multiplies_fp4(x, mx):
        return None
    change = _pre_scale(tensors), _order(tensors), problem.hadamard_block, problem.num_rotations
    codes, code_scale, row_scale = ops.fp4_quantize_rows(x, *change, mx)
    weight, outer = (tensors["weight"], tensors["weight_scale"]), tensors.get("weight_scale_2")
    gated = None, None
    given = codes, row_scale, *weight, code_scale, outer, bias, then.gelu, *gated, x.dtype
    y: Tensor = ops.fp4_linear(*given, *(then.branch or ()))
    return y


def _by_width(problem: LinearProblem, shape: tuple[int, int]) -> str:
    whole = gpu_dispatch.FP4_COLUMNS[isinstance(problem.weight_format, MxFp4)]
    if shape[1] % whole:
        return f"sm_120: no FP4 products, K {shape[1]} is not a multiple of {whole}"
    return "sm_120: FP4 products; before it decoded to float"


def _group_fits(problem: LinearProblem) -> str | None:
    fits = isinstance(problem.weight_format, Int) and problem.weight_format.bits in (4, 8)
    return _unsupported_activations(problem) or _unless(fits, problem, "4- or 8-bit integers")


def _group(
    problem: LinearProblem, x: Tensor, tensors: PackedTensors, bias: Tensor | None
) -> Tensor:
    assert isinstance(problem.weight_format, Int)
    if gpu_dispatch.on_gpu(x):  # a float scale for every 64 channels is slower than bfloat16 there
        return _float(problem, x, tensors, bias)
    weight = tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero_point")
    codes, scale = _codes(problem, x, tensors)
    y: Tensor = ops.group_a8_linear(
        codes, scale, *weight, problem.weight_format.bits, bias, x.dtype
    )
    return y


def _always(problem: LinearProblem) -> str | None:
    return None


def _reference(
    problem: LinearProblem, x: Tensor, tensors: PackedTensors, bias: Tensor | None
) -> Tensor:
    w = problem.weight_format.unpack({n: t for n, t in tensors.items() if n.startswith("weight")})

    def multiply(rows: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rows, w.to(rows.dtype), None if bias is None else bias.to(rows.dtype))

    return _in_float(multiply, problem, x, tensors, bias)


def _stored(problem: LinearProblem, tensors: PackedTensors) -> tuple[list[Tensor], list[str], str]:
    """The parts of the weight, their names, its format: what the ops ask for."""
    names = [name for name in tensors if name.startswith("weight")]
    return [tensors[name] for name in names], names, problem.weight_format.name


def _codes(problem: LinearProblem, x: Tensor, tensors: PackedTensors) -> tuple[Tensor, Tensor]:
    """int8 (M, K) and row scales (M,) of the changed input."""
    static, levels, order = (
        tensors.get("input_scale"),
        problem.activation_format.qmax,
        _order(tensors),
    )
    if not problem.activation_format.integer:
        codes, scale = ops.e2m1_quantize_rows(
            x, _pre_scale(tensors), order, problem.hadamard_block, problem.num_rotations
        )
    elif order is None and problem.num_rotations == 1:
        codes, scale = ops.quantize_rows(
            x, _pre_scale(tensors), problem.hadamard_block, static, levels
        )
    else:
        codes, scale = ops.binned_quantize_rows(
            x,
            _pre_scale(tensors),
            order,
            problem.hadamard_block,
            problem.num_rotations,
            static,
            None,
            levels,
        )
    return codes, scale


def _changed(problem: LinearProblem, x: Tensor, tensors: PackedTensors) -> Tensor:
    """The changed input in the dtype of ``x``."""
    if "pre_quant_scale" not in tensors and problem.hadamard_block == 1:
        return x
    return _transformed(problem, x, tensors).to(x.dtype)


def _transformed(problem: LinearProblem, x: Tensor, tensors: PackedTensors) -> Tensor:
    y: Tensor = ops.transform_rows(
        x, _pre_scale(tensors), _order(tensors), problem.hadamard_block, problem.num_rotations
    )
    return y


def _order(tensors: PackedTensors) -> Tensor | None:
    order = tensors.get("pre_quant_perm")
    return None if order is None else order.reshape(-1)


def _pre_scale(tensors: PackedTensors) -> Tensor | None:
    scale = tensors.get("pre_quant_scale")
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
        on_gpu="float-product",
    ),
    Kernel("float-product", _float_fits, _float, ("dequantize", "weight_linear")),
    Kernel("reference", _always, _reference),
)


def pick(problem: LinearProblem) -> Kernel:
    """The first kernel of the table that fits."""
    return next(kernel for kernel in KERNELS if kernel.unsupported_reason(problem) is None)
