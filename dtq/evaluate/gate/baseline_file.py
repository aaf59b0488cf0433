# SPDX-License-Identifier: Apache-2.0
"""Baseline files: an accepted run, and the history of who accepted which run and why."""

from __future__ import annotations

import getpass
import os
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dtq.errors import InputError
from dtq.evaluate import feature_file, run_file
from dtq.evaluate.gate.decision import decide, key_of
from dtq.evaluate.gate.metrics import METRICS
from dtq.evaluate.gate.policy import Policy
from dtq.evaluate.gate.validity import flaws
from dtq.evaluate.run_file import Run
from dtq.io import schema
from dtq.io.atomic import atomic_write
from dtq.io.safe_parse import is_finite_numbers, read_json

_FEATURES = ".features.safetensors"


def accept(run: Run, file: Path, reason: str, policy: Policy, who: str = "") -> dict[str, Any]:
    """Write a run as the baseline file, atomically, and append to the file's history.

    Args:
        run: later runs are compared with it.
        file: the baseline file.
        reason: for readers of the history.
        policy: the run must have all of its metrics.
        who: name in the history; default: the user's.

    Returns:
        The new entry of the history.

    Raises:
        InputError: no reason, a run that the gate could not use, or the file exists and is not a
            baseline.
    """
    if not reason.strip():
        raise InputError("a baseline needs a reason: --reason 'GPTQ damping is 0.02 now'")
    problems = flaws(run, [*policy.primary, *policy.secondary])
    if (prompts := len({sample.prompt for sample in run.samples})) < policy.looks[0]:
        problems.append(f"{prompts} prompts; the policy's first look is at {policy.looks[0]}")
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise InputError(f"this run cannot be a baseline:\n{lines}")
    old = _read(file)
    entry: dict[str, Any] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "who": who or _user(),
        "why": reason.strip(),
        **key_of(run, policy),
        "candidate": run.candidate,
        "dtq": run.conditions.get("dtq"),
        "means": _means(run),
    }
    if old is not None:
        verdict = decide(run, run_file.read(file), policy)
        entry["against_the_last"] = {"verdict": verdict.outcome.word, "because": verdict.sentence}
    history = [*(old or {}).get("history", []), entry]
    run = _with_features(run, file, policy)
    atomic_write(file, run_file.text({**run.to_json(), "history": history}))
    last = None if old is None else run_file.parse(old, str(file)).image_sets
    kept = None if run.image_sets is None else run.image_sets.file
    # a copy of another baseline names the features of that one
    ours = re.compile(rf"{re.escape(file.stem)}\.[0-9a-f]{{12}}{re.escape(_FEATURES)}")
    if last is not None and last.file != kept and ours.fullmatch(last.file):
        (file.parent / last.file).unlink(missing_ok=True)
    return entry


def _with_features(run: Run, file: Path, policy: Policy) -> Run:
    """The run with the features that the policy needs in a file next to the baseline."""
    limits = [x for x in (*policy.primary, *policy.secondary) if METRICS[x.metric].of_sets]
    if not limits or run.image_sets is None:
        return replace(run, image_sets=None)
    from dtq.evaluate.gate.set_metrics import feature_name

    names = {feature_name(run, x, s) for x in limits for s in ("candidate", "float", "rerun")}
    features = {name: run.features[name] for name in sorted(names)}
    name = f"{file.stem}.{{digest}}{_FEATURES}"
    return replace(run, image_sets=feature_file.write(features, file.parent, run.image_sets, name))


def history(file: Path) -> list[dict[str, Any]]:
    """Entries of a baseline file, oldest first.

    Raises:
        InputError: no such file, or not a baseline.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such baseline; dtq gate accept writes one")
    entries: list[dict[str, Any]] = (_read(file) or {})["history"]
    return entries


@dataclass(frozen=True)
class _Comparison:
    verdict: str


@dataclass(frozen=True)
class _Entry:
    """The text that ``dtq gate log`` shows of an entry."""

    when: str
    who: str
    why: str
    recipe: str
    checkpoint: str
    against_the_last: _Comparison = _Comparison("")


@dataclass(frozen=True)
class _Baseline:
    history: tuple[_Entry, ...]


def _read(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    data = read_json(file, infinite=False)
    schema.parse(_Baseline, data, f"{file} is not a dtq baseline; pass another --baseline")
    return data


def _means(run: Run) -> dict[str, float | None]:
    """Mean of each metric over samples and steps."""
    means: dict[str, float | None] = {}
    for metric, table in run.values.items():
        flat = [x for v in table.values() for x in (v if isinstance(v, list) else [v])]
        # a metric that the policy does not use may be missing for some samples
        means[metric] = sum(flat) / len(flat) if flat and is_finite_numbers(flat) else None
    return means


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # containers have no entry for the user id
        return f"user {os.getuid()}"
