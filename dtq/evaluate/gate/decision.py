# SPDX-License-Identifier: Apache-2.0
"""The gate: is a candidate no worse than a baseline, by more than a margin, beyond doubt.

Both runs were compared with their float model on the same prompts and seeds. For each metric the
paired differences over prompts give a studentized interval of their mean; below the margin it is
a pass, above it a regression, across it neither. Two families of claims are made, "no metric is
worse by more than its margin" and "one is", each at level ``alpha`` by Holm over the primary
metrics, and at ``alpha / looks`` at each look. A run is judged at the largest look that it reaches,
so no sample of a look is left unread; as every look spends its own share of ``alpha``, adding
samples and judging again is paid for. What cannot be compared is invalid, never absent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from dtq.errors import printable
from dtq.evaluate.fingerprint import digest
from dtq.evaluate.gate.bootstrap import holm, paired, samples_needed, sign_test
from dtq.evaluate.gate.metrics import METRICS, Metric
from dtq.evaluate.gate.policy import Limit, Policy
from dtq.evaluate.run_file import JOB, PLACE, Run, Sample, Value

LARGEST = 1e100
"""No figure is larger; squares of larger ones are beyond the range of numbers."""

NOISE_DOMINATED = 4
"""How far noise may raise a margin, as a multiple of it; beyond, a pass would prove nothing."""


class Outcome(IntEnum):
    """Of a metric or of the whole; the number is the exit code of ``dtq gate``."""

    PASS = 0
    REGRESSION = 1
    INCONCLUSIVE = 2
    INVALID = 3

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass
class MetricVerdict:
    """One metric at the look that decided.

    Attributes:
        name: of the metric, and which part of the trajectory: ``error 2/4``.
        margin: that was used, on the scale of the differences.
        asked: the policy's margin on that scale.
        noise: measured, on that scale.
        mean, lower, upper: of the paired differences; the bounds are one-sided, each at ``alpha``.
        p_pass, p_regression: before Holm.
        sign: p-value of the sign test, which assumes nothing.
        worst: mean of the worst tenth of the prompts.
        differences: by prompt, positive is worse.
        outcome: with Holm over the primary metrics; a secondary one stands alone.
    """

    name: str
    metric: Metric
    primary: bool
    margin: float
    asked: float
    noise: float
    mean: float
    lower: float
    upper: float
    p_pass: float
    p_regression: float
    sign: float
    worst: float
    differences: dict[str, float]
    outcome: Outcome = Outcome.INCONCLUSIVE

    @property
    def noise_dominated(self) -> bool:
        """Whether noise raised the margin so far that staying below it is no pass."""
        return self.margin > NOISE_DOMINATED * self.asked

    def to_json(self) -> dict[str, Any]:
        """Plain data; margins and bounds on the scale of the differences."""
        data = {k: v for k, v in vars(self).items() if k not in ("metric", "outcome")}
        scale = "log ratio" if self.metric.ratio else "difference"
        return {**data, "scale": scale, "outcome": self.outcome.word}


@dataclass
class Verdict:
    """What ``dtq gate`` says.

    Attributes:
        outcome: of the whole.
        sentence: why, in one.
        reasons: what makes it invalid, all of it.
        notes: what differs between the runs without making them incomparable.
        rows: the metrics.
        prompts: that the deciding look used.
        look: which of the policy's looks this is, from 1; 0 for none.
        alpha: that this look spent.
        key: what the verdict belongs to: checkpoint, recipe, policy, hardware.
    """

    outcome: Outcome
    sentence: str
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[MetricVerdict] = field(default_factory=list)
    prompts: int = 0
    look: int = 0
    alpha: float = 0.0
    key: dict[str, str] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, every paired difference included."""
        data = dict(vars(self))
        data["outcome"], data["exit"] = self.outcome.word, int(self.outcome)
        data["rows"] = [row.to_json() for row in self.rows]
        return data


