# SPDX-License-Identifier: Apache-2.0
"""``dtq plan``: what a run would do to each layer, and what it would cost."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from dtq.cli import options as opt
from dtq.cli.output import duration, fold, print_unknown, size, table
from dtq.errors import InputError

if TYPE_CHECKING:
    import torch

    from dtq.estimate import Estimate
    from dtq.plan import Plan
    from dtq.recipe import Recipe
    from dtq.stages.pipeline_sizes import PipelineBudget, Sizes
    from dtq.stages.run import Run


@click.command()
@click.argument("model")
@opt.recipe
@opt.model
@opt.target
@opt.text_encoder
@opt.embeddings
@opt.vae
@opt.exclude
@opt.memory
@opt.count("--batch", default=1, help="Images sampled at a time, for the memory while sampling.")
@opt.every_layer
@opt.json(help="Print the plan as JSON.")
def plan(
    model: str,
    components: tuple[str, ...],
    dtype: str,
    variant: str | None,
    target: str,
    text_encoder: str | None,
    vae: str | None,
    exclude: tuple[str, ...],
    memory: str | None,
    batch: int,
    every: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Show the plan for each layer of MODEL, and the cost.

    MODEL is a local diffusers folder, a hub id, or a bundled model: demo, demo-outliers,
    demo-video, demo-text, demo-text-4step. Of its weights only names, shapes and FP8 tensors without
    a scale are read. The file size is exact; memory, disk and time are estimates. Of a local pipeline
    also the memory while sampling, at the size of --arg, with and without offloading.

    \b
    dtq plan demo --recipe w4a8
    dtq plan demo-video --recipe w4a8 --text-encoder w4a16
    dtq plan black-forest-labs/FLUX.1-dev --recipe w4a8 --budget 12GB
    """
    from dtq import demo
    from dtq.cli import sampling_memory
    from dtq.cli.inputs import check_names, recipe_with, size_of_budget
    from dtq.io.memory import tune_malloc
    from dtq.pipelines import contents
    from dtq.recipe.resolve import BNB_NF4
    from dtq.stages.pipeline_sizes import PipelineBudget, refuse_too_small

    tune_malloc()
    recipe = recipe_with(choices)
    check_names(target, text_encoder)
    budget = PipelineBudget.of(size_of_budget(choices), vae, text_encoder)
    folder = demo.path_of(model)
    has_pipeline = not folder.exists() or contents.folder_kind(folder) == "pipeline"
    options = {"exclude": exclude, "memory": memory, "target": target, "text": text_encoder}
    options["embeddings"] = choices["embeddings"]
    runs, compute, mapped = _runs(model, components, dtype, variant, recipe, budget, options)
    data: dict[str, dict[str, Any]] = {}
    local = has_pipeline and folder.exists()
    pipeline, unknown = sampling_memory.without_weights(folder) if local else (None, "")
    for run, cost in _costs(runs, compute, mapped, pipeline, has_pipeline):
        name = run.loaded.component
        data[name] = _to_json(run, cost)
        if not as_json:
            if len(runs) > 1:
                click.echo(f"{name}:")
            _print(run, cost, every)
    plans = {run.loaded.component: run.plan for run in runs}
    files = {name: part["bytes"] for name, part in data.items()}
    if budget is not None:
        found = _sizes(model, runs, vae or "", budget.nf4, compute, has_pipeline)
        refuse_too_small(budget.bytes, found, model)
        for entry in data.values():
            entry["pipeline"] = {"budget": budget.bytes, **asdict(found)}
        if not as_json:
            _print_budget(found, budget.bytes)
    elif vae == "w8" or text_encoder == BNB_NF4:
        nf4 = text_encoder == BNB_NF4
        files = _sizes(model, runs, vae or "keep", nf4, compute, has_pipeline).fixed | files
        for entry in data.values():
            entry["pipeline"] = {"fixed": files}
    if budget is None and len(files) > 1 and not as_json:
        _print_shares(files)
    if local:
        sampling: dict[str, Any] = {"unknown": unknown}
        if pipeline is not None:  # its models were float while the calibration was estimated
            sampling = sampling_memory.estimated(pipeline, recipe, batch, compute, plans)
        for entry in data.values():
            entry["sampling"] = sampling
        if not as_json:
            sampling_memory.show(sampling)
    if as_json:
        click.echo(json.dumps(data if len(data) > 1 else next(iter(data.values()))))


