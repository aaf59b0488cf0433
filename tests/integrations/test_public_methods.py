# SPDX-License-Identifier: Apache-2.0
"""Every public method of a quantized model and pipeline gives what it gives on the float one.

The methods are those of the classes, found by inspection. Each is called on a copy of the float model
and on a copy of the quantized one, and then both run. Outputs must agree within the quantization
error, or the call on the quantized model raises an error of dtq.
"""

from __future__ import annotations

import copy
import inspect
import io
from contextlib import nullcontext
from functools import cache

import diffusers
import pytest
import tiny
import torch
from accelerate.utils import recursively_apply
from conftest import QUICK
from diffusers import DDIMScheduler, FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from torch import nn

import dtq
from dtq.errors import DtqError
from dtq.pipelines.tracing import dummy_inputs

peft = pytest.importorskip("peft")

PIPELINES = {
    "dit": diffusers.DiTPipeline,
    "pixart": diffusers.PixArtAlphaPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "flux": diffusers.FluxPipeline,
    "wan": diffusers.WanPipeline,
}
CLASSES = {name: type(make()) for name, make in tiny.TRANSFORMERS.items()}
ERROR = 0.05  # of the output, after a call that changes nothing 0.005 to 0.02
CPU = torch.device("cpu")

DEVICE = "needs a device or a package that the test machine lacks"
NETWORK = "needs the hub"
TEXT = "needs components other than the transformer"
EXCEPTIONS = {
    "compile": "slow; tests/nn/test_offload_compile_export.py compares it",
    "compile_repeated_blocks": "slow; tests/nn/test_offload_compile_export.py compares it",
    "dequantize": "a float model has no quantizer; test_casts.py and test_diffusers.py test it",
    "enable_parallelism": "needs several processes; tests/ranks.py tests it",
    "from_config": "makes a model with new random weights",
    "to_empty": "leaves the weights uninitialized",
    "get_extra_state": "nn.Module only declares it",
    "set_extra_state": "nn.Module only declares it",
    "register_for_auto_class": "is about code on the hub",
    "get_label_ids": "needs the labels of a real model",
    **dict.fromkeys(("cuda", "ipu", "mtia", "xpu", "enable_model_cpu_offload"), DEVICE),
    **dict.fromkeys(("enable_npu_flash_attention", "enable_xla_flash_attention"), DEVICE),
    "enable_xformers_memory_efficient_attention": DEVICE,
    "enable_sequential_cpu_offload": f"{DEVICE}; test_offload_compile_export.py has cpu_offload",
    **dict.fromkeys(("push_to_hub", "download", "load_ip_adapter", "from_single_file"), NETWORK),
    **dict.fromkeys(("set_ip_adapter_scale", "unload_ip_adapter"), "follows load_ip_adapter"),
    **dict.fromkeys(("encode_image", "prepare_ip_adapter_image_embeds", "encode_prompt"), TEXT),
    **dict.fromkeys(("check_inputs", "prepare_latents", "prepare_extra_step_kwargs"), TEXT),
    **dict.fromkeys(("load_textual_inversion", "unload_textual_inversion"), TEXT),
    **dict.fromkeys(("maybe_convert_prompt", "load_lora_into_text_encoder", "numpy_to_pil"), TEXT),
}
"""Methods that are not called, and why."""

FLASH = "makes processors for another kind of attention"
REFUSED = {
    ("dit", "enable_group_offload"): "diffusers has no group offload for this class",
    ("pixart", "unfuse_qkv_projections"): "nothing has been fused",
    ("sd3", "unfuse_qkv_projections"): "nothing has been fused",
    **{
        (name, f"{method}_{kind}_flash_attention"): FLASH
        for name in ("sd3", "flux", "wan")
        for method in ("disable", "set_use")
        for kind in ("npu", "xla")
    },
    ("sd3", "disable_xformers_memory_efficient_attention"): FLASH,
    ("sd3", "set_use_memory_efficient_attention_xformers"): FLASH,
}
"""Methods that the float model refuses, and why."""

REFUSED_BY_DTQ = {"type": "casts integers, so packed tensors, too"}
"""Methods that raise an error of dtq on the quantized model, and why."""


def public(kind: type) -> list[str]:
    """Names of the public methods of a class."""
    named = ((n, inspect.getattr_static(kind, n)) for n in dir(kind) if not n.startswith("_"))
    return [
        n for n, value in named if callable(getattr(kind, n)) and not isinstance(value, property)
    ]


def adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a LoRA on q of every block."""
    g, state = torch.Generator().manual_seed(0), {}
    for name, layer in model.named_modules():
        if name.endswith("to_q"):
            k, n = layer.in_features, layer.out_features
            state[f"{name}.lora_A.weight"] = torch.randn(2, k, generator=g) / k**0.5
            state[f"{name}.lora_B.weight"] = torch.randn(n, 2, generator=g)
    return state


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)


def with_transformer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"transformer.{name}": value for name, value in state.items()}


def nothing(*args: object) -> None:
    """A hook."""


def saved(model, folder):
    model.save_pretrained(folder)
    parts = {} if isinstance(model, nn.Module) else model.components
    return type(model).from_pretrained(folder, **{n: None for n, v in parts.items() if v is None})


def first(items):
    return next(iter(items))


ARGUMENTS = {
    "forward": lambda m, folder: m.forward(**inputs(m)),
    "save_pretrained": saved,
    "from_pretrained": saved,
    "load_config": lambda m, folder: [m.save_config(folder), type(m).load_config(folder)],
    "get_config_dict": lambda m, folder: [m.save_config(folder), type(m).get_config_dict(folder)],
    "save_config": lambda m, folder: m.save_config(folder),
    "to_json_file": lambda m, folder: m.to_json_file(folder / "config.json"),
    "extract_init_dict": lambda m, folder: m.extract_init_dict(dict(m.config)),
    "add_module": lambda m, folder: m.add_module("more", nn.Identity()),
    "register_module": lambda m, folder: m.register_module("more", nn.Identity()),
    "register_buffer": lambda m, folder: m.register_buffer("more", torch.zeros(1)),
    "register_parameter": lambda m, folder: m.register_parameter("more", None),
    "apply": lambda m, folder: m.apply(nothing),
    "get_buffer": lambda m, folder: m.register_buffer("b", torch.ones(1)) or m.get_buffer("b"),
    "get_parameter": lambda m, folder: m.get_parameter(first(m.named_parameters())[0]),
    "get_submodule": lambda m, folder: m.get_submodule("transformer_blocks.0")
    if hasattr(m, "transformer_blocks") else m.get_submodule("blocks.0"),
    "set_submodule": lambda m, folder: m.set_submodule("proj_out", m.get_submodule("proj_out"))
    if hasattr(m, "proj_out") else m.set_submodule("proj_out_2", m.get_submodule("proj_out_2")),
    "load_state_dict": lambda m, folder: m.load_state_dict(m.state_dict()),
    "train": lambda m, folder: m.train(False),  # dropout is random
    "to": lambda m, folder: m.to(torch.bfloat16),
    "type": lambda m, folder: m.type(torch.float64),
    "set_attention_backend": lambda m, folder: m.set_attention_backend("native"),
    "set_attn_processor": lambda m, folder: m.set_attn_processor(m.attn_processors),
    "enable_group_offload": lambda m, folder: m.enable_group_offload(CPU, offload_type="leaf_level"),
    "enable_layerwise_casting": lambda m, folder: m.enable_layerwise_casting(
        torch.bfloat16, torch.float32
    ),
    "enable_cache": lambda m, folder: m.enable_cache(FirstBlockCacheConfig(threshold=0.1)),
    "cache_context": lambda m, folder: m.cache_context("test"),
    "add_adapter": lambda m, folder: m.add_adapter(lora(), "more"),
    "load_lora_adapter": lambda m, folder: m.load_lora_adapter(
        adapter(m), prefix=None, adapter_name="more"
    ),
    "delete_adapters": lambda m, folder: m.delete_adapters("one"),
    "set_adapter": lambda m, folder: m.set_adapter("one"),
    "set_adapters": lambda m, folder: m.set_adapters("one", 0.5),
    "save_lora_adapter": lambda m, folder: m.save_lora_adapter(folder, "one"),
    "from_pipe": lambda p, folder: type(p).from_pipe(p),
    "set_attention_slice": lambda p, folder: p.set_attention_slice("auto"),
    "progress_bar": lambda p, folder: p.progress_bar(total=1),
    "register_modules": lambda p, folder: p.register_modules(transformer=p.transformer),
    "lora_state_dict": lambda p, folder: p.lora_state_dict(state_of(p)),
    "load_lora_weights": lambda p, folder: p.load_lora_weights(state_of(p), adapter_name="more"),
    "load_lora_into_transformer": lambda p, folder: p.load_lora_into_transformer(
        state_dict=state_of(p), transformer=p.transformer, adapter_name="more",
        **({"network_alphas": None} if isinstance(p, diffusers.FluxPipeline) else {}),
    ),
    "pack_weights": lambda p, folder: p.pack_weights(state_of(p), "transformer"),
    "save_lora_weights": lambda p, folder: p.save_lora_weights(folder, state_of(p)),
    "set_lora_device": lambda p, folder: p.set_lora_device(["one"], "cpu"),
    "write_lora_layers": lambda p, folder: p.write_lora_layers(
        state_of(p), folder, True, "lora.safetensors", None, True
    ),
}  # fmt: skip
"""How to call the methods that need arguments."""

ARGUMENTS |= {n: (lambda m, folder, n=n: getattr(m, n)(nothing)) for n in dir(nn.Module)
              if n.startswith("register_") and n.endswith("hook")}  # fmt: skip
ARGUMENTS |= {n: (lambda m, folder, n=n: getattr(m, n)(False)) for n in (
    "set_use_memory_efficient_attention_xformers", "set_use_npu_flash_attention",
    "set_use_xla_flash_attention")}  # fmt: skip


def replaced_forwards(model, folder):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            before = module.forward
            module.forward = lambda x, before=before: 0.9 * before(x)


def hooks(model, folder):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args: (args[0] * 0.9,))
            module.register_forward_hook(lambda module, args, y: y * 0.9)


def pickled(model, folder):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


MORE = {
    "copy.deepcopy": lambda model, folder: copy.deepcopy(model),
    "torch.save": pickled,
    "replaced forwards": replaced_forwards,
    "hooks": hooks,
    "to the same dtype": lambda model, folder: model.to(model.dtype),
    "to by keyword": lambda model, folder: model.to(device="cpu", dtype=torch.float64),
}
"""What people do to models besides calling their methods."""


@cache
def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    model = tiny.TRANSFORMERS[name]()
    options = {"progress": False, "sanity_check": False, "transform": "none", **QUICK}
    return model, dtq.quantize(copy.deepcopy(model), "w8a8", **options)


@cache
def _pipelines(name: str) -> tuple:
    kind = PIPELINES[name]
    arguments = inspect.signature(kind.__init__).parameters
    scheduler = FlowMatchEulerDiscreteScheduler if name in ("sd3", "flux", "wan") else DDIMScheduler
    given = dict.fromkeys(n for n, p in arguments.items() if p.default is p.empty and n != "self")
    return tuple(
        kind(**{**given, "transformer": model, "scheduler": scheduler()}) for model in _pair(name)
    )


def transformer_of(subject) -> nn.Module:
    return subject if isinstance(subject, nn.Module) else subject.transformer


def floats_of(model: nn.Module) -> nn.Module:
    """The float model of a class, without adapters."""
    return next(_pair(n)[0] for n, kind in CLASSES.items() if isinstance(model, kind))


def state_of(pipe) -> dict[str, torch.Tensor]:
    return with_transformer(adapter(floats_of(pipe.transformer)))


def inputs(model: nn.Module):
    """Of a forward, on the CPU also if the model is offloaded."""
    return recursively_apply(
        lambda t: t.to(model.dtype) if t.is_floating_point() else t,
        dummy_inputs(floats_of(model), 2, 0.5, 1),
    )


def outcome(subject, method, folder):
    """What a method returns, and the output of the model afterwards."""
    torch.manual_seed(0)
    call = {**MORE, **ARGUMENTS}.get(method) or (lambda m, folder: getattr(m, method)())
    result = call(subject, folder)
    made = result if type(result) is type(subject) else subject
    model = transformer_of(made)
    caches = hasattr(model, "cache_context")
    with torch.no_grad(), model.cache_context("test") if caches else nullcontext():
        return result, model(**inputs(model), return_dict=False)[0].double()


LORA = {"sd3", "flux", "wan"}
ADAPTED = ("adapter", "lora")


def prepared(subject, name: str, method: str):
    """A copy, with an adapter if the method is about adapters."""
    copied = copy.deepcopy(subject)
    loads = method.startswith(("add_", "load_", "enable_lora_hotswap"))
    if name in LORA and any(word in method for word in ADAPTED) and not loads:
        state = adapter(_pair(name)[0])
        transformer_of(copied).load_lora_adapter(state, prefix=None, adapter_name="one")
        if method.startswith("unfuse"):
            copied.fuse_lora()
    return copied


CASES = [(n, "model", m) for n, kind in CLASSES.items() for m in [*public(kind), *MORE]] + [
    (n, "pipeline", m) for n, kind in PIPELINES.items() for m in public(kind)
]


def called(name: str, what: str, method: str) -> bool:
    """What nn.Module defines is the same for every class, and called on one of them, in turn."""
    if method in EXCEPTIONS:
        return False
    plain = inspect.getattr_static(nn.Module, method, None)
    if what == "pipeline" or plain is None:
        return True
    if any(inspect.getattr_static(kind, method) is not plain for kind in CLASSES.values()):
        return True
    return name == [*CLASSES][public(nn.Module).index(method) % len(CLASSES)]


@pytest.mark.parametrize(("name", "what", "method"), [case for case in CASES if called(*case)])
def test_a_method_does_what_it_does_to_the_float_model(name, what, method, tmp_path):
    pair = _pair(name) if what == "model" else _pipelines(name)
    floats, quantized = (prepared(subject, name, method) for subject in pair)
    if (name, method) in REFUSED:
        with pytest.raises((ValueError, AttributeError, TypeError, RuntimeError)):
            outcome(floats, method, tmp_path)
        return
    (tmp_path / "float").mkdir()
    (tmp_path / "quantized").mkdir()
    returned, want = outcome(floats, method, tmp_path / "float")
    if method in REFUSED_BY_DTQ:
        with pytest.raises(DtqError):
            outcome(quantized, method, tmp_path / "quantized")
        return
    result, got = outcome(quantized, method, tmp_path / "quantized")
    assert type(result) is type(returned)
    assert (got - want).norm() < ERROR * want.norm()


def test_the_lists_hold_nothing_else():
    methods = {m for _, _, m in CASES}
    assert set(EXCEPTIONS) <= methods
    assert set(ARGUMENTS) <= methods
    assert {m for _, m in REFUSED} | set(REFUSED_BY_DTQ) <= methods
