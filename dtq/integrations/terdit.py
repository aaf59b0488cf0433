# SPDX-License-Identifier: Apache-2.0
"""Trained ternary linears, as TerDiT leaves them (2405.14854): codes in, a dtq model out.

TerDiT trains from scratch; its weights need no quantizing, only a format and a runtime. Which key
of a checkpoint belongs to which linear of a diffusers class is the caller's to say.
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
from dtq.nn.linear import QuantLinear
from dtq.nn.swap import finalize
from dtq.plan.layers import LayerPlan, LayerSpec, Plan


def unpack_codes(packed: Tensor) -> Tensor:
    """Codes of TerDiT's deployment packing: four to a byte along the output axis.

    Byte row i holds the codes of output rows i, i + N/4, i + N/2 and i + 3N/4, the first in the
    highest two bits, each plus one.

    Args:
        packed: uint8 (N/4, K).

    Returns:
        int8 (N, K) in {-1, 0, 1}.

    Raises:
        InputError: another dtype, or a byte that holds no ternary codes.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise InputError(f"packed ternary codes are uint8 (N/4, K), got {packed.dtype}")
    digits = torch.cat([(packed >> shift) & 3 for shift in (6, 4, 2, 0)])
    if bool((digits == 3).any()):
        raise InputError("packed ternary codes hold a 3; they are not TerDiT's, or damaged")
    return digits.to(torch.int8) - 1


def load_ternary(
    model: nn.Module,
    weights: Mapping[str, tuple[Tensor, Tensor | float]],
    *,
    fmt: str = "ternary-row",
) -> nn.Module:
    """Put trained ternary weights where linears of a diffusers transformer are.

    The result runs, saves and loads like any dtq model. Its biases and all other layers stay.

    Args:
        model: a diffusers transformer; changed in place.
        weights: linear name to its codes, int8 (N, K) in {-1, 0, 1} or uint8 (N/4, K) packed as
            :func:`unpack_codes` reads them, and alpha: one number, or per row (N, 1).
        fmt: a ternary format; ``trit-row`` keeps five codes a byte.

    Raises:
        InputError: no such linear, another shape, or codes that are not ternary.
    """
    ternary = FORMATS.get(fmt)
    if not isinstance(ternary, Ternary):
        known = ", ".join(n for n, f in FORMATS.items() if isinstance(f, Ternary))
        raise InputError(f"{fmt!r} is not a ternary format; there are {known}")
    modules = dict(model.named_modules())
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    made: dict[str, QuantLinear] = {}
    for name, (given, alpha) in weights.items():
        old = modules.get(name)
        if not isinstance(old, nn.Linear):
            raise InputError(f"{type(model).__name__} has no linear {name!r}")
        codes = unpack_codes(given) if given.dtype == torch.uint8 else given
        if codes.shape != old.weight.shape:
            raise InputError(
                f"{name}: codes are {list(codes.shape)}, the linear is {list(old.weight.shape)}"
            )
        if not bool(((codes.abs() <= 1) & (codes == codes.round())).all()):
            raise InputError(f"{name}: codes must be -1, 0 or 1")
        if not bool(torch.as_tensor(alpha).isfinite().all()):
            raise InputError(f"{name}: alpha must be finite")
        new = QuantLinear(
            old.in_features, old.out_features, old.bias is not None, LayerSpec(fmt, "none"),
            compute_dtype=dtype, device="meta",
        )  # fmt: skip
        parts = ternary.pack_codes(codes.to(old.weight.device), alpha)
        new.fill(parts)
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach().to(dtype), requires_grad=False)
        made[name] = new.train(old.training)
    layers = []
    for name, new in made.items():
        model.set_submodule(name, new)
        shape = new.out_features, new.in_features
        layers.append(LayerPlan(name, "other", shape, LayerSpec(fmt, "none")))
    finalize(model, ())
    attach_quantizer(model, Plan("terdit", tuple(layers)), (), dtype, DTQConfig())
    return model
