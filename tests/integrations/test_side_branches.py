# SPDX-License-Identifier: Apache-2.0
"""LoKr, LoHa and DoRA on quantized linears equal peft's layers on the dequantized weights."""

from __future__ import annotations

import copy
from functools import cache

import accelerate
import pytest
import tiny
import torch
from conftest import hasty
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import dtq
from dtq.errors import InputError
from dtq.pipelines.tracing import dummy_inputs

peft = pytest.importorskip("peft")
dora = pytest.importorskip("dtq.integrations.dora")

KINDS = {
    "lokr": lambda t: peft.LoKrConfig(r=4, alpha=2, target_modules=t),
    "lokr whole": lambda t: peft.LoKrConfig(r=10**4, alpha=10**4, target_modules=t),
    "lokr both": lambda t: peft.LoKrConfig(
        r=2, alpha=2, target_modules=t, decompose_both=True, decompose_factor=8
    ),
    "loha": lambda t: peft.LoHaConfig(r=3, alpha=6, target_modules=t),
    "loha wide": lambda t: peft.LoHaConfig(r=16, alpha=8, target_modules=t),
    "dora": lambda t: peft.LoraConfig(r=4, lora_alpha=2, target_modules=t, use_dora=True),
}
FUSIBLE = ("lokr", "lokr both", "loha")
NAMES = ("lokr_", "hada_", "lora_")


@cache
def _quantized(name: str, recipe: str) -> nn.Module:
    chosen = hasty(recipe, finetune="none", transform="smooth-hadamard", solver="rtn")
    return dtq.quantize(tiny.TRANSFORMERS[name](), chosen, progress=False)


def quantized(name: str, recipe: str = "w4a16") -> nn.Module:
    return copy.deepcopy(_quantized(name, recipe))


def linears(model: nn.Module) -> dict[str, dtq.QuantLinear]:
    return {
        name.replace(".base_layer", ""): m
        for name, m in model.named_modules()
        if isinstance(m, dtq.QuantLinear)
    }


