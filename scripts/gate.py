# SPDX-License-Identifier: Apache-2.0
"""Measure the gate: coverage of its confidence bounds, false alarms, planted regressions.

    python scripts/gate.py                        # everything; prints the numbers of docs/gate.md
    python scripts/gate.py coverage reruns        # some parts
    python scripts/gate.py planted --w4a8 demo-w4a8   # with an existing checkpoint

Exits with 1 if a number is outside the limit that docs/gate.md states.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import dtq
from dtq.evaluate import paired_run, trajectory
from dtq.evaluate.gate.bootstrap import paired
from dtq.evaluate.gate.decision import Outcome, Verdict, decide
from dtq.evaluate.gate.policy import Limit, Policy
from dtq.evaluate.metrics import images
from dtq.evaluate.run_file import JOB, Run, Sample
from dtq.nn.linear import QuantLinear
from dtq.pipelines import prompts
from dtq.pipelines.loading import LoadedModel, load_transformer
from dtq.pipelines.settings import SamplingSettings

HERE = Path(__file__).parent
BAD: list[str] = []
Defect = Callable[[nn.Module, str], AbstractContextManager[str]]
GUIDANCE = 4.0  # of the bundled models

SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda g, n: g.normal(size=n),
    "a tenth much worse": lambda g, n: np.where(g.random(n) < 0.1, g.normal(5, 1, n), g.normal(0, 1, n)) - 0.5,
    "exponential": lambda g, n: g.exponential(size=n) - 1,
    "t, 3 degrees": lambda g, n: g.standard_t(3, n),
    "log-normal, sigma 1 (not promised)": lambda g, n: np.exp(g.normal(size=n)) - np.exp(0.5),
}  # fmt: skip


def expect(good: bool, text: str) -> None:
    """Print a check, and remember it if it failed."""
    print(f"{'ok  ' if good else 'BAD '} {text}", flush=True)
    if not good:
        BAD.append(text)


def coverage(options: argparse.Namespace) -> None:
    """Share of one-sided bounds that are on the right side of the true mean."""
    print(
        "\n| differences | n | upper 95 % | lower 95 % | upper 98.3 % | lower 98.3 % |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, draw in SHAPES.items():
        for n in (16, 32, 64):
            g, hits = np.random.default_rng(n), np.zeros(4)
            for i in range(options.sets):
                p = paired(draw(g, n), floor=1e-3, resamples=1999, seed=i)
                hits += [
                    p.upper(0.05) >= 0,
                    p.lower(0.05) <= 0,
                    p.upper(0.05 / 3) >= 0,
                    p.lower(0.05 / 3) <= 0,
                ]
            shares = hits / options.sets
            print(f"| {name} | {n} | " + " | ".join(f"{s:.3f}" for s in shares) + " |", flush=True)
            if n == 32 and "not promised" not in name:
                expect(min(shares[:2]) >= 0.92, f"{name}, n = 32: {min(shares[:2]):.3f} >= 0.92")


def margin(options: argparse.Namespace) -> None:
    """At the margin itself, a pass and a regression are both errors; alpha is 0.05 for each."""
    policy = Policy(primary=(Limit("error", 1.05),), resamples=1999)
    for shape in ("a tenth much worse", "exponential", "t, 3 degrees"):
        outcomes: Counter[str] = Counter()
        for i in range(options.sets // 2):
            g = np.random.default_rng(i)
            errors = np.exp(g.normal(size=96))
            worse = errors * 1.05 * np.exp(0.05 * SHAPES[shape](g, 96))
            verdict = _in_looks(_random_run(worse), _random_run(errors), policy)
            outcomes[verdict.outcome.word] += 1
        total = sum(outcomes.values())
        print(
            f"true ratio at the margin, {shape}, 3 looks, {total} gates: {dict(outcomes)}",
            flush=True,
        )
        expect(outcomes["pass"] <= 0.08 * total, f"{outcomes['pass']} of {total} pass wrongly")
        expect(outcomes["regression"] <= 0.08 * total, f"{outcomes['regression']} false alarms")


def reruns(options: argparse.Namespace) -> None:
    """200 seeded re-runs of one quantized tiny DiT, with other batch sizes than the baseline."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import tiny

    quick = {"calibration": {"samples": 8, "batch_size": 4, "steps": 8, "num_timestep_bins": 4}}
    pipe = dtq.quantize(tiny.pipeline(), "w4a8", progress=False, **quick)
    reference, candidate = load_transformer(tiny.pipeline()), load_transformer(pipe)
    policy, outcomes, different = Policy.load("default"), Counter[str](), 0
    for seed in range(options.count):
        settings = SamplingSettings(samples=32, steps=4, batch_size=16, seed=seed)
        base = paired_run.compare(paired_run.observe(reference, settings), candidate).run
        other = replace(settings, batch_size=(1, 2, 5)[seed % 3])
        again = paired_run.compare(paired_run.observe(reference, other), candidate).run
        different += again.values != base.values
        outcomes[decide(again, base, policy).outcome.word] += 1
    print(f"tiny DiT, w4a8, 32 prompts, 4 steps, seeds 0..{options.count - 1}, batches of 16, then of 1, 2 or 5: {dict(outcomes)}; "
          f"{different} re-runs with different values")  # fmt: skip
    expect(
        outcomes["pass"] >= 0.99 * options.count,
        f"{outcomes['pass']} of {options.count} re-runs pass",
    )
    expect(different > 0.9 * options.count, "the re-runs are not copies")


