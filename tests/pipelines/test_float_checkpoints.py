# SPDX-License-Identifier: Apache-2.0
"""Float checkpoints of other tools: scales, codes, prefixes, missing tensors, variants."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import zoo
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import dtq
from dtq import demo
from dtq.checkpoint import reader
from dtq.cli import main
from dtq.cli.inputs import variants_of
from dtq.errors import CheckpointError, DtqError, InputError
from dtq.pipelines import loading
from dtq.pipelines.plain_weights import plain_weights
from dtq.pipelines.stored_tensors import COMPANION, described, refuse_codes

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=zoo.FIVE)
def saved(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / request.param
    zoo.model(request.param).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def rewrite(folder: Path, change) -> None:
    """Store what ``change`` makes of the tensors."""
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS)


def matrix(folder: Path) -> str:
    """Name of the weight of a linear layer, without its ending."""
    model = zoo.model(folder.name)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.in_features > 16]
    return names[-1]


def scaled(folder: Path, ending: str, rows: bool = False) -> None:
    """Store every linear in FP8 with a scale."""
    linears = [n for n, m in zoo.model(folder.name).named_modules() if isinstance(m, nn.Linear)]

    def change(tensors):
        for name in linears:
            w = tensors[f"{name}.weight"]
            s = (w.abs().amax(1, keepdim=True) if rows else w.abs().amax()).clamp_min(1e-9) / 448
            tensors[f"{name}.weight"] = (w / s).to(torch.float8_e4m3fn)
            tensors[f"{name}{ending}"] = s.float().clone()

    rewrite(folder, change)


def refused(folder: Path, *words: str) -> None:
    """Loading, planning and quantizing while loading refuse the folder and say the words."""
    kind = zoo.classes()[folder.name]
    config = dtq.DTQConfig("w4a16")
    for call in (
        lambda: loading.load_transformers(str(folder)),
        lambda: loading.meta_models(str(folder)),
        lambda: kind.from_pretrained(folder, quantization_config=config),
    ):
        with pytest.raises(DtqError) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("ending", [".weight_scale", ".scale_weight"])
def test_the_scale_of_fp8_weights_is_applied(ending, rows, saved, folder):
    want = loading.load_transformer(str(saved)).model
    scaled(folder, ending, rows)
    loaded = loading.load_transformer(str(folder))
    assert loaded.dtype == torch.float32
    for name, tensor in want.state_dict().items():
        got = loaded.model.state_dict()[name]
        assert got.dtype == tensor.dtype
        torch.testing.assert_close(got, tensor, rtol=0.07, atol=float(tensor.abs().max()) / 400)
    loading.meta_models(str(folder))
    with pytest.raises(CheckpointError, match=r"is FP8 with the scale .*dtq\.quantize"):
        type(want).from_pretrained(folder, quantization_config=dtq.DTQConfig("w4a16"))


COMPANIONS = {
    "weight_scale of a plain weight": (".weight_scale", torch.tensor(0.1)),
    "scale per block": (".weight_scale_inv", torch.rand(2, 2)),
    "second scale": (".weight_scale_2", torch.tensor(0.1)),
    "input scale": (".input_scale", torch.tensor(0.1)),
    "comfy": (".comfy_quant", torch.zeros(8, dtype=torch.uint8)),
    "bitsandbytes": (".weight.absmax", torch.rand(4)),
    "bitsandbytes state": (".weight.quant_state.bitsandbytes__nf4", torch.zeros(4).byte()),
    "bitsandbytes 8 bit": (".SCB", torch.rand(4)),
    "gptq": (".qweight", torch.zeros(4, 4, dtype=torch.int32)),
    "gptq scales": (".scales", torch.rand(4, 4)),
    "quanto": (".weight._data", torch.zeros(4, 4, dtype=torch.int8)),
    "lora": (".lora_A.weight", torch.rand(4, 4)),
    "weight norm": (".weight_g", torch.rand(4, 1)),
}


@pytest.mark.parametrize("kind", COMPANIONS)
def test_a_tensor_that_changes_a_weight_is_refused_by_name(kind, folder):
    ending, tensor = COMPANIONS[kind]
    key = matrix(folder) + ending
    rewrite(folder, lambda tensors: tensors.update({key: tensor}))
    refused(folder, WEIGHTS, key)


def test_codes_are_refused_by_name(folder):
    key = f"{matrix(folder)}.weight"
    rewrite(folder, lambda t: t.update({key: t[key].mul(100).to(torch.int8)}))
    refused(folder, key, "I8")


def test_fp8_codes_whose_scale_is_lost_are_refused(folder):
    key = f"{matrix(folder)}.weight"
    codes = lambda w: (w / w.abs().max() * 448).to(torch.float8_e4m3fn)  # noqa: E731
    rewrite(folder, lambda t: t.update({key: codes(t[key])}))
    refused(folder, key, "FP8")


def test_weights_that_were_only_cast_to_fp8_are_used(folder, caplog):
    key = f"{matrix(folder)}.weight"
    rewrite(folder, lambda t: t.update({key: t[key].to(torch.float8_e4m3fn)}))
    model = loading.load_transformer(str(folder)).model
    want = load_file(folder / WEIGHTS)[key].float()
    assert torch.equal(model.state_dict()[key].float(), want)
    assert "without a scale" in caplog.text
    kind = type(model)
    quantized = kind.from_pretrained(folder, quantization_config=dtq.DTQConfig("w4a16"))
    assert all(p.dtype != torch.float8_e4m3fn for p in quantized.parameters())


def test_metadata_that_names_a_quantization_is_refused(folder):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"_quantization_metadata": "{}"})
    refused(folder, "_quantization_metadata")


def test_codes_in_an_object_are_refused(folder):
    scaled(folder, ".weight_scale")
    model = zoo.classes()[folder.name].from_pretrained(folder)  # diffusers ignores the scales
    with pytest.raises(InputError, match="codes without their scale"):
        dtq.quantize(model, "w4a16", progress=False)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_missing_tensor_is_named(part, folder):
    key = f"{matrix(folder)}.{part}"
    if key not in load_file(folder / WEIGHTS):
        pytest.skip("no bias")
    rewrite(folder, lambda tensors: {k: t for k, t in tensors.items() if k != key})
    refused(folder, WEIGHTS, f"the tensor {key} is missing")


def test_a_cut_tensor_is_named(folder):
    key = f"{matrix(folder)}.weight"
    rewrite(folder, lambda t: t.update({key: t[key][:, :-1].contiguous()}))
    refused(folder, WEIGHTS, key, "has shape")


def test_a_config_of_fewer_layers_is_refused(folder):
    key = next(k for k in load_file(folder / WEIGHTS) if ".0." in k and k.endswith(".weight"))
    rewrite(folder, lambda t: t.update({key.replace(".0.", ".99.", 1): torch.rand(4, 4)}))
    with pytest.raises(CheckpointError, match="fewer layers"):
        loading.load_transformers(str(folder))


def test_a_tensor_that_one_layer_lacks_is_of_another_model():
    model = tiny.dit(blocks=2)
    stored = described(model.state_dict())
    del model.transformer_blocks[1].attn1.to_q._parameters["bias"]
    with pytest.raises(
        CheckpointError, match=r"1\.attn1\.to_q\.bias, which this layer of the model"
    ):
        plain_weights(model, stored)


def test_buffers_that_the_model_computes_are_ignored(caplog):
    model = zoo.model("PixArtTransformer2DModel")
    model.transformer_blocks[0].attn1.to_q.register_buffer(
        "weight_scale", torch.ones(1), persistent=False
    )
    stored = dict(model.state_dict())
    key = "transformer_blocks.0.attn1.to_q.weight_scale"
    plain_weights(model, described({**stored, key: torch.ones(1)}))
    assert key not in caplog.text
    with pytest.raises(CheckpointError, match=r"to_k\.weight_scale"):
        plain_weights(model, described({**stored, key.replace("to_q", "to_k"): torch.ones(1)}))


def test_tensors_that_the_class_ignores_are_ignored(saved, tmp_path, caplog):
    model = zoo.model("WanTransformer3DModel")
    model.save_pretrained(tmp_path)
    key = "blocks.0.attn2.norm_added_q.weight"
    rewrite(tmp_path, lambda t: t.update({key: torch.ones(4)}))
    loading.load_transformers(str(tmp_path))
    loading.meta_models(str(tmp_path))
    assert key not in caplog.text


@pytest.mark.parametrize("end", ["weight_scale", "input_scale", "output_scales"])
def test_a_parameter_whose_name_merely_ends_in_scale_is_a_parameter(end):
    assert COMPANION.search(f"layers.0.to_q.{end}")
    assert COMPANION.search(end)
    assert not COMPANION.search(f"layers.0.per_layer_{end}")
    tensors = {"layers.0.weight": torch.rand(2, 2), f"layers.0.per_layer_{end}": torch.ones(1)}
    refuse_codes(described(tensors))


def test_a_folder_without_weights_is_refused(folder):
    (folder / WEIGHTS).rename(folder / "mine.safetensors")
    with pytest.raises(CheckpointError) as caught:
        loading.load_transformers(str(folder))
    with pytest.raises(CheckpointError) as planned:
        loading.meta_models(str(folder))
    assert str(caught.value) == str(planned.value)
    for word in (str(folder), f"expected {WEIGHTS}", "the folder has mine.safetensors"):
        assert word in str(caught.value)
    (folder / "mine.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the folder has only config\.json"):
        loading.load_transformers(str(folder))


def test_tensors_of_nothing_in_the_model_are_reported(saved, folder, caplog):
    rewrite(folder, lambda t: t.update({"optimizer.step": torch.zeros(1)}))
    want = loading.load_transformer(str(saved)).model
    model = loading.load_transformer(str(folder)).model
    torch.testing.assert_close(zoo.output(model, folder.name), zoo.output(want, folder.name))
    assert "optimizer.step" in caplog.text


PREFIXES = ("_orig_mod.", "module.", "model.diffusion_model.", "module._orig_mod.", "model.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_known_prefixes_are_removed(prefix, saved, folder, caplog):
    # each prefix and each class with both
    dtype = ("fp32", "bf16")[(PREFIXES.index(prefix) + zoo.FIVE.index(folder.name)) % 2]
    rewrite(folder, lambda tensors: {f"{prefix}{k}": t for k, t in tensors.items()})
    model = loading.load_transformer(str(folder), dtype=dtype).model
    want = loading.load_transformer(str(saved), dtype=dtype).model
    for (name, got), tensor in zip(model.state_dict().items(), want.state_dict().values()):  # noqa: B905
        assert got.dtype == tensor.dtype, name
        assert torch.equal(got, tensor), name
    # buffers that are not stored, too; tensors at other addresses round differently
    got, same = (zoo.output(m.float(), folder.name) for m in (model, want))
    torch.testing.assert_close(got, same)
    assert prefix in caplog.text
    loading.meta_models(str(folder))
    config = dtq.DTQConfig("w4a16")
    made = type(want).from_pretrained(folder, quantization_config=config)
    same = type(want).from_pretrained(saved, quantization_config=dtq.DTQConfig("w4a16"))
    assert all(torch.equal(made.state_dict()[k], t) for k, t in same.state_dict().items())


def test_compiled_blocks_and_a_pipeline(float_folder, tmp_path):
    copy = Path(shutil.copytree(float_folder, tmp_path / "p"))
    rewrite(copy / "transformer", lambda tensors: {
        k.replace("transformer_blocks.0.", "transformer_blocks.0._orig_mod."): t
        for k, t in tensors.items()
    })  # fmt: skip
    got, want = loading.load_transformer(str(copy)), loading.load_transformer(str(float_folder))
    assert got.pipeline is not None
    assert got.pipeline.transformer is got.model
    state = got.model.state_dict()
    assert all(torch.equal(state[k], t) for k, t in want.model.state_dict().items())


def test_a_tensor_with_and_without_prefix_is_refused(folder):
    key = f"{matrix(folder)}.weight"
    rewrite(folder, lambda t: t.update({f"_orig_mod.{key}": t[key].clone()}))
    refused(folder, f"_orig_mod.{key}", "both")


def dtq_command(*words: object) -> str:
    """Standard error of a command that must succeed."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return result.stderr


