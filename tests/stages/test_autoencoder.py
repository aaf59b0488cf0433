# SPDX-License-Identifier: Apache-2.0
"""Autoencoders with 8-bit weights: saved, loaded by plain diffusers, and how far decodes are off."""

from __future__ import annotations

import json

import pipelines
import pytest
import tiny
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKLKVAEVideo, AutoencoderKLMiniMaxH3, DiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl_minimax_h3 import MiniMaxH3VideoCausalConv3d
from torch import nn

import dtq
from dtq.cli import main
from dtq.errors import CheckpointError, InputError
from dtq.evaluate.report.quantization_report import quantization_report
from dtq.nn.conv import QuantConv
from dtq.nn.linear import QuantLinear
from dtq.recipe.selectors import excludes
from dtq.stages.autoencoder import quantize_weights

FEW = {"samples": 1, "steps": 1, "batch_size": 1}


def weights(folder):
    return sorted(folder.glob("*.safetensors"))


def test_from_the_command_line(tmp_path):
    pipe = tiny.pipeline()
    pipe.save_pretrained(tmp_path / "float")
    command = [
        "quantize",
        tmp_path / "float",
        "--recipe=rtn-w4a8",
        "--vae=w8",
        "-o",
        tmp_path / "out",
    ]
    command += ["--samples=1", "--steps=1", "--shard-size=30KB", "--no-sanity-check"]
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "dtq_report.json").read_text())["vae"]
    assert f"vae: {report['layers']} layers in int8-row" in result.output
    assert 30 < report["psnr"] < 80
    assert report["bytes"] < 0.4 * report["bytes_before"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`vae`: PSNR of its decodes {report['psnr']:.1f} dB" in card
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    convolutions = [m for m in loaded.vae.modules() if isinstance(m, nn.Conv2d)]
    quantized = [m for m in convolutions if isinstance(m, QuantConv)]
    assert f", {len(quantized)} convolutions | {report['layers']} `int8-row` |" in card
    before, after = (weights(tmp_path / n / "vae") for n in ("float", "out"))
    assert sum(f.stat().st_size for f in after) < 0.6 * sum(f.stat().st_size for f in before)
    assert all(isinstance(m, QuantConv) for m in convolutions)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = (p.vae.decode(x).sample for p in (pipe, loaded))
    assert 0 < float((got - want).square().mean() / want.square().mean()) < 1e-3
    loaded.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    for file in after:
        assert file.read_bytes() == (tmp_path / "again" / "vae" / file.name).read_bytes()
    with torch.no_grad():
        plain = loaded.vae.dequantize().decode(x).sample
    torch.testing.assert_close(plain, got, atol=1e-4, rtol=1e-4)
    data = bytearray(after[0].read_bytes())
    data[-50] ^= 1
    after[0].write_bytes(data)
    with pytest.raises((CheckpointError, ValueError, OSError), match="damaged"):
        DiffusionPipeline.from_pretrained(tmp_path / "out")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"{after[0]}: " in result.stderr
    assert "damaged" in result.stderr


def test_with_text_encoders(tmp_path):
    pipelines.flux().save_pretrained(tmp_path / "float")
    out = tmp_path / "out"
    command = ["quantize", tmp_path / "float", "-o", out, "--recipe=rtn-w4a8", "--vae=w8"]
    command += ["--text-encoder=w4a16", "--samples=1", "--steps=1", "--no-sanity-check"]
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "dtq_report.json").read_text())
    assert {*report.pop("pipeline")["components"]} == {*report}
    assert {*report} == {"transformer", "text_encoder", "text_encoder_2", "vae"}
    merged = quantization_report(out)  # which dtq eval reads
    assert len(merged["layers"]) == sum(len(report[n]["layers"]) for n in {*report} - {"vae"})
    shown = json.loads(CliRunner().invoke(main, ["inspect", str(out), "--json"]).stdout)
    assert {*shown} == {*report}
    assert len(shown["vae"]["layers"]) == report["vae"]["layers"]
    text = CliRunner().invoke(main, ["inspect", str(out), "--component", "vae", "--kernels"]).stdout
    assert "convolutions" in text
    assert "float convolution of the unpacked weight" in text


def test_causal_convolutions_of_videos(tmp_path):
    calibration = {**FEW, "steps": 2, "pipeline_args": pipelines.SMALL["wan"]}
    pipe = dtq.quantize(
        pipelines.wan(), "rtn-w4a8", vae="w8", calibration=calibration, progress=False
    )
    assert 30 < pipe.vae.hf_quantizer.report["psnr"] < 80
    dtq.save(pipe, tmp_path / "out")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(pipelines.sample(pipe, "wan", 1), pipelines.sample(loaded, "wan", 1))


def test_layers_that_need_their_float_weight_stay_float():
    torch.manual_seed(0)
    vae = AutoencoderKLMiniMaxH3(
        block_out_channels=(16,) * 6, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        decoder_num_layers=1, decoder_num_attention_heads=2, decoder_attention_head_dim=24,
        latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 17, 32, 32)
    with torch.no_grad():
        want = vae.encode(x).latent_dist.mode()
        assert quantize_weights(vae, "int8-row")
        got = vae.encode(x).latent_dist.mode()
    # their forward is F.conv3d(x, self.weight, ...)
    assert type(vae.encoder.conv_in) is MiniMaxH3VideoCausalConv3d
    assert float((got - want).square().sum() / want.square().sum()) < 1e-3
    packed = [n for n, m in vae.named_modules() if isinstance(m, QuantConv | QuantLinear)]
    assert packed
    assert not [n for n in packed if any(excludes(each, n) for each in vae._keep_in_fp32_modules)]


def test_pointwise_convolutions_keep_a_forward_of_their_own(tmp_path):
    """``self.linear(x, write_to=y)``, and large inputs in parts."""
    torch.manual_seed(0)
    vae = AutoencoderKLKVAEVideo(
        ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, temporal_compress_times=2
    ).eval()
    z = torch.randn(1, 4, 2, 4, 4)
    with torch.no_grad():
        want = vae.decode(z).sample
        quantize_weights(vae, "int8-row")
        got = vae.decode(z).sample
    pointwise = vae.decoder.up[1].upsample.linear
    assert pointwise.kernel_size == (1, 1, 1)
    assert isinstance(pointwise, QuantConv)
    assert 0 < float((got - want).square().sum() / want.square().sum()) < 1e-3
    vae.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoencoderKLKVAEVideo.from_pretrained(tmp_path).decode(z).sample
    assert torch.equal(again, got)


def test_a_module_that_is_registered_twice_stays_one_module():
    vae = pipelines.vae()
    vae.decoder.second = vae.decoder.conv_in
    once = quantize_weights(pipelines.vae(), "int8-row")
    assert quantize_weights(vae, "int8-row") == once
    assert isinstance(vae.decoder.second, QuantConv)
    assert vae.decoder.second is vae.decoder.conv_in


def test_mistakes_are_named_before_the_work():
    with pytest.raises(InputError, match="expected keep, w8"):
        dtq.quantize(tiny.pipeline(), "rtn-w4a8", vae="w4", progress=False)
    with pytest.raises(InputError, match="has no autoencoder"):
        dtq.quantize(tiny.dit(), "rtn-w4a8", vae="w8", progress=False)