def draws(options: argparse.Namespace) -> None:
    """The bundled model twice, with different batch sizes: seeded draws of its prompts."""
    policy, reference, candidate = Policy.load("default"), *_pair(options)
    settings = SamplingSettings(
        samples=64, steps=options.steps, guidance=GUIDANCE, batch_size=8, seed=1000
    )
    base = paired_run.compare(paired_run.observe(reference, settings), candidate).run
    one_by_one = replace(settings, batch_size=1)
    other = paired_run.compare(paired_run.observe(reference, one_by_one), candidate).run
    different = sum(
        other.values["error"][x] != base.values["error"][x] for x in base.values["error"]
    )
    verdicts = [decide(_drawn(other, k), _drawn(base, k), policy) for k in range(options.count)]
    outcomes = Counter(verdict.outcome.word for verdict in verdicts)
    rows = [verdict.rows[0] for verdict in verdicts]
    print(
        f"demo, w4a8, {options.steps} steps, batches of 8 and of 1, {different} of 64 samples with other "
        f"errors, {options.count} draws of 32 prompts: {dict(outcomes)}; mean "
        f"error x {np.exp(min(r.mean for r in rows)):.4f} to "
        f"{np.exp(max(r.mean for r in rows)):.4f}, "
        f"noise x {np.exp(max(r.noise for r in rows)):.5f}"
    )
    expect(outcomes["pass"] >= 0.99 * options.count, f"{outcomes['pass']} of {options.count} pass")
    expect(different > 32, "the re-run is not a copy")


def fresh(options: argparse.Namespace) -> None:
    """The bundled model with other seeds than the baseline, which the gate itself would refuse.

    The errors of one checkpoint then differ from prompt to prompt, while their true mean is the
    same. A regression is a false alarm; inconclusive is correct if the variance is too large.
    """
    policy = replace(Policy.load("default"), secondary=())
    reference, candidate = _pair(options)
    runs = [_errors(reference, candidate, 1000 + i, options.steps) for i in range(options.seeds)]
    logs = [np.log([np.mean(v) for v in each.values["error"].values()]) for each in runs]
    spread = np.std(logs[1] - logs[0], ddof=1)
    outcomes: Counter[str] = Counter()
    for k in range(options.count):
        g = np.random.default_rng(k)
        a, b = g.choice(len(runs), 2, replace=False)
        indices = g.permutation(len(runs[a].samples)).tolist()
        verdict = _in_looks(_picked(runs[b], indices), _picked(runs[a], indices), policy)
        outcomes[verdict.outcome.word] += 1
    print(
        f"{options.model}, w4a8, {options.steps} steps, 96 prompts, {len(runs)} seeds, "
        f"{options.count} draws of two of them and of the prompts' order: {dict(outcomes)}; standard deviation of ln(error "
        f"ratio) {spread:.3f}"
    )
    expect(outcomes["regression"] <= 0.05 * options.count, f"{outcomes['regression']} false alarms")


