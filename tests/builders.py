# SPDX-License-Identifier: Apache-2.0
"""Runs of single stages, for tests that look at what a stage leaves."""

from __future__ import annotations

from typing import Any

from dtq.api import open_runs, run_stages
from dtq.calibrate.collection import Statistics
from dtq.pipelines.loading import LoadedModel
from dtq.recipe import Recipe
from dtq.stages.calibrate import collect
from dtq.stages.plan import plan
from dtq.stages.report import Report
from dtq.stages.run import Run

EVERYTHING = frozenset({"channels", "hessian", "sample", "gradients"})
"""The statistics that any method reads."""


def planned(loaded: LoadedModel, recipe: Recipe, **options: Any) -> Run:
    """A run after its first stage: ``scan`` and ``plan`` are there."""
    (run,) = open_runs([loaded], recipe, **{"progress": False, **options})
    plan(run)
    return run


def collected(
    loaded: LoadedModel, recipe: Recipe, needs: frozenset[str], **options: Any
) -> Statistics:
    """Statistics of the float model."""
    return collect(planned(loaded, recipe, **options), needs)


def quantized(loaded: LoadedModel, recipe: Recipe, **options: Any) -> Report:
    """Every stage on one transformer, in place."""
    (report,) = run_stages(open_runs([loaded], recipe, **{"progress": False, **options})).values()
    return report
