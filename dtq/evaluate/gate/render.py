# SPDX-License-Identifier: Apache-2.0
"""A verdict as table rows, Markdown, JUnit XML, and a contact sheet sorted by harm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from dtq.errors import InputError
from dtq.evaluate.gate.decision import MetricVerdict, Outcome, Verdict
from dtq.evaluate.report import page
from dtq.evaluate.run_file import Run

HEAD = ("metric", "decides", "mean", "between", "margin", "noise", "worst tenth", "verdict")

_MARKS = dict(zip(Outcome, "✅❌❔⛔", strict=True))
_BARS = "▁▂▃▄▅▆▇█"


def cells(row: MetricVerdict) -> tuple[str, ...]:
    """A row of the table under ``HEAD``."""
    shown = row.metric.shown
    return (
        row.name,
        "yes" if row.primary else "no",
        shown(row.mean),
        f"{shown(row.lower)} .. {shown(row.upper)}",
        shown(row.margin) + (" (2 x noise)" if row.margin > row.policy_margin else ""),
        shown(row.noise),
        shown(row.worst_tenth),
        row.outcome.word,
    )


def spark(values: Sequence[float]) -> str:
    """One bar character per value, sorted, worst last."""
    if not values:
        return ""
    low, high = min(values), max(values)
    width = (high - low) or 1.0
    return "".join(_BARS[min(7, int(8 * (v - low) / width))] for v in sorted(values))


def conditions(run: Run) -> str:
    """The conditions of a run in one line."""
    job = run.conditions
    return (
        f"{len(run.samples)} samples of {job.get('prompts')}, {job.get('steps')} steps of "
        f"{job.get('sampler')}, guidance {job.get('guidance')}, seed {job.get('seed')}, "
        f"{job.get('dtype')}, {job.get('hardware')}, torch {job.get('torch')}, "
        f"dtq {job.get('dtq')}; recipe {run.identity.get('recipe')}, checkpoint "
        f"{run.identity.get('checkpoint')}"
    )


def markdown(verdict: Verdict, run: Run | None = None) -> str:
    """For ``$GITHUB_STEP_SUMMARY``: the sentence, the table, every difference as a bar."""
    return page.render(
        "gate_summary.md",
        mark=_MARKS[verdict.outcome],
        verdict=verdict,
        head=HEAD,
        rows=[(cells(row), spark(list(row.differences.values()))) for row in verdict.rows],
        bounds=f"{verdict.prompts} prompts, look {verdict.look}; each bound is one-sided at "
        f"{1 - verdict.alpha:.4g}, without Holm correction over the primary metrics.",
        conditions=None if run is None else conditions(run),
    )


def junit(verdict: Verdict) -> str:
    """JUnit XML: a test case per metric, or one case if the metrics were not compared."""
    failed = [r for r in verdict.rows if r.primary and r.outcome is not Outcome.PASS]
    stopped = not verdict.rows
    suite = ElementTree.Element(
        "testsuite",
        name="dtq gate",
        tests=str(len(verdict.rows) + stopped),
        failures=str(len(failed) + (stopped and verdict.outcome is Outcome.INCONCLUSIVE)),
        errors=str(int(verdict.outcome is Outcome.INVALID)),
        skipped=str(sum(not r.primary and r.outcome is not Outcome.PASS for r in verdict.rows)),
    )
    if stopped:
        case = ElementTree.SubElement(suite, "testcase", classname="dtq.gate", name="comparable")
        kind = "error" if verdict.outcome is Outcome.INVALID else "failure"
        attributes = {"type": verdict.outcome.word, "message": verdict.sentence}
        ElementTree.SubElement(case, kind, attributes).text = "\n".join(verdict.reasons)
    for row in verdict.rows:
        case = ElementTree.SubElement(suite, "testcase", classname="dtq.gate", name=row.name)
        words = ", ".join(f"{k} {v}" for k, v in zip(HEAD[2:], cells(row)[2:], strict=True))
        if row.outcome is Outcome.PASS:
            ElementTree.SubElement(case, "system-out").text = words
        elif row.primary:
            ElementTree.SubElement(case, "failure", type=row.outcome.word, message=words)
        else:  # a secondary metric does not decide
            ElementTree.SubElement(case, "skipped", message=words)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def sheet(verdict: Verdict, run: Run, folder: Path) -> str:
    """A self-contained page with images of the float model and the candidate, worst prompt first.

    Args:
        verdict: its first metric of samples orders the prompts.
        run: of the candidate.
        folder: with the images of ``dtq eval --keep-images``.

    Raises:
        InputError: the images are missing.
    """
    at = folder / "pictures"
    if not at.is_dir():
        raise InputError(f"{at}: no images; evaluate with dtq eval ... --keep-images")
    first = next((row for row in verdict.rows if not row.metric.of_sets), None)
    harm = first.differences if first else {}
    samples = []
    for sample in sorted(run.samples, key=lambda s: -harm.get(s.prompt, float("-inf"))):
        caption = sample.prompt
        if first and sample.prompt in harm:
            caption = f"{first.metric.shown(harm[sample.prompt])} · {caption}"
        files = [(side, at / side / f"{sample.id}.png") for side in ("float", "candidate")]
        samples.append({"images": [(side, _source(f)) for side, f in files], "caption": caption})
    return page.render(
        "gate_sheet.html",
        title=f"dtq gate: {verdict.outcome.word}",
        passed=verdict.outcome is Outcome.PASS,
        sentence=verdict.sentence,
        sorted_by=first.name if first else "nothing; the runs were not compared",
        conditions=conditions(run),
        samples=samples,
    )


def _source(file: Path) -> str:
    if not file.is_file():
        raise InputError(f"{file}: missing; evaluate again with dtq eval ... --keep-images")
    return page.image_source(file.read_bytes())
