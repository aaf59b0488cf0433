# SPDX-License-Identifier: Apache-2.0
"""Recipes: every shipped one loads; a broken one lists all its mistakes with the nearest names."""

from __future__ import annotations

import pytest
import tiny
import yaml

from dtq.errors import InputError, RecipeError
from dtq.io.package_data import folder, yaml_names
from dtq.io.schema import MethodSpec
from dtq.models import ROLES, Linear
from dtq.pipelines.tracing import scan_model
from dtq.recipe import Recipe, resolve


@pytest.mark.parametrize("path", sorted(folder("recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_says_its_command_and_survives_a_round_trip(path, tmp_path):
    recipe = Recipe.load(path.stem)
    assert recipe.about
    assert path.read_text().startswith(f"# dtq quantize MODEL --recipe {path.stem} -o OUT")
    data = recipe.to_dict()
    data.pop("name")
    copy = tmp_path / path.name
    copy.write_text(yaml.safe_dump(data))
    assert Recipe.load(copy) == recipe


def test_all_mistakes_at_once_with_nearest_names(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(
        "weight: int4-2l-g64\n"
        "weights: int4-2l-g63\n"
        "activations: int8row\n"
        "solver: {gptq: {dampp: 0.1}}\n"
        "transform: {smooth: {alpha: high}}\n"
        "exclude: [embedd]\n"
        "rules: [{match: ffn.up, weights: int9}, {weights: int8-row}]\n"
        "promote: {budgets: 4}\n"
        "calibration: {samples: 0, steps: many}\n"
        "correct_bias: 3\n"
    )
    with pytest.raises(RecipeError) as caught:
        Recipe.load(file)
    text = str(caught.value)
    for words in (
        "weight: unknown key; did you mean 'weights'?",
        "promote.budgets: unknown key; did you mean 'budget'?",
        "calibration.steps: expected a whole number",
        "correct_bias: expected true or false",
        "rules[1].match: missing",
    ):
        assert words in text, text
    file.write_text(file.read_text().replace("weight: int4-2l-g64\n", "").replace(", {weights: int8-row}", "")
                    .replace("promote: {budgets: 4}\n", "").replace(", steps: many", "").replace("correct_bias: 3\n", ""))  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        Recipe.load(file)
    text = str(caught.value)
    for words in (
        "weights: unknown name 'int4-2l-g63'; did you mean int4-2l-g64",
        "activations: unknown name 'int8row'; did you mean int8-row",
        "solver.gptq: unknown knob 'dampp'; did you mean damp",
        "transform.smooth.alpha: expected a number",
        "exclude: 'embedd' is neither a role nor a pattern; did you mean embed",
        "rules[0].weights: unknown name 'int9'",
        "calibration.samples: must be at least 1",
    ):
        assert words in text, text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"weights": 4}, "weights: expected a name, got 4"),
        ({"exclude": "embed"}, "exclude: expected a list of names, got 'embed'"),
        ({"exclude": ["embed", 3]}, "exclude: expected a list of names"),
        ({"rules": ["ffn.up"]}, "rules: expected a list of rules"),
        ({"rules": [{"match": "ffn.up", "weights": None}]}, "rules[0].weights: expected a name"),
        ({"rules": [{"match": "ffn.up", "solver": None}]}, "rules[0].solver: expected a method"),
        ({"promote": "int8-row"}, "promote: expected a mapping"),
        ({"promote": {"max_error": float("inf")}}, "promote.max_error: expected a number"),
        ({"allocate": {"budget": True}}, "allocate.budget: expected a number or a size"),
        ({"calibration": {"samples": True}}, "calibration.samples: expected a whole number"),
        ({"solver": {"gptq": {}, "rtn": {}}}, "solver: expected a method name, or one name"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_what_is_expected(given, says):
    with pytest.raises(RecipeError) as caught:
        Recipe.load("w4a8", **given)
    assert says in str(caught.value)


def test_unknown_and_missing_recipes():
    with pytest.raises(InputError, match="did you mean w4a8"):
        Recipe.load("w4a88")
    with pytest.raises(InputError, match="no such recipe file"):
        Recipe.load("nowhere.yaml")
    assert {"w4a8", "w8a8", "w4a16", "rtn-w4a8"} <= set(yaml_names("recipes"))


def test_not_yaml(tmp_path):
    (tmp_path / "x.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match="not YAML"):
        Recipe.load(tmp_path / "x.yaml")


def test_overrides():
    recipe = Recipe.load("w4a8", modulation="w4a16", solver={"gptq": {"damp": 0.1}})
    assert recipe.modulation == "w4a16"
    assert recipe.solver == MethodSpec("gptq", (("damp", 0.1),))
    with pytest.raises(RecipeError, match="modulation"):
        Recipe.load("w4a8", modulation="w3a16")


def test_plan_resolves_roles_rules_and_fallbacks():
    scan = scan_model(tiny.dit())
    plan = Recipe.load("w4a8").plan(scan)
    by_role = {x.role: x for x in plan.layers}
    assert by_role["adaln"].weight_format == "int8-g64"
    assert by_role["adaln"].activation_format == "none"
    assert by_role["embed"].unquantized
    assert by_role["head"].unquantized
    assert by_role["attn.q"].weight_format == "int4-2l-g64"
    rules = [
        {"match": "ffn.down", "weights": "int8-row"},
        {"match": "*blocks.1.attn1.to_q", "activations": "none"},
    ]
    plan = Recipe.load("w4a8", rules=rules).plan(scan)
    assert plan["transformer_blocks.0.ff.net.2"].weight_format == "int8-row"
    assert plan["transformer_blocks.1.attn1.to_q"].activation_format == "none"
    assert plan["transformer_blocks.0.attn1.to_q"].activation_format == "int8-row"
    with pytest.raises(RecipeError, match="matches no layer"):
        Recipe.load("w4a8", rules=[{"match": "xattn.q", "weights": "int8-row"}]).plan(scan)
    odd = scan_model(tiny.dit(heads=3))  # 96 channels: groups of 64 do not fit
    plan = Recipe.load("w4a8").plan(odd)
    layer = plan["transformer_blocks.0.attn1.to_q"]
    assert layer.weight_format == "int4-2l-g32"
    assert "divisible by 64" in layer.note
    assert plan["transformer_blocks.0.norm1.linear"].weight_format == "int8-row"
    assert plan.bits(plan.gemm()) < 5.2
    shape = (30, 30)
    odd = resolve._resolve_layer(
        Recipe.load("w4a8"), Linear("a.0.ff.net.2", "ffn.down", shape, True), ()
    )
    assert odd.weight_format == "int8-row"


@pytest.mark.parametrize(
    "pattern", ["transformer_blocks.0", "transformer_blocks.0.attn1.to_q", "attn1", "re:to_[qk]$"]
)
def test_modules_to_not_convert(pattern):
    plan = Recipe.load("w4a8").plan(scan_model(tiny.dit()), [pattern])
    assert plan["transformer_blocks.0.attn1.to_q"].unquantized
    assert not plan["transformer_blocks.1.ff.net.2"].unquantized


@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_the_scan_knows_every_linear_of_the_known_families(name):
    model = tiny.TRANSFORMERS[name]()
    scan = scan_model(model)
    roles = {x.name: x.role for x in scan.linears()}
    assert scan.traced
    assert "other" not in roles.values()
    assert set(roles.values()) <= set(ROLES)
    assert {"ffn.up", "ffn.down", "embed", "head", "attn.q"} <= set(roles.values())
    assert ("xattn.k" in roles.values()) == (name in ("pixart", "wan"))
    shared = [
        {x.role for x in group.linears} for group in scan.input_groups if len(group.linears) > 1
    ]
    assert {"attn.q", "attn.k", "attn.v"} in shared or {
        "attn.q",
        "attn.k",
        "attn.v",
        "ffn.up",
    } in shared


def test_activation_groups_that_do_not_divide_the_input_give_way_with_a_note():
    model = tiny.dit(heads=3)  # width 96
    plan = Recipe.load("q-dit", allocate={"budget": ""}).plan(scan_model(model))
    narrow = [x for x in plan.gemm() if x.shape[1] % 128]
    assert narrow
    assert all(x.activation_format == "int8-row" and "int8-asym-g128" in x.note for x in narrow)


def test_knobs_that_belong_to_the_caller_are_not_the_recipes():
    with pytest.raises(RecipeError, match="progress"):
        Recipe.load("w4a8", finetune={"blocks": {"progress": False}})