def test_a_leftover_index_of_another_variant_is_ignored(folder):
    (folder / WEIGHTS).rename(folder / "all.safetensors")
    tensors = load_file(folder / "all.safetensors")
    (folder / "all.safetensors").unlink()
    save_file(tensors, folder / WEIGHTS)
    names = dict.fromkeys(tensors, "diffusion_pytorch_model.fp16-00001-of-00002.safetensors")
    for name in (f"{WEIGHTS}.index.fp16.json", f"{WEIGHTS}.fp16.index.json"):
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    loading.load_transformers(str(folder))
    loading.meta_models(str(folder))
    with pytest.raises(InputError, match="no file of the variant 'fp16'"):
        loading.load_transformers(str(folder), variant="fp16")


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_a_folder_of_one_variant_is_read(shard, saved, tmp_path, caplog):
    model = loading.load_transformer(str(saved)).model
    model.bfloat16().save_pretrained(tmp_path / "v", variant="bf16", max_shard_size=shard)
    for variant in (None, "bf16"):
        loaded = loading.load_transformer(str(tmp_path / "v"), variant=variant)
        assert loaded.variant == "bf16"
        assert loaded.dtype == torch.bfloat16
        ((_, dtype),) = loading.meta_models(str(tmp_path / "v"), variant=variant).values()
        assert dtype == torch.bfloat16
    assert "stored as the variant bf16 only" in caplog.text


