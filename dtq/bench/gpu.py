# SPDX-License-Identifier: Apache-2.0
"""The benchmark's suites for a GPU: linears and whole models beside cuBLAS and other libraries.

Data are random: constant ones flatter a GPU, which then draws less power and clocks higher. Every
candidate goes through copies of its operands that together are larger than three times the L2
cache, as the layers of a model do. Compiled models are captured as well, so nobody pays for
launches.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtq.bench.cases import OURS, quantized, quantized_model
from dtq.bench.cpu import MODULES, BenchRow, Candidate, Result, installed, race
from dtq.bench.timer import Clock, clock_of
from dtq.errors import InputError
from dtq.evaluate.baselines import BASELINES
from dtq.kernels import CUDA, gpu_dispatch

SHAPES = ((1152, 1152), (1152, 4608), (4608, 1152), (3072, 3072), (3072, 12288), (12288, 3072))
"""(K, N) of DiT-XL and FLUX."""
TOKENS = (1, 16, 64, 256, 1024, 4096)
PRODUCTS = ("w8a8 product", "w4a8 product")
"""Of given codes, beside the whole layers."""
MODULATION = {"w8a8": None, "w4a8": "int4-g64"}
"""Weight-only format of modulation; None leaves it in bfloat16."""

ops = torch.ops.dtq


def gpu() -> torch.device:
    """The GPU.

    Raises:
        InputError: there is none.
    """
    if not torch.cuda.is_available():
        raise InputError(
            "no GPU that torch can use: the CUDA suites need one; --device cpu runs the others"
        )
    return torch.device("cuda", torch.cuda.current_device())


def gemm(device: torch.device, quick: bool, rounds: int, clock: Clock) -> Iterator[list[BenchRow]]:
    """Whole linears, bfloat16 in to bfloat16 out, and the bare products."""
    for k, n in SHAPES[::2] if quick else SHAPES:
        for m in TOKENS[::2] if quick else TOKENS:
            yield linear_race(m, k, n, rounds, device, clock)


def e2e(device: torch.device, quick: bool, rounds: int, clock: Clock) -> Iterator[list[BenchRow]]:
    """One denoising step of models with random weights, eager and compiled."""
    for case, make in (("flux", flux), ("dit", dit)):
        model, given, tokens = make(device, quick)
        yield model_race(f"{case} shape", tokens, model, given, rounds, clock)
        del model, given  # before the next is made


Races = Callable[[torch.device, bool, int, Clock], Iterator[list[BenchRow]]]


def suite(
    races: Races,
    *,
    quick: bool = False,
    rounds: int = 15,
    progress: Callable[[list[BenchRow]], None] | None = None,
    device: torch.device | None = None,
) -> Result:
    """Every race of a suite; ``say`` hears of each when it is over.

    Raises:
        InputError: no device is given, and there is no GPU.
    """
    device = device or gpu()
    clock = clock_of(device)
    rows: list[BenchRow] = []
    for found in races(device, quick, rounds, clock):
        rows += found
        if progress:
            progress(found)
    return Result(races.__name__, conditions(rounds, device, clock), rows)


SUITES: dict[str, Callable[..., Result]] = {
    "gemm": functools.partial(suite, gemm),
    "e2e": functools.partial(suite, e2e),
}


def conditions(rounds: int, device: torch.device, clock: Clock) -> dict[str, str | int]:
    """What a figure needs beside it."""
    found: dict[str, str | int] = {"device": str(device)}
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "kernels": CUDA.describe(),
            "cuda": str(torch.version.cuda),
        }
    return found | {
        "clock": clock.name,
        "torch": torch.__version__,
        "rounds": rounds,
        "date": time.strftime("%Y-%m-%d"),
    }


# ------------------------------------------------------------------------------------- linears


def linear_race(
    m: int, k: int, n: int, rounds: int, device: torch.device, clock: Clock
) -> list[BenchRow]:
    """Everybody's linear of one size, side by side."""
    torch.manual_seed(0)
    plain = nn.Linear(k, n, device=device, dtype=torch.bfloat16)
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    count = copies(device, x.nbytes + plain.weight.nbytes)
    layers = {name: quantized(plain, weights) for name, weights in OURS.items()}
    if gpu_dispatch.multiplies_fp4(x, mx=False):
        layers["nvfp4"] = quantized(plain, "nvfp4", "nvfp4")
    found = [
        *(ours(name, layer, x, count) for name, layer in layers.items()),
        *(product(name, plain, x, count) for name in OURS),
        *(rival for rival in peers(plain, x, count) if rival is not None),
    ]
    return race(f"{k} x {n}", m, found, rounds, clock, (*layers, *PRODUCTS))


