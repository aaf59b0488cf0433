# SPDX-License-Identifier: Apache-2.0
"""Programs that use dtq as a library: ``python children.py NAME ARGUMENT ...``, in a process of their own."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from digests import sha

FAMILY_RECIPES = ("w4a8", "w4a16", "nvfp4", "viditq", "svdquant", "ptq4dit", "lrq-dit", "w8a8")


def library(out: str, demo: str, *checkpoints: str) -> None:
    """Two pictures of every pipeline; one that was quantized while loading; a compiled one."""
    import diffusers
    import torch

    import dtq

    found = {}
    recipe = dtq.DTQConfig(recipe="w4a16")
    transformer = Path(demo) / "transformer"
    model = diffusers.DiTTransformer2DModel.from_pretrained(transformer, quantization_config=recipe)
    loaded = diffusers.DiffusionPipeline.from_pretrained(demo, transformer=model)
    pipelines = {"while loading": loaded}
    for folder in (demo, *checkpoints):
        pipelines[Path(folder).name] = diffusers.DiffusionPipeline.from_pretrained(folder)
    for name, pipeline in pipelines.items():
        pipeline.set_progress_bar_config(disable=True)
        rng = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
        images = pipeline([13, 31], generator=rng, num_inference_steps=4, output_type="np").images
        found[f"pixels {name}"] = f"{images.shape} {sha(images.tobytes())}"
    rng = torch.Generator().manual_seed(0)
    given = {"hidden_states": torch.randn(2, 4, 8, 8, generator=rng)}
    given |= {"timestep": torch.tensor([700, 20]), "class_labels": torch.tensor([5, 60])}
    compiled = pipelines["w4a8"].transformer
    compiled.transformer_blocks[0].compile(backend="dtq")
    with torch.no_grad():
        found["compiled w4a8"] = outputs(compiled(**given))
    Path(out).write_text(json.dumps(found))


def two_transformers(out: str, video: str) -> None:
    """A tiny Wan 2.2 with the text encoder of the bundled video model."""
    import diffusers
    import torch

    torch.manual_seed(0)
    latte = diffusers.DiffusionPipeline.from_pretrained(video)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    models = [
        diffusers.WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4,
            text_dim=latte.text_encoder.config.d_model, freq_dim=64, ffn_dim=256, num_layers=2,
        )
        for _ in range(2)
    ]  # fmt: skip
    diffusers.WanPipeline(
        tokenizer=latte.tokenizer, text_encoder=latte.text_encoder, vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=models[0], transformer_2=models[1], boundary_ratio=0.8,
    ).save_pretrained(out)  # fmt: skip


def families(out: str, zoo: str) -> None:
    """Quantize a model of every class in the file, save it, and run it."""
    import diffusers
    import torch

    import dtq

    found = {}
    for name, spec in json.loads(Path(zoo).read_text()).items():
        recipe = FAMILY_RECIPES[int(sha(name), 16) % len(FAMILY_RECIPES)]
        torch.manual_seed(0)
        kind = getattr(diffusers, name, None)
        if kind is None:
            continue
        model = kind(**built(spec["init"], torch.Generator().manual_seed(0))).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("pad_token"):  # diffusers does not initialize it
                    parameter.zero_()
                if parameter.is_floating_point() and not parameter.any():
                    parameter.normal_(std=0.02)
        calls = [built(spec["inputs"], torch.Generator().manual_seed(seed)) for seed in (0, 1, 2)]
        dtq.quantize(model, recipe, inputs=calls[:2], progress=False)
        model.save_pretrained(Path(out) / name)
        with torch.no_grad():
            found[f"{name} output"] = f"{recipe} {outputs(model(**calls[2]))}"
    (Path(out) / "outputs.json").write_text(json.dumps(found))


def built(value: Any, rng: Any) -> Any:
    """A value of the zoo: ``{"__t__": shape, "dtype": ...}`` is a tensor, random unless it says."""
    import torch

    if isinstance(value, list):
        return [built(each, rng) for each in value]
    if not isinstance(value, dict):
        return value
    if "__t__" in value:
        shape, dtype = value["__t__"], getattr(torch, value["dtype"])
        if "val" in value:
            return torch.tensor(value["val"], dtype=dtype).reshape(shape)
        if "fill" in value:
            return torch.full(shape, value["fill"], dtype=dtype)
        return torch.randn(shape, generator=rng).to(dtype)
    if "__items__" in value:
        return {key: built(each, rng) for key, each in value["__items__"]}
    if "__tuple__" in value:
        return tuple(built(each, rng) for each in value["__tuple__"])
    if "__call__" in value:
        module, function = value["__call__"].split(":")
        return getattr(importlib.import_module(module), function)(*value["args"])
    return {key: built(each, rng) for key, each in value.items()}


def outputs(value: Any) -> str:
    """Digest of the tensors in what a model returned."""
    import torch

    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {sha(data)}"
    below = value.values() if isinstance(value, dict) else value
    return ", ".join(outputs(each) for each in below if each is not None)


def environment(out: str) -> None:
    """What the bytes depend on, and where dtq is."""
    import diffusers
    import torch

    import dtq

    cpu = torch.backends.cpu.get_cpu_capability()
    found = {"torch": torch.__version__, "diffusers": diffusers.__version__, "cpu": cpu}
    found |= {"python": sys.version.split()[0]}
    Path(out).write_text(json.dumps({"package": str(Path(dtq.__file__).parent.parent), **found}))


CHILDREN = {each.__name__: each for each in (library, two_transformers, families, environment)}

if __name__ == "__main__":
    CHILDREN[sys.argv[1]](*sys.argv[2:])