def test_the_variant_decides_the_dtype_and_the_user_the_variant(saved, tmp_path):
    model = loading.load_transformer(str(saved)).model
    folder = tmp_path / "v"
    for variant in ("one", "two"):
        model.bfloat16().save_pretrained(folder, variant=variant)
    with pytest.raises(InputError, match=r"variants only \(one, two\).*--variant"):
        loading.load_transformers(str(folder))
    model.float().save_pretrained(folder)
    for variant, dtype in ((None, torch.float32), ("one", torch.bfloat16)):
        assert loading.load_transformer(str(folder), variant=variant).dtype == dtype
    with pytest.raises(InputError, match="no file of the variant 'three'; it has one, two"):
        loading.load_transformers(str(folder), variant="three")
    with pytest.raises(InputError, match="is loaded already"):
        dtq.quantize(model, "w4a16", variant="one")


def test_the_commands_take_a_variant(float_folder, tmp_path):
    pipe = loading.load_transformer(str(float_folder)).pipeline
    pipe.save_pretrained(tmp_path / "f", variant="ema")
    few = ("--samples", 1, "--steps", 2)
    dtq_command("plan", tmp_path / "f", "--variant", "ema", *few)
    made = ("quantize", tmp_path / "f", "--variant", "ema", "--recipe", "rtn-w4a8", *few)
    dtq_command(*made, "--no-sanity-check", "-o", tmp_path / "q")
    dtq_command("sample", tmp_path / "f", "--variant", "ema", "-n", 1, "--steps", 2,
                "-o", tmp_path / "s")  # fmt: skip
    dtq_command("eval", tmp_path / "q", "--reference", tmp_path / "f", "--variant", "ema", *few)
    dtq.quantize(pipe, "rtn-w4a8", progress=False, sanity_check=False,
                 calibration={"samples": 1, "steps": 2})  # fmt: skip
    pipe.save_pretrained(tmp_path / "qv", variant="w4")
    for more in ((), ("--variant", "w4")):
        dtq_command("inspect", tmp_path / "qv", *more)


