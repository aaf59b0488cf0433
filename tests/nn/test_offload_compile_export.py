# SPDX-License-Identifier: Apache-2.0
"""Models after loading: offload, compile, export, cache, split."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import pipelines
import pytest
import tiny
import torch
from accelerate import cpu_offload
from accelerate.utils import send_to_device
from diffusers import DiTPipeline
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.tensor_parallel import _check_tp_supported
from diffusers.models._modeling_parallel import TensorParallelConfig
from diffusers.models.cache_utils import CacheMixin
from torch import nn
from torch._dynamo.testing import CompileCounter

import dtq
from dtq.nn import QuantLinear
from dtq.nn.timestep_hook import install_clock
from dtq.pipelines.tracing import dummy_inputs
from dtq.plan.step_policy import StepPolicy

CPU = torch.device("cpu")
POLICY = StepPolicy((300.0, 700.0), ("a16", "native", "a8"))
TIMES = (999.0, 600.0, 30.0)  # each in another bin and with another precision
GRAPHS = 2  # one of the hook that sets the clock, one of the model
FEW = {"calibration": {"samples": 2, "batch_size": 2, "steps": 4, "num_timestep_bins": 4}}


def gpu(test):
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(missing(test))


@functools.cache
def _quantized(name: str, activations: str, recipe: str) -> nn.Module:
    return dtq.quantize(
        tiny.TRANSFORMERS[name](), recipe, activations=activations, progress=False, **FEW
    )


def quantized(name: str, activations: str = "int8-row", recipe: str = "rtn-w4a8") -> nn.Module:
    return copy.deepcopy(_quantized(name, activations, recipe))


@functools.cache
def calls(name: str) -> tuple[dict, ...]:
    """Arguments along a trajectory."""
    return tuple(dummy_inputs(tiny.TRANSFORMERS[name](), 2, t, seed=1) for t in TIMES)


def outputs(model: nn.Module, inputs: tuple[dict, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**each)[0] for each in inputs]


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# inference mode


@pytest.mark.parametrize("activations", ["int8-row", "int8-static-timestep"])
@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_a_model_that_was_made_under_inference_mode_runs_outside(name, activations, tmp_path):
    model = quantized(name, activations)
    edges = model.hf_quantizer.quantization_config.timestep_edges
    install_clock(model, edges, POLICY)
    want = outputs(model, calls(name))
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = type(model).from_pretrained(tmp_path)
        install_clock(loaded, edges, POLICY)
        copied = copy.deepcopy(model)
        assert same(outputs(copied, calls(name)), want)
    for made in (loaded, copied, copy.deepcopy(loaded)):
        assert same(outputs(made, calls(name)), want)
        with torch.inference_mode():
            assert same(outputs(made, calls(name)), want)
        assert same(outputs(made, calls(name)), want)


# offloading


def block_level(model, folder):
    model.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)


def leaf_level(model, folder):
    model.enable_group_offload(CPU, offload_type="leaf_level")


def to_disk(model, folder):
    model.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


def sequential(model, folder):
    cpu_offload(model, CPU, offload_buffers=True)


@pytest.mark.parametrize("offload", [block_level, leaf_level, to_disk, sequential])
@pytest.mark.parametrize("activations", ["int8-row", "int8-static-timestep"])
@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "wan"])
def test_offloading_does_not_change_outputs(name, activations, offload, tmp_path):
    model = quantized(name, activations)
    want = outputs(model, calls(name))
    assert not same(want[:1], want[1:2])
    offload(model, tmp_path)
    assert same(outputs(model, calls(name)), want)
    assert (offload is to_disk) == any(tmp_path.iterdir())


def test_dit_has_only_sequential_offload(tmp_path):
    model = quantized("dit", "int8-static-timestep")
    want = outputs(model, calls("dit"))
    for refused in (block_level, leaf_level, to_disk):
        with pytest.raises(ValueError, match="does not support group offloading"):
            refused(model, tmp_path)
    sequential(model, tmp_path)
    assert same(outputs(model, calls("dit")), want)


@pytest.mark.parametrize("name", ["pixart", "flux", "wan"])
def test_offloading_obeys_the_step_policy(name, tmp_path):
    model = quantized(name)
    install_clock(model, (), POLICY)
    want = outputs(model, calls(name))
    to_disk(model, tmp_path)
    assert same(outputs(model, calls(name)), want)


@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_layerwise_casting_skips_quantized_layers(name):
    model = quantized(name, "int8-static-timestep")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in layers.items()}
    by_class = copy.deepcopy(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    by_class.enable_layerwise_casting(
        torch.float8_e4m3fn, torch.float32, skip_modules_classes=(QuantLinear,)
    )
    assert same(outputs(model, calls(name)), outputs(by_class, calls(name)))
    for name_, layer in layers.items():
        assert layer.state_dict().keys() == before[name_].keys()
        assert all(torch.equal(v, before[name_][k]) for k, v in layer.state_dict().items())
    if name != "wan":  # keeps all unquantized layers in float32
        assert torch.float8_e4m3fn in {p.dtype for p in model.parameters()}


def test_dequantized_layers_are_cast():
    model = quantized("pixart")
    model.hf_quantizer.dequantize(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert model.transformer_blocks[0].ff.net[2].weight.dtype == torch.float8_e4m3fn


@gpu
@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "wan"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("low_cpu", [False, True])
def test_offloading_with_a_stream(name, level, low_cpu):
    model = quantized(name, "int8-static-timestep").cuda()
    inputs = tuple(send_to_device(each, "cuda") for each in calls(name))
    want = outputs(model, inputs)
    model.cpu().enable_group_offload(
        torch.device("cuda"),
        offload_type=level,
        num_blocks_per_group=1,
        use_stream=True,
        low_cpu_mem_usage=low_cpu,
    )
    assert same(outputs(model, inputs), want)


@gpu
def test_model_cpu_offload(quantized_folder):
    pipe = DiTPipeline.from_pretrained(quantized_folder).to("cuda")
    want = tiny.sample(pipe)
    pipe = DiTPipeline.from_pretrained(quantized_folder)
    pipe.enable_model_cpu_offload()
    assert torch.equal(tiny.sample(pipe), want)


# compiling


@pytest.fixture
def counter() -> CompileCounter:
    """A backend that counts the graphs it compiles."""
    torch._dynamo.reset()
    return CompileCounter()


@pytest.fixture(params=[None, POLICY], ids=["static-scales", "step-policy"])
def stepped(request):
    """Makes models that depend on the timestep: with static scales, also with a step policy."""

    def make(name: str) -> nn.Module:
        model = quantized(name, "int8-static-timestep")
        if request.param is not None:
            install_clock(model, model._dtq_clock.edges.tolist(), request.param)
        return model

    return make


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_one_compilation_serves_a_trajectory(name, stepped, counter):
    model = stepped(name)
    want = outputs(model, calls(name))
    model.compile(fullgraph=True, backend=counter)
    got = outputs(model, calls(name)[:1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += outputs(model, calls(name)[1:])
    assert counter.frame_count == GRAPHS
    assert same(got, want)


def test_one_compilation_serves_a_pipeline(counter):
    pipe = tiny.pipeline()
    pipe.transformer = quantized("dit", "int8-static-timestep")
    want = tiny.sample(pipe, steps=4)
    pipe.transformer.compile(fullgraph=True, backend=counter)
    assert torch.equal(tiny.sample(pipe, steps=4), want)
    assert counter.frame_count == GRAPHS


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_compiling_repeated_blocks_compiles_each_kind_once(name, counter):
    model = quantized(name, "int8-static-timestep")
    want = outputs(model, calls(name))
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert same(outputs(model, calls(name)), want)
    assert counter.frame_count == len(model._repeated_blocks)


@pytest.mark.slow
def test_inductor_gives_the_same_image():
    pipe = dtq.quantize(
        tiny.pipeline(blocks=1),
        "rtn-w4a8",
        activations="int8-static-timestep",
        progress=False,
        **FEW,
    )
    want = tiny.sample(pipe)
    torch._dynamo.reset()
    pipe.transformer.compile(fullgraph=True)
    torch.testing.assert_close(tiny.sample(pipe), want, atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_an_exported_program_gives_the_same_outputs(name, stepped):
    model = stepped(name)
    want = outputs(model, calls(name))
    with torch.no_grad():
        program = torch.export.export(model, (), calls(name)[0]).module()
    assert same(outputs(program, calls(name)), want)


# caches of diffusers

_BLOCKS = r"(transformer_|single_transformer_)?blocks\.\d+\."
STEPS = (999.0, 800.0, 600.0, 400.0, 200.0, 10.0)


def first_block(now):
    return apply_first_block_cache, FirstBlockCacheConfig(threshold=10.0)


def pyramid(now):
    return apply_pyramid_attention_broadcast, PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 950),
        cross_attention_block_skip_range=3,
        cross_attention_timestep_skip_range=(100, 950),
        current_timestep_callback=lambda: now[0],
    )


def faster(now):
    return apply_faster_cache, FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 700),
        attention_weight_callback=lambda module: 0.3,
        is_guidance_distilled=True,
        current_timestep_callback=lambda: now[0],
    )


def taylor(now):
    return apply_taylorseer_cache, TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[rf"{_BLOCKS}attn\d?"],
    )


def mag(now):
    return apply_mag_cache, MagCacheConfig(
        num_inference_steps=len(STEPS), mag_ratios=[1.0] * len(STEPS), threshold=0.5
    )


def counted(model) -> list[int]:
    """A counter of calls of linears, in a list."""
    count = [0]

    def called(*_):
        count[0] += 1

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(called)
    return count


def cached(model, inputs, cache) -> tuple[list[torch.Tensor], int, int]:
    """Outputs along a trajectory, number of calls of linears, and that number without a cache."""
    now, count = [0.0], counted(model)
    outputs(model, inputs)
    plain, count[0] = count[0], 0
    apply, config = cache(now)
    model.enable_cache(config) if isinstance(model, CacheMixin) else apply(model, config)
    got = []
    for now[0], each in zip(STEPS, inputs, strict=True):
        with CacheMixin.cache_context(model, "cond"):
            got += outputs(model, (each,))
    return got, count[0], plain


@pytest.mark.parametrize("cache", [first_block, pyramid, faster, taylor, mag])
@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
def test_caches_skip_what_they_skip_on_the_float_model(name, cache):
    if (name, cache) == ("sd3", first_block):
        pytest.skip("its last block returns no text, which this cache cannot do on any SD3")
    model = tiny.TRANSFORMERS[name]()
    inputs = tuple(dummy_inputs(model, 2, t, seed=1) for t in STEPS)
    want, calls_float, plain = cached(model, inputs, cache)
    got, calls_quantized, _ = cached(quantized(name, "int8-static-timestep"), inputs, cache)
    assert calls_quantized == calls_float < plain
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() / b.norm() < 0.2


@pytest.mark.parametrize("cache", [first_block, pyramid, faster, taylor, mag])
def test_disabling_a_cache_restores_the_outputs(cache):
    model = quantized("flux", "int8-static-timestep")
    want = outputs(model, calls("flux"))
    model.enable_cache(cache([0.0])[1])
    model.disable_cache()
    assert same(outputs(model, calls("flux")), want)


@pytest.mark.parametrize("name", ["flux", "wan", "pixart"])
def test_the_attention_backend_can_be_chosen(name):
    model = quantized(name)
    want = outputs(model, calls(name))
    model.set_attention_backend("native")
    assert same(outputs(model, calls(name)), want)


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "wan"])
def test_cache_dit_skips_what_it_skips_on_the_float_model(name):
    cache_dit = pytest.importorskip("cache_dit")
    make = pipelines.PIPELINES.get(name, tiny.pipeline)
    sample = functools.partial(tiny.sample, steps=8)
    if name != "dit":
        sample = functools.partial(pipelines.sample, name=name, steps=8)
    calls_of, images = [], []
    for recipe in (None, "rtn-w4a8"):
        pipe = make()
        if recipe:
            dtq.quantize(pipe, recipe, progress=False, sanity_check=False, **FEW)
        count = counted(pipe.transformer)
        sample(pipe)
        plain, count[0] = count[0], 0
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=10.0
        )
        cache_dit.enable_cache(pipe, cache_config=config)
        images.append(sample(pipe))
        calls_of.append((count[0], plain))
    assert calls_of[0] == calls_of[1]
    assert calls_of[1][0] < calls_of[1][1]
    assert (images[1] - images[0]).norm() / images[0].norm() < 0.3


# the page


PAGE = Path(__file__).parent.parent.parent / "docs/running.md"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S))
def test_examples_of_the_page_run(block, tmp_path):
    model = quantized("flux")
    model.save_pretrained(tmp_path / "saved")
    named = {"model": model, "device": CPU, "backend": "eager", "saved": tmp_path / "saved"}
    names = {**named, "inputs": calls("flux")[0]}
    torch._dynamo.reset()
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        exec(block, names)
        if "enable_cache" not in block:  # needs the cache context of a pipeline
            assert outputs(names["model"], calls("flux")[:1])[0].isfinite().all()
    finally:
        torch.distributed.destroy_process_group()


def test_diffusers_refuses_to_split_quantized_models():
    with pytest.raises((ValueError, RuntimeError), match="quantized"):
        _check_tp_supported(
            "Flux", {}, 4, TensorParallelConfig(tp_degree=2), model=quantized("flux")
        )
