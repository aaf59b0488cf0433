# SPDX-License-Identifier: Apache-2.0
"""Nunchaku Lite's folders: tiles as the project's own packer makes them."""

from __future__ import annotations

import json

import nunchaku_kernels
import pytest
import torch
from engine_models import error, float_output, layer_input, output, quantized
from nunchaku_numbers import ASSET, digest, numbers
from safetensors.torch import load_file, save_file

import dtq
from dtq.engines import nunchaku_lite
from dtq.engines import nunchaku_tiles as tiles
from dtq.engines.model_folder import WEIGHTS
from dtq.engines.smooth_branch import branch_of
from dtq.engines.target import Contents, StoredLayer
from dtq.errors import CheckpointError
from dtq.formats import FORMATS
from dtq.nn import QuantLinear
from dtq.pipelines.tracing import dummy_inputs
from dtq.plan.layers import LayerSpec

PACKED = {
    "codes": (tiles.tiled_codes, tiles.untiled_codes),
    "scale": (tiles.tiled_scales, tiles.untiled_scales),
    "vector": (tiles.tiled_scales, tiles.untiled_scales),
    "down": (tiles.tiled_down, tiles.untiled_down),
    "up": (tiles.tiled_branch, tiles.untiled_branch),
    "awq_codes": (tiles.awq_words, tiles.awq_codes),
}


@pytest.mark.parametrize("name", PACKED)
def test_tiles_are_those_of_the_packer_byte_by_byte(name):
    there, back = PACKED[name]
    given = numbers()[name]
    assert len(given.unique()) > 10
    made = there(given)
    assert digest(made) == json.loads(ASSET.read_text())["tensors"][name]
    assert torch.equal(back(made), given)


def test_the_zeros_of_weight_only_layers_are_those_of_the_packer():
    given = numbers()
    hashes = json.loads(ASSET.read_text())["tensors"]
    scale = given["awq_scale"].T.contiguous()
    assert digest(scale) == hashes["awq_scale"]
    assert digest(-8 * scale) == hashes["awq_zero"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The float model, the quantized one, and its folder."""
    model, made = quantized("flux", "svdquant-w4a4", "nunchaku-lite")
    folder = tmp_path_factory.mktemp("nunchaku") / "flux"
    dtq.export(made, "nunchaku-lite", folder)
    return model, made, folder


def test_the_modules_of_diffusers_take_the_folder(exported, monkeypatch):
    model, made, folder = exported
    engine = nunchaku_kernels.model(folder, monkeypatch)
    layers = {n: m for n, m in made.named_modules() if isinstance(m, QuantLinear)}
    kinds = {layer.activation_format for layer in layers.values()}
    assert kinds == {"int4-g64", "none"}
    for name, layer in layers.items():
        x = layer_input(layer.in_features, 1000)
        want = float_output(model, name, x)
        with torch.no_grad():
            own, theirs = error(layer(x), want), error(engine.get_submodule(name)(x), want)
        assert 0 < own < 0.1
        assert theirs <= 1.01 * own, name
    inputs = dummy_inputs(model, 2, 500 / 1000, 1)
    want = output(model, inputs)
    assert 0 < error(output(engine, inputs), want) < 2 * error(output(made, inputs), want)


def layer_of(rank: int, rows: int = 128, columns: int = 128) -> StoredLayer:
    """A layer with smoothing and a branch."""
    fmt, w = FORMATS["int4-g64"], layer_input(columns, rows)
    g = torch.Generator().manual_seed(0)
    down, up = (torch.randn(s, generator=g).bfloat16() for s in ((rank, columns), (rows, rank)))
    scale = (1 / (1 + torch.rand(1, columns, generator=g)).bfloat16().float()).bfloat16()
    tensors = fmt.pack(w, fmt.compute_qparams(w)) | {"pre_quant_scale": scale}
    if rank:
        tensors |= {"proj_down": down, "proj_up": up}
    return StoredLayer(LayerSpec("int4-g64", "int4-g64", 1, True, rank), (rows, columns), tensors)


def test_branches_of_every_rank_come_back(tmp_path):
    layers = {f"a.{rank}": layer_of(rank) for rank in (0, 5, 20)}
    contents = Contents(layers, {"a.5.bias": torch.arange(128.0)})
    nunchaku_lite.write(contents, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["quantization_config"]["svdq_w4a4"]["rank"] == 32
    again = nunchaku_lite.read(tmp_path / "x")
    assert torch.equal(again.others["a.5.bias"], contents.others["a.5.bias"])
    for name, layer in layers.items():
        assert again.layers[name].spec == layer.spec
        assert {key: t.dtype for key, t in again.layers[name].tensors.items()} == {
            key: t.dtype for key, t in layer.tensors.items()
        }
        for key, tensor in layer.tensors.items():
            assert torch.equal(again.layers[name].tensors[key], tensor), (name, key)
    assert branch_of(layers["a.5"], 32)[0].shape == (32, 128)


def test_smoothing_that_is_no_reciprocal_is_refused():
    layer = layer_of(0)
    assert nunchaku_lite.unsupported_reason(layer) is None
    every = torch.arange(128, dtype=torch.int16) + 0x3F80  # 1 to 2
    layer.tensors["pre_quant_scale"] = every.view(torch.bfloat16).reshape(1, -1)
    assert "no reciprocal" in nunchaku_lite.unsupported_reason(layer)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qweight", lambda t: t[:100], "no 100 rows"),
        ("wscales", lambda t: t.float(), "dtq reads torch.bfloat16"),
        ("smooth_factor", torch.zeros_like, "cannot be divided by"),
        ("proj_up", lambda t: t[:, :15], "rank 15"),
        ("proj_down", torch.ones_like, "more is not zero"),
    ],
)
def test_other_layouts_are_refused(part, change, message, tmp_path):
    nunchaku_lite.write(Contents({"a": layer_of(5)}, {}), tmp_path / "x")
    file = tmp_path / "x" / WEIGHTS
    tensors = load_file(file)
    tensors[f"a.{part}"] = change(tensors[f"a.{part}"]).contiguous()
    save_file(tensors, file, {"dtq": json.dumps({"ranks": {"a": 5}})})
    with pytest.raises(CheckpointError, match=message):
        nunchaku_lite.read(tmp_path / "x")


def test_a_bfloat16_reciprocal_comes_back_from_its_divisor():
    """All bfloat16 numbers whose reciprocals are normal: what smooth_branch relies on."""
    every = torch.arange(0x0100, 0x7E80, dtype=torch.int16).view(torch.bfloat16)
    once = (1 / every.float()).bfloat16()
    again = (1 / (1 / once.float()).bfloat16().float()).bfloat16()
    assert torch.equal(once, again)
    assert not torch.equal((1 / once.float()).bfloat16(), every)
