# SPDX-License-Identifier: Apache-2.0
"""diffusers' own ``from_single_file`` gives back, bit for bit, every model under original names."""

from __future__ import annotations

import json
import math

import pytest
import torch
import zoo
from diffusers.loaders import single_file_model
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES
from safetensors.torch import save_file
from torch import nn

from dtq.engines.original import (
    KeyMap,
    key_map,
    mapping,
    table_for,
    tables,
    to_diffusers,
    to_original,
)
from dtq.engines.original.contents import PREFIX
from dtq.engines.target import Contents
from dtq.errors import CheckpointError, InputError

CONVERTERS = [
    name
    for name in single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    if name in zoo.classes() and "Transformer" in name  # others are VAEs, U-Nets and adapters
]
LATER_VERSIONS = {
    "WanTransformer3DModel": {"image_dim": 16, "added_kv_proj_dim": 24},
    "SD3Transformer2DModel": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "CosmosTransformer3DModel": {"extra_pos_embed_type": None},
    "FluxTransformer2DModel": {"guidance_embeds": True},
    "Flux2Transformer2DModel": {"guidance_embeds": False},
}
"""Another version of a class, with tensors that the model of ``zoo.json`` lacks, or without some."""

MARKERS = {
    "auraflow": "auraflow",
    "chroma": "chroma",
    "cosmos1": "cosmos-1.0",
    "flux": "flux",
    "flux2": "flux2",
    "flux3": "flux3",
    "hidream": "hidream",
    "hunyuan_video": "hunyuan-video",
    "krea2": "krea2",
    "ltx": "ltx-video",
    "lumina2": "lumina2",
    "minimax_h3": "minimax-h3",
    "mochi": "mochi-1-preview",
    "qwen_image21": "qwen-image-2.1",
    "sana": "sana",
    "sd3": "sd3",
    "wan": "wan",
    "z_image": "z-image-turbo",
}
"""By table: the names by which diffusers tells the family's files from others."""


