# SPDX-License-Identifier: Apache-2.0
"""``dtq gate``: its options, exit codes and files."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from dtq.cli import options as opt
from dtq.cli.output import COMPONENT_COLUMNS, INVALID, component_cells, table
from dtq.errors import LIBRARY_ERRORS, DtqError, InputError, printable

if TYPE_CHECKING:
    from dtq.evaluate.run_file import Contribution


class Gate(click.Group):
    """A group whose first argument may be a run: ``dtq gate RUN`` is ``dtq gate check RUN``.

    Exit code 1 means regression and 2 inconclusive, so wrong usage and unreadable files are 3.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The arguments, with ``check`` before a first one that names no command."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["check", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors end with the exit code ``INVALID``."""
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, click.exceptions.Exit):
            raise
        except click.UsageError as error:
            error.show()
        except (DtqError, OSError) as error:
            click.echo(f"error: {error}", err=True)
        except LIBRARY_ERRORS:  # a fault must not have the exit code of a regression
            traceback.print_exc()
        sys.exit(INVALID)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the options of ``check`` and the commands."""
        check = self.commands["check"]
        options = [param for param in check.get_params(ctx) if isinstance(param, click.Option)]
        rows = [row for option in options if (row := option.get_help_record(ctx)) is not None]
        with formatter.section("Options"):
            formatter.write_dl(rows)
        self.format_commands(ctx, formatter)


policy_option = click.option(
    "--policy", default="auto", metavar="NAME",
    help="Name of a shipped policy, or a YAML file: metrics, margins, alpha, looks. auto takes the "
         "policy sound for sounds, default for images and videos.",
)  # fmt: skip


@click.group(cls=Gate, no_args_is_help=True)
def gate() -> None:
    """Test whether RUN is worse than a baseline.

    Worse by more than a margin, with statistical confidence. RUN is a folder of dtq eval, or its
    eval.json. The baseline is one of these, or a file of dtq gate accept. Both must have the same
    prompts, seeds, steps, sampler, guidance and float model.

    \b
    dtq eval demo-w4a8 --reference demo --samples 32 -o run
    dtq gate accept run --baseline base.json --reason "first"
    dtq gate run --baseline base.json

    \b
    exit code   verdict        means
    0           pass           no deciding metric is worse by more than its margin
    1           regression     a deciding metric is worse by more than its margin
    2           inconclusive   neither is certain; add prompts (eval --samples)
    3           invalid        different conditions, a missing metric, sample or image, wrong usage

    In a GitHub workflow the table is added to the summary of the step.
    """


# fmt: off
_check_options = opt.combined(
    opt.path("--baseline", required=True,
         help="Run to compare with: a folder, an eval.json or a baseline file."),
    policy_option,
    opt.flag("--components", help="Also print what each component adds to the error, of both models; "
                                  "needs dtq eval --components."),
    opt.json(help="Print the verdict and every difference as JSON."),
    opt.path("--out", help="File to write that JSON to. Default: not written."),
    opt.path("--junit", help="File to write JUnit XML to, one test case per metric. Default: not written."),
    opt.path("--sheet",
         help="File to write an HTML page of the images to, worst first; needs dtq eval --keep-images. "
              "Default: not written."),
)
# fmt: on


@gate.command("check")
@click.argument("run", type=click.Path(path_type=Path))
@_check_options
def check(
    run: Path,
    baseline: Path,
    policy: str,
    components: bool,
    as_json: bool,
    out: Path | None,
    junit: Path | None,
    sheet: Path | None,
) -> None:
    """Compare RUN with a baseline; the same as dtq gate RUN.

    RUN is a folder of dtq eval, or its eval.json.

    \b
    dtq gate check run --baseline base.json --junit gate.xml
    """
    from dtq.evaluate import run_file
    from dtq.evaluate.gate import render
    from dtq.evaluate.gate.decision import Outcome, decide
    from dtq.evaluate.gate.policy import Policy

    result, base = run_file.read(run), run_file.read(baseline)
    parts = {str(run): result.components, str(baseline): base.components} if components else {}
    if without := [name for name, rows in parts.items() if not rows]:
        raise InputError(
            f"{' and '.join(without)}: has no errors of components; dtq eval --components adds them"
        )
    verdict = decide(result, base, Policy.of_runs(policy, result, base))
    text = run_file.text(verdict.to_json())
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if junit is not None:
        junit.write_text(render.junit(verdict), encoding="utf-8")
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as stream:
            stream.write(render.markdown(verdict, result))
    if sheet is not None:
        folder = run if run.is_dir() else run.parent
        sheet.write_text(render.sheet(verdict, result, folder), encoding="utf-8")
    if as_json:
        click.echo(json.dumps({**json.loads(text), **_contributions(parts)}))
    else:
        if verdict.rows:
            table(render.HEAD, [render.cells(row) for row in verdict.rows])
        for line in (*verdict.reasons, *verdict.notes):
            click.echo(f"  - {line}")
        if parts:
            rows = [[name, *component_cells(row)] for name, every in parts.items() for row in every]
            table(("run", *COMPONENT_COLUMNS), rows)
        click.echo(f"{verdict.outcome.word}: {verdict.sentence}")
    if verdict.outcome is not Outcome.PASS:
        sys.exit(int(verdict.outcome))


def _contributions(parts: dict[str, list[Contribution]]) -> dict[str, Any]:
    """The entry ``components`` of the JSON output, if it was asked for."""
    rows = {name: [vars(row) for row in every] for name, every in parts.items()}
    return {"components": rows} if rows else {}


@gate.command("accept")
@click.argument("run", type=click.Path(path_type=Path))
@opt.path("--baseline", required=True, help="Baseline file to write.")
@click.option("--reason", required=True, help="Why it is accepted; kept in the file.")
@policy_option
@click.option("--who", metavar="NAME", help="Name in the history. Default: your user name.")
def accept(run: Path, baseline: Path, reason: str, policy: str, who: str | None) -> None:
    """Make RUN the baseline that later runs are compared with.

    RUN is a folder of dtq eval, or its eval.json. The file keeps who accepted what and why, keyed
    by checkpoint, recipe, policy and hardware, and the verdict of the new baseline against the
    last one.

    \b
    dtq gate accept run --baseline base.json --reason "GPTQ damping is 0.02 now"
    """
    from dtq.evaluate import run_file
    from dtq.evaluate.gate import baseline_file
    from dtq.evaluate.gate.policy import Policy

    accepted = run_file.read(run)
    chosen = Policy.of_runs(policy, accepted)
    new = baseline_file.accept(accepted, baseline, reason, chosen, who or "")
    last = new.get("against_the_last")
    words = f"; against the last one: {last['verdict']}" if last else ", the first one"
    click.echo(f"{baseline}: {new['recipe']} {new['checkpoint']}, by {new['who']}{words}")


@gate.command("log")
@click.argument("baseline", type=click.Path(path_type=Path))
def log(baseline: Path) -> None:
    """List who accepted what into the file BASELINE, and why.

    \b
    dtq gate log base.json
    """
    from dtq.evaluate.gate import baseline_file

    head = ("when", "who", "recipe", "checkpoint", "against the last", "why")
    entries = baseline_file.history(baseline)
    for entry in entries:
        entry["against the last"] = entry.get("against_the_last", {}).get("verdict", "-")
    table(head, [[printable(entry[key]) for key in head] for entry in entries])


@gate.command("policy")
@click.argument("name", default="default")
def policy_(name: str) -> None:
    """Check the policy NAME and print it with its defaults.

    NAME is the name of a shipped policy, or a YAML file. Default: default.

    \b
    dtq gate policy default > mine.yaml
    """
    from dtq.evaluate.gate.policy import Policy

    data = Policy.load(name).to_dict()
    data.pop("name")
    click.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True).rstrip())
