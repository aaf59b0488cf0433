# SPDX-License-Identifier: Apache-2.0
"""Say where the time of a DiT-XL/2 step goes on this CPU: products, attention, quantizing, the rest.

    python scripts/profile_step.py --tokens 1024 --blocks 2

One thread, eager mode. The time of an op is the median CPU time of its calls, taken around each call,
so other processes do not count. What is left of the CPU time of a step is Python and the
dispatcher. The time of GELU is that of the product with it less that of the product without it.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import click
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtq.bench.cases import calibration_calls, cast_floats, dit_case, quantized_model
from dtq.bench.cpu import conditions
from dtq.bench.layers import RECIPES
from dtq.kernels import CPU
from dtq.nn import QuantLinear

Shapes = Sequence[Sequence[int]]

FLOAT_LINEARS = "modulation and other linears in float"
PREFIXES = {
    "products": ("dtq::w8a8", "dtq::w4a8"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "quantize": ("dtq::quantize_rows", "dtq::binned_quantize_rows"),
    FLOAT_LINEARS: (
        "dtq::weight_linear", "aten::addmm", "aten::mm", "aten::mkldnn", "aten::silu"
    ),
    "GELU as an op": ("dtq::gelu", "aten::gelu"),
    "LayerNorm": ("aten::native_layer_norm",),
}  # fmt: skip
"""By part of a step, how the names of its ops start."""


def part(op: str, shapes: Shapes) -> str:
    """The part of a step that an op belongs to.

    Args:
        op: its name.
        shapes: of its inputs; a vector for each image is (B, 1, C), an activation (B, T, C).
    """
    for name, prefixes in PREFIXES.items():
        if op.startswith(prefixes):
            return name
    first, second = ([*shapes, [], []])[:2]
    if op in ("aten::add", "aten::mul") and len(first) == len(second) == 3:
        if first[1] > 1 and second[1] == 1 and first[0] == second[0]:
            return "modulation of the norm"
        if op == "aten::mul" or first == second:
            return "gate and residual"
    return "views, copies and other ops"


@click.command(help=__doc__)
@click.option("--recipe", type=click.Choice([*RECIPES, "bfloat16"]), default="w8a8")
@click.option("--tokens", default=256, show_default=True, help="Of an image: 256, 1024, ...")
@click.option("--blocks", default=4, show_default=True, help="Of the model.")
@click.option("--steps", default=12, show_default=True, help="Steps that are measured.")
@torch.no_grad()
def main(recipe: str, tokens: int, blocks: int, steps: int) -> None:
    torch.set_num_threads(1)
    CPU.load()
    torch.manual_seed(0)
    case = dit_case(blocks, tokens)
    inputs = cast_floats(case.inputs, torch.bfloat16)
    if recipe == "bfloat16":
        model = case.model.bfloat16()
    else:
        model = quantized_model(case.model, recipe, calibration_calls(case.inputs))
    model(**inputs)
    step = statistics.median(_cpu_times(partial(model, **inputs), steps))
    parts = _parts(partial(model, **inputs), steps)
    parts["Python and the dispatcher"] = step - sum(parts.values())
    if recipe == "bfloat16":
        parts["products"] = parts.pop(FLOAT_LINEARS, 0.0)
    else:
        epilogue = blocks * _gelu(model, 2 * tokens, steps)
        parts["products"] -= epilogue
        parts["GELU in the product"] = epilogue
    print(", ".join(f"{k} {v}" for k, v in conditions(steps).items()))
    print(f"{case.name}, {recipe}: {step * 1e3:.1f} ms")
    for name, seconds in parts.most_common():
        print(f"  {seconds / step:6.1%} {seconds * 1e3:8.2f} ms  {name}")


def _cpu_times(run: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return times


def _parts(run: Callable[[], object], steps: int) -> Counter[str]:
    """Seconds of a step by part."""
    with _Watch() as watch:
        for _ in range(steps):
            run()
    parts: Counter[str] = Counter()
    for (op, shapes), times in watch.calls.items():
        parts[part(op, shapes)] += statistics.median(times) * len(times) / steps
    return parts


class _Watch(TorchDispatchMode):
    """Takes the CPU time of every op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[str, Shapes], list[float]] = defaultdict(list)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        started = time.process_time()
        result = func(*args, **(kwargs or {}))
        seconds = time.process_time() - started
        shapes = tuple(tuple(a.shape) if isinstance(a, torch.Tensor) else () for a in args)
        self.calls[func.name().split(".")[0], shapes].append(seconds)
        return result


def _gelu(model: nn.Module, tokens: int, rounds: int) -> float:
    """Seconds that GELU adds to the product of one feed-forward."""
    projection = next(
        module for name, module in model.named_modules() if name.endswith("ff.net.0.proj")
    )
    assert isinstance(projection, QuantLinear)
    x = torch.randn(tokens, projection.in_features).bfloat16()
    plain, with_gelu = partial(projection, x), partial(projection.gelu, x)
    plain(), with_gelu()
    pairs = [(_cpu_times(with_gelu, 1)[0], _cpu_times(plain, 1)[0]) for _ in range(rounds)]
    return statistics.median(a - b for a, b in pairs)


if __name__ == "__main__":
    main()
