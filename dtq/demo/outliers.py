# SPDX-License-Identifier: Apache-2.0
"""Make any adaLN-zero DiT hard to quantize without changing its function.

Small models lack the activation outliers that make diffusion transformers hard to quantize
(ViDiT-Q, 2406.02540, fig. 3; DiTAS, 2409.07756, fig. 2). :func:`inject_outliers` creates them by an
exact reparameterization: it scales channels of the modulated input of q, k, v and of the
feed-forward up in the modulation linear and down in the linears that read them; likewise channels
of v up, and of the attention output projection down. In float32 the model computes the same as
before. Test a recipe with it: ``dtq quantize demo-outliers``, or ``dtq.inject_outliers(model)`` on
a model of your own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dtq.errors import InputError


@torch.no_grad()
def inject_outliers(
    model: nn.Module,
    *,
    fraction: float = 0.04,
    min_factor: float = 10.0,
    max_factor: float = 60.0,
    timestep_weight: float = 1.0,
    seed: int = 0,
) -> nn.Module:
    """Scale some channels by ``min_factor`` to ``max_factor`` (log-uniform), in place.

    The scaled input is ``s * (LN(x) * (1 + scale) + shift)``. The rows of the modulation linear
    that compute shift and scale are multiplied by s, and the bias of the scale becomes
    ``(1 + b) s - 1``. The effect of the timestep on an outlier channel grows by s, too.

    Args:
        model: a diffusers transformer whose blocks have ``norm1.linear`` (six chunks in the order
            of ``AdaLayerNormZero``), ``attn1``, ``ff``.
        fraction: of the channels that are scaled, at least one. The papers report a few percent.
        min_factor: of the mildest outlier.
        max_factor: of the largest outlier.
        timestep_weight: preference for channels that the timestep changes most; 0 chooses at
            random. Outliers then come and go along the trajectory, as the papers report.
        seed: of the choice.

    Returns:
        The same model.

    Raises:
        InputError: a model without adaLN-zero in each block.
    """
    blocks: list[Any] = [m for m in model.modules() if _is_adaln_zero_block(m)]
    if not blocks:
        raise InputError(
            f"{type(model).__name__}: inject_outliers() needs blocks with their own adaLN-zero "
            f"modulation (norm1.linear with six chunks, attn1, ff), as in DiTTransformer2DModel"
        )
    rng = torch.Generator().manual_seed(seed)

    def factors(strength: Tensor, weight: float) -> Tensor:
        """Factors (channels,): 1, except for the outliers; ``weight`` prefers large strengths."""
        channels = len(strength)
        count = max(1, round(fraction * channels))
        # Gumbel top-k: random, but channels of large strength come first
        noise = -torch.log(-torch.log(torch.rand(channels, generator=rng).clamp(1e-9, 1 - 1e-7)))
        score = weight * torch.log(strength.float().cpu().clamp(min=1e-9)) + noise
        chosen = score.topk(count).indices
        low, high = torch.tensor([min_factor, max_factor]).log()
        s = torch.ones(channels)
        s[chosen] = torch.exp(low + (high - low) * torch.rand(count, generator=rng))
        return s.to(strength)

    for block in blocks:
        attention, up = block.attn1, block.ff.net[0].proj
        for chunk, readers in ((0, (attention.to_q, attention.to_k, attention.to_v)), (3, (up,))):
            # of six chunks, this one is the shift of the input of the readers, the next its scale
            shift, scale = block.norm1.linear.weight.chunk(6)[chunk : chunk + 2]
            bias_shift, bias_scale = block.norm1.linear.bias.chunk(6)[chunk : chunk + 2]
            s = factors(scale.norm(dim=1), timestep_weight)
            shift.mul_(s.unsqueeze(1))
            bias_shift.mul_(s)
            scale.mul_(s.unsqueeze(1))
            bias_scale.add_(1).mul_(s).sub_(1)
            for reader in readers:
                reader.weight.div_(s)
        value, out = attention.to_v, attention.to_out[0]
        s = factors(value.weight.norm(dim=1), 0.0)
        value.weight.mul_(s.unsqueeze(1))
        if value.bias is not None:
            value.bias.mul_(s)
        out.weight.div_(s)
    return model


def _is_adaln_zero_block(module: nn.Module) -> bool:
    linear = getattr(getattr(module, "norm1", None), "linear", None)
    attention, feed_forward = getattr(module, "attn1", None), getattr(module, "ff", None)
    if not isinstance(linear, nn.Linear) or attention is None or feed_forward is None:
        return False
    return linear.out_features == 6 * attention.to_q.in_features and linear.bias is not None
