# SPDX-License-Identifier: Apache-2.0
"""The command line. Each command parses, calls one function, prints a table.

The commands are in files of their noun, options that several share in ``options.py``.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from typing import Any

import click
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError

import dtq
from dtq.cli import bench, doctor, evaluate, gate, inspect, quantize, recipe
from dtq.errors import DtqError, first_line
from dtq.pipelines import loading


class Commands(click.Group):
    """Turns what can go wrong into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        # a kill is an interrupt: half-written folders are removed on the way out
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            return super().invoke(ctx)
        except DtqError as error:
            _fail(str(error))
        except SafetensorError as error:
            _fail(f"safetensors: {error}")
        except (MemoryError, RuntimeError, OSError) as error:
            if loading.out_of_memory(error):
                _fail(
                    f"out of memory ({first_line(error)}). Take less at a time: --memory 4GB, "
                    f"--set calibration.batch=1; dtq plan says what is needed"
                )
            if not isinstance(error, OSError):
                raise
            _fail(" ".join(str(error).split()))
        except KeyboardInterrupt:
            click.echo("interrupted; no half-written folder is left", err=True)
            sys.exit(130)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    click.echo(f"error{f' in process {rank}' if rank != '0' else ''}: {message}", err=True)
    sys.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(dtq.__version__)
@click.option("-v", "--verbose", is_flag=True, help="Say what is decided on the way.")
def main(verbose: bool) -> None:
    """Quantize diffusion transformers after training, and prove that they did not get worse.

    \b
    dtq quantize demo --recipe w4a8 -o demo-w4a8     quantize the bundled model
    dtq eval demo-w4a8 --reference demo -o report    compare it with the float one
    dtq gate report --baseline base.json             fail when it got worse since
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("dtq").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:  # diffusers' own deprecations are not the user's business
        warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
        diffusers_logging.set_verbosity_error()


COMMANDS: tuple[click.Command, ...] = (
    quantize.quantize,
    quantize.plan,
    quantize.calibrate,
    inspect.inspect,
    evaluate.sample,
    evaluate.evaluate,
    gate.gate,
    recipe.recipe,
    bench.bench,
    doctor.doctor,
)
"""A command is listed here; ``dtq --help`` sorts them."""

for command in COMMANDS:
    main.add_command(command)