def copies(device: torch.device, size: int) -> int:
    """How many sets of operands of ``size`` bytes exceed three times the L2 cache; at most 32."""
    if device.type != "cuda":
        return 2
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(2, min(32, math.ceil(3 * cache / size)))


def turning(runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Each time the next of them."""
    turn = itertools.cycle(runs)
    return lambda: next(turn)()


def ours(name: str, layer: nn.Module, x: Tensor, count: int) -> Candidate:
    """The quantized layer, dispatcher included."""
    size = sum(p.nbytes for p in layer.parameters())
    return Candidate(name, repeat_layer(layer, x, count), size)


def product(name: str, plain: nn.Linear, x: Tensor, count: int) -> Candidate:
    """The product of codes that are there already."""
    layer = quantized(plain, OURS[name])
    codes, scale = ops.quantize_rows(x, None, 1, None)
    parts, op = layer.packed_tensors(), ops.w8a8_linear if name == "w8a8" else ops.w4a8_linear
    names = [n for n in ("weight", "weight_scale", "weight_scale_2") if n in parts]
    sets = [
        (codes.clone(), scale, *(parts[n].clone() for n in names), layer.bias, x.dtype)
        for _ in range(count)
    ]
    size = sum(parts[n].nbytes for n in names)
    return Candidate(f"{name} product", turning([_bound(op, *s) for s in sets]), size)


def peers(plain: nn.Linear, x: Tensor, count: int) -> Iterable[Candidate | None]:
    """cuBLAS in bfloat16, torch's own 8-bit products, libraries that are installed."""
    k, n = plain.in_features, plain.out_features
    yield Candidate("bf16", repeat_layer(plain, x, count), plain.weight.nbytes)
    on_cpu = x.device.type == "cpu"
    if on_cpu or (len(x) > 16 and k % 8 == n % 8 == 0):
        codes = torch.randint(-127, 128, x.shape, dtype=torch.int8, device=x.device)
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=x.device)
        sets = [(codes.clone(), weight.clone().T) for _ in range(count)]
        # the bare product: codes given, no scales, no bias, int32 out
        runs = [_bound(torch._int_mm, *s) for s in sets]
        yield Candidate("_int_mm, bare", turning(runs), weight.numel())
    if (
        not on_cpu
        and torch.cuda.get_device_capability(x.device) >= (8, 9)
        and k % 16 == n % 16 == 0
    ):
        yield _scaled_mm(plain, x, count)
    for name, baseline in BASELINES.items():
        if not on_cpu and installed(MODULES[name.split("-")[0]]):
            holder = nn.Sequential(copy.deepcopy(plain))
            baseline.apply(holder, ["0"])
            size = math.ceil(baseline.bits(holder[0]) * k * n / 8)
            yield Candidate(name, repeat_layer(holder[0], x, count), size)