def renamed(folder: Path, *variants: str) -> None:
    """Store the weights of a component as variants only."""
    (file,) = folder.glob("*.safetensors")
    for variant in variants:
        shutil.copy(file, file.with_suffix(f".{variant}.safetensors"))
    file.unlink()


@pytest.fixture
def pipeline(float_folder, tmp_path) -> Path:
    return Path(shutil.copytree(float_folder, tmp_path / "pipeline"))


@pytest.mark.parametrize("plain", ["vae", "transformer", None])
def test_each_component_has_its_own_variant(plain, pipeline, float_folder, caplog):
    variants = {"vae": "fp16", "transformer": "ema"}
    for name, variant in variants.items():
        if name != plain:
            renamed(pipeline / name, variant)
    (loaded,) = loading.load_transformers(str(pipeline))
    assert loaded.variant == (None if plain == "transformer" else "ema")
    want = loading.load_transformer(str(float_folder)).pipeline
    for name in variants:
        got = getattr(loaded.pipeline, name)
        assert all(
            torch.equal(got.state_dict()[k], t) for k, t in getattr(want, name).state_dict().items()
        )
        assert got.dtype == torch.float32
        message = f"of {name} are stored as the variant {variants[name]} only"
        assert caplog.text.count(message) == (name != plain)
    loading.meta_models(str(pipeline))
    if plain is not None:
        asked = next(v for name, v in variants.items() if name != plain)
        loading.load_transformers(str(pipeline), variant=asked)


