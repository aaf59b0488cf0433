# SPDX-License-Identifier: Apache-2.0
"""ControlNets and IP-Adapters with a quantized transformer, compared with the float one."""

from __future__ import annotations

import copy
from functools import cache

import diffusers
import pytest
import tiny
import torch
from conftest import hasty
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from torch import nn

import dtq
from dtq.pipelines.tracing import dummy_inputs


@cache
def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    model = tiny.TRANSFORMERS[name]()
    return model, dtq.quantize(copy.deepcopy(model), hasty("w4a8"), progress=False)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A float model, and the same model quantized."""
    return copy.deepcopy(_pair(name))


def run(model: nn.Module, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(**dummy_inputs(model, 2, 500.0, 1), **more, return_dict=False)[0]


def check_same_effect(model, twin, plain, **more) -> None:
    """The added module has the same effect on the quantized model as on the float model."""
    changed = [run(m, **more) - before for m, before in zip((model, twin), plain, strict=True)]
    assert changed[0].norm() > 0.1 * plain[0].norm()
    assert (changed[1] - changed[0]).norm() < 0.25 * changed[0].norm()


def random_state(module: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(v.shape, generator=g) / (v.shape[-1] ** 0.5 if v.ndim == 2 else 1)
        for k, v in module.state_dict().items()
    }


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_controlnet_has_the_same_effect(name):
    model, twin = pair(name)
    plain = run(model), run(twin)
    inputs = dummy_inputs(model, 2, 500.0, 1)
    size = {"num_layers": 1}
    kind = diffusers.SD3ControlNetModel
    if name == "flux":
        kind = diffusers.FluxControlNetModel
        size |= {"num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 4}
    net = kind.from_transformer(copy.deepcopy(model), **size).eval()
    for p in net.parameters():
        if not p.any():  # ControlNets start at zero
            nn.init.normal_(p, std=0.1)
    cond = inputs["hidden_states"]
    if name == "sd3":
        cond = torch.cat([cond, torch.ones(2, 1, *cond.shape[2:])], 1)
    with torch.no_grad():
        samples = net(**inputs, controlnet_cond=cond, return_dict=False)
    if name == "sd3":
        check_same_effect(model, twin, plain, block_controlnet_hidden_states=samples[0])
    else:
        blocks, single = samples
        more = {"controlnet_block_samples": blocks, "controlnet_single_block_samples": single}
        check_same_effect(model, twin, plain, **more)


def test_flux_takes_an_ip_adapter():
    model, twin = pair("flux")
    plain = run(model), run(twin)
    g = torch.Generator().manual_seed(3)
    text, width, image = model.config.joint_attention_dim, model.inner_dim, 16
    proj = {
        "proj.weight": torch.randn(4 * text, image, generator=g),
        "proj.bias": torch.zeros(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    heads = {f"0.to_{c}_ip.weight": torch.randn(width, text, generator=g) for c in "kv"}
    heads |= {f"0.to_{c}_ip.bias": torch.zeros(width) for c in "kv"}
    for m in (model, twin):
        m._load_ip_adapter_weights({"image_proj": proj, "ip_adapter": heads})
    picture = {"ip_adapter_image_embeds": [torch.randn(2, 1, image, generator=g)]}
    check_same_effect(model, twin, plain, joint_attention_kwargs=picture)


def test_sd3_takes_an_ip_adapter():
    model, twin = pair("sd3")
    plain = run(model), run(twin)
    projection = IPAdapterTimeImageProjection(
        embed_dim=16, output_dim=128, hidden_dim=128, depth=4, heads=2, num_queries=4
    )
    heads = SD3IPAdapterJointAttnProcessor2_0(
        hidden_size=128, ip_hidden_states_dim=128, head_dim=32, timesteps_emb_dim=128
    )
    state = {
        "image_proj": random_state(projection, 1),
        "ip_adapter": {
            f"{i}.{k}": v * 10 if "to_v" in k else v  # compensates for small gates
            for i in range(len(model.attn_processors))
            for k, v in random_state(heads, i).items()
        },
    }
    for m in (model, twin):
        m._load_ip_adapter_weights(state)
    g = torch.Generator().manual_seed(3)
    picture = {"ip_adapter_image_embeds": torch.randn(2, 3, 16, generator=g)}
    check_same_effect(model, twin, plain, joint_attention_kwargs=picture)
