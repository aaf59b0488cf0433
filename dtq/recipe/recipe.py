# SPDX-License-Identifier: Apache-2.0
"""``Recipe``: what a user asks for, by role, read from YAML; every mistake is reported at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtq.errors import InputError, RecipeError, hint
from dtq.finetune import FINETUNE
from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS, PRECISIONS
from dtq.io.package_data import find_yaml
from dtq.io.safe_parse import LARGEST_YAML, parse_yaml, read_text
from dtq.io.schema import MethodSpec, check_method, check_name, plain, read
from dtq.models import ROLES, Scan
from dtq.pipelines.settings import SamplingSettings
from dtq.plan import Plan
from dtq.recipe.resolve import CONVOLUTIONS, EMBEDDINGS, MODULATION, resolve
from dtq.recipe.schema import Allocate, Promote, Rule, StepPolicySearch
from dtq.recipe.selectors import is_role
from dtq.solvers import SOLVERS
from dtq.solvers.lowrank import LOWRANK
from dtq.transforms import TRANSFORMS

ATTENTION = ("float", "int8")
"""How attention is computed on a CPU."""

_LEAST = {"samples": 1, "batch_size": 1, "num_shards": 1, "num_timestep_bins": 1} | dict.fromkeys(
    ("steps", "guidance", "seed", "mixed_prompts"), 0
)
_MOST = {
    "samples": 10**6, "steps": 10**4, "batch_size": 10**4, "num_timestep_bins": 1000,
    "seed": 2**40, "mixed_prompts": 1000,
}  # fmt: skip
"""Above these even the lists of samples and bins would not fit in memory."""


@dataclass(frozen=True)
class Recipe:
    """What is asked for, by role. docs/recipes.md describes every key.

    Attributes:
        name: of the file, without ``.yaml``.
        about: one line.
        weights: weight format of attention and feed-forward.
        activations: format of their inputs.
        transform: how the input transform is chosen.
        transform_candidates: other transforms that the whole model is solved with; the one with
            the lowest error on recorded inputs stays.
        solver: how weights are quantized.
        format_candidates: weight formats that every layer is solved in, the best one kept. The plan
            shows ``weights``; the candidates should cost the same.
        lowrank: 16-bit low-rank branch of every weight; ``none`` for none.
        format_fallbacks: weight formats for layers whose shape ``weights`` does not fit; the first
            that fits is taken.
        modulation: a key of ``MODULATION``, or a weight format.
        convolutions: a key of ``CONVOLUTIONS``: how convolutions of blocks are stored.
        embeddings: a key of ``EMBEDDINGS``: how tables of token embeddings are stored.
        correct_bias: whether each layer's mean error is moved into its bias.
        exclude: roles, or globs on names, that stay unquantized.
        rules: exceptions; the last match wins.
        promote: promotion of sensitive layers.
        allocate: mixed precision within a budget.
        finetune: fine-tuning, block by block; ``none`` for none.
        step_policy: activation precision by part of the trajectory.
        attention: ``int8`` lets modules compute their attention in int8 on a CPU where the error
            of a step allows it; ``float`` keeps that of the model.
        calibration: what the float model is run on.
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
    convolutions: str = "keep"
    embeddings: str = "keep"
    correct_bias: bool = True
    exclude: tuple[str, ...] = ("embed", "head")
    rules: tuple[Rule, ...] = ()
    promote: Promote = field(default_factory=Promote)
    allocate: Allocate = field(default_factory=Allocate)
    finetune: MethodSpec = MethodSpec("none")
    step_policy: StepPolicySearch = field(default_factory=StepPolicySearch)
    attention: str = "float"
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
        """Names that no table has, knobs that no method has, numbers out of range."""
        problems: list[str] = []
        for at, name, table in self._names():
            check_name(name, table, at, problems)
        methods = _methods()
        for key, table in methods.items():
            check_method(getattr(self, key), table, key, problems)
        for i, rule in enumerate(self.rules):
            for key in ("transform", "solver", "lowrank"):
                if method := getattr(rule, key):
                    check_method(method, methods[key], f"rules[{i}].{key}", problems)
            _check_selector(rule.match, f"rules[{i}].match", problems)
        for selector in self.exclude:
            _check_selector(selector, "exclude", problems)
        for key in dict.fromkeys((*_LEAST, *_MOST)):
            value = getattr(self.calibration, key)
            if value is None:  # guidance: the pipeline's own
                continue
            if value < _LEAST.get(key, value):
                least = "be at least 1" if _LEAST[key] else "not be negative"
                problems.append(f"calibration.{key}: must {least}, is {value}")
            if value > _MOST.get(key, value):
                problems.append(f"calibration.{key}: must be at most {_MOST[key]}, is {value}")
        return problems

    def _names(self) -> Iterator[tuple[str, str, Iterable[str]]]:
        """Where a name stands, the name, and the table that must have it."""
        yield "weights", self.weights, FORMATS
        yield "activations", self.activations, ACTIVATION_FORMATS
        yield "attention", self.attention, ATTENTION
        yield "modulation", self.modulation, [*MODULATION, *FORMATS]
        yield "convolutions", self.convolutions, CONVOLUTIONS
        yield "embeddings", self.embeddings, EMBEDDINGS
        lists: dict[str, tuple[tuple[str, ...], Iterable[str]]] = {
            "format_fallbacks": (self.format_fallbacks, FORMATS),
            "format_candidates": (self.format_candidates, FORMATS),
            "allocate.formats": (self.allocate.formats, FORMATS),
            "step_policy.precisions": (self.step_policy.precisions, PRECISIONS),
            "transform_candidates": (self.transform_candidates, TRANSFORMS),
        }
        for key, (names, table) in lists.items():
            yield from ((f"{key}[{i}]", name, table) for i, name in enumerate(names))
        if self.promote.to:
            yield "promote.to", self.promote.to, FORMATS
        for i, rule in enumerate(self.rules):
            if rule.weights:
                yield f"rules[{i}].weights", rule.weights, FORMATS
            if rule.activations is not None:
                yield f"rules[{i}].activations", rule.activations, ACTIVATION_FORMATS

    def plan(self, scan: Scan, exclude: Iterable[str] = (), tied: Iterable[str] = ()) -> Plan:
        """Resolve the recipe to the layers of a model.

        Args:
            scan: the model's linears.
            exclude: dotted names, prefixes, path components, globs or ``re:`` patterns that stay
                unquantized (``modules_to_not_convert`` of diffusers).
            tied: names of linears that share their weight with another module, and stay float.

        Raises:
            RecipeError: a rule, or a name in ``exclude``, matches no layer of this model.
        """
        return resolve(self, scan, tuple(exclude), tuple(tied))

    def needs(self) -> frozenset[str]:
        """The statistics that this recipe's methods read, keys of ``OBSERVERS``."""
        every: tuple[Recipe | Rule, ...] = (self, *self.rules)
        rows: list[Any] = [
            *(TRANSFORMS[x.transform.name] for x in every if x.transform),
            *(TRANSFORMS[name] for name in self.transform_candidates),
            *(SOLVERS[x.solver.name] for x in every if x.solver),
            *(LOWRANK[x.lowrank.name] for x in every if x.lowrank and x.lowrank.name != "none"),
        ]
        needs: frozenset[str] = frozenset().union(*(row.needs for row in rows))
        if self.correct_bias:
            needs |= {"channels"}
        formats = [x.activations for x in every if x.activations is not None]
        static = any(ACTIVATION_FORMATS[name].static for name in formats)
        if self.promote.to or self.format_candidates or static:
            needs |= {"sample"}
        return needs

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default filled in; ``dtq recipe show`` prints it as YAML."""
        return plain(self)


def find(what: str | Path) -> Path:
    """The file of a recipe given by name or path.

    Raises:
        InputError: neither exists; the message lists the names that do.
    """
    return find_yaml(what, "recipes", "recipe", "See: dtq recipe ls")


def _methods() -> dict[str, dict[str, Callable[..., Any]]]:
    """The methods that a key of the recipe may name; read late, since tables can be extended."""
    none = {"none": lambda: None}
    return {
        "transform": {name: row.call for name, row in TRANSFORMS.items()},
        "solver": {name: row.call for name, row in SOLVERS.items()},
        "lowrank": none | {name: row.call for name, row in LOWRANK.items()},
        "finetune": none | FINETUNE,
    }


def _check_selector(selector: str, at: str, problems: list[str]) -> None:
    """A selector without a wildcard or dot must be a role; others are globs on names."""
    if is_role(selector) or any(c in selector for c in "*?[") or selector.count(".") > 1:
        return
    words = hint(selector, ROLES, f"roles: {', '.join(ROLES)}")
    problems.append(f"{at}: {selector!r} is neither a role nor a pattern; {words}")