def test_a_text_encoder_of_one_variant_is_read(tmp_path):
    pytest.importorskip("transformers")
    copy = Path(shutil.copytree(demo.folder("demo-video"), tmp_path / "v"))
    renamed(copy / "text_encoder", "fp16")
    got = loading.load_transformer(str(copy)).pipeline.text_encoder
    want = loading.load_transformer("demo-video").pipeline.text_encoder
    assert got.dtype == want.dtype
    assert all(torch.equal(got.state_dict()[k], t) for k, t in want.state_dict().items())


def test_the_advice_about_variants_can_be_followed(pipeline):
    renamed(pipeline / "vae", "a")
    renamed(pipeline / "transformer", "b", "c")
    none = (
        r"no variant covers all components \(transformer: b, c; vae: a\); get files of one variant"
    )
    for variant in (None, "a", "b"):
        with pytest.raises(InputError, match=none):
            loading.load_transformers(str(pipeline), variant=variant)
    (pipeline / "transformer" / "diffusion_pytorch_model.c.safetensors").unlink()
    with pytest.raises(InputError, match="leave --variant out to read the only one of each"):
        loading.load_transformers(str(pipeline), variant="a")
    loading.load_transformers(str(pipeline))
    (pipeline / "vae" / "diffusion_pytorch_model.a.safetensors").rename(
        pipeline / "vae" / "diffusion_pytorch_model.b.safetensors"
    )
    with pytest.raises(InputError, match=r"no file of the variant 'a'; it has b$"):
        loading.load_transformers(str(pipeline), variant="a")


def test_a_variant_that_is_chosen_is_reported_once(
    quantized_folder, float_folder, tmp_path, caplog
):
    copy = Path(shutil.copytree(quantized_folder, tmp_path / "q"))
    renamed(copy / "transformer", "w4")
    once = "of transformer are stored as the variant w4 only"
    for command in (
        ("inspect", copy),
        ("eval", copy, "--reference", float_folder, "--samples", 1, "--steps", 1),
    ):
        caplog.clear()
        dtq_command(*command)
        assert caplog.text.count(once) == 1


def test_a_bundled_model_has_no_variants():
    with pytest.raises(InputError, match="neither demo nor demo-video has files of the variant"):
        variants_of(["demo", "demo-video"], "fp16")


def test_one_of_two_models_may_lack_the_variant(pipeline):
    renamed(pipeline / "transformer", "ema")
    assert variants_of([str(pipeline), "demo"], "ema") == ["ema", None]


