# SPDX-License-Identifier: Apache-2.0
"""``dtq gate``: its options, exit codes and files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import yaml

from dtq.cli.output import table
from dtq.errors import DtqError, printable

INVALID = 3


class Gate(click.Group):
    """A group whose first argument may be a run: ``dtq gate RUN`` is ``dtq gate check RUN``.

    Exit code 2 means inconclusive and 1 regression, so wrong usage and unreadable files are 3.
    """

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            return "check", self.commands["check"], args
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        asks = args and args[0] in ("-h", "--help")
        if args and args[0].startswith("-") and not asks:
            args = ["check", *args]  # options before the run are those of check
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _code_3():
            return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        check = self.commands["check"]
        rows = [row for p in check.get_params(ctx) if (row := p.get_help_record(ctx)) is not None]
        with formatter.section("Options"):
            formatter.write_dl(rows)
        self.format_commands(ctx, formatter)


@contextmanager
def _code_3() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        error.show()
        sys.exit(INVALID)
    except (DtqError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(INVALID)


policy_option = click.option(
    "--policy",
    default="default",
    show_default=True,
    help="Name of a shipped policy, or a YAML file: metrics, margins, alpha, looks.",
)


@click.group(cls=Gate, no_args_is_help=True)
def gate() -> None:
    """Say whether RUN is worse than BASE, by more than a margin and beyond doubt.

    RUN and BASE are folders of dtq eval, their eval.json, or files of dtq gate accept. Both must be
    the same job: prompts, seeds, steps, sampler, guidance, float model.

    \b
    dtq eval demo-w4a8 --reference demo --samples 32 -o run
    dtq gate accept run --baseline base.json --reason "first"
    dtq gate run --baseline base.json

    \b
    exit code   verdict        means
    0           pass           no deciding metric is worse by more than its margin
    1           regression     one is
    2           inconclusive   neither is sure; add prompts (eval --samples)
    3           invalid        not the same job, a metric, sample or picture is missing, wrong usage

    In a GitHub workflow the table is added to the step's summary.
    """


@gate.command("check")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    required=True,
    help="Run to compare with: folder, eval.json or baseline file.",
)
@policy_option
@click.option("--json", "as_json", is_flag=True, help="Print the verdict and every difference.")
@click.option("--out", type=click.Path(path_type=Path), help="Write that JSON to a file.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML, a case a metric.")
@click.option(
    "--sheet",
    type=click.Path(path_type=Path),
    help="Write an HTML page of pictures, most harmed first (needs eval --pictures).",
)
def check(
    run: Path,
    baseline: Path,
    policy: str,
    as_json: bool,
    out: Path | None,
    junit: Path | None,
    sheet: Path | None,
) -> None:
    """Compare RUN with a baseline; the same as dtq gate RUN.

    \b
    dtq gate run --baseline base.json --policy default --junit gate.xml
    """
    from dtq.evaluate import run_file
    from dtq.evaluate.gate import render
    from dtq.evaluate.gate.decision import Outcome, decide
    from dtq.evaluate.gate.policy import Policy

    mine, theirs = run_file.read(run), run_file.read(baseline)
    found = decide(mine, theirs, Policy.load(policy))
    text = run_file.text(found.to_json())
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if junit is not None:
        junit.write_text(render.junit(found), encoding="utf-8")
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as stream:
            stream.write(render.markdown(found, mine))
    if sheet is not None:
        folder = run if run.is_dir() else run.parent
        sheet.write_text(render.sheet(found, mine, folder), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(json.loads(text)))
    else:
        if found.rows:
            table(render.HEAD, [render.cells(row) for row in found.rows])
        for line in (*found.reasons, *found.notes):
            click.echo(f"  - {line}")
        click.echo(f"{found.outcome.word}: {found.sentence}")
    if found.outcome is not Outcome.PASS:
        sys.exit(int(found.outcome))


@gate.command("accept")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--baseline", type=click.Path(path_type=Path), required=True, help="Baseline file to write."
)
@click.option("--reason", required=True, help="Why; kept in the file.")
@policy_option
@click.option("--who", default="", help="Name in the history; yours by default.")
def accept(run: Path, baseline: Path, reason: str, policy: str, who: str) -> None:
    """Make RUN the baseline that later runs are compared with.

    The file keeps who accepted what and why, keyed by checkpoint, recipe, policy and hardware, and
    what the gate said of the new baseline against the last one.

    \b
    dtq gate accept run --baseline base.json --reason "GPTQ damping is 0.02 now"
    """
    from dtq.evaluate import run_file
    from dtq.evaluate.gate import baseline_file
    from dtq.evaluate.gate.policy import Policy

    entry = baseline_file.accept(run_file.read(run), baseline, reason, Policy.load(policy), who)
    last = entry.get("against_the_last")
    words = f"; against the last one: {last['verdict']}" if last else ", the first one"
    click.echo(f"{baseline}: {entry['recipe']} {entry['checkpoint']}, by {entry['who']}{words}")


@gate.command("log")
@click.argument("baseline", type=click.Path(path_type=Path))
def log(baseline: Path) -> None:
    """Who accepted what into BASELINE, and why.

    \b
    dtq gate log base.json
    """
    from dtq.evaluate.gate import baseline_file

    rows = [
        (
            e["when"],
            e["who"],
            e["recipe"],
            e["checkpoint"],
            e.get("against_the_last", {}).get("verdict", "-"),
            e["why"],
        )
        for e in baseline_file.history(baseline)
    ]
    head = ("when", "who", "recipe", "checkpoint", "against the last", "why")
    table(head, [tuple(map(printable, row)) for row in rows])


@gate.command("policy")
@click.argument("name", default="default")
def policy_(name: str) -> None:
    """Check a policy, by name or YAML file, and print it with every default filled in.

    \b
    dtq gate policy default > mine.yaml
    """
    from dtq.evaluate.gate.policy import Policy

    data = Policy.load(name).to_dict()
    data.pop("name")
    click.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True).rstrip())
