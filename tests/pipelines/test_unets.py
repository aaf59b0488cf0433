# SPDX-License-Identifier: Apache-2.0
"""Pipelines with a U-Net: from folder to folder, evaluated, with adapters, compiled."""

from __future__ import annotations

import json

import pipelines
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import dtq
from dtq.cli import main
from dtq.engines.export import contents_of
from dtq.errors import InputError
from dtq.nn import QuantLinear
from dtq.nn.conv import QuantConv
from dtq.pipelines import image_inputs

# what is searched in layers depends on no pipeline
HASTY = ("--set", "transform=smooth", "--set", "solver={gptq: {clip: false}}")
FEW = {"samples": 2, "steps": 2, "batch_size": 2}


def run(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def small(name: str) -> list[str]:
    return [f"--arg={k}={json.dumps(v)}" for k, v in pipelines.SMALL[name].items()]


@pytest.mark.parametrize("name", pipelines.U_NETS)
def test_a_pipeline_from_folder_to_folder(name, tmp_path):
    pipelines.U_NETS[name]().save_pretrained(tmp_path / "float")
    more = small(name)
    if name == "svd":
        image_inputs.random_image((20, 24), 0).save(tmp_path / "image.png")
        more += ["--images", tmp_path / "image.png"]
    few = ("--samples=2", "--steps=4", *HASTY)
    if name != "sd 1.5":  # the model is compared with a candidate once
        few += ("--set", "transform_candidates=[]")
    run("quantize", tmp_path / "float", "-o", tmp_path / "out", *few, *more)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    layers = {n for n, m in loaded.unet.named_modules() if isinstance(m, QuantLinear)}
    assert {n.rpartition(".")[2] for n in layers} >= {"to_q", "proj_in", "proj_out", "proj"}
    assert f"{len(layers)} quantized linears" in run("inspect", tmp_path / "out")
    command = ("eval", tmp_path / "out", "--reference", tmp_path / "float", "--json")
    command += ("--samples=2", "--steps=2", *more)
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)["rows"][0]
    assert 0 < row["error"] < 0.02


def quantized(name: str, recipe: str = "rtn-w4a8") -> DiffusionPipeline:
    calibration = {**FEW, "pipeline_args": pipelines.SMALL[name]}
    return dtq.quantize(pipelines.U_NETS[name](), recipe, calibration=calibration, progress=False)


def test_static_scales_follow_the_timesteps_of_guidance(tmp_path):
    """Latents are repeated for guidance, and the timestep is a scalar for both halves."""
    calibration = {**FEW, "steps": 4, "pipeline_args": pipelines.SMALL["sd 1.5"]}
    calibration |= {"num_timestep_bins": 2}
    pipe = dtq.quantize(
        pipelines.sd15(), "rtn-w4a8", calibration=calibration, progress=False,
        activations="int8-static-timestep",
    )  # fmt: skip
    assert pipe.unet.hf_quantizer.report.edges == (500.0,)
    bins = []
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.register_forward_hook(lambda module, args, output: bins.append(int(module.clock.bin)))
    pipelines.sample(pipe, "sd 1.5", 4)
    assert sorted(set(bins)) == [0, 1]
    assert bins == sorted(bins, reverse=True)  # from noise to the image
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(pipelines.sample(pipe, "sd 1.5", 2), pipelines.sample(again, "sd 1.5", 2))


def test_adapters_load_fuse_and_unfuse(tmp_path):
    pipe = quantized("sdxl")
    before = pipelines.sample(pipe, "sdxl", 2)
    floats = pipelines.sdxl()
    targets = ["to_q", "to_k", "proj_in", "ff.net.2"]
    floats.unet.add_adapter(LoraConfig(r=4, target_modules=targets))
    torch.manual_seed(0)
    for key, weight in floats.unet.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.3)
    adapter = get_peft_model_state_dict(floats.unet)
    type(pipe).save_lora_weights(tmp_path, unet_lora_layers=adapter)
    pipe.load_lora_weights(tmp_path)
    active = pipelines.sample(pipe, "sdxl", 2)
    effect = float((active - before).square().mean())
    pipe.fuse_lora()
    fused = pipelines.sample(pipe, "sdxl", 2)
    assert float((fused - active).square().mean()) < 0.1 * effect
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(pipelines.sample(pipe, "sdxl", 2), before)