def planted(options: argparse.Namespace) -> None:
    """Defects of the bundled model, each compared with the unchanged one, with the default policy."""
    policy, reference, candidate = Policy.load("default"), *_pair(options)
    started = time.process_time()
    settings = SamplingSettings(
        samples=32, steps=options.steps, guidance=GUIDANCE, batch_size=8, seed=1000
    )
    job = paired_run.observe(reference, settings)
    base = paired_run.compare(job, candidate).run
    print(
        "\n| planted | verdict | error | quarters | color | PSNR lost, dB |\n| --- | --- | --- | --- | ---: | ---: |"
    )

    def gated(
        name: str,
        changed: LoadedModel,
        against: Run = base,
        allowed: tuple[Outcome, ...] = (Outcome.REGRESSION,),
    ) -> Run:
        run = paired_run.compare(job, changed).run
        verdict = decide(run, against, policy)
        cells = [r.metric.shown(r.mean) for r in verdict.rows]
        color, psnr = (cells[[r.name for r in verdict.rows].index(x)] for x in ("color", "psnr"))
        quarters = " ".join(cells[1:5])
        print(
            f"| {name} | {verdict.outcome.word} | {cells[0]} | {quarters} | {color} | {psnr} |",
            flush=True,
        )
        expect(verdict.outcome in allowed, f"{name}: {verdict.outcome.word}")
        return run

    unchanged = gated("nothing", candidate, allowed=(Outcome.PASS,))
    plants = PLANTS[options.model]
    for defect, at in plants.harmful:
        with defect(candidate.model, at) as name:
            gated(name, candidate)
    for defect, at in plants.mild:
        with defect(candidate.model, at) as name:
            gated(name, candidate, allowed=(Outcome.PASS, Outcome.INCONCLUSIVE))
    gated(
        "recipe rtn-w4a8 in place of w4a8",
        load_transformer(dtq.quantize(options.model, "rtn-w4a8", progress=False)),
    )
    per_timestep = dtq.quantize(options.model, "w4a8", activations="int8-static-timestep", transform_candidates=[], progress=False,
                           calibration={"samples": 16, "steps": 10, "guidance": GUIDANCE})  # fmt: skip
    static = load_transformer(per_timestep)
    unharmed = paired_run.compare(job, static).run
    with step_bin(static.model, plants.last_bin) as name:
        gated(name, static, unharmed)
    removed = copy.deepcopy(unchanged)
    del removed.values["psnr"]
    expect(decide(removed, base, policy).outcome is Outcome.INVALID, "a metric removed: invalid")
    removed = copy.deepcopy(unchanged)
    del removed.values["error"]["0007"]
    expect(
        decide(removed, base, policy).outcome is Outcome.INVALID,
        "a sample's value removed: invalid",
    )
    removed = copy.deepcopy(unchanged)
    removed.samples.pop()
    expect(decide(removed, base, policy).outcome is Outcome.INVALID, "a sample removed: invalid")
    few = decide(_head(unchanged, 16), base, policy).outcome
    expect(few is Outcome.INCONCLUSIVE, f"16 prompts: {few.word}")
    print(f"{time.process_time() - started:.0f} s of one core")


@contextmanager
def scaled(model: nn.Module, at: str) -> Iterator[str]:
    layer = _layer(model, at)
    before = layer._parameters["weight_scale"].data.clone()
    layer.packed_tensor("weight_scale").mul_(1.5)
    yield f"scale of {at} x 1.5"
    layer._parameters["weight_scale"].data.copy_(before)


@contextmanager
def swapped(model: nn.Module, at: str) -> Iterator[str]:
    layer = _layer(model, at)
    _swap(layer)
    yield f"outputs 0 and 1 of {at} swapped"
    _swap(layer)


@contextmanager
def without_bias(model: nn.Module, at: str) -> Iterator[str]:
    layer = _layer(model, at)
    before = layer.bias.data.clone()
    layer.bias.data.zero_()
    yield f"bias of {at} dropped"
    layer.bias.data.copy_(before)


@contextmanager
def less_color(model: nn.Module, at: str) -> Iterator[str]:
    """The images that are sampled lose a tenth of their saturation; the model is as it was."""
    with mock.patch.object(trajectory, "shown", lambda result: _gray(images.shown(result))):
        yield "images lose a tenth of their saturation"


def _gray(batch: Tensor) -> Tensor:
    return batch.lerp(batch.mean(-3, keepdim=True), 0.1)


@contextmanager
def step_bin(model: nn.Module, index: int) -> Iterator[str]:
    """Halve the activation scale of one timestep bin in every layer."""
    layers = [
        m
        for m in model.modules()
        if isinstance(m, QuantLinear) and m.problem.activation_format.per_timestep
    ]
    for layer in layers:
        layer.packed_tensor("input_scale").reshape(-1)[index] *= 0.5
    yield f"int8-static-timestep: scales of bin {index + 1} of 8, the least noisy first, x 0.5"
    for layer in layers:
        layer.packed_tensor("input_scale").reshape(-1)[index] *= 2


@dataclass(frozen=True)
class Plants:
    """Defects to plant in a bundled model, each with the layer to plant it in.

    Attributes:
        harmful: the gate must report a regression.
        mild: the harm is less than the margin; a regression would be a false alarm.
        last_bin: timestep bin of the last sampler step.
    """

    harmful: tuple[tuple[Defect, str], ...]
    mild: tuple[tuple[Defect, str], ...]
    last_bin: int


