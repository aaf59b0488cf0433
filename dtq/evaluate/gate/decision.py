# SPDX-License-Identifier: Apache-2.0
"""The gate: a test whether a candidate is worse than a baseline by more than a margin.

Both runs were compared with their float model on the same prompts and seeds. For each metric the
paired differences over prompts give a studentized interval of their mean. An interval below the
margin is a pass, one above it a regression, and one that contains it is neither. There are two
families of claims, "no metric is worse by more than its margin" and "one metric is". Each holds
``alpha`` by Holm's procedure over the primary metrics, and ``alpha / looks`` at each look. The gate
uses the largest look for which the run has enough prompts, with all prompts of that look. Because
alpha is divided over the looks, adding samples and repeating the gate does not raise the error
probability. Runs that cannot be compared are invalid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from dtq.errors import printable
from dtq.evaluate.fingerprint import digest
from dtq.evaluate.gate.bootstrap import holm, paired, samples_needed, sign_test
from dtq.evaluate.gate.metrics import METRICS, Metric
from dtq.evaluate.gate.policy import Limit, Policy
from dtq.evaluate.gate.validity import differences_allowed, flaws, mismatches
from dtq.evaluate.run_file import Run, Sample, mean_of

NOISE_DOMINATED = 4
"""If noise raises a margin to more than this multiple of the policy's, a pass proves nothing."""


class Outcome(IntEnum):
    """Of one metric or of the verdict; the value is the exit code of ``dtq gate``."""

    PASS = 0
    REGRESSION = 1
    INCONCLUSIVE = 2
    INVALID = 3

    @property
    def word(self) -> str:
        """The name in lower case."""
        return self.name.lower()


@dataclass
class MetricVerdict:
    """One metric at the look that decided.

    Margins, noise and bounds are on the scale of the differences, see :meth:`Metric.worse`.

    Attributes:
        name: of the metric and the part of the trajectory: ``error 2/4``.
        metric: the metric.
        primary: whether it decides.
        margin: that was used.
        policy_margin: the margin of the policy; ``margin`` is larger if noise raised it.
        noise: measured by the second run of the float model.
        mean: of the paired differences.
        lower: one-sided lower bound of the mean, at ``alpha``.
        upper: one-sided upper bound.
        p_pass: p-value of a pass, before Holm's procedure.
        p_regression: p-value of a regression, before Holm's procedure.
        p_sign_test: p-value of the sign test, which makes no assumptions.
        worst_tenth: mean of the worst tenth of the prompts.
        differences: by prompt, positive is worse; for a set metric by block of prompts, and none
            if there are too few images.
        outcome: by Holm's procedure over the primary metrics; a secondary metric stands by itself.
    """

    name: str
    metric: Metric
    primary: bool
    margin: float
    policy_margin: float
    noise: float
    mean: float
    lower: float
    upper: float
    p_pass: float
    p_regression: float
    p_sign_test: float
    worst_tenth: float
    differences: dict[str, float]
    outcome: Outcome = Outcome.INCONCLUSIVE

    @property
    def noise_dominated(self) -> bool:
        """Whether noise raised the margin so much that a mean below it is not a pass."""
        return self.margin > NOISE_DOMINATED * self.policy_margin

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = {k: v for k, v in vars(self).items() if k not in ("metric", "outcome")}
        scale = "log ratio" if self.metric.ratio else "difference"
        return {**data, "scale": scale, "outcome": self.outcome.word}


