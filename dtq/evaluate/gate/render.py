# SPDX-License-Identifier: Apache-2.0
"""A verdict for people and machines: table rows, markdown, JUnit XML, a contact sheet by harm."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from dtq.errors import InputError
from dtq.evaluate.gate.decision import MetricVerdict, Outcome, Verdict
from dtq.evaluate.run_file import Run

HEAD = ("metric", "decides", "mean", "between", "margin", "noise", "worst tenth", "verdict")

_MARKS = {
    Outcome.PASS: "✅",
    Outcome.REGRESSION: "❌",
    Outcome.INCONCLUSIVE: "❔",
    Outcome.INVALID: "⛔",
}
_BARS = "▁▂▃▄▅▆▇█"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 32px auto; padding: 0 20px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 18px; }
figure { margin: 0; } figure div { display: flex; gap: 4px; }
figure img { flex: 1 1 0; min-width: 0; image-rendering: pixelated; }
figcaption { font-size: 13px; overflow-wrap: anywhere; }
"""


def cells(row: MetricVerdict) -> tuple[str, ...]:
    """A line of the table under ``HEAD``."""
    shown = row.metric.shown
    between = f"{shown(row.lower)} .. {shown(row.upper)}"
    margin = shown(row.margin) + (" (2 x noise)" if row.margin > row.asked else "")
    return (
        row.name,
        "yes" if row.primary else "no",
        shown(row.mean),
        between,
        margin,
        shown(row.noise),
        shown(row.worst),
        row.outcome.word,
    )


def spark(values: Sequence[float]) -> str:
    """One character per value, sorted, worst last."""
    low, high = min(values), max(values)
    wide = (high - low) or 1.0
    return "".join(_BARS[min(7, int(8 * (v - low) / wide))] for v in sorted(values))


def conditions(run: Run) -> str:
    """What the figures hold under, in one line."""
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
    lines = [f"### {_MARKS[verdict.outcome]} dtq gate: {verdict.outcome.word}", ""]
    lines += [_cell(verdict.sentence), ""]
    lines += [f"- {_cell(reason)}" for reason in verdict.reasons]
    if verdict.rows:
        lines += [f"| {' | '.join(HEAD)} | prompts, worst last |", "|---" * (len(HEAD) + 1) + "|"]
        for row in verdict.rows:
            bars = spark(list(row.differences.values()))
            lines.append(f"| {' | '.join(map(_cell, cells(row)))} | {bars} |")
        lines += ["", _bounds(verdict)]
    lines += [f"- {_cell(note)}" for note in verdict.notes]
    if run is not None:
        lines += ["", f"<sub>{_cell(conditions(run))}</sub>"]
    return "\n".join(lines) + "\n"


def junit(verdict: Verdict) -> str:
    """One test case per metric; a run that is invalid is one error."""
    primary = [row for row in verdict.rows if row.primary]
    failed = [row for row in primary if row.outcome is not Outcome.PASS]
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
        what = {"type": verdict.outcome.word, "message": verdict.sentence}
        ElementTree.SubElement(case, kind, what).text = "\n".join(verdict.reasons)
    for row in verdict.rows:
        case = ElementTree.SubElement(suite, "testcase", classname="dtq.gate", name=row.name)
        words = ", ".join(f"{k} {v}" for k, v in zip(HEAD[2:], cells(row)[2:], strict=True))
        if row.outcome is Outcome.PASS:
            ElementTree.SubElement(case, "system-out").text = words
        elif row.primary:
            what = {"type": row.outcome.word, "message": words}
            ElementTree.SubElement(case, "failure", what)
        else:  # it does not decide
            ElementTree.SubElement(case, "skipped", message=words)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def sheet(verdict: Verdict, run: Run, folder: Path) -> str:
    """A self-contained page of float and candidate pictures, most harmed prompts first.

    Args:
        verdict: its first primary metric says how harmed.
        run: what was judged.
        folder: where ``dtq eval --pictures`` kept the pictures.

    Raises:
        InputError: they are not there.
    """
    at = folder / "pictures"
    if not at.is_dir():
        raise InputError(f"{at}: no pictures; make the run with dtq eval ... --pictures")
    harm = verdict.rows[0].differences if verdict.rows else {}
    order = sorted(run.samples, key=lambda s: -harm.get(s.prompt, float("-inf")))
    figures = []
    for sample in order:
        images = "".join(
            f"<img alt='{side}' src='data:image/png;base64,{_encoded(at / side / f'{sample.id}.png')}'>"
            for side in ("float", "candidate")
        )
        words = html.escape(sample.prompt)
        if sample.prompt in harm:
            words = f"{verdict.rows[0].metric.shown(harm[sample.prompt])} · {words}"
        figures.append(f"<figure><div>{images}</div><figcaption>{words}</figcaption></figure>")
    title = f"dtq gate: {verdict.outcome.word}"
    by = verdict.rows[0].name if verdict.rows else "nothing; the runs were not compared"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style><body>"
        f"<h1>{title}</h1><p>{html.escape(verdict.sentence)}</p>"
        f"<p>Float left, candidate right; sorted by {html.escape(by)} against the baseline, worst "
        f"first. {html.escape(conditions(run))}</p><div class=pairs>{''.join(figures)}</div>"
    )


def _bounds(verdict: Verdict) -> str:
    return (
        f"{verdict.prompts} prompts, look {verdict.look}; each bound is one-sided at "
        f"{1 - verdict.alpha:.4g}, Holm over the metrics that decide comes on top."
    )


def _cell(words: str) -> str:
    """Text that stays one cell of a table and no markup."""
    return html.escape(words, quote=False).replace("|", "\\|").replace("\n", " ")


def _encoded(file: Path) -> str:
    if not file.is_file():
        raise InputError(f"{file}: missing; make the run again with dtq eval ... --pictures")
    return base64.b64encode(file.read_bytes()).decode()
