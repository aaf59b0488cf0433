# SPDX-License-Identifier: Apache-2.0
"""Trainable copies of quantized linears, computed in float32 with gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtq.finetune.report import FinetuneConfig
from dtq.formats import PackedTensors
from dtq.formats.activations import fake_quantize, row_codes
from dtq.formats.vq import Vq
from dtq.nn.linear import QuantLinear

SURE = 0.99
"""A sub-vector whose largest ratio is above this is fixed to its codeword (VQ4DiT, sec. 3.2)."""

LEAD = 4.0
"""First logit of the present codeword, the other candidates' being 0."""


class TrainableLinear(nn.Linear):
    """A quantized linear whose float tensors are trained, computed in float32.

    Every tensor is ``start * exp(d)`` (scales, which keep their sign) or ``start + unit * d``, with
    ``d`` starting at zero, so that one learning rate fits all. In the forward pass tensors are
    rounded to the stored dtype, and activations to their format, both with a straight-through
    gradient.

    Args:
        layer: the quantized linear; it is read and not changed.
    """

    def __init__(self, layer: QuantLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        # for code that reads the weight and bias of a linear; neither is trained
        self.weight, self.bias = layer.weight, layer.bias
        self._layer = [layer]  # in a list: not a submodule
        specs = layer.tensor_specs()
        self.dtypes = {n: s.dtype for n, s in specs.items() if _is_trained(n, s.dtype)}
        self.start = {n: layer.packed_tensor(n).detach().float() for n in self.dtypes}
        self.unit = {n: _rms(t) for n, t in self.start.items()}
        if layer.bias is not None:
            self.dtypes["bias"] = layer.bias.dtype
            self.start["bias"] = layer.bias.detach().float().clone()
            # the RMS of an output when that of the input is one
            self.unit["bias"] = _rms(layer.dequantize(torch.float32)) * self.in_features**0.5
        self.moves = nn.ParameterDict({n: self._no_move(n) for n in self.start})

    def _no_move(self, name: str) -> Tensor:
        """Zeros for a tensor; one row of them where the format has the same values in all rows."""
        start, fmt = self.start[name], self.layer.problem.weight_format
        equal = name in fmt.matrix_tensors and bool((start == start[:1]).all())
        return torch.zeros_like(start[:1] if equal else start)

    @property
    def layer(self) -> QuantLinear:
        """The quantized linear that this one stands in for."""
        return self._layer[0]

    def groups(self, config: FinetuneConfig, reach: float) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer.

        Args:
            config: has the learning rates.
            reach: factor of the rates, the square root of the block's error before training.
        """
        main = [p for n, p in self.moves.items() if n.startswith("weight_")]
        other = [p for n, p in self.moves.items() if not n.startswith("weight_")]
        groups = [
            {"params": main, "lr": config.lr * reach},
            {"params": other, "lr": config.lr_other * reach},
        ]
        return [group for group in groups if group["params"]]

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., K) to (..., N), in the dtype of ``input``."""
        rows = input.reshape(-1, self.in_features).float()  # (M, K)
        transformed = self.layer.transform().x(rows)
        with torch.no_grad():
            rounded = self._fake_quantized(transformed)
        y = F.linear(_straight_through(rounded, transformed), self.matrix())  # (M, N)
        if self.layer.spec.rank:
            y = y + F.linear(F.linear(rows, self.now("proj_down")), self.now("proj_up"))
        if "bias" in self.moves:
            y = y + self.now("bias")
        return y.to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def matrix(self) -> Tensor:
        """The weight (N, K) that multiplies the transformed input."""
        fmt = self.layer.problem.weight_format
        packed = {
            n: self.layer.packed_tensor(n)
            for n in fmt.tensor_specs((self.out_features, self.in_features))
        }
        return fmt.unpack(packed | {n: self.now(n) for n in packed if n in self.moves})

    def now(self, name: str) -> Tensor:
        """The present value of a tensor, rounded as it is stored, in float32."""
        start, move = self.start[name], self.moves[name]
        positive = "scale" in name
        value = start * move.exp() if positive else start + self.unit[name] * move
        return _straight_through(_cast(value, self.dtypes[name]).float(), value)

    def state(self) -> PackedTensors:
        """Every packed tensor and the bias, with on-disk dtypes."""
        with torch.no_grad():
            trained = {n: _cast(self.now(n), dtype) for n, dtype in self.dtypes.items()}
        return self.layer.packed_tensors() | trained

    def _fake_quantized(self, transformed: Tensor) -> Tensor:
        """The transformed input (M, K) as the layer's GEMM reads it."""
        activations = self.layer.current_activation_format()
        if not activations.static:
            return fake_quantize(transformed, activations)
        scale = self.layer.step_scale()
        return row_codes(transformed, scale, activations.qmax) * scale


class TrainableVq(TrainableLinear):
    """The same for a vector format: each sub-vector is a mix of candidate codewords.

    Args:
        layer: in a vector format: tensors ``weight_lut`` (k, d), ``weight`` and, in some formats,
            ``weight_scale``.
        weight: the float weight (N, K) of the raw input.
        candidates: codewords per sub-vector.
    """

    def __init__(self, layer: QuantLinear, weight: Tensor, candidates: int) -> None:
        super().__init__(layer)
        target = layer.transform().w(weight.detach().float().to(layer.weight.device))
        if layer.spec.rank:
            target = target - self.start["proj_up"] @ layer.transform().w(self.start["proj_down"])
        fmt = self._format
        vectors = fmt.split(target, layer.packed_tensors()).flatten(0, 1)  # (S, d)
        now = fmt.codes(layer.packed_tensors()).flatten().long()  # (S,)
        self.options = _candidates(vectors, self.start["weight_lut"], now, candidates)  # (S, n)
        logits = torch.zeros_like(self.options, dtype=torch.float32)
        logits[:, 0] = LEAD
        self.logits = nn.Parameter(logits)  # (S, n)

    def groups(self, config: FinetuneConfig, reach: float) -> list[dict[str, Any]]:
        """Those of the base class, and the logits with a rate of their own."""
        return [*super().groups(config, reach), {"params": [self.logits], "lr": config.lr_logits}]

    def matrix(self) -> Tensor:
        """The weight (N, K) with mixed codewords."""
        words = F.embedding(self.options, self.now("weight_lut"))  # (S, n, d)
        mixed = (self.logits.softmax(1).unsqueeze(-1) * words).sum(1)  # (S, d)
        vectors = mixed.unflatten(0, (self.out_features, -1))
        scale = {n: self.now(n) for n in self.moves if n == "weight_scale"}
        return self._format.join(vectors, scale)

    def indecision(self) -> Tensor:
        """``mean(1 - |2 r - 1|)``, the paper's L_r: zero when every ratio is 0 or 1."""
        return (1 - (2 * self.logits.softmax(1) - 1).abs()).mean()

    @torch.no_grad()
    def fix(self, everything: bool = False) -> None:
        """Fix the sub-vectors with a ratio above :data:`SURE`, or all, to their best candidate."""
        ratios = self.logits.softmax(1)
        sure = (ratios.amax(1) > SURE) | everything  # (S,)
        # minus infinity: no gradient and no momentum brings a candidate back
        fixed = torch.full_like(ratios, -math.inf).scatter_(1, ratios.argmax(1, True), 0.0)
        self.logits.copy_(torch.where(sure.unsqueeze(1), fixed, self.logits))

    def state(self) -> PackedTensors:
        """That of the base class, each sub-vector with its best candidate."""
        best = self.options.gather(1, self.logits.argmax(1, True)).reshape(self.out_features, -1)
        return self._format.with_codes(super().state(), best)

    @property
    def _format(self) -> Vq:
        fmt = self.layer.problem.weight_format
        assert isinstance(fmt, Vq)
        return fmt


def trainable_of(layer: QuantLinear, linear: nn.Linear, config: FinetuneConfig) -> TrainableLinear:
    """A trainable copy of a quantized linear; ``linear`` is the float one that it replaced."""
    if config.candidates and isinstance(layer.problem.weight_format, Vq):
        return TrainableVq(layer, linear.weight, config.candidates)
    return TrainableLinear(layer)


def _candidates(vectors: Tensor, codebook: Tensor, now: Tensor, count: int) -> Tensor:
    """The present codeword, then the nearest others; int64 (S, n)."""
    count = min(count, len(codebook))
    nearest = []
    for chunk, present in zip(vectors.split(65536), now.split(65536), strict=True):
        distance = torch.cdist(chunk, codebook)  # (s, k)
        distance.scatter_(1, present.unsqueeze(1), -1.0)
        nearest.append(distance.topk(count, largest=False).indices)
    return torch.cat(nearest)


def _is_trained(name: str, dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and name.startswith(("weight_", "proj_"))


def _straight_through(value: Tensor, through: Tensor) -> Tensor:
    """``value`` exactly, with the gradient of ``through``."""
    return value.detach() + (through - through.detach())


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a narrower dtype; values beyond its range are clamped to it."""
    largest = torch.finfo(dtype).max
    return value.detach().clamp(-largest, largest).to(dtype)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def state_of(layer: QuantLinear) -> PackedTensors:
    """Every packed tensor, and a copy of the bias."""
    bias = {} if layer.bias is None else {"bias": layer.bias.detach().clone()}
    return layer.packed_tensors() | bias


@torch.no_grad()
def set_state(layer: QuantLinear, state: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`state_of`, in place."""
    layer.fill({n: t for n, t in state.items() if n != "bias"})
    if layer.bias is not None:
        layer.bias.copy_(state["bias"])
