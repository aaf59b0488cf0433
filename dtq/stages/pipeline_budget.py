# SPDX-License-Identifier: Apache-2.0
"""Stage over all models of a pipeline: one budget for all weight files, spent where it helps most.

The common unit of damage is the relative squared error of the denoisers' output, averaged over the
steps of a float sampling run. A layer of a denoiser is replaced and the recorded calls are
replayed. A layer of a text encoder is replaced, the prompts are encoded again, and the float
denoiser gets the new embeddings with the latents of the float run. The autoencoder is the last
model of the chain: the error of its decodes counts as the error of the latents that would change
them as much (``autoencoder.latent_error``). Errors of items are added up, as in mixed precision of
one model (``dtq.allocate``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from dtq.allocate.allocation import Allocation, choose
from dtq.allocate.measure import measure, sensitivities
from dtq.allocate.metrics import groups_of
from dtq.errors import InputError
from dtq.io.memory import paged_weights
from dtq.models import is_text_encoder
from dtq.pipelines.loading import modules_of
from dtq.pipelines.recorded_calls import RecordedCall, replay, subsample
from dtq.pipelines.recorded_sampling import RecordedSampling
from dtq.pipelines.sampling import never_called
from dtq.plan.layers import LayerPlan, Plan
from dtq.runs.tasks import TaskStore
from dtq.stages.autoencoder import VAE_CHOICES, latent_error, weights_plan
from dtq.stages.candidates import CandidateLayers, Options, measure_candidates
from dtq.stages.file_tensors import model_bytes
from dtq.stages.layer_result import LayerResult, finalize
from dtq.stages.mixed_precision import costs_of, members_of, solve_every_format
from dtq.stages.pipeline_sizes import (
    FLOAT,
    VAE,
    PipelineBudget,
    autoencoder_bytes,
    can_change,
    left_float,
    other_models,
)
from dtq.stages.record_calls import RECORDED_SAMPLES
from dtq.stages.run import Run

Results = dict[str, dict[str, dict[str, LayerResult]]]
"""Solved layers by input group, format and name."""


def record_sampling(runs: Sequence[Run]) -> RecordedSampling | None:
    """Run the float pipeline once, and keep the calls of each denoiser for its run.

    Returns:
        The sampling; None for a bare model, which has its own recorded calls.

    Raises:
        InputError: the pipeline never calls a denoiser that is quantized.
    """
    first = runs[0]
    if first.loaded.pipeline is None:
        return None
    with paged_weights(*modules_of(first.loaded)):
        made = RecordedSampling.record(first.loaded, first.recipe.calibration, RECORDED_SAMPLES)
    for run in runs:
        if run.shares_budget and not is_text_encoder(run.model):
            run.recorded = [call for call in made.calls if call.model == run.loaded.component]
            if not run.recorded:
                raise never_called(run.loaded, run.recipe.calibration)
    return made


class SharedBudget:
    """The measured items of all models, from which :meth:`spend` chooses.

    Args:
        runs: of the whole pipeline, solved.
        budget: for all files.
        sampling: of :func:`record_sampling`.

    Attributes:
        kept: layers that stay float whatever the budget chooses, by component.
        counted: bytes of the files of models that no longer are float, by component.
    """

    def __init__(
        self, runs: Sequence[Run], budget: PipelineBudget, sampling: RecordedSampling | None
    ) -> None:
        self.runs, self.budget, self.sampling = runs, budget, sampling
        self.shared = {run.loaded.component: run for run in runs if run.shares_budget}
        self.members: dict[str, dict[str, list[str]]] = {}
        self.results: dict[str, Results] = {}
        self.tables: dict[str, dict[str, float]] = {}
        self.costs: dict[str, dict[str, int]] = {}
        self.weights: dict[str, int] = {}
        self.owner: dict[str, str] = {}
        self.others = other_models(runs, budget.nf4)
        self.kept: dict[str, dict[str, LayerPlan]] = {name: {} for name in self.shared}
        self.counted: dict[str, int] = {}

    def measure(self) -> None:
        """Solve every format and measure the damage of each; the processes share the work."""
        for name, run in self.shared.items():
            members = self.members[name] = members_of(run)
            results = self.results[name] = solve_every_format(run, members)
            damage = self._damage(run, results)
            costs = costs_of(results, run.plan.bins)
            for group, layers in members.items():
                weights = sum(math.prod(run.plan[x].shape) for x in layers)
                if run.may_stay_float:
                    damage[group][FLOAT] = 0.0
                    costs[group][FLOAT] = weights * run.loaded.dtype.itemsize
                self._add(f"{name}/{group}", damage[group], costs[group], weights)

    def _add(
        self, item: str, damage: dict[str, float], costs: dict[str, int], weights: int
    ) -> None:
        """Add an item, whose name begins with that of its component."""
        self.tables[item], self.costs[item] = damage, costs
        self.weights[item], self.owner[item] = weights, item.partition("/")[0]

    def _damage(self, run: Run, results: Results) -> dict[str, dict[str, float]]:
        """Error of the denoisers' output by input group and format."""
        settings = run.recipe.allocate
        if is_text_encoder(run.model) and self.sampling is not None:
            items: dict[str, Options] = {**results}
            return self._damage_of_prompts(run, items, settings.num_inputs)
        groups = groups_of(g for g in run.scan.input_groups if g.name in results)
        found = sensitivities(
            measure_candidates(run, results, settings.num_inputs, "allocate"),
            groups,
            per_group_metric=settings.per_group_metric,
        )
        # one of two denoisers makes a part of the steps
        share = len(run.recorded) / len(self.sampling.calls) if self.sampling else 1.0
        return {g: {o: share * x for o, x in options.items()} for g, options in found.items()}

    def _damage_of_prompts(
        self, run: Run, items: Mapping[str, Options], num_inputs: int
    ) -> dict[str, dict[str, float]]:
        """Error of the float denoisers' output on prompts that the changed encoder has encoded."""
        sampling = self.sampling
        assert sampling is not None
        calls = subsample(sampling.calls, num_inputs)
        places = [next(i for i, c in enumerate(sampling.calls) if c is call) for call in calls]
        denoisers = sampling.loaded.models()

        def outputs() -> Iterator[Tensor]:
            changed: list[RecordedCall] = sampling.again()
            return (replay(denoisers[changed[i].model], changed[i]) for i in places)

        layers = {item: CandidateLayers(run, options, None) for item, options in items.items()}
        with paged_weights(*modules_of(run.loaded)):
            measured = measure(
                run.model, calls, layers,
                outputs=outputs, progress=run.progress, what="allocate", tasks=run.tasks,
            )  # fmt: skip
        return {g: {o: m["mse"] for o, m in options.items()} for g, options in measured.items()}

    def _measure_vae(self, tasks: TaskStore) -> None:
        """Add the autoencoder, if the budget may quantize it and the pipeline decodes with it."""
        model, whole = self.others.get(VAE, (None, 0))
        if self.budget.vae or self.sampling is None or not can_change(model):
            return
        assert model is not None
        sampling, name = self.sampling, VAE_CHOICES["w8"]
        _, error = tasks.get_or_compute("allocate-vae", lambda: ({}, latent_error(sampling, name)))
        if error is None:
            return
        plan = weights_plan(model, name)
        small = autoencoder_bytes(model)
        count = sum(math.prod(x.shape) for x in plan.layers)
        self._add(VAE, {FLOAT: 0.0, name: error}, {FLOAT: whole, name: small}, count)

    def spend(self) -> None:
        """Choose the formats, and put the chosen layers into the runs; in the main process.

        The ``outcome`` of the budget says what was chosen.

        Raises:
            InputError: the budget is too small for what was solved; has the smallest size.
        """
        self._measure_vae(self.runs[0].tasks)
        try:
            chosen = choose(
                self.tables, self.costs, self.budget.bytes,
                groups=self.owner, weights=self.weights, total=self._total,
            )  # fmt: skip
        except InputError as error:
            raise InputError(f"{self.runs[0].loaded.name}: {error}") from error
        choice = chosen.choice
        for name, run in self.shared.items():
            self._apply(run, name, choice)
            rows = [row for row in chosen.rows if row.group == name]
            run.report.allocation = {
                "rows": [{**vars(row), "item": row.item.partition("/")[2]} for row in rows],
                "bytes": sum(row.bytes for row in rows),
                "sensitivity": sum(row.sensitivity for row in rows),
            }
        self.budget.outcome = self._outcome(chosen)

    def fix(self, run: Run, layer: str, result: LayerResult | None) -> bool:
        """Give a layer the same result in every format that the budget chooses from.

        Args:
            run: of its model.
            layer: its name.
            result: the layer; None: it stays float.

        Returns:
            Whether the budget chooses the format of that layer.
        """
        name = run.loaded.component
        groups = [g for g, layers in self.members[name].items() if layer in layers]
        for group in groups:
            options, item = self.results[name][group], f"{name}/{group}"
            for option, layers in options.items():
                others = {k: r for k, r in layers.items() if k != layer}
                solved = others if result is None else {**others, layer: result}
                options[option] = solved
                floats = sum(
                    math.prod(run.plan[k].shape) * run.loaded.dtype.itemsize
                    for k in self.members[name][group]
                    if k not in solved
                )
                stored = sum(r.plan.nbytes(run.plan.bins) for r in solved.values())
                self.costs[item][option] = stored + floats
        return bool(groups)

    def _left(self, name: str, layer: LayerPlan) -> LayerPlan:
        return self.kept[name].get(layer.name, left_float(layer))

    def _total(self, choice: Mapping[str, str]) -> int:
        return sum(self._files(choice).values())

    def _files(self, choice: Mapping[str, str]) -> dict[str, int]:
        """Bytes of every file of the pipeline under a choice."""
        files = {name: size for name, (_, size) in self.others.items()}
        for run in self.runs:
            name = run.loaded.component
            if name in self.counted:
                files[name] = self.counted[name]
                continue
            plan = self._chosen_plan(run, name, choice) if name in self.shared else run.plan
            files[name] = model_bytes(run.model, plan, run.loaded.dtype)
        if VAE in choice:
            files[VAE] = self.costs[VAE][choice[VAE]]
        elif self.budget.vae == "w8":
            files[VAE] = autoencoder_bytes(self.others[VAE][0])
        return files

    def _chosen_plan(self, run: Run, name: str, choice: Mapping[str, str]) -> Plan:
        """The plan of a run under a choice; layers outside of input groups are as solved."""
        plan, layers = run.plan, {x.name: run.results[x.name].plan for x in run.plan.quantized()}
        for group, options in self.results[name].items():
            solved = options.get(choice[f"{name}/{group}"], {})
            for layer in self.members[name][group]:
                found = solved.get(layer)
                layers[layer] = self._left(name, plan[layer]) if found is None else found.plan
        return plan.with_layers(layers)

    def _apply(self, run: Run, name: str, choice: Mapping[str, str]) -> None:
        changed: dict[str, LayerPlan] = {}
        for group, options in self.results[name].items():
            solved = options.get(choice[f"{name}/{group}"], {})
            run.results |= solved
            for layer in {*self.members[name][group]} - {*solved}:
                changed[layer] = self._left(name, run.plan[layer])
                del run.results[layer]
        run.plan = finalize(run.plan.with_layers(changed), run.results)
        run.report.plan = run.plan

    def _outcome(self, chosen: Allocation) -> dict[str, Any]:
        errors = dict.fromkeys(dict.fromkeys(row.group for row in chosen.rows), 0.0)
        for row in chosen.rows:
            errors[row.group] += row.sensitivity
        files, whole = self._files(chosen.choice), sum(errors.values())
        return {
            "budget": self.budget.bytes,
            "bytes": sum(files.values()),
            "vae": self.budget.vae or ("keep" if chosen.choice.get(VAE, FLOAT) == FLOAT else "w8"),
            "components": {
                name: {
                    "bytes": size,
                    "error": errors.get(name),
                    "error_share": errors[name] / whole if whole and name in errors else None,
                }
                for name, size in files.items()
            },
        }
