# SPDX-License-Identifier: Apache-2.0
"""Load the trained ternary weights of TerDiT (2405.14854) into a diffusers transformer.

TerDiT trains ternary weights from scratch, so they are not quantized here, only packed. The caller
maps the keys of a TerDiT checkpoint to the linears of a diffusers class.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dtq.checkpoint.config import DTQConfig
from dtq.errors import InputError
from dtq.formats import FORMATS
from dtq.formats.ternary import Ternary
from dtq.integrations.diffusers import attach_quantizer
from dtq.models.linears import shape_of
from dtq.nn.linear import QuantLinear
from dtq.nn.swap import finalize
from dtq.plan.layers import LayerPlan, LayerSpec, Plan


def unpack_codes(packed: Tensor) -> Tensor:
    """Unpack the codes of TerDiT's deployment format: four per byte along the output axis.

    Byte row i holds the codes of output rows i, i + N/4, i + N/2 and i + 3N/4, the first one in the
    two highest bits. Each code is stored plus one.

    Args:
        packed: uint8 (N/4, K).

    Returns:
        int8 (N, K) in {-1, 0, 1}.

    Raises:
        InputError: the dtype or the number of axes is different, or a code is not ternary.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise InputError(f"packed ternary codes are uint8 (N/4, K), got {packed.dtype}")
    digits = torch.cat([(packed >> shift) & 3 for shift in (6, 4, 2, 0)])
    if bool((digits == 3).any()):
        raise InputError("packed ternary codes hold a 3; they are damaged, or not of TerDiT")
    return digits.to(torch.int8) - 1


def load_ternary(
    model: nn.Module,
    weights: Mapping[str, tuple[Tensor, Tensor | float]],
    *,
    fmt: str = "ternary-row",
) -> nn.Module:
    """Replace linears of a diffusers transformer by ones with trained ternary weights.

    The result runs, saves and loads like any dtq model. Biases and all other layers do not change.

    Args:
        model: a diffusers transformer; changed in place.
        weights: linear name to codes and alpha. Codes are int8 (N, K) in {-1, 0, 1}, or uint8
            (N/4, K) in the format that :func:`unpack_codes` reads; alpha is one number, or one per
            output channel (N, 1).
        fmt: a ternary format; ``trit-row`` stores five codes per byte.

    Returns:
        The model.

    Raises:
        InputError: a linear does not exist or has another shape, codes are not ternary, or alpha is
            not finite.
    """
    ternary = FORMATS.get(fmt)
    if not isinstance(ternary, Ternary):
        known = ", ".join(n for n, f in FORMATS.items() if isinstance(f, Ternary))
        raise InputError(f"{fmt!r} is not a ternary format; the ternary formats are {known}")
    modules = dict(model.named_modules())
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    layers: dict[str, QuantLinear] = {}
    for name, (packed, alpha) in weights.items():
        old = modules.get(name)
        if not isinstance(old, nn.Linear):
            raise InputError(f"{type(model).__name__} has no linear {name!r}")
        codes = unpack_codes(packed) if packed.dtype == torch.uint8 else packed
        got, want = list(codes.shape), list(old.weight.shape)
        if got != want:
            raise InputError(f"{name}: codes are {got}, the linear is {want}")
        if not bool(((codes.abs() <= 1) & (codes == codes.round())).all()):
            raise InputError(f"{name}: codes must be -1, 0 or 1")
        if not bool(torch.as_tensor(alpha).isfinite().all()):
            raise InputError(f"{name}: alpha must be finite")
        spec = LayerSpec(fmt, "none")
        new = QuantLinear.in_place_of(old, spec, compute_dtype=dtype, device="meta")
        new.fill(ternary.pack_codes(codes.to(old.weight.device), alpha))
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach().to(dtype), requires_grad=False)
        layers[name] = new.train(old.training)
    for name, new in layers.items():
        model.set_submodule(name, new)
    plans = (LayerPlan(n, "other", shape_of(m), m.spec) for n, m in layers.items())
    finalize(model, ())
    attach_quantizer(model, Plan("terdit", tuple(plans)), (), dtype, DTQConfig())
    return model
