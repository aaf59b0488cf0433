# SPDX-License-Identifier: Apache-2.0
"""Float models with adapters, fused projections or replaced forwards: refused before any work."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import zoo
from accelerate import cpu_offload
from conftest import QUICK

import dtq
from dtq import api
from dtq.errors import InputError
from dtq.stages.float_model import check_float_model

peft = pytest.importorskip("peft")

FUSABLE = [
    n
    for n in zoo.names()
    # diffusers cannot fuse those of UVit2DModel: its forward has no return_dict
    if hasattr(zoo.classes()[n], "fuse_qkv_projections") and n != "UVit2DModel"
]


@pytest.fixture
def no_work(monkeypatch):
    """Fails if a model is calibrated."""
    stages = (api.plan, lambda run: pytest.fail("calibrated"))
    monkeypatch.setattr(api, "FLOAT_STAGES", stages)


def adapted(name: str, targets: str):
    model = tiny.TRANSFORMERS[name]()
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    return model


@pytest.mark.parametrize("targets", [".*(to_q|net.2)", ".*norm.*linear"])
@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_loaded_adapters(name, targets, no_work):
    if name in ("pixart", "wan") and "norm" in targets:
        targets = ".*(time_embedder|timestep_embedder).linear_1"
    with pytest.raises(InputError, match=r"adapter is loaded.*unload_lora_weights"):
        dtq.quantize(adapted(name, targets), "w8a8", progress=False)


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_adapters_that_are_fused_and_unloaded_are_part_of_the_model(name):
    model = adapted(name, ".*to_q")
    model._hf_peft_config_loaded = True
    model.peft_config = {}
    arguments = dtq.pipelines.tracing.dummy_inputs(model, 2, 500.0, 1)
    with torch.no_grad():
        want = model(**arguments)[0]
        model.fuse_lora()
        with pytest.raises(InputError, match="adapter is loaded"):
            dtq.quantize(model, "w8a8", progress=False)
        model.unload_lora()
        dtq.quantize(model, "w8a8", progress=False, transform="none", **QUICK)
        got = model(**arguments)[0]
    assert (got - want).norm() < 0.05 * want.norm()


def test_of_several_transformers_all_are_looked_at_before_the_first_is_calibrated(no_work):
    pipe = tiny.two_stages()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"]), pipe.transformer_2)
    with pytest.raises(InputError, match="adapter is loaded"):
        dtq.quantize(pipe, "w8a8", progress=False)


def lora_of_kohya(linear):
    before = linear.forward
    linear.forward = lambda x: before(x) + 1


def hook(linear):
    linear.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lora_of_kohya, "forward of .* has been replaced"),
        (hook, "has forward hooks"),
        (lambda linear: cpu_offload(linear, torch.device("cpu")), "offloading"),
    ],
)
@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_changed_linears(name, change, message, no_work):
    model = tiny.TRANSFORMERS[name]()
    layer = next(n for n, m in model.named_modules() if n.endswith("to_q"))
    change(model.get_submodule(layer))
    with pytest.raises(InputError, match=f"{message}.*modules_to_not_convert"):
        dtq.quantize(model, "w8a8", progress=False)


def test_a_changed_linear_that_is_not_quantized_does_not_matter():
    model = tiny.flux()
    lora_of_kohya(model.x_embedder)
    lora_of_kohya(model.transformer_blocks[0].attn.to_q)
    excluded = ["transformer_blocks.0.attn.to_q"]
    dtq.quantize(model, "w4a16", progress=False, modules_to_not_convert=excluded)
    assert "forward" in vars(model.transformer_blocks[0].attn.to_q)


@pytest.mark.parametrize("name", FUSABLE)
def test_fused_projections(name, tmp_path):
    model = zoo.model(name)
    before = [*model.state_dict()]
    other = copy.deepcopy(model)
    try:
        model.fuse_qkv_projections()
    except (AttributeError, RuntimeError) as error:  # a bug of diffusers in this class
        pytest.skip(f"the float model raises {error!r}")
    fused = [*model.state_dict()] != before
    if fused:
        with pytest.raises(InputError, match="unfuse_qkv_projections"):
            dtq.quantize(model, "w4a16", progress=False, inputs=[zoo.inputs(name)])
        model.unfuse_qkv_projections()
    quick = {"transform": "none", "solver": "rtn", "sanity_check": False, "progress": False}
    for each in (model, other) if fused else (model,):
        dtq.quantize(each, "w8a8", inputs=[zoo.inputs(name)], **quick)
    if fused:
        assert model.state_dict().keys() == other.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for each in (model, loaded):
        plain = zoo.output(each, name)
        each.fuse_qkv_projections()
        assert torch.equal(zoo.output(each, name), plain)
        each.unfuse_qkv_projections()
        assert torch.equal(zoo.output(each, name), plain)
    loaded.dequantize()
    loaded.fuse_qkv_projections()
    assert ([*loaded.state_dict()] != before) == fused


@pytest.mark.parametrize("kind", ["attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"])
def test_codes_in_one_kind_of_layer_are_refused(kind):
    model = tiny.dit(blocks=8)  # 74 linears, 9 in each block: every 9th is always of one kind
    for block in model.transformer_blocks:
        block.get_submodule(kind).weight.data[0, 0] = torch.finfo(torch.float8_e4m3fn).max
    with pytest.raises(InputError, match=rf"0\.{kind}\.weight is the largest value of FP8"):
        check_float_model(model, "it")