def _runs(
    model: str,
    components: tuple[str, ...],
    dtype: str,
    variant: str | None,
    recipe: Recipe,
    budget: PipelineBudget | None,
    options: dict[str, Any],
) -> tuple[list[Run], torch.dtype, set[str]]:
    """Planned runs on the meta device, the compute dtype, and the models whose files have it."""
    import psutil

    from dtq.allocate import parse_size
    from dtq.models import is_text_encoder
    from dtq.pipelines import loading
    from dtq.stages.make_runs import Wanted, make_runs
    from dtq.stages.plan import plan as plan_stage

    memory = options["memory"]
    wanted = Wanted(recipe, options["text"], budget, options["embeddings"])
    found = loading.meta_models(model, components or "auto", variant, text=wanted.text_runs)
    _, first = next(iter(found.values()))  # the dtype in which the whole pipeline is loaded
    compute = first if dtype == "auto" else loading.DTYPES[dtype]
    models: list[loading.LoadedModel] = []
    texts: list[loading.LoadedModel] = []
    for name, (empty, _) in found.items():
        # a class may keep layers in float32 for some dtypes
        loaded = loading.LoadedModel(model, None, name, empty.to(compute))
        (texts if wanted.text_runs and is_text_encoder(empty) else models).append(loaded)
    runs = make_runs(
        models, texts, wanted, exclude=options["exclude"], target=options["target"],
        memory=parse_size(memory) if memory else psutil.virtual_memory().available // 2,
    )  # fmt: skip
    for run in runs:
        plan_stage(run)
    return runs, compute, {name for name, (_, stored) in found.items() if stored == compute}


def _costs(
    runs: list[Run],
    compute: torch.dtype,
    mapped: set[str],
    pipeline: Any,
    has_pipeline: bool,
) -> Iterator[tuple[Run, Estimate]]:
    """Planned runs, each with its estimate; ``pipeline`` is a local one without weights."""
    from dtq.estimate import estimate
    from dtq.estimate.calibrating import calibrating_memory
    from dtq.stages.calibrate import statistics_needed

    every = [statistics_needed(run.recipe, has_pipeline) for run in runs]
    held, settings = None, runs[0].recipe.calibration
    if pipeline is not None and any(every):
        held = calibrating_memory(pipeline, settings, compute, mapped=bool(mapped))
    for run, needs in zip(runs, every, strict=True):
        name = run.loaded.component
        cost = estimate(
            run, compute, needs=needs, mapped=name in mapped, has_pipeline=has_pipeline,
            around=held.around(name) if held and needs else 0,
        )  # fmt: skip
        yield run, cost


def _sizes(
    model: str,
    runs: list[Run],
    vae: str,
    nf4: bool,
    compute: torch.dtype,
    has_pipeline: bool,
) -> Sizes:
    """Bytes of all weight files; refuses a choice for a VAE that is not there."""
    from dtq import demo
    from dtq.estimate.fake_pipeline import meta_modules
    from dtq.estimate.sampling import cast_floats
    from dtq.pipelines.hub import download_configs
    from dtq.stages.pipeline_sizes import VAE, can_change, saved_files, sizes

    path = demo.path_of(model)
    others = {}
    if has_pipeline:
        others = meta_modules(path if path.exists() else download_configs(model))
    for name in [run.loaded.component for run in runs]:
        others.pop(name, None)
    for module in others.values():
        cast_floats(module, compute)
    if vae == "w8" and not can_change(others.get(VAE)):
        raise InputError(f"{model} has no autoencoder that dtq can quantize; leave --vae out")
    return sizes(runs, saved_files(others, nf4), vae)