@dataclass
class Verdict:
    """The result of ``dtq gate``.

    Attributes:
        outcome: of the gate.
        sentence: the outcome and its reason in one sentence.
        reasons: why the runs cannot be compared, if the outcome is invalid.
        notes: differences between the runs that do not make them incomparable.
        rows: the metrics.
        prompts: number of prompts of the look.
        look: number of the look, from 1; 0 if there was none.
        alpha: error probability of this look.
        key: checkpoint, recipe, policy and hardware of the run, and their digest.
        policy: every key of the policy.
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
        """Plain data with every paired difference."""
        data = dict(vars(self))
        data["outcome"], data["exit_code"] = self.outcome.word, int(self.outcome)
        data["rows"] = [row.to_json() for row in self.rows]
        return data


def decide(run: Run, baseline: Run, policy: Policy) -> Verdict:
    """Compare a run with a baseline run of the same job."""
    key = key_of(run, policy)
    reasons = mismatches(run, baseline, policy)
    limits = [*policy.primary, *policy.secondary]
    for side, name in ((run, "run"), (baseline, "baseline")):
        reasons += [f"{name}: {reason}" for reason in flaws(side, limits)]
    # they quote files, and files may contain control characters
    notes = differences_allowed(run, baseline, policy)
    reasons, notes = ([printable(line) for line in lines] for lines in (reasons, notes))
    common: dict[str, Any] = {"notes": notes, "key": key, "policy": policy.to_dict()}
    if reasons:
        sentence = f"The runs cannot be compared, for {len(reasons)} reason(s)."
        return Verdict(Outcome.INVALID, sentence, reasons=reasons, **common)
    prompts = list(dict.fromkeys(sample.prompt for sample in _shared(run, baseline)))
    if len(prompts) < policy.looks[0]:
        sentence = (
            f"{len(prompts)} prompts are too few: the policy's first look is at {policy.looks[0]}. "
            f"Run dtq eval with --samples {policy.looks[0]} or more, on a set with as many prompts."
        )
        return Verdict(Outcome.INCONCLUSIVE, sentence, prompts=len(prompts), **common)
    alpha = policy.alpha / len(policy.looks)
    verdict = Verdict(Outcome.INCONCLUSIVE, "", alpha=alpha, **common)
    verdict.look, verdict.prompts = max(
        (number, count) for number, count in enumerate(policy.looks, 1) if count <= len(prompts)
    )
    verdict.rows = compare_metrics(run, baseline, policy, prompts[: verdict.prompts], alpha)
    outcomes = {row.outcome for row in verdict.rows if row.primary}
    if Outcome.REGRESSION in outcomes:
        verdict.outcome = Outcome.REGRESSION
    elif outcomes == {Outcome.PASS}:
        verdict.outcome = Outcome.PASS
    unused = len(prompts) - verdict.prompts
    if unused:
        verdict.notes.append(f"{unused} prompts beyond look {verdict.look} were not used")
    verdict.notes += [
        f"{row.name}: the runs have fewer images than num_images of the policy"
        for row in verdict.rows
        if not row.differences
    ]
    verdict.sentence = _sentence(verdict, policy, len(prompts))
    verdict.notes += [
        f"{row.name}: the margin was raised from {row.metric.shown(row.policy_margin)} to "
        f"{row.metric.shown(row.margin)}, twice the measured noise"
        for row in verdict.rows
        if row.margin > row.policy_margin
    ]
    return verdict


def compare_metrics(
    run: Run, baseline: Run, policy: Policy, prompts: Sequence[str], alpha: float
) -> list[MetricVerdict]:
    """Compare every metric of a policy, with Holm's procedure over the primary metrics.

    Args:
        run: of the candidate.
        baseline: run of the same job.
        policy: metrics and margins.
        prompts: of the look.
        alpha: error probability of the look.
    """
    rows = [
        _compare_metric(run, baseline, policy, limit, part, prompts, alpha)
        for limit in (*policy.primary, *policy.secondary)
        for part in range(limit.parts)
    ]
    primary = sum(limit.parts for limit in policy.primary)
    for row in rows[:primary]:
        row.primary = True
    for family in (rows[:primary], *([row] for row in rows[primary:])):
        worse = holm([row.p_regression for row in family], alpha)
        passes = holm([row.p_pass for row in family], alpha)
        for row, is_worse, is_pass in zip(family, worse, passes, strict=True):
            if is_worse:
                row.outcome = Outcome.REGRESSION
            elif is_pass and not row.noise_dominated:
                row.outcome = Outcome.PASS
    return rows


def key_of(run: Run, policy: Policy) -> dict[str, str]:
    """Checkpoint, recipe, policy and hardware of a verdict or baseline, and their digest."""
    parts = {
        "checkpoint": str(run.identity.get("checkpoint")),
        "recipe": str(run.identity.get("recipe")),
        "policy": policy.key(),
        "hardware": str(run.conditions.get("hardware")),
    }
    return {**parts, "key": digest(parts)}


def noise_of(run: Run, metric: Metric, steps: slice = slice(None)) -> float:
    """Mean change of the value of a sample between the two runs of the float model.

    Args:
        run: with ``values`` and ``rerun``.
        metric: of the values.
        steps: part of the trajectory.
    """
    first, second = run.values[metric.name], run.rerun[metric.name]
    means = ((mean_of(table[s.id], steps) for table in (second, first)) for s in run.samples)
    changes = [abs(metric.worse(*pair)) for pair in means]
    return sum(changes) / len(changes)


def _compare_metric(
    run: Run,
    baseline: Run,
    policy: Policy,
    limit: Limit,
    part: int,
    prompts: Sequence[str],
    alpha: float,
) -> MetricVerdict:
    metric = METRICS[limit.metric]
    if metric.of_sets:
        from dtq.evaluate.gate import set_metrics  # it imports torch

        blocks = set_metrics.differences(run, baseline, limit)
        noise = max(set_metrics.noise_of(side, limit) for side in (run, baseline))
        return _metric_verdict(metric.name, limit, blocks, noise, policy, alpha)
    steps = _steps_of_part(run, limit, part)
    mine, theirs = run.values[metric.name], baseline.values[metric.name]
    by_prompt: dict[str, list[float]] = {prompt: [] for prompt in prompts}
    for sample in _shared(run, baseline):
        if sample.prompt in by_prompt:
            pair = mean_of(mine[sample.id], steps), mean_of(theirs[sample.id], steps)
            by_prompt[sample.prompt].append(metric.worse(*pair))
    differences = {prompt: sum(ds) / len(ds) for prompt, ds in by_prompt.items()}
    noise = max(noise_of(side, metric, steps) for side in (run, baseline))
    name = f"{metric.name} {part + 1}/{limit.parts}" if limit.parts > 1 else metric.name
    return _metric_verdict(name, limit, differences, noise, policy, alpha)


def _metric_verdict(
    name: str,
    limit: Limit,
    differences: dict[str, float],
    noise: float,
    policy: Policy,
    alpha: float,
) -> MetricVerdict:
    """Bounds and p-values of a metric; without differences nothing is certain."""
    metric = METRICS[limit.metric]
    policy_margin = metric.to_difference(limit.margin)
    margin = max(policy_margin, 2 * noise)
    common: dict[str, Any] = {
        "name": name,
        "metric": metric,
        "primary": False,
        "margin": margin,
        "policy_margin": policy_margin,
        "noise": noise,
        "differences": differences,
    }
    if not differences:
        inf = math.inf
        return MetricVerdict(
            **common, mean=math.nan, lower=-inf, upper=inf, p_pass=1.0, p_regression=1.0,
            p_sign_test=1.0, worst_tenth=math.nan,
        )  # fmt: skip
    # a hundredth of the margin does not matter, and equal runs do not divide by zero
    d = list(differences.values())
    bootstrap = paired(d, floor=margin / 100, resamples=policy.resamples, seed=policy.seed)
    tenth = sorted(d, reverse=True)[: math.ceil(len(d) / 10)]
    return MetricVerdict(
        **common,
        mean=bootstrap.mean,
        lower=bootstrap.lower(alpha),
        upper=bootstrap.upper(alpha),
        p_pass=bootstrap.p_below(margin),
        p_regression=bootstrap.p_above(margin),
        p_sign_test=sign_test(d),
        worst_tenth=sum(tenth) / len(tenth),
    )


def _shared(run: Run, baseline: Run) -> list[Sample]:
    """Samples of both runs: the run with more samples begins with those of the other."""
    return run.samples[: len(baseline.samples)]


def _steps_of_part(run: Run, limit: Limit, part: int) -> slice:
    """The steps of one of ``limit.parts`` parts of the trajectory."""
    if limit.parts == 1:
        return slice(None)
    first = run.values[limit.metric][run.samples[0].id]
    assert isinstance(first, list)
    return slice(part * len(first) // limit.parts, (part + 1) * len(first) // limit.parts)


def _sentence(verdict: Verdict, policy: Policy, prompts: int) -> str:
    primary = [row for row in verdict.rows if row.primary]
    where = f"{verdict.prompts} prompts, look {verdict.look} of {len(policy.looks)}"
    if verdict.outcome is Outcome.PASS:
        return f"Not worse than the baseline in any of {len(primary)} primary metrics ({where})."
    if verdict.outcome is Outcome.REGRESSION:
        worse = ", ".join(
            f"{r.name} {r.metric.shown(r.mean)} (margin {r.metric.shown(r.margin)})"
            for r in primary
            if r.outcome is Outcome.REGRESSION
        )
        return f"Worse than the baseline: {worse} ({where})."
    undecided = [row for row in primary if row.outcome is not Outcome.PASS]
    if noisy := [row for row in undecided if row.noise_dominated]:
        changes = ", ".join(f"{r.name} {r.metric.shown(r.noise)}" for r in noisy)
        return (
            f"Inconclusive: a second run of the float model changes {changes}, far above the "
            f"policy's margin ({where}); make the job repeatable, or use a wider margin."
        )
    names = ", ".join(row.name for row in undecided)
    advice = "; ".join(_advice(undecided, policy, verdict.alpha, prompts))
    return f"Inconclusive in {names} ({where}): {advice}."


def _advice(
    rows: Sequence[MetricVerdict], policy: Policy, alpha: float, prompts: int
) -> Iterator[str]:
    """What would decide the undecided primary metrics."""
    if few := {row.name for row in rows if not row.differences}:
        images = max(limit.num_images for limit in policy.primary if limit.metric in few)
        yield f"evaluate both with --num-images {images}"
    if sets := [row.name for row in rows if row.metric.of_sets and row.differences]:
        yield f"raise num_images of {', '.join(sets)} in the policy, and --num-images of dtq eval"
    later = [count for count in policy.looks if count > prompts]
    if of_samples := [row for row in rows if not row.metric.of_sets]:
        if later:
            needed = _needed(of_samples, alpha)
            yield f"evaluate both on at least {later[0]} prompts ({needed})"
        else:
            yield "the policy has no further look; the difference is too close to the margin"


def _needed(rows: Sequence[MetricVerdict], alpha: float) -> str:
    """How many prompts would decide, if the means stay."""
    most = 0
    for row in rows:
        distance = abs(row.margin - row.mean)
        if distance < row.margin / 100:
            return "no number will decide, the mean is at the margin"
        d = list(row.differences.values())
        sigma = math.sqrt(sum((x - row.mean) ** 2 for x in d) / (len(d) - 1))
        most = max(most, samples_needed(sigma, distance, alpha / len(rows)))
    return f"about {most} should decide"