ENTRIES = {
    "load": lambda path: loading.load_transformers(path, variant="secret"),
    "plan": lambda path: loading.meta_models(path, variant="secret"),
    "inspect": lambda path: reader.verify(Path(path), variant="secret"),
    "eval": lambda path: variants_of([path], "secret"),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_folder_outside_is_looked_at_for_variants(entry, pipeline, tmp_path):
    shutil.move(pipeline / "transformer", tmp_path / "out")
    renamed(tmp_path / "out", "secret")
    shutil.copytree(tmp_path / "out", pipeline / "transformer")
    for file in (pipeline / "transformer").glob("*.safetensors"):
        file.rename(file.with_name(WEIGHTS))
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, "../out": None}))
    with pytest.raises(InputError, match=r"its files have no variant|has files of the variant"):
        ENTRIES[entry](str(pipeline))
    kind = ["diffusers", "DiTTransformer2DModel"]
    (pipeline / "model_index.json").write_text(json.dumps({**index, "../out": kind}))
    with pytest.raises(InputError, match="not the name of a component"):
        ENTRIES[entry](str(pipeline))
    (pipeline / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(pipeline / "transformer")
    (pipeline / "transformer").symlink_to(tmp_path / "out")
    with pytest.raises(InputError, match="a link out of the folder"):
        ENTRIES[entry](str(pipeline))


def test_a_text_encoder_with_scales_is_refused(tmp_path, float_folder):
    copy = Path(shutil.copytree(float_folder, tmp_path / "p"))
    save_file(
        {
            "x.weight": torch.rand(4, 4).to(torch.float8_e4m3fn),
            "x.scale_weight": torch.tensor(0.1),
        },
        copy / "model.safetensors",
    )
    (copy / "text_encoder").mkdir()
    (copy / "model.safetensors").rename(copy / "text_encoder" / "model.safetensors")
    (copy / "text_encoder" / "config.json").write_text("{}")
    index = json.loads((copy / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "T5EncoderModel"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"x\.scale_weight"):
        loading.load_transformers(str(copy))


LAYERS = {
    "SD3Transformer2DModel": "transformer_blocks.0.attn.to_q",
    "FluxTransformer2DModel": "transformer_blocks.0.attn.to_q",
    "WanTransformer3DModel": "blocks.0.attn1.to_q",
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("damage", ["scale", "codes", "missing", "cut", "prefix"])
def test_single_files(damage, name, tmp_path):
    if damage == "missing" and name != "WanTransformer3DModel":
        pytest.skip("the conversion of diffusers fails first")
    model = zoo.model(name)
    model.save_config(tmp_path)
    tensors = dict(model.state_dict())
    layer = LAYERS[name]
    key = f"{layer}.weight"
    if damage == "scale":
        key = f"{layer}.weight_scale"
        tensors[key] = torch.tensor(0.1)
    elif damage == "codes":
        tensors[key] = tensors[key].mul(100).to(torch.int8)
    elif damage == "missing":
        del tensors[key]
    elif damage == "cut":
        tensors[key] = tensors[key][:, :-1].contiguous()
    else:
        tensors = {f"_orig_mod.{k}": t for k, t in tensors.items()}
    save_file(tensors, tmp_path / "one.safetensors")

    def load():
        return type(model).from_single_file(
            str(tmp_path / "one.safetensors"),
            config=str(tmp_path),
            quantization_config=dtq.DTQConfig("w4a16"),
        )

    if damage == "prefix":
        same = dtq.quantize(model, "w4a16", progress=False).state_dict()
        assert all(torch.equal(same[k], t) for k, t in load().state_dict().items())
    else:
        with pytest.raises(CheckpointError, match=key):
            load()


@pytest.mark.parametrize("name", zoo.FIVE)
def test_a_model_made_of_the_config_of_a_quantized_one_is_float(name, tmp_path):
    quantized = dtq.quantize(zoo.model(name), "w4a16", progress=False)
    quantized.save_pretrained(tmp_path / "q")
    kind = type(quantized)
    stored = kind.load_config(tmp_path / "q")
    for config in (quantized.config, stored, dict(quantized.config)):
        model = kind.from_config(config)
        model.save_pretrained(tmp_path / "f")
        assert "quantization_config" not in json.loads((tmp_path / "f/config.json").read_text())
        again = kind.from_pretrained(tmp_path / "f").state_dict()
        assert all(torch.equal(again[k], t) for k, t in model.state_dict().items())
    assert "quantization_config" in quantized.config