def decide(run: Run, baseline: Run, policy: Policy) -> Verdict:
    """Compare a run with a baseline run of the same job."""
    key = key_of(run, policy)
    reasons = mismatches(run, baseline, policy)
    limits = [*policy.primary, *policy.secondary]
    for side, name in ((run, "run"), (baseline, "baseline")):
        reasons += [f"{name}: {problem}" for problem in flaws(side, limits)]
    # they quote the files, and files may hold anything
    reasons, notes = (
        [printable(x) for x in said] for said in (reasons, _notes(run, baseline, policy))
    )
    common: dict[str, Any] = {"notes": notes, "key": key, "policy": policy.to_dict()}
    if reasons:
        sentence = f"Nothing can be said: {len(reasons)} thing(s) make the runs incomparable."
        return Verdict(Outcome.INVALID, sentence, reasons=reasons, **common)
    prompts = list(dict.fromkeys(sample.prompt for sample in _shared(run, baseline)))
    if len(prompts) < policy.looks[0]:
        sentence = (
            f"{len(prompts)} prompts are too few: the policy's first look is at {policy.looks[0]}. "
            f"Run dtq eval with --samples {policy.looks[0]} or more, on a set with as many prompts."
        )
        return Verdict(Outcome.INCONCLUSIVE, sentence, prompts=len(prompts), **common)
    spent = policy.alpha / len(policy.looks)
    verdict = Verdict(Outcome.INCONCLUSIVE, "", alpha=spent, **common)
    verdict.look, verdict.prompts = max(
        (number, count) for number, count in enumerate(policy.looks, 1) if count <= len(prompts)
    )
    verdict.rows = look(run, baseline, policy, prompts[: verdict.prompts], spent)
    decided = {row.outcome for row in verdict.rows if row.primary}
    if Outcome.REGRESSION in decided:
        verdict.outcome = Outcome.REGRESSION
    elif decided == {Outcome.PASS}:
        verdict.outcome = Outcome.PASS
    if verdict.prompts < len(prompts):
        verdict.notes.append(
            f"{len(prompts) - verdict.prompts} prompts beyond look {verdict.look} were not used"
        )
    verdict.sentence = _sentence(verdict, policy, len(prompts))
    verdict.notes += [
        f"{row.name}: judged at {row.metric.shown(row.margin)}, twice the measured noise, not at "
        f"{row.metric.shown(row.asked)}"
        for row in verdict.rows
        if row.margin > row.asked
    ]
    return verdict


def look(
    run: Run, baseline: Run, policy: Policy, prompts: Sequence[str], alpha: float
) -> list[MetricVerdict]:
    """Every metric on these prompts, Holm over the primary ones."""
    rows = []
    for primary, limits in ((True, policy.primary), (False, policy.secondary)):
        for limit in limits:
            for part in range(limit.parts):
                rows.append(_judged(run, baseline, policy, limit, part, prompts, alpha, primary))
    for group in ([r for r in rows if r.primary], *([r] for r in rows if not r.primary)):
        worse = holm([row.p_regression for row in group], alpha)
        held = holm([row.p_pass for row in group], alpha)
        for row, is_worse, holds in zip(group, worse, held, strict=True):
            row.outcome = (
                Outcome.PASS if holds and not row.noise_dominated else Outcome.INCONCLUSIVE
            )
            row.outcome = Outcome.REGRESSION if is_worse else row.outcome
    return rows


def mismatches(run: Run, baseline: Run, policy: Policy) -> list[str]:
    """Why the two are not the same job, all reasons."""
    found = []
    for name in (*JOB, *policy.match):
        mine, theirs = _condition(run, name), _condition(baseline, name)
        if mine is None or theirs is None:
            side = "run" if mine is None else "baseline"
            found.append(f"{side}: the condition {name} was not recorded")
        elif mine != theirs:
            found.append(f"{name}: {mine!r} in the run, {theirs!r} in the baseline")
    if run.identity.get("reference") != baseline.identity.get("reference"):
        found.append(
            f"the float models differ: {run.identity.get('reference')} in the run, "
            f"{baseline.identity.get('reference')} in the baseline"
        )
    for name in dict.fromkeys(limit.metric for limit in (*policy.primary, *policy.secondary)):
        mine, theirs = (_counts(side.values.get(name, {})) for side in (run, baseline))
        if mine and theirs and mine != theirs:
            found.append(f"{name}: {_all(mine)} steps in the run, {_all(theirs)} in the baseline")
    for ours, other in zip(run.samples, baseline.samples, strict=False):
        if ours != other:
            found.append(
                f"{_sample_name(ours)} in the run is {_sample_name(other)} in the baseline"
            )
    return found