def built(name: str, **changes) -> nn.Module:
    """A tiny model of ``zoo.json``, or of the sizes that diffusers' converter has as constants.

    The numbers have nothing to repeat them but a period that no row has.
    """
    config = dict(zoo.model(name).config) | changes
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    table = table_for({"_class_name": name, **config})
    with torch.device("meta"):
        model = zoo.classes()[name].from_config(config | dict(table.reference))
    base = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).bfloat16()
    state = {}
    for i, (key, tensor) in enumerate(model.state_dict().items()):
        count = tensor.numel()
        values = base.roll(7919 * i).repeat(-(-count // len(base)))[:count]
        state[key] = values.reshape(tensor.shape).clone()
    model.load_state_dict(state, assign=True)
    return model.eval()


def parts_of(model: nn.Module) -> tuple[Contents, KeyMap]:
    config = json.loads(model.to_json_string())
    names = key_map(config)
    assert names is not None
    return Contents({}, dict(model.state_dict()), config), names


@pytest.fixture(
    scope="module",
    params=[(name, {}) for name in CONVERTERS] + [*LATER_VERSIONS.items()],
    ids=[*CONVERTERS, *(f"{name}-later" for name in LATER_VERSIONS)],
)
def model(request):
    name, changes = request.param
    return built(name, **changes)


def test_every_class_with_a_converter_is_tested():
    assert len(CONVERTERS) >= 27
    assert set(CONVERTERS) <= set(zoo.names())
    assert {name for table in tables() for name in table.classes} == {
        *CONVERTERS,
        "PixArtTransformer2DModel",
    }


def test_from_single_file_gives_back_the_model(model, tmp_path):
    """Written in float under original names, read by diffusers alone: every tensor is equal."""
    contents, names = parts_of(model)
    if names.family == "cosmos1":
        pytest.skip("diffusers 0.42 reads Cosmos 1.0 as 2.0: see the next test")
    written = to_original(contents, names)
    save_file({k: t.contiguous() for k, t in written.others.items()}, tmp_path / "a.safetensors")
    model.save_config(tmp_path)
    loaded = type(model).from_single_file(
        str(tmp_path / "a.safetensors"), config=str(tmp_path), torch_dtype=torch.bfloat16
    )
    state = loaded.state_dict()
    assert set(state) == set(contents.others)
    for key, tensor in contents.others.items():
        assert torch.equal(state[key], tensor), key


def test_the_converter_gives_back_cosmos_1_once_it_finds_its_names():
    """diffusers looks for them in the checkpoint that it has just emptied; this one remembers."""
    contents, names = parts_of(built("CosmosTransformer3DModel"))
    assert names.family == "cosmos1"
    written = to_original(contents, names)
    converted = mapping._converted(contents.config, written.others)
    assert set(converted) == set(contents.others)
    assert all(torch.equal(converted[key], t) for key, t in contents.others.items())
    convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["CosmosTransformer3DModel"]
    plain = convert["checkpoint_mapping_fn"](checkpoint=dict(written.others))
    assert set(plain) != set(contents.others)  # when this fails, the skip above can go


def test_import_gives_back_what_was_exported(model):
    contents, names = parts_of(model)
    written = to_original(contents, names)
    for prefix in ("", PREFIX):
        read = Contents({}, {prefix + key: t for key, t in written.others.items()})
        back = to_diffusers(read, names, "file").others
        assert set(back) == set(contents.others)
        for key, tensor in contents.others.items():
            assert back[key].shape == tensor.shape
            assert torch.equal(back[key], tensor), key


def test_names_are_those_that_diffusers_knows_the_family_by(model):
    contents, names = parts_of(model)
    if names.family not in MARKERS:
        pytest.skip("diffusers knows the family by tensors that it drops, or by none")
    known = CHECKPOINT_KEY_NAMES[MARKERS[names.family]]
    known = [known] if isinstance(known, str) else known
    written = to_original(contents, names).others
    assert any(each in written for each in known)
    if names.family in ("auraflow", "cosmos1"):  # those for which diffusers asks for all
        assert all(each in written for each in known)


def test_every_element_is_where_the_converter_puts_it(model):
    """Numbers for elements, not rows: columns stay in their order."""
    _, names = parts_of(model)
    checked = 0
    for name, entry in names.entries.items():
        if len(entry.parts) > 1 and math.prod(entry.shape) < 2**16:
            numbered = torch.arange(math.prod(entry.shape)).reshape(entry.shape)
            back = to_diffusers(Contents({}, {name: numbered}), names, "file").others
            again = torch.cat([back[p.key][p.start : p.start + p.rows] for p in entry.parts])
            assert torch.equal(again, numbered), name
            checked += 1
    fused = any(len(entry.parts) > 1 for entry in names.entries.values())
    assert bool(checked) == fused or table_for({"_class_name": type(model).__name__}).reference


@pytest.mark.parametrize(
    "name", ["FluxTransformer2DModel", "Lumina2Transformer2DModel", "MochiTransformer3DModel",
             "HunyuanVideoTransformer3DModel", "ChromaTransformer2DModel"],
)  # fmt: skip
def test_other_sizes_are_split_in_the_same_proportion(name):
    """Where the converter has sizes as constants, a tiny model is a small copy of a large one."""
    config = json.loads(zoo.model(name).to_json_string())
    large = config | dict(table_for(config).reference)
    tiny_map, large_map = key_map(config), key_map(large)
    (_, shapes), (_, large_shapes) = mapping.described(config), mapping.described(large)
    compared = 0
    for key, entry in tiny_map.entries.items():
        other = large_map.entries.get(key)
        if other is None or {p.key for p in entry.parts} != {p.key for p in other.parts}:
            continue
        for part, big in zip(entry.parts, other.parts, strict=True):
            assert part.key == big.key
            ours, theirs = (s[part.key][0] for s in (shapes, large_shapes))
            assert part.start * theirs == big.start * ours
            assert part.rows * theirs == big.rows * ours
            compared += 1
    assert compared > 40


def test_a_tensor_that_the_converter_misses_has_the_name_in_the_table():
    """diffusers leaves the position table of Wan's first-and-last-frame model as it is."""
    name = "WanTransformer3DModel"
    model = built(name, image_dim=16, added_kv_proj_dim=24, pos_embed_seq_len=6)
    contents, names = parts_of(model)
    key = "condition_embedder.image_embedder.pos_embed"
    written = to_original(contents, names)
    assert torch.equal(written.others["img_emb.emb_pos"], contents.others[key])
    assert torch.equal(to_diffusers(written, names, "file").others[key], contents.others[key])


def test_pixart_is_as_in_the_script_of_diffusers():
    """diffusers' script takes q, k and v, then k and v of the text, in this order (0.42)."""
    model = built("PixArtTransformer2DModel", cross_attention_dim=4)
    contents, names = parts_of(model)
    written = to_original(contents, names).others
    q, k, v = written["blocks.0.attn.qkv.weight"].chunk(3)
    text_k, text_v = written["blocks.0.cross_attn.kv_linear.bias"].chunk(2)
    state = contents.others
    for key, tensor in {
        "attn1.to_q.weight": q,
        "attn1.to_k.weight": k,
        "attn1.to_v.weight": v,
        "attn2.to_k.bias": text_k,
        "attn2.to_v.bias": text_v,
    }.items():
        assert torch.equal(state[f"transformer_blocks.0.{key}"], tensor), key


def test_what_the_converter_does_not_read_is_refused(monkeypatch):
    config = json.loads(zoo.model("SD3Transformer2DModel").to_json_string())
    assert key_map({"_class_name": "DiTTransformer2DModel"}) is None
    entry = {"checkpoint_mapping_fn": lambda checkpoint, config: checkpoint}
    table = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    monkeypatch.setitem(table, "SD3Transformer2DModel", entry)
    with pytest.raises(InputError, match=r"pos_embed.pos_embed is missing.*--names"):
        key_map(config)
    monkeypatch.delitem(table, "SD3Transformer2DModel")
    with pytest.raises(InputError, match="reads no single files of SD3Transformer2DModel"):
        key_map(config)


def test_a_tensor_of_another_shape_is_refused():
    contents, names = parts_of(built("SD3Transformer2DModel"))
    written = to_original(contents, names).others
    written["joint_blocks.0.x_block.attn.qkv.weight"] = torch.zeros(5, 32)
    with pytest.raises(CheckpointError, match=r"qkv.weight is \[5, 32\].*\[96, 32\] for transf"):
        to_diffusers(Contents({}, written), names, "file")
