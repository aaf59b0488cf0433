# SPDX-License-Identifier: Apache-2.0
"""The script that trains an adapter on a quantized model, on a tiny pipeline."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import train_adapter
from conftest import QUICK

import dtq
from dtq.recipe import Recipe

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_loss_falls_and_the_adapter_loads_on_the_float_model(dora, tmp_path):
    pipe = tiny.pipeline()
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    floats = copy.deepcopy(pipe.transformer)
    recipe = Recipe.load("w8a8", **QUICK)
    model = dtq.quantize(pipe.transformer, recipe, progress=False)
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=train_adapter.TARGETS, use_dora=dora)
    adapted = peft.get_peft_model(model, config)
    before = train_adapter.held_out(adapted, pipe, latents, 1)
    losses = train_adapter.train(adapted, pipe, latents, 1, steps=20, rate=1e-2)
    after = train_adapter.held_out(adapted, pipe, latents, 1)
    assert after < 0.9 * before
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    adapted.save_pretrained(tmp_path)

    plain = train_adapter.held_out(floats, pipe, latents, 1)
    loaded = peft.PeftModel.from_pretrained(floats, tmp_path)
    assert train_adapter.held_out(loaded, pipe, latents, 1) < 0.9 * plain
    unloaded = adapted.unload().state_dict()
    assert all(torch.equal(unloaded[k], v) for k, v in bits.items())
