# SPDX-License-Identifier: Apache-2.0
"""How long the layers of a plan will take on this machine: the real work, on small random layers.

What a layer costs depends on its format, solver and transform, on the processor and on the number
of threads. Two small layers are solved for each kind of layer in a plan; products of matrices,
which grow otherwise than the rest, are counted apart. Without statistics there are none, and what
is left is a stream over the weight, whose speed depends on what the caches hold: then the largest
layer of the kind is solved.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dtq.calibrate.observers import InputSample, InputStats, SampleOrigin
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.io.schema import MethodSpec
from dtq.linalg.cholesky import factor_cost
from dtq.plan.layers import LayerPlan
from dtq.recipe.resolve import Recipe
from dtq.stages.solve import trim_memory
from dtq.stages.solve_layer import TransformedInput, solve_input_group
from dtq.stages.transform_choice import choose_transform
from dtq.transforms import TRANSFORMS, TransformChoice

_COLUMNS, _ROWS = 256, (128, 384)
_MOST = 2**24  # weights of the largest layer, which is cut to that
_BINS = 4


@dataclass(frozen=True)
class Pace:
    """Seconds of one kind of layer.

    Attributes:
        chosen: of choosing the transform, per element of the sampled inputs and of the weight.
        rows: sampled inputs that it is chosen on.
        outputs: channels of an output that it is chosen on, at most.
        column, weight: of solving once, products aside.
        tries: transforms that are solved.
        judged: on sampled inputs, which there are none of without statistics.
        sampled: inputs that there are to sample.
    """

    chosen: float
    rows: int
    outputs: float
    column: float
    weight: float
    tries: int
    judged: bool = True
    sampled: float = math.inf

    def seconds(
        self, shape: tuple[int, int], rate: float, hessian: bool, readers: int = 1
    ) -> float:
        """For a linear (N, K).

        Args:
            shape: (N, K).
            rate: float32 operations a second.
            hessian: whether there are second moments, so GPTQ's products.
            readers: linears that share its input.
        """
        n, k = shape
        choose = self.chosen * k * (min(self.rows, self.sampled) + min(n, self.outputs))
        solve = self.column * k + self.weight * n * k
        if self.judged:
            solve += _products(n, k, rate, hessian, readers, self.sampled)
        return choose + self.tries * solve


def paces(
    layers: Iterable[LayerPlan],
    recipe: Recipe,
    needs: frozenset[str],
    rate: float,
    sampled: float = math.inf,
) -> dict[LayerPlan, Pace]:
    """Measure each kind of layer once.

    Args:
        layers: of a plan, quantized ones.
        recipe: that they are solved by.
        needs: statistics that there will be.
        rate: float32 operations a second.
        sampled: rows of an input that calibration sees.

    Returns:
        By :func:`kind`.
    """
    largest: dict[LayerPlan, LayerPlan] = {}
    for layer in layers:
        key = kind(layer)
        if key not in largest or math.prod(layer.shape) > math.prod(largest[key].shape):
            largest[key] = layer
    if not needs:
        return {key: _streamed(layer, recipe) for key, layer in largest.items()}
    measured = {key: _measured(key, recipe, needs, rate) for key in largest}
    return {key: replace(pace, sampled=sampled) for key, pace in measured.items()}


def kind(layer: LayerPlan) -> LayerPlan:
    """What a layer has in common with all that take the same time a weight."""
    return replace(layer, name="probe", role="", shape=(_ROWS[1], _COLUMNS), note="")


def _streamed(layer: LayerPlan, recipe: Recipe) -> Pace:
    n, k = layer.shape
    rows = max(1, min(n, _MOST // k))
    weight = torch.randn(rows, k, generator=torch.Generator().manual_seed(0)) * 0.02
    member = replace(layer, shape=(rows, k), transform=MethodSpec("none"))
    choice = choose_transform([member], [weight], None)

    def work() -> None:
        solve_input_group([member], [weight], _input(None, choice, member, weight, recipe))
        trim_memory([weight])

    spent = min(_timed(work)[1] for _ in range(2))  # the first finds memory cold
    return Pace(0.0, 0, 0.0, 0.0, spent / weight.numel(), 1, judged=False)


def _measured(layer: LayerPlan, recipe: Recipe, needs: frozenset[str], rate: float) -> Pace:
    generator = torch.Generator().manual_seed(0)
    stats = _statistics(needs, generator)
    few, many = _ROWS
    members = {n: [replace(layer, shape=(n, _COLUMNS))] for n in (few, many)}
    weights = {n: [torch.randn(n, _COLUMNS, generator=generator) * 0.02] for n in (few, many)}
    rows, outputs = _sampled(layer.transform)
    choice, spent = _timed(partial(choose_transform, members[many], weights[many], stats))
    chosen = spent / (_COLUMNS * (rows + min(many, outputs)))
    alone = replace(choice, runner_ups=())  # it is of the columns, so it fits both
    solved = {}
    for n in (few, many):
        work = partial(
            solve_input_group,
            members[n],
            weights[n],
            _input(stats, alone, layer, weights[n][0], recipe),
        )
        spent = min(_timed(work)[1] for _ in range(2))
        solved[n] = max(0.0, spent - _products(n, _COLUMNS, rate, "hessian" in needs))
    weight = max(0.0, (solved[many] - solved[few]) / ((many - few) * _COLUMNS))
    column = max(0.0, solved[few] / _COLUMNS - weight * few)
    return Pace(chosen, rows, outputs, column, weight, 1 + len(choice.runner_ups))


def _sampled(transform: MethodSpec) -> tuple[int, float]:
    """Inputs, and channels of an output, that a transform is chosen on: knobs of those names.

    Without them it looks at no input, and at the whole weight.
    """
    known = inspect.signature(TRANSFORMS[transform.name].call).parameters
    knobs = {name: knob.default for name, knob in known.items()} | dict(transform.knobs)
    return int(knobs.get("rows", 0)), float(knobs.get("outputs", math.inf))


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result and its seconds; with one thread of its own time, not of others'."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    return work(), clock() - started


def _products(
    n: int, k: int, rate: float, hessian: bool, readers: int = 1, sampled: float = math.inf
) -> float:
    """Seconds of what grows faster than the weight: errors on sampled rows; factors and repairs."""
    rows = min(InputSample(k, 1).per_stratum * 2, sampled)
    flops = 4.0 * rows * n * k
    if hessian:
        flops += 2.0 * n * k * k + factor_cost(k)[1] / readers
    return flops / rate


def _statistics(needs: frozenset[str], generator: torch.Generator) -> InputStats:
    """Of made-up inputs with a few large channels."""
    stats = InputStats(_COLUMNS, _BINS, needs)
    spread: Tensor = torch.exp(0.5 * torch.randn(_COLUMNS, generator=generator))
    spread[::100] *= 20
    for call in range(2 * _BINS):
        rows = torch.randn(1024, _COLUMNS, generator=generator) * spread
        stats.observe(rows, SampleOrigin(call % _BINS, call, torch.arange(len(rows)) % 2))
    return stats


def _input(
    stats: InputStats | None,
    choice: TransformChoice,
    layer: LayerPlan,
    weight: Tensor,
    recipe: Recipe,
) -> TransformedInput:
    activations = ACTIVATION_FORMATS[layer.activation_format]
    return TransformedInput(stats, choice, activations, weight, recipe.correct_bias)