def flaws(run: Run, limits: Sequence[Limit]) -> list[str]:
    """What a run lacks of the metrics of a policy, or has and cannot be used."""
    found = [f"sample {name} failed: {why}" for name, why in run.failures.items()]
    found += [f"{name} was asked for and is missing: {why}" for name, why in run.missing.items()]
    declared = run.conditions.get("samples")
    if declared != len(run.samples):
        found.append(f"{declared} samples were asked for, {len(run.samples)} are listed")
    ids = [sample.id for sample in run.samples]
    if len(set(ids)) != len(ids):
        found.append("sample ids are not unique")
    most: dict[str, int] = {}
    for limit in limits:
        most[limit.metric] = max(limit.parts, most.get(limit.metric, 1))
    for name, parts in most.items():
        for table, what in ((run.values, name), (run.rerun, f"noise of {name}")):
            if name not in table:
                found.append(f"{what} was not measured")
                continue
            found += _value_flaws(table[name], METRICS[name], what, ids, parts)
        counts, noise = (_counts(table.get(name, {})) for table in (run.values, run.rerun))
        if counts and noise and counts != noise:
            found.append(f"{name} has {_all(counts)} steps, its noise {_all(noise)}")
    return found


def key_of(run: Run, policy: Policy) -> dict[str, str]:
    """What a verdict or a baseline belongs to."""
    parts = {
        "checkpoint": str(run.identity.get("checkpoint")),
        "recipe": str(run.identity.get("recipe")),
        "policy": policy.key(),
        "hardware": str(run.conditions.get("hardware")),
    }
    return {**parts, "key": digest(parts)}


def noise_of(run: Run, metric: Metric, steps: slice) -> float:
    """How far a second run of the float model moves a sample's figure, mean over samples."""
    first, second = run.values[metric.name], run.rerun[metric.name]
    moves = [
        abs(metric.worse(_mean(second[s.id], steps), _mean(first[s.id], steps)))
        for s in run.samples
    ]
    return sum(moves) / len(moves)


def _judged(
    run: Run,
    baseline: Run,
    policy: Policy,
    limit: Limit,
    part: int,
    prompts: Sequence[str],
    alpha: float,
    primary: bool,
) -> MetricVerdict:
    metric = METRICS[limit.metric]
    steps = _part(run, limit, part)
    mine, theirs = run.values[metric.name], baseline.values[metric.name]
    apart: dict[str, list[float]] = {prompt: [] for prompt in prompts}
    for sample in _shared(run, baseline):
        if sample.prompt in apart:
            pair = _mean(mine[sample.id], steps), _mean(theirs[sample.id], steps)
            apart[sample.prompt].append(metric.worse(*pair))
    differences = {prompt: sum(ds) / len(ds) for prompt, ds in apart.items()}
    noise = max(noise_of(side, metric, steps) for side in (run, baseline))
    asked = metric.inside(limit.margin)
    margin = max(asked, 2 * noise)
    # a hundredth of the margin is of no interest, and keeps equal runs from dividing by zero
    d = list(differences.values())
    found = paired(d, floor=margin / 100, resamples=policy.resamples, seed=policy.seed)
    tenth = sorted(d, reverse=True)[: math.ceil(len(d) / 10)]
    return MetricVerdict(
        name=f"{metric.name} {part + 1}/{limit.parts}" if limit.parts > 1 else metric.name,
        metric=metric,
        primary=primary,
        margin=margin,
        asked=asked,
        noise=noise,
        mean=found.mean,
        lower=found.lower(alpha),
        upper=found.upper(alpha),
        p_pass=found.p_below(margin),
        p_regression=found.p_above(margin),
        sign=sign_test(d),
        worst=sum(tenth) / len(tenth),
        differences=differences,
    )


def _shared(run: Run, baseline: Run) -> list[Sample]:
    """Samples that both have: the one with more begins with those of the other."""
    return run.samples[: len(baseline.samples)]