def run(model: nn.Module, seed: int = 1) -> torch.Tensor:
    with torch.no_grad():
        return model(**dummy_inputs(model, 2, 500.0, seed), return_dict=False)[0]


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if any(kind in n for kind in NAMES)}


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random factors, so that every adapter changes the output; magnitudes change by a tenth."""
    g = torch.Generator().manual_seed(seed)
    for name, p in factors(model).items():
        if "magnitude" in name:
            p.data *= 1 + 0.1 * torch.randn(p.shape, generator=g)
        else:
            p.data = torch.randn(p.shape, generator=g) / (p.shape[-1] if p.ndim > 1 else 10) ** 0.5


def adapted(model: nn.Module, kind: str, seed: int = 0) -> nn.Module:
    """The model with a random adapter on what is quantized; peft changes it in place."""
    names = [*linears(model)]
    peft.inject_adapter_in_model(KINDS[kind](names), model, "one")
    randomize(model, seed)
    return model


def tuners(model: nn.Module):
    return [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]


def float_twin(model: nn.Module, kind: str) -> nn.Module:
    """peft's own adapter on the dequantized model, with the same factors."""
    names = [*linears(model)]
    twin = copy.deepcopy(model)
    for layer in names:
        twin.set_submodule(layer, linears(twin)[layer].unquantized())
    peft.inject_adapter_in_model(KINDS[kind](names), twin, "one")
    mine, its = factors(model), factors(twin)
    assert {n.replace(".base_layer", "") for n in mine} == {*its}
    for name, p in mine.items():
        its[name].data.copy_(p.data)
    assert all(type(m).__module__.startswith("peft.") for m in tuners(twin))
    return twin


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_an_adapter_equals_merging_it_into_the_dequantized_model(name, kind):
    model = quantized(name)
    plain = run(model)
    adapted(model, kind)
    twin = float_twin(model, kind)
    for layer in tuners(twin):
        layer.merge()
    on = run(model)
    assert relative(on, plain) > 1e-3  # the adapter has an effect
    assert relative(on, run(twin)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_quantized_activations_are_those_of_the_plain_layer(name, kind):
    """``y' - b = g (y - b) + x D^T``: the packed product is the layer's, the adapter's is float."""
    model = adapted(quantized(name, "w4a8"), kind)
    twin = float_twin(model, kind)
    for layer in tuners(twin):
        layer.merge()
    for layer_name, base in linears(model).items():
        x = torch.randn(5, base.in_features)
        w = base.dequantize(torch.float32)
        merged = twin.get_submodule(layer_name).base_layer
        gain, y = torch.ones(len(w)), base(x)
        bias = 0 if base.bias is None else base.bias
        module = model.get_submodule(layer_name)
        if kind == "dora":
            delta = module.lora_B["one"].weight @ module.lora_A["one"].weight / 2
            gain = module.lora_magnitude_vector["one"].weight / (w + delta).norm(dim=1)
        change = merged.weight - gain[:, None] * w
        want = bias + gain * (y - bias) + x @ change.T
        torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("recipe", ["w4a8", "w4a8-hq"])
@pytest.mark.parametrize("kind", KINDS)
def test_unloading_gives_back_every_bit(kind, recipe):
    model = quantized("flux", recipe)
    before, plain = {k: v.clone() for k, v in model.state_dict().items()}, run(model)
    adapted(model, kind)
    model._hf_peft_config_loaded = True
    on = run(model)
    model.disable_adapters()
    assert torch.equal(run(model), plain)
    model.enable_adapters()
    assert torch.equal(run(model), on)
    model.unload_lora()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(run(model), plain)
    assert all(type(m) is dtq.QuantLinear for m in linears(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_peft_on_the_dequantized_model(kind):
    model = adapted(quantized("wan"), kind)
    twin = float_twin(model, kind)
    for each in (model, twin):
        each(**dummy_inputs(each, 2, 500.0, 1), return_dict=False)[0].square().mean().backward()
    mine, its = factors(model), factors(twin)
    assert mine
    for name, p in its.items():
        assert p.grad.abs().sum() > 0, name
        torch.testing.assert_close(
            mine[name].grad, p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max()) + 1e-9
        )


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_that_of_peft(kind):
    """Random numbers are drawn in the same order."""
    model = quantized("dit")
    name = next(iter(linears(model)))
    config = KINDS[kind]([name])
    if kind == "dora":
        config.lora_dropout = 0.5
    else:
        config.rank_dropout, config.module_dropout = 0.5, 0.2
    twin = copy.deepcopy(model)
    twin.set_submodule(name, linears(twin)[name].unquantized())
    for each in (model, twin):
        peft.inject_adapter_in_model(config, each, "one")
        randomize(each)
        each.train()
    x = torch.randn(5, linears(model)[name].in_features)
    outputs = []
    for seed in range(3):
        mine, its = (
            (torch.manual_seed(seed), each.get_submodule(name)(x))[1] for each in (model, twin)
        )
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
        outputs.append(mine)
    assert not torch.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize("recipe", ["w4a8", "w4a8-hq"])
@pytest.mark.parametrize("kind", FUSIBLE)
def test_factors_of_low_rank_can_be_fused(kind, recipe, tmp_path):
    model = quantized("flux", recipe)
    before, plain = {k: v.clone() for k, v in model.state_dict().items()}, run(model)
    adapted(model, kind)
    model._hf_peft_config_loaded = True
    on = run(model)
    model.fuse_lora(safe_fusing=True)
    fused = run(model)
    # the factors are rounded to bfloat16
    assert (fused - on).norm() < 0.03 * (on - plain).norm()
    twin = copy.deepcopy(model)
    twin.unload_lora()
    twin.save_pretrained(tmp_path)
    assert torch.equal(run(type(twin).from_pretrained(tmp_path)), fused)
    model.unfuse_lora()
    assert torch.equal(run(model), on)
    model.unload_lora()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("kind", ["dora", "lokr whole", "loha wide"])
def test_what_has_no_low_rank_is_not_fused(kind):
    model = adapted(quantized("flux", "w4a8"), kind)
    on = run(model)
    for layer in tuners(model):
        with pytest.raises(InputError, match=r"cannot be fused|larger than the float weight"):
            layer.merge()
        assert not layer.merged
    assert torch.equal(run(model), on)


def test_norms_of_dora_follow_what_they_depend_on():
    """Factors are changed as hot swapping does, the weight as fusing another adapter does."""
    model = adapted(quantized("flux"), "dora")
    run(model)  # the norms are kept from here on
    for change in (
        lambda m: m.lora_A["one"].weight.data.mul_(1.5),
        lambda m: m.lora_B["one"].weight.data.add_(0.1),
        lambda m: m.scaling.update(one=0.75),
        lambda m: m.get_base_layer().add_rank(
            torch.ones(1, m.in_features), torch.ones(m.out_features, 1)
        ),
    ):
        before = run(model)
        for layer in tuners(model):
            change(layer)
        on = run(model)
        assert relative(on, before) > 1e-4
        fresh = copy.deepcopy(model)  # copies keep no norms
        assert torch.equal(on, run(fresh))
        twin = float_twin(model, "dora")
        for layer in tuners(twin):
            layer.scaling["one"] = tuners(model)[0].scaling["one"]
            layer.merge()
        assert relative(on, run(twin)) < 1e-5


def test_norms_of_dora_follow_new_tensors_while_the_old_ones_are_alive():
    model = adapted(quantized("flux"), "dora")
    run(model)  # the norms are kept from here on
    old = [*model.parameters()]
    for base in linears(model).values():
        tensors = base.packed_tensors()
        base.fill({n: t * 2 if t.is_floating_point() else t for n, t in tensors.items()})
    on = run(model)
    assert len(old) == len([*model.parameters()])
    assert torch.equal(on, run(copy.deepcopy(model)))  # copies keep no norms


def test_norms_of_dora_wait_for_no_gpu_while_a_graph_is_captured(monkeypatch):
    """Tensors without values, whose device is a GPU: reading one, as ``torch.equal`` does, fails."""
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    layer = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(8, 4)))[0].eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            part.weight = nn.Parameter(torch.empty(part.weight.shape, device="cuda"))
        dora._norms(layer, "default")  # kept from here on
        with pytest.raises(DataDependentOutputException):
            dora._norms(layer, "default")
        capturing = True
        assert dora._norms(layer, "default").shape == (4,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_follows_the_factors_of_dora():
    model = adapted(quantized("flux"), "dora").cuda()
    name = next(iter(linears(model)))
    layer = model.get_submodule(name)
    x = torch.randn(5, layer.in_features, device="cuda")
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        layer.lora_B["one"].weight.data.mul_(2)
        graph.replay()
        assert relative(y, layer(x)) < 1e-5


@pytest.mark.parametrize("kind", ["lokr", "loha", "dora"])
def test_adapters_of_several_kinds_add_up(kind):
    model = quantized("flux")
    plain = run(model)
    names = [*linears(model)]
    adapted(model, kind)
    on = run(model)
    lora = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    peft.inject_adapter_in_model(lora, model, "two")
    model._hf_peft_config_loaded = True
    x = torch.randn(3, linears(model)[names[0]].in_features)
    model.set_adapters(["one", "two"], [1.0, 0.0])
    assert relative(run(model), on) < 1e-6
    model.set_adapters(["one", "two"], [1.0, 0.5])
    assert relative(run(model), on) > 1e-3
    assert model.get_submodule(names[0])(x).isfinite().all()
    model.delete_adapters("two")
    assert relative(run(model), on) < 1e-6
    model.unload_lora()
    assert torch.equal(run(model), plain)
    assert all(type(m) is dtq.QuantLinear for m in linears(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_bfloat16_has_adapters_in_float32(kind):
    model = adapted(quantized("sd3", "w4a8"), kind)
    want = run(model)
    model.bfloat16()
    half = {n: p.dtype for n, p in factors(model).items()}
    assert set(half.values()) == {torch.bfloat16}
    got = model(**dummy_inputs(model, 2, 500.0, 1), return_dict=False)[0]
    assert got.dtype == torch.bfloat16
    assert relative(got.float(), want) < 0.1


@pytest.mark.parametrize("kind", ["lokr", "loha", "dora"])
def test_a_dequantized_model_keeps_its_adapters(kind):
    model = adapted(quantized("flux"), kind)
    on = run(model)
    model.dequantize()
    assert not linears(model)
    assert relative(run(model), on) < 1e-5
    for layer in tuners(model):
        layer.merge()
    assert relative(run(model), on) < 1e-4
    for layer in tuners(model):
        layer.unmerge()
    assert relative(run(model), on) < 1e-4


@pytest.mark.parametrize("kind", ["lokr", "loha", "dora"])
def test_adapted_models_can_be_offloaded(kind):
    model = adapted(quantized("flux", "w4a8"), kind)
    want = run(model)
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(run(model), want)


@pytest.mark.parametrize("kind", ["lokr", "loha", "dora"])
def test_adapted_layers_compile_to_one_graph(kind):
    model = adapted(quantized("flux", "w4a8"), kind)
    layer = model.get_submodule(next(iter(linears(model))))
    x = torch.randn(5, layer.in_features)
    with torch.no_grad():
        want = layer(x)
        torch._dynamo.reset()
        got = torch.compile(layer, backend="dtq", fullgraph=True)(x)
    assert relative(got, want) < 1e-5


def test_dora_on_layers_that_are_offloaded_one_by_one_is_refused():
    model = adapted(quantized("flux"), "dora")
    call = dummy_inputs(model, 2, 500.0, 1)
    with torch.no_grad():
        model(**call)
        accelerate.cpu_offload(model, torch.device("cpu"))
        with pytest.raises(InputError, match="offload whole models or groups"):
            model(**call)


@pytest.mark.parametrize("kind", ["lokr", "loha", "dora"])
def test_convolutions_are_refused(kind):
    spec = next(iter(linears(_quantized("flux", "w4a16")).values())).spec
    layer = dtq.QuantLinear.in_place_of(nn.Conv2d(64, 64, 1), spec)
    model = nn.ModuleDict({"pointwise": layer})
    with pytest.raises(InputError, match="quantized convolutions take no adapters"):
        peft.inject_adapter_in_model(KINDS[kind](["pointwise"]), model)
