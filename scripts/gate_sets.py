# SPDX-License-Identifier: Apache-2.0
"""Measure the set metrics of the gate on images of a bundled model: coverage, repeats, power.

    python scripts/gate_sets.py pools -o pools         # samples the models; once, the longest part
    python scripts/gate_sets.py coverage repeats values verdicts power -o pools
    python scripts/gate_sets.py samples --run RUN --baseline BASELINE

``pools`` keeps the features of ``--images`` images of the float model, of ``w4a8``, of both again
with another batch size, and of ``w4a8`` with each planted defect. The other parts draw sets of
images from the pools with replacement, so a pool is the population, and its own value is the truth.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dtq
from dtq.evaluate import run_file
from dtq.evaluate.gate.bootstrap import paired
from dtq.evaluate.gate.metrics import METRICS
from dtq.evaluate.gate.policy import Policy
from dtq.evaluate.gate.set_metrics import SET_METRICS, blocks_of, pseudo_values
from dtq.evaluate.metrics import extractors
from dtq.evaluate.metrics.images import as_bytes, shown
from dtq.evaluate.metrics.mmd import cubic_kernel, gaussian_kernel
from dtq.evaluate.run_file import mean_of
from dtq.pipelines import prompts
from dtq.pipelines.loading import load_transformer
from dtq.pipelines.sampling import run_pipeline
from dtq.pipelines.settings import SamplingSettings

GUIDANCE = 4.0
ALPHA = 0.05
RESAMPLES = 1999
SHOWN = ("fid", "kid", "cmmd", "sfid", "is", "precision", "recall")
BAD: list[str] = []


def expect(good: bool, text: str) -> None:
    """Print a check, and remember it if it failed."""
    print(f"{'ok  ' if good else 'BAD '} {text}", flush=True)
    if not good:
        BAD.append(text)


@contextmanager
def nothing(pipe: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """The model as it is."""
    yield lambda images: images


@contextmanager
def less_color(pipe: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Images lose a tenth of their saturation after sampling."""
    yield lambda images: images.lerp(images.mean(1, keepdim=True), 0.1)


