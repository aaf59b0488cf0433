# SPDX-License-Identifier: Apache-2.0
"""Files with original names: the engine runs the joined layers, and diffusers takes them apart."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace

import diffusers
import pytest
import tiny
import torch
import zoo
from click.testing import CliRunner
from conftest import hasty
from engine_models import ORIGINAL, THOROUGH, model_errors, output, quantized, random_inputs
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import dtq
from dtq.cli import main
from dtq.engines import TARGETS
from dtq.engines.export import contents_of
from dtq.engines.gguf_blocks import to_blocks
from dtq.engines.gguf_file import read_gguf
from dtq.engines.original import (
    config_of,
    fusion_reasons,
    joined_layers,
    key_map,
    to_diffusers,
    to_original,
)
from dtq.engines.original.contents import PREFIX
from dtq.engines.runtimes import run_by
from dtq.engines.runtimes.comfy_kitchen import JoinedRows
from dtq.errors import InputError, RecipeError
from dtq.nn import QuantLinear
from dtq.pipelines.tracing import dummy_inputs
from dtq.plan.layers import LayerPlan, LayerSpec
from dtq.stages import replace_layers
from dtq.stages.joined_layers import joined_groups

needs_kitchen = pytest.mark.skipif(
    importlib.util.find_spec("comfy_kitchen") is None,
    reason="needs comfy-kitchen: see docs/engines/README.md",
)
needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="needs gguf: see docs/engines/README.md"
)
COMFY = {name: t.limits.recipe for name, t in TARGETS.items() if name.startswith("comfy")}


@needs_kitchen
@pytest.mark.parametrize("target", COMFY)
@pytest.mark.parametrize("family", ORIGINAL)
def test_the_engine_runs_joined_layers_with_the_error_of_dtq(family, target, tmp_path):
    model, made = quantized(family, COMFY[target], target)
    file = tmp_path / "model.safetensors"
    report = dtq.export(made, target, file)
    assert report.names == "original"
    engine = run_by("comfy-kitchen", file, model)
    joined = [m.weight for m in engine.modules() if isinstance(m, JoinedRows)]
    assert len(joined) >= len({id(weight) for weight in joined}) + 6  # at least three of three
    ours, theirs = model_errors(model, made, engine)
    assert ours > 0
    assert theirs <= 1.01 * ours
    back = dtq.load(file)
    inputs = dummy_inputs(model, 2, 500, 1)
    assert torch.equal(output(back, inputs), output(made, inputs))


def wide(name: str, **changes) -> nn.Module:
    """A model of ``zoo.json`` that is 256 channels wide: a whole superblock of a K-quant."""
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 32, "num_attention_heads": 8, "joint_attention_dim": 64}
    return zoo.classes()[name].from_config({**zoo.model(name).config, **sizes, **changes}).eval()


MODELS = {
    "sd3": lambda: tiny.sd3(heads=8),
    "flux2": lambda: wide(
        "Flux2Transformer2DModel",
        in_channels=16,
        timestep_guidance_channels=64,
        axes_dims_rope=(8, 8, 8, 8),
    ),
    "auraflow": lambda: wide(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        caption_projection_dim=256,
        pos_embed_max_size=64,
    ),
    "wan": tiny.wan,  # its patch embedding has five dimensions
}


@pytest.fixture(scope="module", params=MODELS)
def gguf(request, tmp_path_factory):
    """A float model, the quantized one, and its GGUF file with original names."""
    model = MODELS[request.param]()
    made = dtq.quantize(
        copy.deepcopy(model),
        hasty("gguf-q4", solver="rtn"),
        to="gguf",
        inputs=random_inputs(model),
        progress=False,
        sanity_check=False,
    )
    file = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    report = dtq.export(made, "gguf", file)
    assert report.names == "original"
    return model, made, file


@needs_gguf
def test_diffusers_takes_gguf_files_apart(gguf, tmp_path):
    """``from_single_file`` of the engine: every block is dtq's, and so are the errors."""
    from diffusers.quantizers.gguf.utils import GGUFLinear

    model, made, file = gguf
    model.save_config(tmp_path)
    engine = type(model).from_single_file(
        str(file), config=str(tmp_path), torch_dtype=torch.float32,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
    ).eval()  # fmt: skip
    layers = {n: m for n, m in made.named_modules() if isinstance(m, QuantLinear)}
    assert {n for n, m in engine.named_modules() if isinstance(m, GGUFLinear)} == set(layers)
    for name, layer in layers.items():
        weight = {k: layer.packed_tensor(k) for k in layer.tensor_specs() if k.startswith("weight")}
        theirs = engine.get_submodule(name).weight
        assert torch.equal(torch.as_tensor(theirs.data), to_blocks(layer.weight_format, weight))
    state = engine.state_dict()
    for key, tensor in contents_of(made).others.items():
        if key in dict(made.named_parameters()):
            assert torch.equal(state[key], tensor), key
    ours, theirs = model_errors(model, made, engine)
    assert ours > 0
    assert theirs <= 1.01 * ours


