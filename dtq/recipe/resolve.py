# SPDX-License-Identifier: Apache-2.0
"""From a recipe and the scan of a model to a plan: one entry for every linear."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from typing import TYPE_CHECKING

from dtq.errors import RecipeError
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.io.schema import MethodSpec
from dtq.models import Linear, Scan
from dtq.plan import LayerPlan, LayerSpec, Plan
from dtq.plan.layers import misfit
from dtq.recipe.schema import Rule, StepPolicySearch
from dtq.recipe.selectors import excludes, is_role, matches
from dtq.solvers.lowrank import rank_for
from dtq.transforms import TRANSFORMS

if TYPE_CHECKING:
    from dtq.pipelines.settings import SamplingSettings
    from dtq.recipe.recipe import Recipe

MODULATION = {"w8a16": "int8-g64", "w4a16": "int4-asym-g64", "keep": ""}
"""How modulation linears are stored, or the name of a format: weight-only, see docs/design.md."""

_MODULATION_FALLBACKS = {"w8a16": ("int8-row",), "w4a16": ("int4-asym-g32", "int8-row"), "keep": ()}

CONVOLUTIONS = {"keep": "", "w8": "int8-row"}
"""How convolutions of blocks are stored: as they are, or with one scale per output channel."""

EMBEDDINGS = {"keep": "", "w8": "int8-row", "w4": "int4-2l-g32"}
"""How tables of token embeddings are stored: as they are, or in rows that are unpacked one by one.
Both formats are measured in docs/text_encoders.md."""

EMBEDDING_FALLBACK = "int8-row"
"""For tables whose rows the format does not divide."""

KEEP = "keep"
"""In place of the recipe of text encoders: they are not quantized."""


BNB_NF4 = "bnb-nf4"
"""In place of the recipe of text encoders: NF4 of bitsandbytes, in its own format."""
TEXT_RECIPE = "w4a16"
"""Recipe of text encoders whose formats a budget chooses: weights alone, which is what counts."""


def for_text_encoder(
    recipe: Recipe, calibration: SamplingSettings, *, shares_budget: bool = False
) -> Recipe:
    """A recipe as it applies to text encoders, which have no timestep.

    Args:
        recipe: of the text encoders.
        calibration: of the transformer; the text encoders are calibrated on the same prompts, and
            on as many mixed ones as their own recipe says.
        shares_budget: a budget chooses between the recipe's format and 8 bits per weight.
    """
    if shares_budget:
        formats = (recipe.weights, "int8-row")
        recipe = replace(recipe, allocate=replace(recipe.allocate, formats=formats))
    return replace(
        recipe,
        calibration=replace(
            calibration, num_timestep_bins=1, mixed_prompts=recipe.calibration.mixed_prompts
        ),
        step_policy=StepPolicySearch(),
        attention="float",
    )


def resolve(
    recipe: Recipe, scan: Scan, exclude: tuple[str, ...], tied: tuple[str, ...] = ()
) -> Plan:
    """See :meth:`Recipe.plan`.

    Args:
        recipe: what is asked for.
        scan: as there.
        exclude: as there.
        tied: as there.
    """
    linears = list(scan.linears())
    selectors = {f"rules[{i}].match": rule.match for i, rule in enumerate(recipe.rules)}
    # a role that this model has no layer of is no mistake in a list that serves every model
    names = [selector for selector in recipe.exclude if not is_role(selector)]
    others = (*scan.convolutions, *scan.tables)
    names = [x for x in names if not any(matches(x, layer) for layer in others)]
    selectors |= {f"exclude[{recipe.exclude.index(name)}]": name for name in names}
    unused = [
        f"{at}: {selector!r} matches no layer of this model"
        for at, selector in selectors.items()
        if not any(matches(selector, linear) for linear in linears)
        and not any(fnmatch.fnmatchcase(name, selector) for name in scan.uncalled)
    ]
    if unused:
        raise RecipeError(f"recipe {recipe.name}", unused)
    layers = [_resolve_layer(recipe, linear, (*exclude, *tied)) for linear in linears]
    layers += _convolutions(recipe, scan, exclude)
    layers += _tables(recipe, scan, exclude)
    per_timestep = any(ACTIVATION_FORMATS[x.activation_format].per_timestep for x in layers)
    note = "never called in the traced forward"
    layers += [LayerPlan(name, "other", (0, 0), note=note) for name in scan.uncalled]
    bins = recipe.calibration.num_timestep_bins if per_timestep else 1
    return Plan(recipe.name, tuple(layers), bins)


def _resolve_layer(recipe: Recipe, linear: Linear, exclude: tuple[str, ...]) -> LayerPlan:
    base = LayerPlan(linear.name, linear.role, linear.shape)
    if any(excludes(pattern, linear.name) for pattern in exclude):
        note = "excluded by name (--exclude, modules_to_not_convert, or float32 in diffusers)"
        return replace(base, note=note)
    rules = [rule for rule in recipe.rules if matches(rule.match, linear)]
    if not rules and any(matches(selector, linear) for selector in recipe.exclude):
        return replace(base, note=f"the recipe excludes {linear.role}")
    wanted, fallbacks = _wanted(recipe, linear, rules)
    if not wanted.weights:
        return replace(base, note="the recipe excludes it")
    problems = {name: misfit(name, linear.shape) for name in (wanted.weights, *fallbacks)}
    weights = next((name for name, problem in problems.items() if not problem), "")
    note = problems[wanted.weights]
    if not weights:
        return replace(base, note=f"unquantized: {note}")
    assert wanted.activations is not None and wanted.transform and wanted.solver and wanted.lowrank  # noqa: PT018
    activations, other = _fitting_activations(wanted.activations, linear.shape[1])
    transform, lowrank = wanted.transform, wanted.lowrank
    candidates = recipe.transform_candidates if linear.role != "adaln" else ()
    block = 1
    method = TRANSFORMS[transform.name]
    if method.rotates:
        largest = dict(transform.knobs).get("block", method.largest_block)
        block = method.block_for(linear.shape[1], largest)
    transformed = any(name != "none" for name in (transform.name, *candidates))
    rank = 0 if lowrank.name == "none" else rank_for(linear.shape, dict(lowrank.knobs))
    own = linear.role != "adaln" and all(rule.weights is None for rule in rules)
    return replace(
        base,
        spec=LayerSpec(weights, activations, block, pre_quant=transformed, rank=rank),
        transform=transform,
        solver=wanted.solver,
        lowrank=lowrank,
        format_candidates=recipe.format_candidates if own and weights == recipe.weights else (),
        note="; ".join(x for x in (note, other) if x),
    )


def _convolutions(recipe: Recipe, scan: Scan, exclude: tuple[str, ...]) -> list[LayerPlan]:
    """The convolutions that are quantized: all of blocks but the excluded ones, or none."""
    name = CONVOLUTIONS[recipe.convolutions]
    if not name:
        return []
    return [
        LayerPlan(conv.name, conv.role, conv.shape, LayerSpec(name, "none"))
        for conv in scan.convolutions
        if not any(excludes(pattern, conv.name) for pattern in exclude)
        and not any(matches(selector, conv) for selector in recipe.exclude)
    ]


def _tables(recipe: Recipe, scan: Scan, exclude: tuple[str, ...]) -> list[LayerPlan]:
    """The tables of token embeddings that are quantized: all but the excluded ones, or none."""
    wanted = EMBEDDINGS[recipe.embeddings]
    if not wanted:
        return []
    layers = []
    for table in scan.tables:
        names = (table.name, *table.tied)
        if any(excludes(pattern, name) for pattern in exclude for name in names):
            continue
        if any(matches(selector, table) for selector in recipe.exclude):
            continue
        problem = misfit(wanted, table.shape)
        spec = LayerSpec(EMBEDDING_FALLBACK if problem else wanted, "none")
        # clip search gains nothing at 8 bits
        solver = MethodSpec("rtn" if spec.weight_format == EMBEDDING_FALLBACK else "search")
        also = f"also the weight of {', '.join(table.tied)}" if table.tied else ""
        note = "; ".join(x for x in (problem, also) if x)
        layers.append(
            LayerPlan(table.name, table.role, table.shape, spec, solver=solver, note=note)
        )
    return layers


def _wanted(recipe: Recipe, linear: Linear, rules: list[Rule]) -> tuple[Rule, tuple[str, ...]]:
    """What the recipe and its rules ask for of one linear, and the fallback formats."""
    if linear.role == "adaln":
        none = MethodSpec("none")
        solver = recipe.solver if recipe.solver.name == "rtn" else MethodSpec("search")
        weights = MODULATION.get(recipe.modulation, recipe.modulation)
        wanted = Rule("", weights, "none", none, solver, none)
        fallbacks = _MODULATION_FALLBACKS.get(recipe.modulation, ("int8-row",))
    else:
        wanted = Rule(
            "", recipe.weights, recipe.activations, recipe.transform, recipe.solver, recipe.lowrank
        )
        fallbacks = recipe.format_fallbacks
    for rule in rules:
        exceptions = {k: v for k, v in vars(rule).items() if v is not None and k != "match"}
        wanted = replace(wanted, **exceptions)
    return wanted, fallbacks


def _fitting_activations(name: str, columns: int) -> tuple[str, str]:
    """The activation format, or one scale per token where its groups do not divide K; and why."""
    fmt = ACTIVATION_FORMATS[name]
    if fmt.block_format and (problem := misfit(fmt.block_format, (1, columns))):
        return f"int{fmt.bits}-row", f"input as int{fmt.bits}-row: {problem}".split(". ")[0]
    return name, ""
