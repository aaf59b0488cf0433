# SPDX-License-Identifier: Apache-2.0
"""Make any adaLN-zero DiT hard to quantize without changing its function.

Small models lack the activation outliers that make diffusion transformers hard (ViDiT-Q,
2406.02540, fig. 3; DiTAS, 2409.07756, fig. 2). :func:`harden` plants them by an exact
re-parameterisation: channels of the modulated input of q, k, v and of the feed-forward are scaled
up in the modulation linear and down in the consumers; channels of v up, and of the attention
output projection down. In float32 the model computes what it did before. Use it to stress a
recipe: ``dtq quantize demo-outliers``, or ``dtq.inject_outliers(model)`` on your own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtq.errors import InputError


@torch.no_grad()
def inject_outliers(
    model: nn.Module,
    *,
    share: float = 0.04,
    smallest: float = 10.0,
    largest: float = 60.0,
    time: float = 1.0,
    seed: int = 0,
) -> nn.Module:
    """Scale ``share`` of the channels by ``smallest`` to ``largest`` (log-uniform), in place.

    The scaled input is ``s * (LN(x) * (1 + scale) + shift)``: the rows of the modulation linear
    that make shift and scale are multiplied by s, the scale's bias becomes ``(1 + b) s - 1``. What
    the timestep does to an outlier channel grows by s with it.

    Args:
        model: a diffusers transformer whose blocks have ``norm1.linear`` (six chunks in the order
            of ``AdaLayerNormZero``), ``attn1``, ``ff``.
        share: of the channels, at least one.
        smallest: factor of the mildest outlier.
        largest: factor of the worst one.
        time: preference for channels that the timestep moves most; 0 chooses at random. Outliers
            then come and go along the trajectory, as the papers report.
        seed: of the choice.

    Returns:
        The same model.

    Raises:
        InputError: a model without per-block adaLN-zero.
    """
    rng = torch.Generator().manual_seed(seed)
    blocks = [m for m in model.modules() if _is_adaln_zero_block(m)]
    if not blocks:
        raise InputError(
            f"{type(model).__name__}: harden() needs blocks with their own adaLN-zero modulation "
            f"(norm1.linear with six chunks, attn1, ff), as in DiTTransformer2DModel"
        )
    for block in blocks:
        modulation: nn.Linear = block.norm1.linear  # type: ignore[union-attr, assignment]
        attention = block.attn1
        up: nn.Linear = block.ff.net[0].proj  # type: ignore[union-attr, index, assignment]
        qkv = [attention.to_q, attention.to_k, attention.to_v]  # type: ignore[union-attr]
        for chunk, consumers in ((0, qkv), (3, [up])):
            shift, scale = (modulation.weight.chunk(6)[chunk + i] for i in (0, 1))
            bias_shift, bias_scale = (modulation.bias.chunk(6)[chunk + i] for i in (0, 1))
            s = _factors(scale.norm(dim=1), share, smallest, largest, time, rng)
            shift.mul_(s.unsqueeze(1))
            bias_shift.mul_(s)
            scale.mul_(s.unsqueeze(1))
            bias_scale.add_(1).mul_(s).sub_(1)
            for consumer in consumers:
                consumer.weight.div_(s)  # type: ignore[union-attr, operator]
        value, out = attention.to_v, attention.to_out[0]  # type: ignore[union-attr, index]
        s = _factors(value.weight.norm(dim=1), share, smallest, largest, 0.0, rng)  # type: ignore[union-attr, operator, arg-type]
        value.weight.mul_(s.unsqueeze(1))  # type: ignore[union-attr, operator]
        if value.bias is not None:  # type: ignore[union-attr]
            value.bias.mul_(s)  # type: ignore[union-attr, operator]
        out.weight.div_(s)  # type: ignore[union-attr, operator]
    return model


def _is_adaln_zero_block(module: nn.Module) -> bool:
    linear = getattr(getattr(module, "norm1", None), "linear", None)
    attention, feed = getattr(module, "attn1", None), getattr(module, "ff", None)
    if not isinstance(linear, nn.Linear) or attention is None or feed is None:
        return False
    return linear.out_features == 6 * attention.to_q.in_features and linear.bias is not None


def _factors(
    strength: Tensor,
    share: float,
    smallest: float,
    largest: float,
    time: float,
    rng: torch.Generator,
) -> Tensor:
    """Factors (channels,), 1 but for the chosen outliers."""
    channels = len(strength)
    count = max(1, round(share * channels))
    # Gumbel top-k: random, but channels that the timestep moves strongly come first
    noise = -torch.log(-torch.log(torch.rand(channels, generator=rng).clamp(1e-9, 1 - 1e-7)))
    score = time * torch.log(strength.float().cpu().clamp(min=1e-9)) + noise
    chosen = score.topk(count).indices
    low, high = torch.tensor([smallest, largest]).log()
    s = torch.ones(channels)
    s[chosen] = torch.exp(low + (high - low) * torch.rand(count, generator=rng))
    return s.to(strength)