@needs_gguf
def test_gguf_files_name_their_family(gguf):
    model, made, file = gguf
    entries, tensors = read_gguf(file)
    names = key_map(config_of(made))
    assert entries["general.architecture"] == names.gguf
    assert names.gguf in {"sd3", "flux", "aura", "wan"}  # as ComfyUI-GGUF has them
    assert set(tensors) == set(names.entries)
    back = dtq.load(file)
    again = file.with_name("again.gguf")
    dtq.export(back, "gguf", again)
    assert again.read_bytes() == file.read_bytes()
    inputs = dummy_inputs(model, 2, 500, 1)
    assert torch.equal(output(back, inputs), output(made, inputs))


def test_codes_survive_every_order_of_names():
    """Joined and split again, each packed tensor has the bits that it had."""
    _, made = quantized("flux", "convrot-w4a8", "comfy-w4a8")
    contents, names = contents_of(made), key_map(config_of(made))
    back = to_diffusers(to_original(contents, names), names, "file")
    assert set(back.layers) == set(contents.layers)
    for name, layer in contents.layers.items():
        other = back.layers[name]
        assert (other.spec, other.shape) == (layer.spec, layer.shape)
        for key, tensor in layer.tensors.items():
            same = other.tensors[key].view(torch.uint8), tensor.contiguous().view(torch.uint8)
            assert torch.equal(*same), f"{name}.{key}"


SHARED = {
    "comfy-w4a8": "weight_lut",
    "comfy-nvfp4": "weight_scale_2",
    "comfy-fp8": "weight_scale",
}
SOLVED_AS_ONE = [
    ("sd3", "comfy-w4a8", True),  # GPTQ of the joined matrix
    *(("flux", target, THOROUGH) for target in SHARED),
    *(("sd3", target, True) for target in list(SHARED)[1:] if THOROUGH),
]
"""Family, target, and whether the recipe is the shipped one."""


@pytest.mark.parametrize(("family", "target", "shipped"), SOLVED_AS_ONE)
def test_joined_layers_share_what_a_format_has_once(family, target, shipped, tmp_path):
    """Solved as one matrix for the target; without it they differ, and are refused by name."""
    shared = SHARED[target]
    model, made = quantized(family, COMFY[target], target, shipped)
    joined = joined_layers(key_map(config_of(made)))
    matrices: dict[str, list[QuantLinear]] = {}
    for name, matrix in joined.items():
        matrices.setdefault(matrix, []).append(made.get_submodule(name))
    for layers in matrices.values():
        parts = [layer.packed_tensor(shared) for layer in layers]
        assert all((part == parts[0][:1]).all() for part in parts)
    alone = dtq.quantize(
        copy.deepcopy(model),
        COMFY[target] if shipped else hasty(COMFY[target], solver="rtn"),
        inputs=random_inputs(model),
        progress=False,
        sanity_check=False,
    )
    file = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match=rf"one {shared} for all rows.*--names diffusers"):
        dtq.export(alone, target, file)
    assert dtq.export(alone, target, file, names="diffusers").names == "diffusers"
    report = dtq.export(alone, target, file, unsupported="float", overwrite=True)
    assert set(report.as_float) == set(joined)
    together, apart = model_errors(model, made, alone)
    print(f"\n{target} {family}: {together / apart:.3f}")
    assert together <= 1.1 * apart


def matrices_of(model: nn.Module) -> list[set[str]]:
    """The layers of each original matrix that has the rows of several."""
    found: dict[str, set[str]] = {}
    for name, matrix in joined_layers(key_map(config_of(model))).items():
        found.setdefault(matrix, set()).add(name)
    return list(found.values())


def sd3_for(target: str, **overrides) -> nn.Module:
    """A tiny model, quantized for a target on random inputs."""
    model = tiny.sd3()
    return dtq.quantize(
        model, COMFY[target], to=target, inputs=random_inputs(model), progress=False, **overrides
    )


def test_layers_of_one_matrix_are_promoted_together(tmp_path):
    promote = {"to": "int8-row", "max_error": 0.0, "budget": 5.5}
    made = sd3_for("comfy-w4a8", promote=promote, sanity_check=False)
    layers = made.hf_quantizer.report.layers
    promoted = {x.name for x in layers if x.promoted}
    assert any(matrix <= promoted for matrix in matrices_of(made))
    assert any(not matrix & promoted for matrix in matrices_of(made))
    assert all(matrix <= promoted or not matrix & promoted for matrix in matrices_of(made))
    report = dtq.export(made, "comfy-w4a8", tmp_path / "model.safetensors")
    assert (report.names, report.as_float) == ("original", {})


def test_the_sanity_check_promotes_layers_of_one_matrix_together(tmp_path, monkeypatch):
    q, built = "transformer_blocks.0.attn.to_q", replace_layers.build_quantized

    def broken(result, *others):
        new = built(result, *others)
        if result.plan.name == q:
            scale = torch.full_like(new.packed_tensor("weight_scale"), torch.nan)
            new.fill({**new.packed_tensors(), "weight_scale": scale})
        return new

    monkeypatch.setattr(replace_layers, "build_quantized", broken)
    made = sd3_for("comfy-w4a8")
    done = made.hf_quantizer.report.sanity_check["promoted"]
    assert [x["layer"] for x in done] == [q, q.replace("_q", "_k"), q.replace("_q", "_v")]
    assert {x["to"] for x in done} == {"int8-row"}
    assert done[1]["why"].startswith(f"in one matrix with {q}: its output is not finite")
    report = dtq.export(made, "comfy-w4a8", tmp_path / "model.safetensors")
    assert (report.names, report.as_float) == ("original", {})


