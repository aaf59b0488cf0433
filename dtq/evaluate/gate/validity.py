# SPDX-License-Identifier: Apache-2.0
"""Whether two runs can be compared at all: the same job, and every value present and finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dtq.errors import InputError
from dtq.evaluate.gate.metrics import METRICS, Metric
from dtq.evaluate.gate.policy import Limit, Policy
from dtq.evaluate.run_file import JOB, MATCHABLE, Run, Sample, Value
from dtq.io.safe_parse import is_finite_numbers

LARGEST = 1e100
"""Larger values are refused: their squares are outside the range of floats."""


def mismatches(run: Run, baseline: Run, policy: Policy) -> list[str]:
    """All reasons why two runs are not the same job."""
    reasons = []
    for name in (*JOB, *policy.match):
        mine, theirs = _condition(run, name), _condition(baseline, name)
        if mine is None or theirs is None:
            side = "run" if mine is None else "baseline"
            reasons.append(f"{side}: the condition {name} was not recorded")
        elif mine != theirs:
            reasons.append(f"{name}: {_both(repr(mine), repr(theirs))}")
    mine, theirs = (side.identity.get("reference") for side in (run, baseline))
    if mine != theirs:
        reasons.append(f"the float models differ: {_both(mine, theirs)}")
    for name in dict.fromkeys(limit.metric for limit in (*policy.primary, *policy.secondary)):
        mine, theirs = (_step_counts(side.values.get(name, {})) for side in (run, baseline))
        if mine and theirs and mine != theirs:
            reasons.append(f"{name}: {_both(f'{_joined(mine)} steps', _joined(theirs))}")
    limits = (*policy.primary, *policy.secondary)
    of_sets = dict.fromkeys(x.metric for x in limits if METRICS[x.metric].of_sets)
    reasons += _set_mismatches(run, baseline, list(of_sets))
    for own, other in zip(run.samples, baseline.samples, strict=False):
        if own != other:
            reasons.append(f"{_described(own)} in the run is {_described(other)} in the baseline")
    return reasons


def differences_allowed(run: Run, baseline: Run, policy: Policy) -> list[str]:
    """Differences between two runs that do not make them incomparable."""
    notes = []
    for name in MATCHABLE:
        mine, theirs = _condition(run, name), _condition(baseline, name)
        if name not in policy.match and mine != theirs:
            notes.append(f"{name}: {_both(mine, theirs)}")
    if any("vbench" in side.conditions for side in (run, baseline)):
        notes.append("vbench: values were imported; their noise is not known and counts as 0")
    mine, theirs = len(run.samples), len(baseline.samples)
    if mine != theirs:
        first = f"the first {min(mine, theirs)} are compared"
        notes.append(f"{_both(f'{mine} samples', theirs)}: {first}")
    return notes


def flaws(run: Run, limits: Sequence[Limit]) -> list[str]:
    """All reasons why a run cannot be used: failed samples, and missing or unusable values.

    Args:
        run: the run.
        limits: of the policy; the run must have their metrics.
    """
    reasons = [f"sample {name} failed: {reason}" for name, reason in run.failures.items()]
    reasons += [f"{name} was requested and is missing: {why}" for name, why in run.missing.items()]
    requested = run.conditions.get("samples")
    if requested != len(run.samples):
        reasons.append(f"{requested} samples were requested, {len(run.samples)} are listed")
    ids = [sample.id for sample in run.samples]
    if len(set(ids)) != len(ids):
        reasons.append("sample ids are not unique")
    parts_of: dict[str, int] = {}
    reasons += _set_flaws(run, [x for x in limits if METRICS[x.metric].of_sets])
    for limit in limits:
        if METRICS[limit.metric].of_sets:
            continue
        parts_of[limit.metric] = max(limit.parts, parts_of.get(limit.metric, 1))
    for name, parts in parts_of.items():
        for table, label in ((run.values, name), (run.rerun, f"noise of {name}")):
            if name not in table:
                reasons.append(f"{label} was not measured")
                continue
            reasons += _value_flaws(table[name], METRICS[name], label, ids, parts)
        counts, noise = (_step_counts(table.get(name, {})) for table in (run.values, run.rerun))
        if counts and noise and counts != noise:
            reasons.append(f"{name} has {_joined(counts)} steps, its noise {_joined(noise)}")
    return reasons


def _set_flaws(run: Run, limits: Sequence[Limit]) -> list[str]:
    """Reasons why the image sets cannot be used for set metrics."""
    if not limits:
        return []
    from dtq.evaluate.gate import set_metrics  # it imports torch

    try:
        return [reason for limit in limits for reason in set_metrics.flaws(run, limit)]
    except InputError as error:
        return [str(error)]


def _set_mismatches(run: Run, baseline: Run, metrics: Sequence[str]) -> list[str]:
    """Reasons why the image sets of two runs are not those of one job, for some set metrics."""
    mine, theirs = run.image_sets, baseline.image_sets
    if mine is None or theirs is None or not metrics:
        return []  # a flaw of one run
    reasons = []
    if mine.seed != theirs.seed:
        reasons.append(f"image sets: seed {_both(mine.seed, theirs.seed)}")
    for metric in metrics:
        own, other = (side.extractor(metric) for side in (mine, theirs))
        if own != other:
            reasons.append(f"{metric}: features of {_both(own, other)}")
    for i, (own, other) in enumerate(zip(mine.prompts, theirs.prompts, strict=False)):
        if own != other:
            reasons.append(f"image sets: image {i}: {_both(repr(own), repr(other))}")
            break
    return reasons


def _value_flaws(
    table: dict[str, Value], metric: Metric, label: str, ids: Sequence[str], parts: int
) -> list[str]:
    """Reasons why the values of a metric cannot be used; ``parts`` of the trajectory are needed."""
    reasons = []
    if missing := [name for name in ids if name not in table]:
        reasons.append(f"{label} is missing for {_first(missing)}")
    if unknown := sorted(set(table) - set(ids)):
        reasons.append(f"{label} has values of samples that are not listed: {_first(unknown)}")
    broken, too_large = [], []
    for name, value in ((name, table[name]) for name in ids if name in table):
        entries = value if isinstance(value, list) else [value]
        if isinstance(value, list) != metric.steps or not is_finite_numbers(entries):
            broken.append(name)
        elif any(abs(x) > LARGEST for x in entries):
            too_large.append(name)
    if broken:
        reasons.append(f"{label} is not a finite number for {_first(broken)}")
    if too_large:
        reasons.append(f"{label} is beyond {LARGEST:g} for {_first(too_large)}")
    counts = _step_counts(table)
    if metric.steps and (len(counts) > 1 or min(counts, default=1) < max(1, parts)):
        steps = f"{label} has {_joined(counts)} steps"
        reasons.append(f"{steps}, the policy divides them into {parts} part(s)")
    return reasons


def _step_counts(table: dict[str, Value]) -> set[int]:
    """Numbers of steps of the samples; a valid table has one."""
    return {len(value) for value in table.values() if isinstance(value, list)}


def _condition(run: Run, name: str) -> Any:
    if name == "engine":
        return run.conditions.get(name, "dtq")
    return run.identity.get("recipe") if name == "recipe" else run.conditions.get(name)


def _both(mine: object, theirs: object) -> str:
    return f"{mine} in the run, {theirs} in the baseline"


def _joined(counts: set[int]) -> str:
    return ", ".join(map(str, sorted(counts)))


def _described(sample: Sample) -> str:
    return f"sample {sample.id} ({sample.prompt!r}, seed {sample.seed})"


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