@contextmanager
def no_label(pipe: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """The label is ignored in the second half of the steps."""
    model: nn.Module = pipe.transformer

    def forget(_m: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        late = float(torch.as_tensor(kwargs["timestep"]).reshape(-1)[0]) < 500
        labels = kwargs["class_labels"]
        return args, kwargs | ({"class_labels": torch.zeros_like(labels)} if late else {})

    handle = model.register_forward_pre_hook(forget, with_kwargs=True)
    yield lambda images: images
    handle.remove()


@contextmanager
def wrong_label(pipe: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """One label in ten is replaced by the next one."""
    model: nn.Module = pipe.transformer

    def replace(_m: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        labels = kwargs["class_labels"]
        return args, kwargs | {"class_labels": torch.where(labels % 10 == 5, labels + 1, labels)}

    handle = model.register_forward_pre_hook(replace, with_kwargs=True)
    yield lambda images: images
    handle.remove()


DEFECTS = {"less color": less_color, "label ignored late": no_label, "wrong labels": wrong_label}


def pools(options: argparse.Namespace) -> None:
    """Sample every pool that is not there yet."""
    extractor = extractors.load("emoji")
    quantized = options.w4a8 or dtq.quantize("demo", "w4a8", progress=False)
    models = {
        "float": load_transformer("demo"),
        "w4a8": load_transformer(quantized),
        "rtn-w4a8": load_transformer(dtq.quantize("demo", "rtn-w4a8", progress=False)),
    }
    jobs: list[tuple[str, str, Any, int]] = [
        (name, name, nothing, options.batch) for name in models
    ]
    jobs += [(f"{name} again", name, nothing, options.batch + 3) for name in ("float", "w4a8")]
    jobs += [(name, "w4a8", defect, options.batch) for name, defect in DEFECTS.items()]
    for name, model, defect, batch in jobs:
        file = options.output / f"{name}.safetensors"
        if file.exists():
            continue
        started = time.process_time()
        pipe = models[model].pipeline
        settings = SamplingSettings(
            samples=options.images, steps=options.steps, guidance=GUIDANCE, batch_size=batch,
            seed=5000,
        )  # fmt: skip
        requests = prompts.load("auto", pipe, options.images, nested=True)
        parts = []
        with torch.no_grad(), defect(pipe) as change:
            for result in run_pipeline(pipe, requests, settings):
                images = as_bytes(change(shown(result))).float() / 255
                parts.append(extractor(images))
        options.output.mkdir(parents=True, exist_ok=True)
        save_file({k: torch.cat([p[k] for p in parts]) for k in parts[0]}, file)
        print(f"{name}: {options.images} images, {time.process_time() - started:.0f} s", flush=True)


Pool = dict[str, Tensor]


def pool(options: argparse.Namespace, name: str) -> Pool:
    """Features by kind (N, D); an error names the missing part."""
    file = options.output / f"{name}.safetensors"
    if not file.exists():
        sys.exit(f"{file}: missing; run the part pools first")
    return load_file(file)


def differences(
    metric: str, run: tuple[Pool, Pool], base: tuple[Pool, Pool], indices: Tensor
) -> Tensor:
    """Differences by block, positive is worse, of a set of images.

    Args:
        metric: name in ``SET_METRICS``.
        run: pools of the candidate and of its float model.
        base: the same of the baseline.
        indices: of the images of the set.
    """
    row = SET_METRICS[metric]
    blocks = list(blocks_of([str(i) for i in range(len(indices))]).values())
    mine, theirs = (
        pseudo_values(row, candidate[row.kind][indices], floats[row.kind][indices], blocks).tolist()
        for candidate, floats in (run, base)
    )
    return torch.tensor([METRICS[metric].worse(a, b) for a, b in zip(mine, theirs, strict=True)])


def population(metric: str, run: tuple[Pool, Pool], base: tuple[Pool, Pool]) -> float:
    """The difference of whole pools, which draws with replacement estimate."""
    row = SET_METRICS[metric]

    def value(candidate: Tensor, floats: Tensor) -> float:
        x, y = candidate.double(), floats.double()
        if metric in ("kid", "cmmd"):  # two draws may be the same image, so the diagonal counts
            kernel, scale = {"kid": (cubic_kernel, 1), "cmmd": (gaussian_kernel, 1000)}[metric]
            same = kernel(x, x).mean() + kernel(y, y).mean()
            return float(scale * (same - 2 * kernel(x, y).mean()))
        return row.value(candidate, floats)

    mine, theirs = (value(*(side[row.kind] for side in pair)) for pair in (run, base))
    return METRICS[metric].worse(mine, theirs)


def coverage(options: argparse.Namespace) -> None:
    """Share of one-sided 95 % bounds on the right side of the pool's own difference."""
    floats = pool(options, "float")
    base = pool(options, "w4a8"), floats
    print(
        "\n| metric | run against w4a8 | images | true | upper | lower |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name in options.runs:
        run = pool(options, name), floats
        for metric in options.metrics:
            true = population(metric, run, base)
            hits = torch.zeros(2)
            for draw in range(options.draws):
                g = torch.Generator().manual_seed(draw)
                indices = torch.randint(options.images, (options.size,), generator=g)
                d = differences(metric, run, base, indices).numpy()
                p = paired(d, floor=1e-9 + abs(true) / 1000, resamples=RESAMPLES, seed=draw)
                hits += torch.tensor([p.upper(ALPHA) >= true, p.lower(ALPHA) <= true])
            upper, lower = (hits / options.draws).tolist()
            print(
                f"| {metric} | {name} | {options.size} | {true:.4g} | {upper:.3f} | {lower:.3f} |",
                flush=True,
            )
            if metric in ("fid", "kid", "cmmd"):
                least = min(upper, lower)
                expect(least >= 0.92, f"{metric}, {name}: {least:.3f} >= 0.92")


def values(options: argparse.Namespace) -> None:
    """Mean and bounds of each metric and pool against w4a8, by number of images."""
    floats = pool(options, "float")
    base = pool(options, "w4a8"), floats
    again = pool(options, "w4a8 again"), pool(options, "float again")
    runs = {"again": again} | {
        name: (pool(options, name), floats) for name in ("rtn-w4a8", *DEFECTS)
    }
    print(
        "\n| metric | run | images | mean | lower | upper |\n| --- | --- | --- | --- | --- | --- |"
    )
    for metric in SHOWN:
        for name, run in runs.items():
            for size in (64, 256, options.images):
                d = differences(metric, run, base, torch.arange(size)).numpy()
                p = paired(d, floor=1e-12, resamples=RESAMPLES)
                print(
                    f"| {metric} | {name} | {size} | {p.mean:.4g} | {p.lower(ALPHA):.4g} | {p.upper(ALPHA):.4g} |",
                    flush=True,
                )


def repeats(options: argparse.Namespace) -> None:
    """An unchanged checkpoint with another batch size: draws of images, the bundled policy."""
    floats = pool(options, "float")
    base = pool(options, "w4a8"), floats
    again = pool(options, "w4a8 again"), pool(options, "float again")
    policy = Policy.load("bundled")
    limits = [x for x in (*policy.primary, *policy.secondary) if METRICS[x.metric].of_sets]
    alpha = policy.alpha / len(policy.looks) / len(policy.primary)
    for limit in limits:
        passes, most = 0, 0.0
        for draw in range(options.draws):
            g = torch.Generator().manual_seed(draw)
            indices = torch.randperm(options.images, generator=g)[: limit.num_images]
            d = differences(limit.metric, again, base, indices).numpy()
            p = paired(d, floor=limit.margin / 100, resamples=RESAMPLES, seed=draw)
            passes += p.p_below(limit.margin) <= alpha
            most = max(most, abs(p.mean))
        print(f"{limit.metric}, margin {limit.margin}, {limit.num_images} images: {passes} of {options.draws} "
              f"draws pass, largest difference {most:.2g}", flush=True)  # fmt: skip
        expect(passes >= 0.98 * options.draws, f"{limit.metric}: {passes} of {options.draws} pass")


def power(options: argparse.Namespace) -> None:
    """How often a share of images with wrong content is a regression, by number of images.

    That share of the images of w4a8 is replaced by those of the same seeds whose label was ignored
    in the second half of the steps. The margins are those of the policy ``bundled``.
    """
    floats = pool(options, "float")
    good, bad = pool(options, "w4a8"), pool(options, "label ignored late")
    policy = Policy.load("bundled")
    limits = [x for x in (*policy.primary, *policy.secondary) if x.metric in ("fid", "kid")]
    alpha = policy.alpha / len(policy.looks)
    print(
        "\n| metric | margin | wrong images | 64 | 256 | 1024 |\n| --- | --- | --- | --- | --- | --- |"
    )
    for limit in limits:
        for share in (0.02, 0.05, 0.1, 0.2):
            cells = []
            for size in (64, 256, 1024):
                caught = 0
                for draw in range(options.draws // 4):
                    g = torch.Generator().manual_seed(draw)
                    indices = torch.randint(options.images, (size,), generator=g)
                    wrong = torch.rand(size, generator=g) < share
                    kind = SET_METRICS[limit.metric].kind
                    mixed = torch.where(wrong[:, None], bad[kind][indices], good[kind][indices])
                    sides = [({kind: t}, {kind: floats[kind][indices]})
                             for t in (mixed, good[kind][indices])]  # fmt: skip
                    d = differences(limit.metric, *sides, torch.arange(size)).numpy()
                    p = paired(d, floor=limit.margin / 100, resamples=RESAMPLES, seed=draw)
                    caught += p.p_above(limit.margin) <= alpha
                cells.append(f"{caught / (options.draws // 4):.2f}")
            print(
                f"| {limit.metric} | {limit.margin} | {share:.0%} | {' | '.join(cells)} |",
                flush=True,
            )


def samples(options: argparse.Namespace) -> None:
    """How often a loss of the metrics of samples is a regression, by number of prompts.

    The differences by prompt are those of two run files of one job, two checkpoints of one recipe;
    their mean is moved to the loss. The margins are those of the policy ``bundled``.
    """
    run, base = run_file.read(options.run), run_file.read(options.baseline)
    policy = Policy.load("bundled")
    limits = {x.metric: x for x in (*policy.secondary, *policy.primary) if x.parts == 1}
    alpha = policy.alpha / len(policy.looks)
    print("\n| metric | margin | loss | 32 | 64 | 96 |\n| --- | --- | --- | --- | --- | --- |")
    for name, losses in (("error", (0.02, 0.05, 0.1, 0.2)), ("psnr", (0.25, 0.5, 1.0, 2.0))):
        metric, margin = METRICS[name], METRICS[name].to_difference(limits[name].margin)
        pairs = [(run.values[name][s.id], base.values[name][s.id]) for s in base.samples]
        d = np.array([metric.worse(mean_of(a), mean_of(b)) for a, b in pairs])
        for loss in losses:
            true = np.log1p(loss) if metric.ratio else loss
            cells = []
            for n in (32, 64, 96):
                g, caught = np.random.default_rng(0), 0
                for draw in range(options.draws):
                    drawn = g.choice(d - d.mean(), n) + true
                    p = paired(drawn, floor=margin / 100, resamples=RESAMPLES, seed=draw)
                    caught += p.p_above(margin) <= alpha
                cells.append(f"{caught / options.draws:.2f}")
            shown = f"{loss:.0%}" if metric.ratio else f"{loss} dB"
            print(f"| {name} | {limits[name].margin} | {shown} | {' | '.join(cells)} |", flush=True)


def verdicts(options: argparse.Namespace) -> None:
    """Whether each pool is a regression in KID at the level of the policy ``bundled``, by set."""
    policy = Policy.load("bundled")
    (limit,) = [x for x in policy.primary if METRICS[x.metric].of_sets]
    alpha = policy.alpha / len(policy.looks) / sum(x.parts for x in policy.primary)
    floats, base = pool(options, "float"), (pool(options, "w4a8"), pool(options, "float"))
    runs = {name: (pool(options, name), floats) for name in ("rtn-w4a8", *DEFECTS)}
    runs["w4a8 again"] = pool(options, "w4a8 again"), pool(options, "float again")
    for name, run in runs.items():
        found: Counter[str] = Counter()
        for indices in torch.arange(options.images).split(limit.num_images):
            d = differences(limit.metric, run, base, indices).numpy()
            p = paired(d, floor=limit.margin / 100, resamples=policy.resamples)
            worse, good = p.p_above(limit.margin) <= alpha, p.p_below(limit.margin) <= alpha
            found["regression" if worse else "pass" if good else "inconclusive"] += 1
        print(f"{limit.metric} {limit.margin}, {name}: {dict(found)}", flush=True)


PARTS = {
    "pools": pools,
    "coverage": coverage,
    "repeats": repeats,
    "values": values,
    "verdicts": verdicts,
    "power": power,
    "samples": samples,
}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "parts", nargs="*", default=["pools", "coverage", "values"], choices=list(PARTS)
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("gate-pools"))
    parser.add_argument("--w4a8", default="", help="a checkpoint of demo by w4a8")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=256, help="images of a set")
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--run", help="run file of the part samples")
    parser.add_argument("--baseline", default="gate/demo-w4a8.json", help="of the part samples")
    parser.add_argument("--metrics", nargs="*", default=list(SHOWN), help="of coverage")
    parser.add_argument("--runs", nargs="*", default=["rtn-w4a8", "less color"], help="of coverage")
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    for part in options.parts:
        PARTS[part](options)
    sys.exit(bool(BAD))


if __name__ == "__main__":
    main()
