# SPDX-License-Identifier: Apache-2.0
"""Recipes: what to do with each role, read from YAML, every mistake reported at once."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dtq.errors import InputError, RecipeError
from dtq.finetune import FINETUNE
from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS, PRECISIONS
from dtq.io.package_data import folder
from dtq.io.safe_parse import LARGEST_YAML, parse_yaml, read_text
from dtq.io.schema import MethodSpec, check_method, check_name, plain, read
from dtq.linalg.hadamard import block_for
from dtq.models import ROLES, Linear, Scan
from dtq.pipelines.settings import SamplingSettings
from dtq.plan.layers import LayerPlan, LayerSpec, Plan
from dtq.recipe.schema import Allocate, Promote, Rule, StepPolicySearch
from dtq.solvers import SOLVERS
from dtq.solvers.lowrank import LOWRANK, rank_for
from dtq.transforms import TRANSFORMS

MODULATION = {"w8a16": "int8-g64", "w4a16": "int4-asym-g64", "keep": ""}
"""How modulation linears are stored, or the name of a format: weight-only, see docs/design.md."""

_MOST = {
    "samples": 10**6,
    "steps": 10**4,
    "batch_size": 10**4,
    "num_timestep_bins": 1000,
    "seed": 2**40,
}
"""Beyond these lists alone would not fit in memory."""

_MODULATION_FALLBACK = {"w8a16": ("int8-row",), "w4a16": ("int4-asym-g32", "int8-row"), "keep": ()}


def _methods() -> dict[str, dict[str, Callable[..., Any]]]:
    """The methods that a key of the recipe names; read late, tables may have grown."""
    none = {"none": lambda: None}
    return {
        "transform": {name: row.call for name, row in TRANSFORMS.items()},
        "solver": {name: row.call for name, row in SOLVERS.items()},
        "lowrank": none | {name: row.call for name, row in LOWRANK.items()},
        "finetune": none | FINETUNE,
    }


@dataclass(frozen=True)
class Recipe:
    """Intent, in roles. See docs/recipes.md for every key.

    Attributes:
        name: of the file, without ``.yaml``.
        about: one line.
        weights: format of attention and feed-forward weights.
        acts: format of their inputs.
        transform: how the change of input channels is chosen.
        compare: transforms that the whole model is solved with as well; what has the least error
            on recorded calls of the float model stays.
        solver: how weights are rounded.
        fallback: weight formats, the first that fits a layer whose shape ``weights`` does not.
        choose: formats that every layer is solved in, the best one kept; ``weights`` is for the
            plan. They should cost the same.
        lowrank: a 16-bit branch of low rank beside every weight; ``none`` for none.
        modulation: a key of ``MODULATION``, or a weight format.
        correct_bias: move the mean error of each layer into its bias.
        keep: roles or globs on names that stay in the compute dtype.
        rules: exceptions, the last match wins.
        guard: promotion of sensitive layers; ``to: ""`` switches it off.
        allocate: formats by layer within a budget.
        refine: fine-tuning of what is continuous, block by block; ``none`` for none.
        steps: activation precision by part of the trajectory.
        calibration: what to run the float model on.
    """

    name: str = ""
    about: str = ""
    weights: str = "int4-2l-g64"
    activations: str = "int8-row"
    transform: MethodSpec = MethodSpec("search")
    transform_candidates: tuple[str, ...] = ()
    solver: MethodSpec = MethodSpec("gptq")
    format_candidates: tuple[str, ...] = ()
    lowrank: MethodSpec = MethodSpec("none")
    format_fallbacks: tuple[str, ...] = ("int4-2l-g32", "int8-row")
    modulation: str = "w8a16"
    correct_bias: bool = True
    exclude: tuple[str, ...] = ("embed", "head")
    rules: tuple[Rule, ...] = ()
    promote: Promote = field(default_factory=Promote)
    allocate: Allocate = field(default_factory=Allocate)
    finetune: MethodSpec = MethodSpec("none")
    step_policy: StepPolicySearch = field(default_factory=StepPolicySearch)
    calibration: SamplingSettings = field(default_factory=SamplingSettings)

    @classmethod
    def load(cls, what: str | Path | Recipe, **overrides: Any) -> Recipe:
        """A recipe by name, by path to a YAML file, or itself, with top-level keys overridden.

        Raises:
            InputError: no recipe of that name, no such file.
            RecipeError: the file or an override has mistakes; all of them are in the message.
        """
        if isinstance(what, Recipe):
            data, where, name = what.to_dict(), f"recipe {what.name}", what.name
        else:
            path = find(what)
            where, name = str(path), path.stem
            try:
                data = parse_yaml(read_text(path, LARGEST_YAML), where)
            except InputError as error:
                raise RecipeError(where, [str(error).removeprefix(f"{where}: ")]) from error
        if not isinstance(data, dict):
            raise RecipeError(where, ["a recipe is a mapping of keys to values"])
        problems: list[str] = []
        recipe = read(cls, {**data, **overrides, "name": name}, "", problems)
        problems += recipe.problems() if not problems else []
        if problems:
            raise RecipeError(where, problems)
        return recipe

    def problems(self) -> list[str]:
        """Names that no table knows, and knobs that no method has."""
        found: list[str] = []
        check_name(self.weights, FORMATS, "weights", found)
        for i, name in enumerate(self.format_fallbacks):
            check_name(name, FORMATS, f"format_fallbacks[{i}]", found)
        check_name(self.activations, ACTIVATION_FORMATS, "activations", found)
        check_name(self.modulation, [*MODULATION, *FORMATS], "modulation", found)
        for i, name in enumerate(self.format_candidates):
            check_name(name, FORMATS, f"format_candidates[{i}]", found)
        for i, name in enumerate(self.allocate.formats):
            check_name(name, FORMATS, f"allocate.formats[{i}]", found)
        for i, name in enumerate(self.step_policy.precisions):
            check_name(name, PRECISIONS, f"step_policy.precisions[{i}]", found)
        methods = _methods()
        for key, table in methods.items():
            check_method(getattr(self, key), table, key, found)
        for i, name in enumerate(self.transform_candidates):
            check_name(name, TRANSFORMS, f"transform_candidates[{i}]", found)
        if self.promote.to:
            check_name(self.promote.to, FORMATS, "promote.to", found)
        for i, rule in enumerate(self.rules):
            at = f"rules[{i}]"
            if rule.weights:
                check_name(rule.weights, FORMATS, f"{at}.weights", found)
            if rule.activations is not None:
                check_name(rule.activations, ACTIVATION_FORMATS, f"{at}.activations", found)
            for key in ("transform", "solver", "lowrank"):
                if call := getattr(rule, key):
                    check_method(call, methods[key], f"{at}.{key}", found)
            _selector(rule.match, f"{at}.match", found)
        for selector in self.exclude:
            _selector(selector, "exclude", found)
        c = self.calibration
        for key in ("samples", "batch_size", "num_shards", "num_timestep_bins"):
            if getattr(c, key) < 1:
                found.append(f"calibration.{key}: must be at least 1, is {getattr(c, key)}")
        for key in ("steps", "guidance", "seed"):
            if getattr(c, key) < 0:
                found.append(f"calibration.{key}: must not be negative, is {getattr(c, key)}")
        for key, most in _MOST.items():
            if getattr(c, key) > most:
                found.append(f"calibration.{key}: must be at most {most}, is {getattr(c, key)}")
        return found

    def plan(self, scan: Scan, skip: Iterable[str] = ()) -> Plan:
        """Resolve to exact layers.

        Args:
            scan: the model's linears.
            skip: dotted names, prefixes, components or ``re:`` patterns that are kept
                (``modules_to_not_convert`` of diffusers).

        Raises:
            RecipeError: a rule or ``keep`` entry matches no layer of this model.
        """
        skips = tuple(skip)
        layers = [self._layer(linear, skips) for linear in scan.linears()]
        layers += [
            LayerPlan(name, "other", (0, 0), note="never called in the traced forward")
            for name in scan.uncalled
        ]
        unused = [
            f"rules[{i}].match: {rule.match!r} matches no layer of this model"
            for i, rule in enumerate(self.rules)
            if not any(_matches(rule.match, linear) for linear in scan.linears())
        ]
        if unused:
            raise RecipeError(f"recipe {self.name}", unused)
        bins = (
            self.calibration.num_timestep_bins
            if any(ACTIVATION_FORMATS[x.activation_format].per_timestep for x in layers)
            else 1
        )
        return Plan(self.name, tuple(layers), bins)

    def needs(self) -> frozenset[str]:
        """The statistics that this recipe's methods read."""
        transforms = [self.transform, *(r.transform for r in self.rules if r.transform)]
        solvers = [self.solver, *(r.solver for r in self.rules if r.solver)]
        branches = [self.lowrank, *(r.lowrank for r in self.rules if r.lowrank)]
        wanted = frozenset().union(
            *(TRANSFORMS[t.name].needs for t in transforms),
            *(TRANSFORMS[name].needs for name in self.transform_candidates),
            *(SOLVERS[s.name].needs for s in solvers),
            *(LOWRANK[b.name].needs for b in branches if b.name != "none"),
        )
        if self.correct_bias:
            wanted |= {"channels"}
        if self.promote.to or self.format_candidates:
            wanted |= {"sample"}
        acts = [self.activations, *(r.activations for r in self.rules if r.activations is not None)]
        if any(ACTIVATION_FORMATS[a].static for a in acts):
            wanted |= {"sample"}
        return wanted

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default filled in; ``dtq recipe show`` prints it as YAML."""
        data: dict[str, Any] = plain(self)
        return data

    def _layer(self, linear: Linear, skips: tuple[str, ...]) -> LayerPlan:
        base = LayerPlan(linear.name, linear.role, linear.shape)
        chosen = [rule for rule in self.rules if _matches(rule.match, linear)]
        weights, acts, transform, solver = (
            self.weights,
            self.activations,
            self.transform,
            self.solver,
        )
        fallback, lowrank, choose = self.format_fallbacks, self.lowrank, self.format_candidates
        if linear.role == "adaln":
            weights = MODULATION.get(self.modulation, self.modulation)
            acts, transform, lowrank, choose = "none", MethodSpec("none"), MethodSpec("none"), ()
            solver = self.solver if self.solver.name == "rtn" else MethodSpec("search")
            fallback = _MODULATION_FALLBACK.get(self.modulation, ("int8-row",))
        if any(_skipped(pattern, linear.name) for pattern in skips):
            return replace(base, note="named in modules_to_not_convert")
        if not chosen and any(_matches(selector, linear) for selector in self.exclude):
            return replace(base, note=f"the recipe keeps {linear.role}")
        for rule in chosen:
            weights = weights if rule.weights is None else rule.weights
            acts = acts if rule.activations is None else rule.activations
            transform, solver = rule.transform or transform, rule.solver or solver
            lowrank = rule.lowrank or lowrank
            choose = choose if rule.weights is None else ()
        if not weights:
            return replace(base, note="the recipe keeps it")
        weights, note = _fitting((weights, *fallback), linear.shape)
        if not weights:
            return replace(base, note=f"kept: {note}")
        acts, other = _acts_fitting(acts, linear.shape[1])
        note = "; ".join(x for x in (note, other) if x)
        others = self.transform_candidates if linear.role != "adaln" else ()
        changed = any(name != "none" for name in (transform.name, *others))
        block = 1
        if TRANSFORMS[transform.name].rotates:
            block = block_for(linear.shape[1], dict(transform.knobs).get("block", 64))
        rank = 0 if lowrank.name == "none" else rank_for(linear.shape, dict(lowrank.knobs))
        return replace(
            base,
            spec=LayerSpec(weights, acts, block, pre_quant=changed, rank=rank),
            transform=transform,
            solver=solver,
            lowrank=lowrank,
            format_candidates=choose if weights == self.weights else (),
            note=note,
        )


def _fitting(formats: Iterable[str], shape: tuple[int, int]) -> tuple[str, str]:
    """The first format that a shape fits, and why the first choice did not; empty if none does."""
    reason = ""
    for name in formats:
        try:
            FORMATS[name].tensor_specs(shape)
        except InputError as error:
            reason = reason or str(error).split(". Use")[0]
        else:
            return name, reason
    return "", reason


def _acts_fitting(acts: str, columns: int) -> tuple[str, str]:
    """The activation format, or where its groups do not divide K, one scale per token."""
    if not ACTIVATION_FORMATS[acts].block_format:
        return acts, ""
    try:
        FORMATS[ACTIVATION_FORMATS[acts].block_format].tensor_specs((1, columns))
    except InputError as error:
        return (
            f"int{ACTIVATION_FORMATS[acts].bits}-row",
            f"input as int{ACTIVATION_FORMATS[acts].bits}-row: {error}".split(". ")[0],
        )
    return acts, ""


def find(what: str | Path) -> Path:
    """The file of a recipe given by name or path.

    Raises:
        InputError: neither exists; lists the names that do.
    """
    path = Path(what)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise InputError(f"{path}: no such recipe file")
    known = names()
    if str(what) not in known:
        near = difflib.get_close_matches(str(what), known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}."
        raise InputError(f"unknown recipe {str(what)!r}; {hint} See: dtq recipe ls")
    return folder("recipes") / f"{what}.yaml"


def names() -> list[str]:
    """Names of the recipes that dtq ships, sorted."""
    return sorted(path.stem for path in folder("recipes").rglob("*.yaml"))


def _matches(selector: str, linear: Linear) -> bool:
    return (
        linear.role == selector
        or fnmatch.fnmatchcase(linear.role, selector)
        or (fnmatch.fnmatchcase(linear.name, selector))
    )


def _skipped(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise InputError(f"{pattern!r} is not a regular expression: {error}") from error
    return name == pattern or name.startswith(f"{pattern}.") or pattern in name.split(".")


def _selector(selector: str, at: str, problems: list[str]) -> None:
    """A selector without wildcard or dot must be a role; others are globs on names."""
    if selector in ROLES or any(c in selector for c in "*?[") or selector.count(".") > 1:
        return
    if any(fnmatch.fnmatchcase(role, selector) for role in ROLES):
        return
    near = difflib.get_close_matches(selector, ROLES, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"roles: {', '.join(ROLES)}"
    problems.append(f"{at}: {selector!r} is neither a role nor a pattern; {hint}")
