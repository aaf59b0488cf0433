# SPDX-License-Identifier: Apache-2.0
"""Skip lists: what they keep, in every form that people write them, and what is refused."""

from __future__ import annotations

import copy
import re

import pytest
import tiny
import zoo
from click.testing import CliRunner

import dtq
from dtq.cli import main
from dtq.errors import InputError, RecipeError
from dtq.pipelines.tracing import scan_model
from dtq.recipe import Recipe


def kept(plan) -> set[str]:
    return {x.name for x in plan.layers if x.unquantized}


@pytest.fixture(scope="module", params=zoo.FIVE)
def case(request):
    """A model, and the name of one layer that w8a8 quantizes."""
    model = zoo.model(request.param)
    scan = scan_model(model, lambda m: m(**zoo.inputs(request.param)))
    plan = Recipe.load("w8a8").plan(scan)
    (name, *_) = (x.name for x in plan.gemm())
    return model, scan, plan, name


def test_every_form_of_an_entry_keeps_its_layers(case):
    _, scan, plan, name = case
    parent, _, leaf = name.rpartition(".")
    forms = {
        name: lambda n: n == name,
        f"{name}.weight": lambda n: n == name,
        parent: lambda n: n.startswith(f"{parent}."),
        f"{parent}.*": lambda n: n.startswith(f"{parent}."),
        leaf: lambda n: leaf in n.split("."),
        f"*.{leaf}": lambda n: n.endswith(f".{leaf}"),
        f"*.{leaf}.weight": lambda n: n.endswith(f".{leaf}"),
        f"re:{re.escape(parent)}": lambda n: parent in n,
    }
    every = {x.name for x in plan.layers}
    for form, stands in forms.items():
        more = kept(Recipe.load("w8a8").plan(scan, [form])) - kept(plan)
        assert more == {n for n in every - kept(plan) if stands(n)}, form
        assert name in more


def test_a_string_is_one_name_in_every_way_to_quantize(case, tmp_path):
    model, _, _, name = case
    where = tmp_path / "float"
    model.save_pretrained(where)
    config = dtq.DTQConfig("rtn-w4a8", modules_to_not_convert=name)
    loaded = type(model).from_pretrained(where, quantization_config=config)
    twin = copy.deepcopy(model)
    options = {"modules_to_not_convert": name, "sanity_check": False, "progress": False}
    dtq.quantize(twin, "rtn-w4a8", **options)
    for each in (loaded, twin):
        assert not isinstance(each.get_submodule(name), dtq.QuantLinear)
        assert any(isinstance(m, dtq.QuantLinear) for m in each.modules())
    for i, each in enumerate((loaded, twin)):
        each.save_pretrained(tmp_path / str(i))
        again = type(model).from_pretrained(tmp_path / str(i))
        assert again.config.quantization_config.modules_to_not_convert == [name]
        assert not isinstance(again.get_submodule(name), dtq.QuantLinear)


@pytest.mark.parametrize(
    "entry", ["to_qq", "blocks_.*", "re:^nothing$", "blocks.99.attn.to_q.weight", "", "*.nothing"]
)
def test_an_entry_that_matches_nothing_is_refused_before_the_work(case, entry, tmp_path):
    model = case[0]
    with pytest.raises(InputError, match="matches no layer") as caught:
        dtq.quantize(model, "w4a16", modules_to_not_convert=[case[3], entry], progress=False)
    assert repr(entry) in str(caught.value)
    assert not any(isinstance(m, dtq.QuantLinear) for m in model.modules())
    model.save_pretrained(tmp_path)
    config = dtq.DTQConfig("w4a16", modules_to_not_convert=[entry])
    with pytest.raises(InputError, match="matches no layer"):
        type(model).from_pretrained(tmp_path, quantization_config=config)
    for command in (["plan"], ["quantize", "-o", str(tmp_path / "out")]):
        result = CliRunner().invoke(main, [*command, str(tmp_path), f"--exclude={entry}"])
        assert result.exit_code == 1
        assert "matches no layer" in result.output
    with pytest.raises(RecipeError, match="matches no layer"):
        Recipe.load("w4a16", rules=[{"match": "a.b.*", "weights": "int8-row"}]).plan(case[1])
    with pytest.raises(RecipeError, match="exclude"):
        Recipe.load("w4a16", exclude=["embed", "a.b.*"]).plan(case[1])


def test_modules_that_are_never_quantized_may_be_listed():
    dtq.quantize(
        tiny.pixart(), "w4a16", progress=False,
        modules_to_not_convert=["pos_embed", "scale_shift_table", "norm_out"],
    )  # fmt: skip


def test_the_message_is_a_sentence_and_names_the_argument():
    for entries, verb in ((["a"], "'a' matches"), (["a", "b"], "'a', 'b' match")):
        message = rf"^modules_to_not_convert \(--exclude\): {verb} no layer; "
        with pytest.raises(InputError, match=message):
            dtq.quantize(tiny.dit(), "w4a16", modules_to_not_convert=entries, progress=False)


@pytest.mark.parametrize("entry", [3, [3], {"a": 1}.values()])
def test_what_is_no_list_of_names_is_refused(entry):
    with pytest.raises(InputError, match="names of layers"):
        dtq.quantize(tiny.dit(), "w4a16", modules_to_not_convert=entry, progress=False)


def test_a_role_that_the_model_lacks_may_stand_in_exclude():
    plan = Recipe.load("w8a8", exclude=["embed", "xattn.*", "head"]).plan(scan_model(tiny.dit()))
    assert plan.quantized()