def _scaled_mm(plain: nn.Linear, x: Tensor, count: int) -> Candidate:
    e4m3 = torch.float8_e4m3fn
    a, b = x.to(e4m3), plain.weight.detach().to(e4m3)
    rows = torch.rand(len(x), 1, device=x.device)
    columns = torch.rand(1, plain.out_features, device=x.device)
    sets = [(a.clone(), b.clone().T, rows, columns) for _ in range(count)]

    def run(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return torch._scaled_mm(a, b, rows, columns, out_dtype=x.dtype)

    # codes and a scale for each row and column given, no bias
    return Candidate("_scaled_mm e4m3", turning([_bound(run, *s) for s in sets]), b.numel())


def repeat_layer(layer: nn.Module, x: Tensor, count: int) -> Callable[[], object]:
    """Runs of ``count`` copies of a layer and its input, one after the other."""
    layers = [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]
    return turning([_bound(each, x.clone()) for each in layers])


def _bound(function: Callable[..., object], *given: Any) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return function(*given)

    return call


# -------------------------------------------------------------------------------------- models


Given = dict[str, Any]


def flux(device: torch.device, quick: bool) -> tuple[nn.Module, Given, int]:
    """Blocks of the shape of FLUX.1, 4096 + 512 tokens: a model, its inputs, the tokens."""
    from diffusers import FluxTransformer2DModel

    small = device.type == "cpu"  # for tests of the path
    width = 2 if small else 24
    with device:
        model: nn.Module = FluxTransformer2DModel(
            num_layers=1 if quick or small else 4,
            num_single_layers=2 if quick or small else 8,
            num_attention_heads=width, attention_head_dim=128, joint_attention_dim=64 * width,
            guidance_embeds=True,
        ).to(torch.bfloat16)  # fmt: skip
        image, text = (16, 8) if small else (4096, 512)
        half: dict[str, Any] = {"dtype": torch.bfloat16}
        given = {
            "hidden_states": torch.randn(1, image, 64, **half),
            "encoder_hidden_states": torch.randn(1, text, 64 * width, **half),
            "pooled_projections": torch.randn(1, 768, **half),
            "timestep": torch.full((1,), 0.5, **half),
            "img_ids": torch.zeros(image, 3),
            "txt_ids": torch.zeros(text, 3),
            "guidance": torch.full((1,), 3.5),
        }
    return model.eval(), given, image + text


def dit(device: torch.device, quick: bool) -> tuple[nn.Module, Given, int]:
    """DiT-XL/2 with 1024 tokens and two images."""
    from diffusers import DiTTransformer2DModel

    small = device.type == "cpu"
    with device:
        model: nn.Module = DiTTransformer2DModel(
            num_attention_heads=2 if small else 16, attention_head_dim=64 if small else 72,
            in_channels=4, out_channels=8, num_layers=2 if small else 7 if quick else 28,
            sample_size=8 if small else 64, patch_size=2, num_embeds_ada_norm=1000,
        ).to(torch.bfloat16)  # fmt: skip
        side = 8 if small else 64
        given = {
            "hidden_states": torch.randn(2, 4, side, side, dtype=torch.bfloat16),
            "timestep": torch.tensor([500, 500]),
            "class_labels": torch.tensor([1, 2]),
        }
    return model.eval(), given, (side // 2) ** 2


def model_race(
    case: str,
    tokens: int,
    model: nn.Module,
    given: Given,
    rounds: int,
    clock: Clock,
    compiled: bool = True,
) -> list[BenchRow]:
    """A step of the float model and of ours, eager and compiled, one after the other.

    Bytes of a row are the most that was allocated during a step on a GPU, else the parameters'.
    """
    makers: dict[str, Callable[[], nn.Module]] = {"bf16": lambda: model}
    for name in OURS:
        makers[name] = lambda name=name: quantized_model(model, name, MODULATION[name])  # type: ignore[misc]
    found = []
    for name, make in makers.items():
        chosen = make()
        size = _footprint(chosen, given)
        found.append(Candidate(name, _step(chosen, given), size))
        if compiled and next(model.parameters()).is_cuda:
            fast: Any = torch.compile(chosen, backend="inductor" if chosen is model else "dtq")
            found.append(Candidate(f"{name} compiled", _step(fast, given), size))
    names = [c.name for c in found if not c.name.startswith("bf16")]
    return race(case, tokens, found, rounds, clock, names)


def _step(model: Callable[..., Any], given: Given) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return model(**given)[0]

    return call


def _footprint(model: nn.Module, given: Given) -> int:
    parameters = sum(p.nbytes for p in model.parameters())
    device = next(model.parameters()).device
    if device.type != "cuda":
        return parameters
    _step(model, given)()  # what is kept from a first run is counted
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _step(model, given)()
    torch.cuda.synchronize(device)
    # the models of the other rows are there too: what this step adds, and its own weights
    return parameters + torch.cuda.max_memory_allocated(device) - before


def bandwidth(device: torch.device, rounds: int, clock: Clock) -> float:
    """Bytes a second of a copy that no cache holds, both ways counted."""
    count = 2**28 if device.type == "cuda" else 2**20
    a, b = (torch.randint(0, 255, (count,), dtype=torch.uint8, device=device) for _ in range(2))
    watch = clock.watch(lambda: b.copy_(a))
    times = sorted(watch() for _ in range(rounds))
    return 2 * count / times[len(times) // 2]
