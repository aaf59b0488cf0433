# SPDX-License-Identifier: Apache-2.0
"""``Run``: everything that one quantization knows; stages read it and add to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from dtq.calibrate.collection import Statistics
from dtq.calibrate.observers import InputStats
from dtq.checkpoint.config import DTQConfig
from dtq.models import Scan
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.recorded_calls import RecordedCall
from dtq.plan.layers import Plan
from dtq.recipe import Recipe
from dtq.runs.tasks import TaskStore
from dtq.stages.layer_result import LayerResult
from dtq.stages.report import Report


@dataclass
class Run:
    """The quantization of one transformer. A stage reads what it needs and adds what it makes.

    Attributes:
        loaded: the model and its pipeline.
        recipe: what is asked for.
        tasks: results of finished tasks, in memory or on disk, shared by processes.
        inputs: keyword arguments of forwards to calibrate a bare transformer on.
        exclude: layers that stay unquantized: names, prefixes, path components, ``re:...``.
        statistics: of the inputs of the float model; None until it has run, or if it never runs.
        memory: bytes that statistics may take; None for half of what is free.
        progress: whether to show progress bars.
        target: key of ``TARGETS`` that the plan must fit; empty: none.
        shares_budget: whether the budget of the whole pipeline chooses the formats of its layers.
        may_stay_float: whether that budget may also leave a layer float.
        joined: for layers whose rows are a part of one matrix in the target's files, its name.
        check: whether the sanity check compares a short sampling run with the float model.
        config: the quantization config; stages complete it.
        scan: input groups and linears of the model.
        plan: what happens to each layer, as decided so far.
        recorded: inputs and outputs of the float model.
        results: quantized layers by name; a layer leaves when it replaces the float one (memory).
        floats: float linears that were replaced, for the stages that compare with them.
        promoted: layers that the sanity check has promoted, solved; None: left float.
        report: what was decided and measured.
    """

    loaded: LoadedModel
    recipe: Recipe
    tasks: TaskStore = field(default_factory=TaskStore)
    inputs: Sequence[dict[str, Any]] | None = None
    exclude: Sequence[str] = ()
    statistics: Statistics | None = None
    memory: int | None = None
    progress: bool = True
    target: str = ""
    shares_budget: bool = False
    may_stay_float: bool = False
    joined: Mapping[str, str] = field(default_factory=dict)
    check: bool = False
    config: DTQConfig = field(default_factory=DTQConfig)
    scan: Scan = field(init=False)
    plan: Plan = field(init=False)
    recorded: list[RecordedCall] = field(default_factory=list)
    results: dict[str, LayerResult] = field(default_factory=dict)
    floats: dict[str, nn.Module] = field(default_factory=dict)
    promoted: dict[str, LayerResult | None] = field(default_factory=dict)
    report: Report = field(default_factory=Report)

    @property
    def model(self) -> nn.Module:
        """The transformer."""
        return self.loaded.model

    @property
    def has_data(self) -> bool:
        """Whether a pipeline or given inputs call the model with real data."""
        return self.loaded.pipeline is not None or self.inputs is not None

    @property
    def formats(self) -> tuple[str, ...]:
        """Weight formats that mixed precision chooses from; empty without it."""
        allocate = self.recipe.allocate
        return allocate.formats if allocate.budget or self.shares_budget else ()

    @property
    def edges(self) -> tuple[float, ...]:
        """Edges of the timestep bins of static activation scales; empty without such scales."""
        return self.statistics.edges if self.statistics and self.plan.bins > 1 else ()

    def progress_bar(self, label: str, **options: Any) -> Any:
        """A progress bar, hidden without ``progress``; options are those of tqdm."""
        return tqdm(desc=label, disable=not self.progress, dynamic_ncols=True, **options)

    def stats(self, group: str) -> InputStats | None:
        """Statistics of an input group, None without calibration data."""
        return self.statistics.inputs.get(group) if self.statistics else None
