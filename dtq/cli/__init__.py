# SPDX-License-Identifier: Apache-2.0
"""The command line: each command parses its options, calls dtq, and prints.

One file per command. ``options.py`` holds the options that several commands share, ``inputs.py``
what their values mean, ``output.py`` how results are printed. A file of a command imports nothing
slow at its top, so that ``--help`` does not wait for torch.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

import click
from safetensors import SafetensorError

from dtq.errors import DtqError, first_line
from dtq.version import __version__

from . import (
    bench,
    calibrate,
    doctor,
    evaluate,
    export,
    gate,
    inspect,
    plan,
    quantize,
    recipe,
    sample,
)

INTERRUPTED, BROKEN_PIPE = 130, 141
"""Exit codes of a shell for SIGINT and SIGPIPE."""


class Commands(click.Group):
    """Reports an error as one line and an exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line; end silently when nobody reads the output: dtq ... | head."""
        try:
            return super().main(*args, **options)
        except BrokenPipeError:
            _stop_writing()

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Parse the options; ``--help`` and ``--version`` print while this runs."""
        try:
            return super().make_context(*args, **options)
        except BrokenPipeError:  # click itself would end with exit code 1
            _stop_writing()

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        # a kill is an interrupt: half-written folders are removed on the way out
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return self._invoke(ctx)
        except BrokenPipeError:  # dtq inspect ... | head
            _stop_writing()

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except DtqError as error:
            if _is_broken_pipe(error):  # a progress bar of a library could not be written
                _stop_writing()
            _fail(str(error))
        except SafetensorError as error:
            _fail(f"safetensors: {error}")
        except (MemoryError, RuntimeError, OSError) as error:
            if _out_of_memory(error):
                _fail(
                    f"out of memory ({first_line(error)}). Use less at a time: --memory 4GB or "
                    "--set calibration.batch_size=1 (quantize), --batch 1 (sample, eval); dtq plan "
                    "estimates what quantize needs"
                )
            if not isinstance(error, OSError):
                raise
            _fail(" ".join(str(error).split()))
        except KeyboardInterrupt:
            click.echo("interrupted; no half-written folder is left", err=True)
            sys.exit(INTERRUPTED)


def _fail(message: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    click.echo(f"error{f' in process {rank}' if rank != '0' else ''}: {message}", err=True)
    sys.exit(1)


def _is_broken_pipe(error: BaseException | None) -> bool:
    """Whether an error is a broken pipe of the output, or was raised because of one."""
    while error is not None and not isinstance(error, BrokenPipeError):
        error = error.__cause__ or error.__context__
    return error is not None


def _stop_writing() -> NoReturn:
    """End silently; the interpreter would write the rest of the output as it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    sys.exit(BROKEN_PIPE)


def _out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from dtq.pipelines.loading import out_of_memory

    return out_of_memory(error)


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Print the decisions on the way.")
def main(verbose: bool) -> None:
    """Quantize diffusion transformers after training, and measure what that changes.

    \b
    dtq quantize demo --recipe w4a8 -o demo-w4a8     quantize the bundled model
    dtq eval demo-w4a8 --reference demo -o report    compare it with the float model
    dtq gate report --baseline base.json             fail if it is worse than the baseline
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("dtq").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:  # deprecations inside diffusers do not concern the user
        warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # read when diffusers is imported
        logging.getLogger("diffusers").setLevel(logging.ERROR)  # if it is imported already


MODULES = (
    bench, calibrate, doctor, evaluate, export, gate, inspect, plan, quantize, recipe, sample,
)  # fmt: skip
"""Each defines the command of its name."""

for module in MODULES:
    main.add_command(getattr(module, module.__name__.rpartition(".")[2]))
