# SPDX-License-Identifier: Apache-2.0
"""A target as a constraint on a plan: what the engine cannot hold is adapted, or refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from dtq.engines import find_target
from dtq.engines.target import CONVOLUTION, Limits, Target
from dtq.errors import RecipeError
from dtq.formats import FORMATS
from dtq.io.schema import MethodSpec
from dtq.plan.layers import LayerPlan, LayerSpec, Plan, misfit
from dtq.recipe import Recipe


def constrain(
    plan: Plan,
    recipe: Recipe,
    target: Target,
    convolutions: Collection[str] = (),
    joined: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """The plan with every layer in a form that the engine of a target can hold.

    A format that the recipe names is never changed where the engine has none like it: that is
    refused. A layer whose format the recipe leaves to dtq (modulation, widths that the format does
    not fit), or whose shape the engine cannot hold, gets the first of the target's fallbacks that
    fits, weight-only, or stays unquantized; its note says why.

    Args:
        plan: the recipe, resolved to the layers of a model.
        recipe: the recipe.
        target: what the file will be exported to.
        convolutions: names of the layers that are 1 x 1 convolutions.
        joined: for layers whose rows are a part of one matrix in the engine's files, its name.
            They have one format; where one of them stays unquantized, all do.

    Raises:
        RecipeError: the engine cannot hold what the recipe asks for; names every key and layer,
            and the recipe that fits.
    """
    problems = list(_recipe_problems(recipe, target))
    changed, refused = {}, dict[str, list[str]]()
    for layer in plan.quantized():
        if layer.name in convolutions:
            changed[layer.name] = _unquantized(layer, target, CONVOLUTION)
            continue
        reason = _reason(layer, target.limits)
        if reason and _is_own_choice(layer, recipe):
            refused.setdefault(reason, []).append(layer.name)
            continue
        reason = reason or target.limits.shape_reason(layer.spec, layer.shape)
        if reason:
            changed[layer.name] = _adapted(layer, target, reason)
    fits = plan.with_layers(changed)
    changed |= _together(fits, target, joined, refused)
    if recipe.finetune.name != "none":
        problems += _finetune_problems(plan.with_layers(changed), target, joined)
    problems += _branch_problems(plan.with_layers(changed), target, joined)
    for reason, names in refused.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        problems.append(f"{names[0]}{more}: {reason}")
    if problems:
        problems.append(f"the recipe {target.limits.recipe} fits: --recipe {target.limits.recipe}")
        raise RecipeError(f"recipe {recipe.name} for {target.name}", problems)
    return plan.with_layers(changed)


def _together(
    plan: Plan, target: Target, joined: Mapping[str, str], refused: dict[str, list[str]]
) -> dict[str, LayerPlan]:
    """Layers that change because the engine has their rows in one matrix; adds to ``refused``."""
    matrices: dict[str, list[LayerPlan]] = {}
    for layer in plan.layers:
        if layer.name in joined:
            matrices.setdefault(joined[layer.name], []).append(layer)
    changed: dict[str, LayerPlan] = {}
    for name, layers in matrices.items():
        floats = [layer for layer in layers if layer.unquantized]
        if floats and len(floats) < len(layers):
            reason = f"its rows and those of {floats[0].name} are {name} there"
            quantized = (layer for layer in layers if not layer.unquantized)
            changed |= {x.name: _unquantized(x, target, reason) for x in quantized}
        elif len({(layer.spec, layer.transform, layer.format_candidates) for layer in layers}) > 1:
            formats = ", ".join(f"{x.name.split('.')[-1]} {x.weight_format}" for x in layers)
            reason = (
                f"one matrix in original files, and formats or transforms differ ({formats}); "
                f"give their roles the same"
            )
            refused.setdefault(reason, []).append(layers[0].name)
    return changed


def _finetune_problems(plan: Plan, target: Target, joined: Mapping[str, str]) -> list[str]:
    """The tensor that fine-tuning would train apart in layers that are one matrix there."""
    for layer in plan.quantized():
        shared = FORMATS[layer.weight_format].matrix_tensors
        if layer.name in joined and shared:
            return [
                f"finetune: trains {shared[0]} of each layer by itself, and {target.name} has one "
                f"for all rows of {joined[layer.name]}; --set finetune=none"
            ]
    return []


def _branch_problems(plan: Plan, target: Target, joined: Mapping[str, str]) -> list[str]:
    """Branches that would differ in layers that are one matrix there."""
    for layer in plan.quantized():
        own = layer.lowrank.name != "none" and not dict(layer.lowrank.knobs).get("share")
        if own and layer.name in joined:
            return [
                f"lowrank: {layer.lowrank.name} gives each layer a branch of its own, and "
                f"{target.name} has one proj_down for all rows of {joined[layer.name]}; "
                f"--set 'lowrank={{svd: {{share: true}}}}'"
            ]
    return []


def in_format(layer: LayerPlan, name: str, target: str) -> LayerPlan:
    """A layer of a plan in another weight format, if the engine of a target holds it then.

    Args:
        layer: in its present format.
        name: key of ``FORMATS``.
        target: key of ``TARGETS``; empty: any format that fits the width.

    Returns:
        The layer in the format; or as it is, with a note that says why.
    """
    changed = layer.in_format(name)
    if not target or changed.weight_format != name:
        return changed
    limits = find_target(target).limits
    reason = _reason(changed, limits) or limits.shape_reason(changed.spec, changed.shape)
    return replace(layer, note=layer.note or f"{target}: {reason}") if reason else changed


def _recipe_problems(recipe: Recipe, target: Target) -> Iterator[str]:
    """Parts of a recipe that decide later, and would leave what the engine can hold."""
    limits = target.limits
    if recipe.step_policy.precisions:
        yield (
            f"step_policy: {target.name} runs every timestep in the same precision; "
            f"--set step_policy.precisions=[]"
        )
    if recipe.attention != "float":
        yield (
            f"attention: a file for {target.name} cannot say that attention is "
            f"{recipe.attention}; --set attention=float"
        )
    others = [name for name in recipe.transform_candidates if name not in limits.transforms]
    if others:
        yield (
            f"transform_candidates: {target.name} cannot run {', '.join(others)}; "
            f"--set transform_candidates=[]"
        )
    later = {
        "promote.to": (recipe.promote.to,) if recipe.promote.to else (),
        "allocate.formats": recipe.allocate.formats if recipe.allocate.budget else (),
        "format_candidates": recipe.format_candidates,
    }
    for key, names in later.items():
        wrong = [name for name in names if name not in limits.formats]
        if wrong:
            known = ", ".join(limits.formats)
            yield f"{key}: {target.name} cannot hold {', '.join(wrong)}; it holds {known}"


def _reason(layer: LayerPlan, limits: Limits) -> str | None:
    if layer.weight_format not in limits.formats:
        return f"weights {layer.weight_format}, where it holds {', '.join(limits.formats)}"
    runs = limits.formats[layer.weight_format]
    if layer.activation_format not in runs:
        return f"activations {layer.activation_format}, where it runs {', '.join(runs)}"
    if layer.transform.name not in limits.transforms:
        known = ", ".join(limits.transforms)
        return f"transform {layer.transform.name}, where it runs {known}"
    if reason := limits.transform_reason(layer):
        return f"transform {layer.transform.name}: {reason}"
    formats = (layer.weight_format, layer.activation_format)
    if layer.lowrank.name != "none" and formats not in limits.branch:
        return f"a low-rank branch, which it does not have in {' with '.join(formats)} activations"
    return None


def _is_own_choice(layer: LayerPlan, recipe: Recipe) -> bool:
    """Whether the recipe names the format of a layer, rather than leaving it to dtq."""
    if layer.role == "adaln":
        return False
    named = {recipe.weights, *(rule.weights for rule in recipe.rules if rule.weights)}
    return layer.weight_format in named


def _adapted(layer: LayerPlan, target: Target, reason: str) -> LayerPlan:
    none = MethodSpec("none")
    for name in target.limits.fallbacks:
        spec = LayerSpec(name, "none")
        if not misfit(name, layer.shape) and not target.limits.shape_reason(spec, layer.shape):
            note = f"{name} for {target.name}: {reason}"
            return replace(
                layer, spec=spec, transform=none, lowrank=none, format_candidates=(), note=note
            )
    return _unquantized(layer, target, reason)


def _unquantized(layer: LayerPlan, target: Target, reason: str) -> LayerPlan:
    note = f"unquantized for {target.name}: {reason}"
    return LayerPlan(layer.name, layer.role, layer.shape, note=note)