def test_candidates_of_one_matrix_are_chosen_together():
    made = sd3_for("comfy-w4a8", format_candidates=["int8-row", "lut4-2l-g16"], sanity_check=False)
    formats = {x.name: x.weight_format for x in made.hf_quantizer.report.layers}
    assert all(len({formats[name] for name in matrix}) == 1 for matrix in matrices_of(made))
    layer = LayerPlan("q", "attn.q", (64, 64), LayerSpec("q4_k", "none"))
    several = replace(layer, format_candidates=("q4_k", "iq4_nl"))
    both = {"q": "qkv", "k": "qkv"}
    assert joined_groups([layer, replace(layer, name="k")], both) == [[0], [1]]
    assert joined_groups([several, replace(several, name="k")], both) == [[0, 1]]


def test_layers_that_do_not_fit_together_are_refused():
    _, made = quantized("sd3", "convrot-w8a8", "comfy-int8")
    contents, names = contents_of(made), key_map(config_of(made))
    assert not fusion_reasons(contents.layers, names)
    q = "transformer_blocks.0.attn.to_q"
    layers = {name: layer for name, layer in contents.layers.items() if name != q}
    reasons = fusion_reasons(layers, names)
    assert set(reasons) == {q.replace("to_q", other) for other in ("to_k", "to_v")}
    assert all("to_q is float" in reason for reason in reasons.values())
    other = replace(contents.layers[q].spec, activation_format="none")
    layers = contents.layers | {q: replace(contents.layers[q], spec=other)}
    reasons = fusion_reasons(layers, names)
    assert len(reasons) == 3
    assert all("formats or transforms differ" in reason for reason in reasons.values())


def test_the_plan_keeps_joined_layers_together():
    """A layer that stays float takes the others of its matrix along; two formats are refused."""
    model = tiny.sd3(heads=8)
    made = dtq.quantize(
        model,
        "convrot-w8a8",
        to="comfy-int8",
        exclude=["attn.q"],
        progress=False,
        sanity_check=False,
    )
    notes = {x.name: x.note for x in made.hf_quantizer.report.plan.layers if x.unquantized}
    note = notes["transformer_blocks.0.attn.to_k"]
    assert "unquantized for comfy-int8: its rows and those of" in note
    assert "joint_blocks.0.x_block.attn.qkv" in note
    with pytest.raises(
        RecipeError, match=r"trains weight_lut of each layer.*attn.qkv; --set finetune=none"
    ):
        dtq.quantize(
            tiny.sd3(heads=8), "convrot-w4a8", to="comfy-w4a8", finetune="blocks", progress=False
        )
    rules = [{"match": "attn.q", "weights": "q6_k"}]
    with pytest.raises(RecipeError, match=r"one matrix in original files.*to_q q6_k, to_k q4_k"):
        dtq.quantize(tiny.sd3(heads=8), "gguf-q4", to="gguf", rules=rules, progress=False)


def test_names_are_chosen_and_checked(tmp_path):
    _, made = quantized("dit", "convrot-w8a8", "comfy-int8")
    file = tmp_path / "model.safetensors"
    with pytest.raises(
        InputError, match=r"no original names for DiTTransformer2DModel.*flux, flux2"
    ):
        dtq.export(made, "comfy-int8", file, names="original")
    with pytest.raises(InputError, match="torchao files have the names of diffusers"):
        dtq.export(made, "torchao", tmp_path / "folder", names="original")
    assert dtq.export(made, "comfy-int8", file).names == "diffusers"
    with pytest.raises(InputError, match="expected one of auto, original, diffusers"):
        dtq.export(made, "comfy-int8", file, names="mine", overwrite=True)
    _, made = quantized("sd3", "convrot-w8a8", "comfy-int8")
    folder = tmp_path / "folder"
    made.save_pretrained(folder)
    line = ["export", str(folder), "--to", "comfy-int8", "-o"]
    for names, written in (("auto", "original"), ("diffusers", "diffusers")):
        file = tmp_path / f"{names}.safetensors"
        result = CliRunner().invoke(main, [*line, str(file), "--names", names])
        assert result.exit_code == 0, result.output
        assert f"names:      {written}" in result.output
    with safe_open(tmp_path / "auto.safetensors", framework="pt") as opened:
        tensors = {PREFIX + key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "prefix.safetensors")
    inputs = dummy_inputs(made, 2, 500, 1)
    for names in ("auto", "diffusers", "prefix"):
        loaded = dtq.load(tmp_path / f"{names}.safetensors", config_of(made))
        assert torch.equal(output(loaded, inputs), output(made, inputs))