def test_a_compiled_transformer_of_a_unet_gives_the_same_image():
    pipe = quantized("sd 1.5")
    want = pipelines.sample(pipe, "sd 1.5", 1)
    middle = pipe.unet.mid_block.attentions[0].transformer_blocks
    middle[0] = torch.compile(middle[0], backend="dtq")
    got = pipelines.sample(pipe, "sd 1.5", 1)
    assert float((got - want).square().mean()) < 1e-4


def test_a_pipeline_without_conditions():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
    )
    pipe = DDPMPipeline(unet.eval(), DDIMScheduler())
    dtq.quantize(pipe, "w8a8", calibration=FEW, transform="smooth", progress=False)
    assert isinstance(pipe.unet.mid_block.attentions[0].to_q, QuantLinear)
    assert pipe.unet.hf_quantizer.report.calibration["calls"] == 2


def test_convolutions_in_8_bits_on_request(tmp_path):
    """Planned to the byte, saved, loaded, sampled; LoRA on linears works, on them it is refused."""
    pipelines.sdxl().save_pretrained(tmp_path / "float")
    few = ("--recipe=rtn-w4a8", "--samples=2", "--steps=2", *small("sdxl"))
    more = (*few, "--set", "convolutions=w8", "--exclude", "down_blocks.0.resnets.0.conv1")
    shown = run("plan", tmp_path / "float", *more)
    assert "8.0" in next(line for line in shown.splitlines() if line.startswith("convolutions"))
    with_hessians = (*more[1:], "--recipe=w4a16", "--set", "convolutions=w8")
    assert json.loads(run("plan", tmp_path / "float", *with_hessians, "--json"))["bytes"]
    planned = json.loads(run("plan", tmp_path / "float", *more, "--json"))
    told = run("quantize", tmp_path / "float", "-o", tmp_path / "out", *more)
    (file,) = (tmp_path / "out/unet").glob("*.safetensors")
    assert file.stat().st_size == planned["bytes"]
    assert planned["bytes"] < json.loads(run("plan", tmp_path / "float", *few, "--json"))["bytes"]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    convs = {n: m for n, m in pipe.unet.named_modules() if isinstance(m, torch.nn.Conv2d)}
    kept = {n for n, m in convs.items() if not isinstance(m, QuantConv)}
    assert kept == {"conv_in", "conv_out", "down_blocks.0.resnets.0.conv1"}
    assert f"linears and {len(convs) - len(kept)} convolutions quantized" in told

    before = pipelines.sample(pipe, "sdxl", 2)
    want = pipelines.sample(quantized("sdxl"), "sdxl", 2)
    assert 0 < float((before - want).square().mean() / want.square().mean()) < 1e-2
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    assert not torch.equal(pipelines.sample(pipe, "sdxl", 2), before)
    pipe.unload_lora_weights()
    assert torch.equal(pipelines.sample(pipe, "sdxl", 2), before)
    with pytest.raises(InputError, match="quantized convolutions take no adapters"):
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["resnets.1.conv1"]))
    floats = contents_of(pipe.unet).others["mid_block.resnets.0.conv1.weight"]  # for export
    assert floats.shape == pipelines.sdxl().unet.mid_block.resnets[0].conv1.weight.shape
    with pytest.raises(InputError, match="more: a convolution with 8-bit weights"):
        dtq.export(tmp_path / "out", "torchao", tmp_path / "engine")
    with pytest.raises(InputError, match="set convolutions=keep"):
        dtq.quantize(pipelines.sdxl(), "w8a8", convolutions="w8", to="comfy-int8", progress=False)