PLANTS = {
    "demo": Plants(
        harmful=(
            (scaled, "transformer_blocks.4.ff.net.2"),
            (swapped, "transformer_blocks.4.ff.net.2"),
            (swapped, "transformer_blocks.4.attn1.to_v"),
            (without_bias, "transformer_blocks.7.ff.net.2"),
            (less_color, ""),
        ),
        mild=(),
        last_bin=0,  # of 8 steps
    ),
    "demo-video": Plants(
        harmful=(
            (scaled, "transformer_blocks.3.ff.net.2"),
            (swapped, "transformer_blocks.3.ff.net.2"),
            (swapped, "temporal_transformer_blocks.3.ff.net.2"),
            (without_bias, "transformer_blocks.5.ff.net.0.proj"),
            (less_color, ""),
        ),
        mild=(
            (swapped, "temporal_transformer_blocks.3.attn1.to_v"),
            (without_bias, "temporal_transformer_blocks.5.ff.net.2"),
        ),
        last_bin=1,  # of 4 steps
    ),
}


def _layer(model: nn.Module, at: str) -> QuantLinear:
    layer = model.get_submodule(at)
    assert isinstance(layer, QuantLinear), at
    return layer


def _swap(layer: QuantLinear) -> None:
    for name, spec in layer.tensor_specs().items():
        if spec.shape and spec.shape[0] == layer.out_features:
            data = layer._parameters[name].data
            data[[0, 1]] = data[[1, 0]].clone()


def _errors(reference: LoadedModel, candidate: LoadedModel, seed: int, steps: int) -> Run:
    """A run with only the teacher-forced errors of 96 prompts."""
    settings = SamplingSettings(samples=96, steps=steps, guidance=GUIDANCE, batch_size=8, seed=seed)
    requests = prompts.load("auto", reference.pipeline, 96, nested=True)
    truth = trajectory.record(reference.pipeline, reference.model, requests, settings)
    outputs = trajectory.replayed(truth, candidate.model)
    floats = truth.by_sample([call.output for call in truth.calls])
    return _random_run(np.array(trajectory.sample_errors(truth.by_sample(outputs), floats)))


def _pair(options: argparse.Namespace) -> tuple[LoadedModel, LoadedModel]:
    """The bundled model, and the same model quantized with ``w4a8``."""
    quantized = options.w4a8 or dtq.quantize(options.model, "w4a8", progress=False)
    return load_transformer(options.model), load_transformer(quantized)


def _in_looks(whole: Run, base: Run, policy: Policy) -> Verdict:
    """The verdict at the first look that decides, as when samples are added until the gate decides."""
    for count in policy.looks:
        verdict = decide(_head(whole, count), _head(base, count), policy)
        if verdict.outcome is not Outcome.INCONCLUSIVE:
            break
    return verdict


def _head(whole: Run, count: int) -> Run:
    return _picked(whole, list(range(count)))


def _drawn(whole: Run, seed: int) -> Run:
    g = np.random.default_rng(seed)
    return _picked(whole, g.permutation(len(whole.samples))[:32].tolist())


def _picked(whole: Run, indices: list[int]) -> Run:
    samples = [whole.samples[i] for i in indices]
    tables = (
        {m: {s.id: table[s.id] for s in samples} for m, table in part.items()}
        for part in (whole.values, whole.rerun)
    )
    values, rerun = tables
    conditions = {**whole.conditions, "samples": len(samples)}
    return replace(whole, samples=samples, values=values, rerun=rerun, conditions=conditions)


def _random_run(errors: np.ndarray) -> Run:
    ids = [f"{i:04d}" for i in range(len(errors))]
    rows = errors.reshape(len(errors), -1).tolist()
    values = {"error": dict(zip(ids, rows, strict=True))}
    conditions = dict.fromkeys((*JOB, "hardware", "torch"), "simulated")
    samples = [Sample(x, x, 0) for x in ids]
    return Run(
        "c", "r", {**conditions, "samples": len(ids)}, {"reference": "r"}, samples, values, values
    )


PARTS = {
    "coverage": coverage,
    "margin": margin,
    "reruns": reruns,
    "draws": draws,
    "fresh": fresh,
    "planted": planted,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument(
        "--sets", type=int, default=2000, help="number of simulated sets of differences"
    )
    parser.add_argument("--count", type=int, default=200, help="re-runs of an unchanged checkpoint")
    parser.add_argument("--seeds", type=int, default=4, help="number of seeds, for fresh")
    parser.add_argument("--steps", type=int, default=8, help="sampler steps of the bundled model")
    parser.add_argument(
        "--model", choices=PLANTS, default="demo", help="for fresh and planted; draws needs demo"
    )
    parser.add_argument("--w4a8", help="its checkpoint with recipe w4a8; default: quantize it")
    options = parser.parse_args()
    if options.model != "demo" and "draws" in (options.parts or PARTS):
        parser.error("draws: only demo prepares a single prompt in the same way as several")
    torch.set_num_threads(1)
    for name in options.parts or PARTS:
        PARTS[name](options)
    sys.exit(bool(BAD))


if __name__ == "__main__":
    main()
