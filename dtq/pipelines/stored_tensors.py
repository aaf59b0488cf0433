# SPDX-License-Identifier: Apache-2.0
"""The tensors in safetensors headers, and signs that they are not the weights of a float model."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dtq.errors import CheckpointError
from dtq.pipelines.weight_files import open_header

log = logging.getLogger("dtq")

SAFETENSORS_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in headers, in the order of the safetensors writer."""

_TORCH = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
FLOATS = {"F64", "F32", "BF16", "F16"}
FP8 = {name: _TORCH[name] for name in ("F8_E4M3", "F8_E5M2")}

COMPANION = re.compile(
    r"(?:(?:^|[._])(?:scaled_fp8|comfy_quant|absmax|quant_map|quant_state|qweight|qzeros|qdata|g_idx"
    r"|SCB|wscales|smooth_factor|weight_packed|zero_points?|weight_zeros?|amax"
    r"|scale_(?:weight|input|output))"
    r"|(?:^|\.)(?:weight|input|output)(?:_global)?_scales?)(?:[._]|$)"
)
"""Names that tools for quantization give to what goes with a stored weight."""

SCALE_WORD = re.compile(r"(?:^|[._])(?:scales?|zeros|_data|_scale)(?:_inv|_\d)?$")
"""Names that can mean the same, and can also be those of ordinary parameters."""


class Stored(NamedTuple):
    """A tensor in the header of a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_headers(files: Iterable[Path]) -> dict[str, Stored]:
    """The tensors in the headers of safetensors files.

    Raises:
        CheckpointError: a file is damaged, its metadata says that it is quantized, or a tensor is
            in two files.
    """
    stored: dict[str, Stored] = {}
    for file in files:
        with open_header(file) as header:
            for note in header.metadata() or {}:
                if "quant" in note.lower():
                    raise not_plain(file, f"the entry {note!r} of its metadata")
            for key in header.keys():  # noqa: SIM118  (safe_open is not a mapping)
                if key in stored:
                    raise CheckpointError(f"{file}: {key} is also in {stored[key].file}")
                tensor = header.get_slice(key)
                stored[key] = Stored(file, tensor.get_dtype(), tuple(tensor.get_shape()))
    return stored


def described(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """The tensors of a state dict as a header would describe them."""
    file, names = Path("the state dict"), SAFETENSORS_DTYPES
    return {
        key: Stored(file, names.get(t.dtype, str(t.dtype)), tuple(t.shape))
        for key, t in tensors.items()
    }


def refuse_codes(stored: Mapping[str, Stored], read: Callable[[str], Tensor] | None = None) -> None:
    """Refuse tensors that are recognized as quantized without knowing the model.

    Args:
        stored: name to file, dtype and shape; names may be those of another library.
        read: gives a tensor by its name; default: from its file.

    Raises:
        CheckpointError: names the tensor.
    """
    for key, tensor in stored.items():
        weight = stored.get(f"{key.rpartition('.')[0]}.weight")
        coded = weight is not None and weight.dtype not in FLOATS
        if COMPANION.search(key) or (coded and SCALE_WORD.search(key)):
            raise not_plain(tensor.file, f"the tensor {key}")
        if key.endswith("weight") and len(tensor.shape) > 1 and tensor.dtype not in FLOATS | {*FP8}:
            raise not_plain(tensor.file, f"the tensor {key}, which is {tensor.dtype},")
    refuse_saturated(stored, read)


def refuse_saturated(
    stored: Mapping[str, Stored], read: Callable[[str], Tensor] | None = None
) -> None:
    """Refuse FP8 tensors that reach the largest value of FP8: their scale has been lost.

    Weights that were only cast to FP8 are far smaller. They are used as they are, with a warning.

    Args:
        stored: name to file, dtype and shape.
        read: gives a tensor by its name; default: from its file.

    Raises:
        CheckpointError: names the tensor.
    """
    found = [key for key, tensor in stored.items() if tensor.dtype in FP8]
    for key in found:
        tensor = read(key) if read is not None else read_tensor(stored, key)
        if is_saturated(tensor):
            raise not_plain(
                stored[key].file, f"the tensor {key}, which is FP8 up to its largest value and has "
                f"no scale,"
            )  # fmt: skip
    if found:
        log.warning(
            "%s: %d tensors are FP8 without a scale (%s); their values are taken as the weights",
            stored[found[0]].file, len(found), found[0],
        )  # fmt: skip


def is_saturated(tensor: Tensor) -> bool:
    """Whether the largest magnitude is exactly the largest value of an FP8 format."""
    if not tensor.numel():
        return False
    values = tensor.detach().float() if tensor.itemsize == 1 else tensor.detach()
    low, high = values.aminmax()
    return max(-low.item(), high.item()) in {torch.finfo(dtype).max for dtype in FP8.values()}


def read_tensor(stored: Mapping[str, Stored], key: str) -> Tensor:
    """A tensor from its file."""
    with open_header(stored[key].file) as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """The most common float dtype of the tensors in safetensors files, except scales."""
    count: Counter[str] = Counter()
    for file in files:
        with open_header(file) as header:
            keys = [key for key in [*header.keys()] if not COMPANION.search(key)]
            count.update(header.get_slice(key).get_dtype() for key in keys)
    usual = FLOATS - {"F64"}
    return next((_TORCH[n] for n, _ in count.most_common() if n in usual), torch.float32)


def not_plain(file: Path, what: str) -> CheckpointError:
    """The error for a file that holds something else than the weights of a float model.

    Args:
        file: where it was found.
        what: the sign of it, the subject of the sentence.
    """
    return CheckpointError(
        f"{file}: {what} says that the weights are stored in another form (quantized, scaled or "
        f"with adapters), which dtq does not read; give the float model"
    )
