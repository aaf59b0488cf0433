# SPDX-License-Identifier: Apache-2.0
"""Compare the estimated memory while sampling with the peak of a real process.

    MALLOC_MMAP_THRESHOLD_=1048576 python scripts/sampling_memory.py demo --batch 128
    python scripts/sampling_memory.py flux --batch 1 --recipe w8a8 --arg height=512 --arg width=512

Each call measures one pipeline, in this process: the estimate is made first, then the models get
memory, and the kernel's peak is reset before sampling. ``flux`` is a FLUX-shaped pipeline of 60
million parameters with random weights. With a recipe, the linears become quantized layers of zeros,
which take the memory of real ones.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import FluxTransformer2DModel as Transformer
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from dtq import demo
from dtq.cli.inputs import call_arguments
from dtq.estimate.fake_pipeline import meta_pipeline
from dtq.estimate.sampling import sampling_memory
from dtq.io.memory import trim_malloc
from dtq.pipelines import prompts
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.sampling import run_pipeline
from dtq.pipelines.settings import SamplingSettings
from dtq.recipe import Recipe
from dtq.stages.plan import plan
from dtq.stages.run import Run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def flux() -> Any:
    """A FLUX-shaped pipeline on the meta device; its prompts have 512 tokens."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import pipelines

    transformer = {
        "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 64,
        "num_attention_heads": 12, "joint_attention_dim": 512, "pooled_projection_dim": 32,
        "guidance_embeds": True, "axes_dims_rope": (16, 24, 24), "in_channels": 64,
    }  # fmt: skip
    vae = {
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (32, 64, 64, 64), "layers_per_block": 1, "latent_channels": 16,
        "norm_num_groups": 8, "use_quant_conv": False, "use_post_quant_conv": False,
        "shift_factor": 0.1, "scaling_factor": 0.3,
    }  # fmt: skip
    t5 = T5Config(
        vocab_size=8000, d_model=512, d_kv=64, d_ff=2048, num_layers=4, num_heads=8,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    clip, words, text = pipelines.clip(), pipelines.tokenizer(77), pipelines.tokenizer(512)
    with torch.device("meta"):
        models = AutoencoderKL(**vae).eval(), T5EncoderModel(t5).eval()
        denoiser = Transformer(patch_size=1, **transformer).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(scheduler, models[0], clip, words, models[1], text, denoiser)


def resident(key: str) -> int:
    """VmRSS, or VmHWM, the peak of it, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def materialize(model: nn.Module) -> None:
    """Give a model on the meta device memory; floats are small random numbers, codes zeros."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # a tied weight stays one tensor
    for store in (s for m in model.modules() for s in (m._parameters, m._buffers)):
        for name, tensor in store.items():
            if tensor is not None and tensor.is_meta:
                if id(tensor) not in made:
                    made[id(tensor)] = tensor, _filled(tensor)
                store[name] = made[id(tensor)][1]


def _filled(tensor: Tensor) -> Tensor:
    filled = torch.zeros(tensor.shape, dtype=tensor.dtype)
    filled = filled.normal_(0, 0.02) if filled.is_floating_point() else filled + 0
    return nn.Parameter(filled, False) if isinstance(tensor, nn.Parameter) else filled


def sample(pipeline: Any, settings: SamplingSettings) -> None:
    """Sample one batch."""
    requests = prompts.load(settings.prompts, pipeline, settings.batch_size)
    with torch.no_grad():
        for _ in run_pipeline(pipeline, requests, settings):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", help="flux, a bundled name, or a folder")
    parser.add_argument("--recipe", default="", help="default: float")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--arg", action="append", default=[])
    options = parser.parse_args()
    arguments, dtype = call_arguments(options.arg), DTYPES[options.dtype]
    settings = SamplingSettings(
        samples=options.batch, batch_size=options.batch, steps=2, pipeline_args=arguments
    )
    made = options.pipeline == "flux"
    pipeline = flux() if made else meta_pipeline(demo.path_of(options.pipeline))
    model, plans = pipeline.transformer, {}
    if options.recipe:
        loaded = LoadedModel(options.pipeline, None, "transformer", model)
        run = Run(loaded, Recipe.load(options.recipe), exclude=(), memory=2**30)
        plan(run)
        plans["transformer"] = run.plan
    found = sampling_memory(pipeline, settings, dtype, plans)
    gc.collect()
    trim_malloc()
    start = resident("VmRSS")
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            materialize(part)
    loaded_bytes = resident("VmRSS") - start
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    sample(pipeline, settings)
    peak = resident("VmHWM")
    estimated = start + found.modes["none"]
    for label, value in {
        "weights, estimated": sum(found.weights.values()),
        "weights, resident": loaded_bytes,
        "activations, estimated": found.activations.total,
        "activations, measured": peak - start - loaded_bytes,
        "process before the weights": start,
        "process, estimated": estimated,
        "process, measured": peak,
    }.items():
        print(f"{label:28}{value / 1e6:10.1f} MB")
    print(f"{'estimated / measured':28}{estimated / peak:10.3f}")


if __name__ == "__main__":
    main()
