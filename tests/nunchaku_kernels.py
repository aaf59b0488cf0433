# SPDX-License-Identifier: Apache-2.0
"""Runs diffusers' modules of Nunchaku Lite on a CPU, with the kernels' arithmetic written in torch.

The kernels are for NVIDIA GPUs and come from a hub. What runs here of diffusers is what reads a folder: which
modules it puts where, their tensors, the check of the names, their ``forward``. The tiles of codes and scales are
those that ``test_tiles_are_those_of_the_packer_byte_by_byte`` compares with Nunchaku's packer.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dtq.engines import nunchaku_tiles as tiles


def _quantize(x, codes, ascales, down, lora, smooth, glu, nvfp4) -> None:
    assert not glu
    assert not nvfp4
    n = len(x)
    lora[:n] = x.float() @ tiles.untiled_down(down).float().T
    groups = (x / tiles.untiled_scales(smooth)).unflatten(1, (-1, 64))
    scale = groups.abs().amax(-1) / 7
    ascales[:, :n] = scale.T
    values = (groups / scale.clamp(min=1e-30).unsqueeze(-1)).round().clamp(-7, 7).flatten(1).int()
    codes[:n] = ((values[:, ::2] & 15) | ((values[:, 1::2] & 15) << 4)).to(torch.uint8)


def _gemm(act, weight, out, _, ascales, wscales, *rest) -> None:
    lora, up, bias = rest[2], rest[3], rest[9]
    nibbles = torch.stack([act & 15, act >> 4], -1).flatten(1)
    x = ((nibbles ^ 8).float() - 8).unflatten(1, (-1, 64)) * ascales.T.unsqueeze(-1)
    codes = tiles.untiled_codes(weight).float().unflatten(1, (-1, 64))
    w = codes * tiles.untiled_scales(wscales).float().unsqueeze(-1)
    y = x.flatten(1) @ w.flatten(1).T + lora @ tiles.untiled_branch(up).float().T
    y = y if bias is None else y + tiles.untiled_scales(bias).float()
    out.copy_(y[: len(out)])


def _awq(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, *_: int) -> Tensor:
    codes = tiles.awq_codes(words).float().unflatten(1, (-1, 64))
    w = codes * scale.T.float().unsqueeze(-1) + zero.T.float().unsqueeze(-1)
    return x @ w.flatten(1).T.to(x)


OPS = SimpleNamespace(
    quantize_w4a4_act_fuse_lora=_quantize, gemm_w4a4=_gemm, gemv_awq=_awq,
    awq_gemm_w4a16_g64_int32=_awq,
)  # fmt: skip


def model(folder: Path, monkeypatch) -> nn.Module:
    """The model of a folder in float32, with diffusers' modules."""
    kernels = ModuleType("kernels")
    kernels.get_kernel = lambda *_, **__: SimpleNamespace(ops=OPS)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr(diffusers.utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(diffusers.utils, "is_kernels_version", lambda *_: True)
    monkeypatch.setattr(diffusers.utils.constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    theirs = importlib.import_module("diffusers.quantizers.nunchaku.utils")
    config = json.loads((folder / "config.json").read_text())
    own = config.pop("quantization_config")
    parsed = diffusers.quantizers.quantization_config.NunchakuLiteQuantizationConfig(**own)
    made = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    count = theirs.replace_with_nunchaku_linear(made, parsed.to_dict(), torch.float32)
    assert count == sum(len(own[kind]["targets"]) for kind in own if "w4a" in kind)
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    theirs.check_strict_state_dict_match(made, state)
    for name, tensor in made.state_dict().items():
        assert state[name].shape == tensor.shape, name
        whole = not tensor.is_floating_point()
        assert not whole or state[name].dtype == tensor.dtype, name
    state = {k: t.float() if t.is_floating_point() else t for k, t in state.items()}
    made.load_state_dict(state, assign=True)
    return made