def _print_budget(found: Sizes, budget: int) -> None:
    """What each component may take, and what is left for the budget to choose."""
    rows = [(name, size(found.least[name]), size(found.most[name])) for name in found.least]
    rows += [(name, size(fixed), "as it is") for name, fixed in found.fixed.items()]
    rows.append(("together", size(found.smallest()), size(found.largest())))
    click.echo()
    table(("component", "file at least", "at most"), rows)
    spare = budget - found.smallest()
    click.echo(f"budget {size(budget)}: {size(spare)} above the least, spent by measured error")


def _to_json(run: Run, cost: Estimate) -> dict[str, Any]:
    plan = run.plan
    return {
        **plan.to_json(),
        "family": run.scan.family,
        "traced": run.scan.traced,
        "unsupported": run.scan.unsupported,
        "bytes": cost.file,
        "bytes_most": cost.file_most,
        "memory": cost.memory,
        "disk": cost.disk,
        "seconds": cost.seconds,
        "bits_gemm": plan.bits(plan.gemm()),
        "bits_adaln": plan.bits([x for x in plan.quantized() if x.role == "adaln"]),
    }


def _print(run: Run, cost: Estimate, every: bool) -> None:
    rows = _rows(run.plan)
    head = ("layer", "role", "N x K", "weights", "activations", "bits", "method", "note")
    table(head, rows if every else fold(rows))
    click.echo()
    if not run.scan.traced:
        click.echo("no inputs for this class: roles come from layer names alone, not from a trace")
    print_unknown(run.plan)
    stored = {f"{layer.name}.weight" for layer in run.plan.convolutions()}
    left = {name: why for name, why in run.scan.unsupported.items() if name not in stored}
    kept = {re.sub(r"\.\d+\.", ".*.", name): why for name, why in left.items()}
    for name, why in kept.items():
        click.echo(f"unquantized, {why}: {name}")
    for label, value in _summary(run, cost):
        click.echo(f"{label:28}{value}")


def _print_shares(files: dict[str, int]) -> None:
    total = sum(files.values())
    shares = [(name, size(file), f"{file / total:.0%}") for name, file in files.items()]
    table(("component", "file", "share"), [*shares, ("together", size(total), "")])


def _rows(plan: Plan) -> list[tuple[str, ...]]:
    return [
        (
            x.name,
            x.role,
            "x".join(map(str, x.shape)),
            x.weight_format or "-",
            "-" if x.unquantized else x.activation_format,
            "" if x.unquantized else f"{x.bits(plan.bins):.2f}",
            "unquantized" if x.unquantized else f"{x.transform.name}, {x.solver.name}",
            x.note,
        )
        for x in plan.layers
    ]


def _summary(run: Run, cost: Estimate) -> list[tuple[str, str]]:
    plan = run.plan
    lines = [("attention and feed-forward", f"{plan.bits(plan.gemm()):.3f} bits per weight")]
    if modulation := [x for x in plan.quantized() if x.role == "adaln"]:
        lines.append(("modulation", f"{plan.bits(modulation):.3f} bits per weight"))
    if convolutions := plan.convolutions():
        bits = f"{len(convolutions)}, {plan.bits(convolutions):.3f} bits per weight"
        lines.append(("convolutions", bits))
    if tables := plan.tables():
        small, dtype = sum(x.nbytes() for x in tables), run.loaded.dtype
        floats = sum(math.prod(x.shape) for x in tables) * dtype.itemsize
        bits = f"{plan.bits(tables):.3f} bits per weight, {size(floats)} to {size(small)}"
        lines.append(("table of embeddings", bits))
    lines.append(("file", f"{cost.file} bytes ({size(cost.file)}); float {size(cost.float_file)}"))
    if cost.file_most > cost.file:
        most = f"{size(cost.file_most)} if the whole budget is spent ({cost.budget})"
        lines.append(("  at most", most))
    time = "unknown"
    if cost.seconds is not None:
        time = f"about {duration(cost.seconds)} (rough; the progress bar shows the remaining time)"
    lines.append(("peak memory", f"about {size(cost.memory)}"))
    lines.append(("disk during the run", f"about {size(cost.disk)}"))
    lines.append(("time", time))
    return lines
