# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint takes the memory of its tensors once."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import DiTTransformer2DModel

import dtq
from dtq.io.memory import trim_malloc


def resident(key: str) -> int:
    """A line of this process's status in bytes: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A DiT of 80 million parameters, 8 bits a weight, in one file."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=64, in_channels=4, out_channels=4,
        num_layers=4, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    ).bfloat16()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8, dtype=torch.bfloat16),
        "timestep": torch.tensor([5]),
        "class_labels": torch.tensor([1]),
    }
    dtq.quantize(model, "w8a8", inputs=[inputs], solver="rtn", transform="none", progress=False)
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and MADV_DONTNEED is Linux's")
@pytest.mark.parametrize("verify", ["1", "0"])
def test_the_peak_is_that_of_the_file(large, verify, monkeypatch):
    monkeypatch.setenv("DTQ_VERIFY", verify)
    (file,) = large.glob("*.safetensors")
    size = file.stat().st_size
    assert size > 60e6
    DiTTransformer2DModel.from_pretrained(large, torch_dtype=torch.bfloat16)  # imports
    gc.collect()
    trim_malloc()  # else the memory of the model before is used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = resident("VmRSS")
    model = DiTTransformer2DModel.from_pretrained(large, torch_dtype=torch.bfloat16)
    taken = resident("VmHWM") - before
    assert taken < 1.1 * size + max(p.nbytes for p in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and MADV_DONTNEED is Linux's")
def test_the_peak_of_a_text_encoder_is_that_of_the_file(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=1024, num_hidden_layers=6, intermediate_size=4096,
        num_attention_heads=16,
    )  # fmt: skip
    model = transformers.BertModel(config).bfloat16().eval()
    call = {"input_ids": torch.arange(8)[None]}
    dtq.quantize(model, "w8a8", inputs=[call], solver="rtn", transform="none", progress=False)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    size = file.stat().st_size
    assert size > 60e6
    transformers.BertModel.from_pretrained(tmp_path)  # imports
    del model
    gc.collect()
    trim_malloc()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model = transformers.BertModel.from_pretrained(tmp_path)
    taken = resident("VmHWM") - before
    assert taken < 1.1 * size + max(p.nbytes for p in model.parameters())