def _part(run: Run, limit: Limit, part: int) -> slice:
    """Which steps one of ``limit.parts`` parts of the trajectory is."""
    if limit.parts == 1:
        return slice(None)
    first = run.values[limit.metric][run.samples[0].id]
    assert isinstance(first, list)
    return slice(part * len(first) // limit.parts, (part + 1) * len(first) // limit.parts)


def _mean(value: Value, steps: slice) -> float:
    if not isinstance(value, list):
        return value
    chosen = value[steps]
    return sum(chosen) / len(chosen)


def _value_flaws(
    table: dict[str, Value], metric: Metric, what: str, ids: Sequence[str], parts: int
) -> list[str]:
    found = []
    if missing := [name for name in ids if name not in table]:
        found.append(f"{what} is missing for {_few(missing)}")
    if unknown := sorted(set(table) - set(ids)):
        found.append(f"{what} has values of samples that are not listed: {_few(unknown)}")
    broken, vast = [], []
    for name in ids:
        value = table.get(name, [] if metric.steps else 0.0)
        if name in table and isinstance(value, list) != metric.steps:
            broken.append(name)
            continue
        entries = value if isinstance(value, list) else [value]
        if any(isinstance(x, bool) or not isinstance(x, int | float) for x in entries) or any(
            not math.isfinite(x) for x in entries
        ):
            broken.append(name)
        elif any(abs(x) > LARGEST for x in entries):
            vast.append(name)
    if broken:
        found.append(f"{what} is not a finite number for {_few(broken)}")
    if vast:
        found.append(f"{what} is beyond {LARGEST:g} for {_few(vast)}")
    lengths = _counts(table)
    if metric.steps and (len(lengths) > 1 or min(lengths, default=1) < max(1, parts)):
        found.append(f"{what} has {_all(lengths)} steps, the policy cuts them into {parts} part(s)")
    return found


def _counts(table: dict[str, Value]) -> set[int]:
    """Numbers of steps that the samples of a table have; one where it is as it should be."""
    return {len(value) for value in table.values() if isinstance(value, list)}


def _all(counts: set[int]) -> str:
    return ", ".join(map(str, sorted(counts)))


def _condition(run: Run, name: str) -> Any:
    return run.identity.get("recipe") if name == "recipe" else run.conditions.get(name)


def _notes(run: Run, baseline: Run, policy: Policy) -> list[str]:
    found = []
    for name in PLACE:
        mine, theirs = _condition(run, name), _condition(baseline, name)
        if name not in policy.match and mine != theirs:
            found.append(f"{name}: {mine} in the run, {theirs} in the baseline")
    if len(run.samples) != len(baseline.samples):
        found.append(
            f"{len(run.samples)} samples in the run, {len(baseline.samples)} in the baseline: "
            f"the first {min(len(run.samples), len(baseline.samples))} are compared"
        )
    return found


def _sentence(verdict: Verdict, policy: Policy, prompts: int) -> str:
    chosen = [row for row in verdict.rows if row.primary]
    where = f"{verdict.prompts} prompts, look {verdict.look} of {len(policy.looks)}"
    if verdict.outcome is Outcome.PASS:
        return f"Not worse than the baseline in any of {len(chosen)} primary metrics ({where})."
    if verdict.outcome is Outcome.REGRESSION:
        bad = [row for row in chosen if row.outcome is Outcome.REGRESSION]
        words = ", ".join(
            f"{r.name} {r.metric.shown(r.mean)} (margin {r.metric.shown(r.margin)})" for r in bad
        )
        return f"Worse than the baseline: {words} ({where})."
    open_rows = [row for row in chosen if row.outcome is not Outcome.PASS]
    if loud := [row for row in open_rows if row.noise_dominated]:
        words = ", ".join(f"{r.name} {r.metric.shown(r.noise)}" for r in loud)
        return (
            f"Undecided: a second run of the float model moves {words}, far above the policy's "
            f"margin ({where}); make the job repeatable, or give a wider margin."
        )
    names = ", ".join(row.name for row in open_rows)
    later = [count for count in policy.looks if count > prompts]
    way = (
        f"evaluate both on at least {later[0]} prompts (about {_needed(open_rows, verdict.alpha)})"
        if later
        else "the policy has no further look; the difference is too close to the margin"
    )
    return f"Undecided in {names} ({where}): {way}."


def _needed(rows: Sequence[MetricVerdict], alpha: float) -> str:
    """How many prompts would decide, if the means stay."""
    most = 0
    for row in rows:
        distance = abs(row.margin - row.mean)
        if distance < row.margin / 100:
            return "no number will do, the mean is at the margin"
        d = list(row.differences.values())
        sigma = math.sqrt(sum((x - row.mean) ** 2 for x in d) / (len(d) - 1))
        most = max(most, samples_needed(sigma, distance, alpha / len(rows)))
    return f"{most} should do"


def _sample_name(sample: Sample) -> str:
    return f"sample {sample.id} ({sample.prompt!r}, seed {sample.seed})"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
