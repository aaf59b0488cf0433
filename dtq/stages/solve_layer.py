# SPDX-License-Identifier: Apache-2.0
"""Quantize one layer from the statistics of its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from dtq.calibrate.observers import InputStats
from dtq.errors import InputError
from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS, ActivationFormat, fake_quantize, row_scale
from dtq.models import is_text_encoder
from dtq.plan.layers import LayerPlan
from dtq.solvers import SOLVERS
from dtq.solvers.lowrank import LowRankBranch
from dtq.stages.layer_result import LayerReport, LayerResult
from dtq.stages.run import Run
from dtq.transforms import OnlineTransform, TransformChoice

RIDGE = 0.1
"""For text encoders, which see few tokens: of the mean diagonal of a Hessian, where it has as many
rows as columns (docs/text_encoders.md). It is not measured for denoisers, which have none."""
LEAST_RIDGE = 0.01
"""A smaller ridge is left out: the solvers' own damping is of that size."""


OUTPUT_RIDGE = 1.0
"""Of the mean diagonal of a block of G, where it has as many rows as columns: few rows say little
of the gradients of other inputs (docs/methods/yaqa.md)."""


@dataclass
class TransformedInput:
    """An input under one transform: its statistics are transformed once for all its layers.

    Attributes:
        stats: of the input, None without calibration data.
        choice: the transform.
        activations: format that the layers round the input with.
        like: a tensor on the device and of the dtype to compute with.
        correct_bias: whether the mean output error is moved into the bias.
        ridge: of ``ridged_hessian``.
        gradients: blocks of G of a layer, for solvers that need them.
        factors: Cholesky factors of the Hessian by damping, shared by the solvers of all layers.
    """

    stats: InputStats | None
    choice: TransformChoice
    activations: ActivationFormat
    like: Tensor
    correct_bias: bool
    ridge: float = 0.0
    gradients: Callable[[LayerPlan], Sequence[Tensor]] = lambda _: ()
    factors: dict[float, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, run: Run, layer: LayerPlan, choice: TransformChoice, weight: Tensor
    ) -> TransformedInput:
        """The input of a layer.

        Args:
            run: has the statistics.
            layer: reads the input.
            choice: its transform.
            weight: float (N, K) of the layer.
        """
        stats = run.stats(run.scan.group_of(layer.name))
        activations = ACTIVATION_FORMATS[layer.activation_format]
        ridge = RIDGE if is_text_encoder(run.model) else 0.0
        correct = run.recipe.correct_bias
        gradients = partial(_gradients, run, weight)
        return cls(stats, choice, activations, weight, correct, ridge, gradients)

    @property
    def transform(self) -> OnlineTransform:
        """The online transform of ``choice``."""
        return self.choice.transform

    @cached_property
    def hessian(self) -> Tensor | None:
        """Hessian (K, K) of the transformed input, None without calibration data."""
        if self.stats is None or self.stats.hessian is None:
            return None
        return self.transform.hessian(self.stats.hessian.hessian().to(self.like))

    @cached_property
    def ridged_hessian(self) -> Tensor | None:
        """The Hessian for solvers that invert it, None without calibration data.

        Of few rows it is a bad guess of that of other inputs, which error feedback would trust:
        then ``ridge * K / rows`` of its mean diagonal is added to the diagonal, as in ridge
        regression.
        """
        if self.hessian is None or self.stats is None or self.stats.hessian is None:
            return None
        ridge = self.ridge * len(self.hessian) / max(1, int(self.stats.hessian.count))
        if ridge <= LEAST_RIDGE:
            return self.hessian
        ridged = self.hessian.clone()
        ridged.diagonal().add_(ridge * ridged.diagonal().mean())
        return ridged

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Sampled rows (R, K): raw, transformed, and rounded as the layer multiplies them."""
        if self.stats is None or self.stats.sample is None:
            return None
        x = self.stats.sample.rows.to(self.like)
        transformed = self.transform.x(x)
        return x, transformed, fake_quantize(transformed, self.activations)

    @property
    def mean(self) -> Tensor | None:
        """Mean (K,) of the transformed input, None without bias correction."""
        if not self.correct_bias or self.stats is None:
            return None
        return self.transform.x(self.stats.channels.mean().to(self.like))

    def output_error(
        self, weight: Tensor, w_q: Tensor, low: Tensor | None, shift: Tensor | None
    ) -> float | None:
        """Relative squared error of a layer's output on sampled rows, None without rows.

        Args:
            weight: float (N, K).
            w_q: fake-quantized transformed weight (N, K), without the low-rank branch.
            low: low-rank branch (N, K) for the transformed input.
            shift: bias shift (N,).
        """
        if self.rows is None:
            return None
        x, transformed, rounded = self.rows
        want = x @ weight.T
        got = rounded @ w_q.T
        if low is not None:
            got += transformed @ low.T
        if shift is not None:
            got += shift
        return float(got.sub_(want).square_().sum() / want.square_().sum().clamp(min=1e-30))

    def static_scale(self) -> Tensor:
        """Static activation scale (1, 1), or one per timestep bin (1, bins), from sampled rows.

        Raises:
            InputError: there are no sampled rows.
        """
        if self.stats is None or self.stats.sample is None:
            raise InputError("static activation scales need calibration data")
        rows = self.transform.x(self.stats.sample.rows.to(self.transform.scale.device))
        bins = (self.stats.sample.stratum // 2).to(rows.device)
        overall = row_scale(rows.reshape(1, -1)).reshape(1, 1)
        if not self.activations.per_timestep:
            return overall
        ranges = (rows[bins == b] for b in range(self.stats.bins))
        scales = [row_scale(x.reshape(1, -1)) if len(x) else overall for x in ranges]
        return torch.stack(scales).reshape(1, -1)


def _gradients(run: Run, weight: Tensor, layer: LayerPlan) -> list[Tensor]:
    """Blocks of G of a layer, on the device of ``weight``; with a ridge where rows are few."""
    blocks = []
    found = run.statistics.gradients(layer.name, layer.shape[0]) if run.statistics else []
    for moment in found:
        g = moment.hessian().to(weight.device)
        g.diagonal().add_(OUTPUT_RIDGE * len(g) / int(moment.count) * g.diagonal().mean())
        blocks.append(g)
    return blocks


def solve_layer(
    layer: LayerPlan, weight: Tensor, x: TransformedInput, branch: LowRankBranch | None = None
) -> LayerResult:
    """Quantize one linear: transform, split off the low-rank branch, solve, correct the bias.

    If the plan has format candidates, all are solved. The one with the lowest output error stays,
    or without sampled rows the one with the lowest weight error.

    Args:
        layer: its plan.
        weight: float (N, K).
        x: its input.
        branch: its low-rank branch, None for none.
    """
    names = layer.format_candidates or (layer.weight_format,)
    attempts = [_solve(layer.with_spec(weight_format=n), weight, x, branch) for n in names]
    return min(attempts, key=lambda r: (r.report.error or 0.0, r.weight_error))


def _solve(
    layer: LayerPlan, weight: Tensor, x: TransformedInput, branch: LowRankBranch | None
) -> LayerResult:
    transform, fmt = x.transform, FORMATS[layer.weight_format]
    target = transform.w(weight)
    low: Tensor | None = None
    tensors = {}
    if branch is not None:
        # what runs is the rounded branch on the raw input; the residual is what that leaves
        down = transform.raw(branch.down).bfloat16()
        tensors = {"proj_down": down, "proj_up": branch.up.bfloat16()}
        low = tensors["proj_up"].to(target) @ transform.w(down.to(target))
        target = target - low
    solver = SOLVERS[layer.solver.name]
    given: list[object] = [x.ridged_hessian, x.factors] if solver.shares else [x.hessian]
    if "gradients" in solver.needs:
        given.append(x.gradients(layer))
    w_q, qparams = solver.call(target, fmt, *given, **dict(layer.solver.knobs))
    mean = x.mean
    shift = None if mean is None else (target - w_q) @ mean
    tensors |= fmt.pack(w_q, qparams)
    if layer.spec.pre_quant:
        # a copy: linears that share a transform must not share memory, safetensors refuses that
        tensors["pre_quant_scale"] = transform.scale.reshape(1, -1).clone()
    if transform.perm is not None:
        tensors["pre_quant_perm"] = transform.perm.reshape(1, -1).clone()
    if x.activations.static:
        tensors["input_scale"] = x.static_scale()
    error = x.output_error(weight, w_q, low, shift)
    final = layer.with_spec(
        hadamard_block_size=transform.block,
        num_rotations=transform.num_rotations,
        permutation=transform.perm is not None,
        rank=0 if branch is None else len(branch.down),
    )
    weight_error = float((target - w_q).square().sum())
    report = LayerReport(
        final.name, final.role, final.weight_format, final.bits(), x.choice.label, error
    )
    return LayerResult(final, tensors, transform, shift, report, weight_error)
