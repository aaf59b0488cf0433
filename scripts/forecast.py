# SPDX-License-Identifier: Apache-2.0
"""Time that `dtq plan` foretells beside the time that it takes, the table of docs/large.md.

    python scripts/forecast.py w4a16 w8a8 w4a8 w4a8-hq

On one thread, in CPU seconds, so that other work on the machine counts less.
"""

from __future__ import annotations

import time

import click
import torch

from dtq.api import quantize_source
from dtq.estimate.size import estimate
from dtq.io.memory import tune_malloc
from dtq.pipelines.loading import load_transformer
from dtq.recipe.resolve import Recipe
from dtq.stages.calibrate import statistics_needed
from dtq.stages.plan import plan_source


@click.command(help=__doc__)
@click.argument("recipes", nargs=-1, required=True)
@click.option("--model", default="demo", show_default=True)
def main(recipes: tuple[str, ...], model: str) -> None:
    torch.set_num_threads(1)
    tune_malloc()
    print("| recipe | foretold | measured |\n| --- | --- | --- |", flush=True)
    for name in recipes:
        source, recipe = load_transformer(model), Recipe.load(name)
        scan, plan = plan_source(source, recipe)
        needs = statistics_needed(recipe, source.pipeline is not None)
        seconds = estimate(source.model, scan, plan, recipe, torch.float32, needs=needs).seconds
        assert seconds is not None
        started = time.process_time()
        quantize_source(source, recipe, progress=False, sanity_check=True)
        spent = time.process_time() - started
        print(f"| `{name}` | {seconds:.0f} s | {spent:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
