# SPDX-License-Identifier: Apache-2.0
"""Every text encoder that a pipeline of diffusers names: scan, quantize, save, load, run."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import shutil

import pytest
import text_encoders as texts
import torch
import transformers
from accelerate import cpu_offload
from peft import LoraConfig
from safetensors import safe_open

import dtq
from dtq.errors import CheckpointError, InputError
from dtq.integrations.transformers import DTQConfig
from dtq.nn import QuantLinear
from dtq.nn.weight_only import WeightOnly
from dtq.pipelines.tracing import dummy_inputs, scan_model
from dtq.recipe import Recipe

RECIPES = ("w8a8", "w4a16", "w4a8")
# relative squared error of the first output; random weights of width 64
BARS = {"w8a8": 0.003, "w4a16": 0.1, "w4a8": 0.1}
# searches of transforms and clips read statistics and weights, no class
HASTY = {"transform": "smooth", "solver": {"gptq": {"clip": False}}}
COARSE = {"transform": {"search": {"step": 0.25, "max_error_ratio": 1.0}}}


def test_every_class_that_a_pipeline_names_is_here():
    named = texts.named_by_pipelines()
    stands_for = {texts.ABSTRACT.get(name, name) for name in named - set(texts.NOT_TEXT)}
    assert stands_for == set(texts.CONFIGS)
    assert set(texts.NOT_TEXT) <= named


def digests(folder):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


@pytest.mark.parametrize("name", sorted({*texts.CONFIGS} - {"GPT2LMHeadModel"}))
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_text_encoder_round_trip(name, recipe, tmp_path):
    # a model that was loaded: only then its config and its names of tensors are as in files
    texts.model(name).save_pretrained(tmp_path / "float")
    model, call = texts.kind_of(name).from_pretrained(tmp_path / "float"), texts.inputs(name)
    want = texts.output(model, call).double()
    hasty = {} if recipe == "w4a16" else HASTY
    inputs = [texts.inputs(name, seed) for seed in range(2)]
    quantized = dtq.quantize(model, recipe, inputs=inputs, progress=False, **hasty)
    layers = [n for n, m in model.named_modules() if isinstance(m, QuantLinear)]
    assert layers
    assert not [n for n in layers if "vision" in n or "visual" in n or "audio" in n or "head" in n]
    got = texts.output(quantized, call)
    assert float((got - want).square().sum() / want.square().sum()) < BARS[recipe]
    model.save_pretrained(tmp_path / "a", max_shard_size="60KB")
    loaded, info = type(model).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(texts.output(loaded, call), got)
    loaded.save_pretrained(tmp_path / "b", max_shard_size="60KB")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert [n for n, m in loaded.named_modules() if isinstance(m, QuantLinear)] == layers


def test_conv1d_is_refused_with_its_name():
    model = texts.model("GPT2LMHeadModel")
    with pytest.raises(InputError, match="8 weights: Conv1D"):
        dtq.quantize(model, "w4a16", inputs=[texts.inputs("GPT2LMHeadModel")], progress=False)


LEAVES = {
    "q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.out", "wi_0": "ffn.up",
    "wi_1": "ffn.up", "wo": "ffn.down", "q_proj": "attn.q", "k_proj": "attn.k",
    "v_proj": "attn.v", "o_proj": "attn.out", "out_proj": "attn.out", "gate_proj": "ffn.up",
    "up_proj": "ffn.up", "gate_up_proj": "ffn.up", "down_proj": "ffn.down", "fc1": "ffn.up",
    "fc2": "ffn.down", "query": "attn.q", "key": "attn.k", "value": "attn.v",
    "attention.output.dense": "attn.out", "intermediate.dense": "ffn.up",
    "output.dense": "ffn.down",
}  # fmt: skip


NOT_ON_META = {
    "ClapTextModelWithProjection": "counts the positions of tokens that are not padding",
    "Gemma4UnifiedForConditionalGeneration": "looks for images among the tokens",
    "T5GemmaEncoder": "looks for padding among the tokens",
    "T5GemmaEncoderModel": "looks for padding among the tokens",
}


@pytest.mark.parametrize("name", sorted({*texts.CONFIGS} - {"GPT2LMHeadModel"}))
def test_roles_on_the_meta_device_are_those_of_the_model(name):
    with torch.device("meta"):
        empty = texts.model(name)
    scan = scan_model(empty)
    assert scan.traced is (name not in NOT_ON_META)
    whole = scan_model(texts.model(name))
    assert scan.linears() == whole.linears() or name in NOT_ON_META
    plan = Recipe.load("w4a16").plan(whole, ())
    for layer in plan.quantized():
        path = layer.name.split(".")
        leaves = (".".join(path[-count:]) for count in (3, 2, 1))
        assert layer.role == next(LEAVES[leaf] for leaf in leaves if leaf in LEAVES), layer.name
    groups = {group.name: len(group.linears) for group in whole.input_groups}
    assert max(groups.values()) >= 3  # q, k and v read one tensor


def test_a_bare_encoder_decoder_gets_two_texts():
    config = transformers.T5Config(**texts.T5, decoder_start_token_id=0)
    model = transformers.T5Model(config).eval()
    scan = scan_model(model)
    assert scan.traced
    assert not scan.uncalled
    dtq.quantize(model, "rtn-w4a8", progress=False)
    decoder = model.decoder.block[0].layer[1].EncDecAttention
    assert isinstance(decoder.k, QuantLinear)


def test_random_tokens_are_not_those_that_a_config_names():
    model = texts.model("LlamaModel")
    model.config.eos_token_id = [2, *range(10, 90)]  # a list in Llama 3
    ids = dummy_inputs(model, 4, 0.0, 0)["input_ids"]
    assert model.config.pad_token_id == 0
    assert not {*ids.flatten().tolist()} & {0, 1, 2, *range(10, 90)}


def test_fp16_keeps_what_transformers_keeps():
    model = texts.model("T5EncoderModel", torch.float16)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float16
    dtq.quantize(model, "w4a16", inputs=[texts.inputs("T5EncoderModel")], progress=False)
    block = model.encoder.block[0].layer[1].DenseReluDense
    assert not isinstance(block.wo, QuantLinear)
    assert isinstance(block.wi_0, QuantLinear)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a quantized BERT."""
    folder = tmp_path_factory.mktemp("bert")
    model = texts.model("BertModel")
    calls = [texts.inputs("BertModel")]
    dtq.quantize(model, "w8a8", inputs=calls, progress=False, **COARSE)
    model.save_pretrained(folder)
    return folder


def test_a_text_encoder_can_be_cast(bert):
    model = transformers.BertModel.from_pretrained(bert)
    layer = model.encoder.layer[0].attention.self.query
    assert isinstance(layer, QuantLinear)
    packed = layer.packed_tensors()
    for cast in (model.half, model.bfloat16, lambda: model.to(torch.bfloat16)):
        cast()
        assert all(torch.equal(t, packed[k]) for k, t in layer.packed_tensors().items())
    assert model.config.quantization_config.compute_dtype == torch.bfloat16
    assert layer.bias.dtype == torch.bfloat16
    model.requires_grad_(True)
    assert layer.bias.requires_grad
    assert not layer.weight.requires_grad


def test_a_damaged_file_is_refused_by_name(bert, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(bert, folder)
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="is damaged"):
        transformers.BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("format_version", 99, "pip install -U dtq"), ("layers", {}, "has no entry in 'layers'")],
)
def test_a_config_that_does_not_fit_is_refused(field, value, says, bert, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(bert, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        transformers.BertModel.from_pretrained(folder)


def test_a_text_encoder_is_quantized_while_it_loads(tmp_path):
    texts.model("T5EncoderModel").save_pretrained(tmp_path / "t")
    model = transformers.T5EncoderModel.from_pretrained(
        tmp_path / "t", quantization_config=dtq.DTQConfig("w4a16", modules_to_not_convert=["wo"])
    )
    kinds = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert kinds == {"q", "k", "v", "o", "wi_0", "wi_1"}
    model.save_pretrained(tmp_path / "q")
    again = transformers.T5EncoderModel.from_pretrained(tmp_path / "q")
    call = texts.inputs("T5EncoderModel")
    assert torch.equal(texts.output(again, call), texts.output(model, call))


def test_dequantize_gives_a_float_model(bert, tmp_path):
    model = transformers.BertModel.from_pretrained(bert)
    call = texts.inputs("BertModel")
    want = texts.output(model, call)
    model.dequantize()
    assert not [m for m in model.modules() if isinstance(m, QuantLinear)]
    got = texts.output(model, call)
    assert float((got - want).square().sum() / want.square().sum()) < 1e-3  # rounded inputs
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = transformers.BertModel.from_pretrained(tmp_path)
    assert torch.equal(texts.output(again, call), got)


TIED = {  # of the tables, what else has their weight in these configurations
    "T5EncoderModel": {"encoder.embed_tokens": "QuantEmbedding"},
    "UMT5EncoderModel": {"encoder.embed_tokens": "QuantEmbedding"},
    "Gemma3ForConditionalGeneration": {"lm_head": "QuantHeadLinear"},
    "Gemma4UnifiedForConditionalGeneration": {"lm_head": "QuantHeadLinear"},
    "Mistral3ForConditionalGeneration": {"lm_head": "QuantHeadLinear"},
    "SmolLM3ForCausalLM": {"lm_head": "QuantHeadLinear"},
}
TABLES_ALONE = {"exclude": ["attn.*", "ffn.*", "embed", "head"], "embeddings": "w8"}


@pytest.mark.parametrize("name", sorted({*texts.CONFIGS} - {"GPT2LMHeadModel"}))
def test_a_packed_table_round_trip(name, tmp_path):
    texts.model(name).save_pretrained(tmp_path / "float")
    model, call = texts.kind_of(name).from_pretrained(tmp_path / "float"), texts.inputs(name)
    floats = dict(model.named_modules(remove_duplicate=False))
    want = texts.output(model, call).double()
    dtq.quantize(model, "w4a16", inputs=[call], progress=False, **TABLES_ALONE)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, WeightOnly)}
    tied = {n: type(m).__name__ for n, m in packed.items() if n in TIED.get(name, {})}
    assert tied == TIED.get(name, {})
    (table,) = {*packed} - {*tied}
    assert all(isinstance(m, type(floats[n])) for n, m in packed.items())
    assert packed[table].weight.dtype == torch.int8
    assert all(m.weight is packed[table].weight for m in packed.values())
    got = texts.output(model, call)
    assert 0 < float((got - want).square().sum() / want.square().sum()) < 1e-3
    model.save_pretrained(tmp_path / "a")
    loaded, info = type(model).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(texts.output(loaded, call), got)
    again = dict(loaded.named_modules())
    assert all(again[n].weight is again[table].weight for n in tied)
    assert all(again[n].weight_scale is again[table].weight_scale for n in tied)
    loaded.save_pretrained(tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.fixture(scope="module")
def umt5(tmp_path_factory):
    """A folder with a UMT5 whose linears and table are packed, in 4 bits."""
    folder = tmp_path_factory.mktemp("umt5")
    model = texts.model("UMT5EncoderModel")
    calls = [texts.inputs("UMT5EncoderModel")]
    dtq.quantize(model, "w4a16", inputs=calls, progress=False, embeddings="w4")
    model.save_pretrained(folder)
    return folder


def test_a_tied_table_is_stored_and_held_once(umt5):
    model = transformers.UMT5EncoderModel.from_pretrained(umt5)
    config = model.config.quantization_config
    assert config.layers["shared"] == {
        "weight_format": "int4-2l-g32", "activation_format": "none",
        "hadamard_block_size": 1, "pre_quant": False,
    }  # fmt: skip
    assert "encoder.embed_tokens" not in config.layers
    with safe_open(umt5 / "model.safetensors", framework="pt") as file:
        keys = {key for key in file.keys() if "shared" in key or "embed_tokens" in key}  # noqa: SIM118
    assert keys == {"shared.weight", "shared.weight_scale", "shared.weight_scale_2"}
    for made in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.bfloat16()):
        assert made.encoder.embed_tokens.weight is made.shared.weight
        assert made.encoder.embed_tokens.weight_scale_2 is made.shared.weight_scale_2


def test_a_tied_table_is_offloaded(umt5):
    model, call = (
        transformers.UMT5EncoderModel.from_pretrained(umt5),
        texts.inputs("T5EncoderModel"),
    )
    want = texts.output(model, call)
    cpu_offload(model, torch.device("cpu"))
    assert model.encoder.embed_tokens.weight.is_meta
    assert torch.equal(texts.output(model, call), want)


def test_a_tied_table_becomes_float_once(umt5):
    model, call = (
        transformers.UMT5EncoderModel.from_pretrained(umt5),
        texts.inputs("T5EncoderModel"),
    )
    rows = model.encoder.embed_tokens(call["input_ids"])
    model.dequantize()
    assert type(model.shared) is type(model.encoder.embed_tokens) is torch.nn.Embedding
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert torch.equal(model.encoder.embed_tokens(call["input_ids"]), rows)
    assert model.all_tied_weights_keys == {"encoder.embed_tokens.weight": "shared.weight"}
    model.resize_token_embeddings(120)  # refused while the table is packed


def test_tokens_are_not_added_to_a_packed_table(umt5):
    model = transformers.UMT5EncoderModel.from_pretrained(umt5)
    with pytest.raises(InputError, match="takes no new tokens"):
        model.resize_token_embeddings(120)


def test_a_packed_table_takes_no_adapters(umt5):
    model = transformers.UMT5EncoderModel.from_pretrained(umt5)
    with pytest.raises(InputError, match="tables of embeddings take no adapters"):
        model.add_adapter(LoraConfig(r=2, target_modules=["embed_tokens"]))


def test_a_table_is_packed_while_loading(tmp_path):
    texts.model("UMT5EncoderModel").save_pretrained(tmp_path)
    config = DTQConfig("rtn-w4a8", embeddings="w8")
    model = transformers.UMT5EncoderModel.from_pretrained(tmp_path, quantization_config=config)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert model.shared.weight.dtype == torch.int8


def test_a_damaged_config_of_a_table_is_one_message(umt5, tmp_path):
    shutil.copytree(umt5, tmp_path / "q")
    config = tmp_path / "q" / "config.json"
    data = json.loads(config.read_text())
    data["quantization_config"]["layers"]["shared"]["weight_format"] = "vq-256x4"
    config.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="'shared' cannot be packed: vq-256x4 has"):
        transformers.UMT5EncoderModel.from_pretrained(tmp_path / "q")


def tables(model, **keys):
    return {x.name: x.note for x in Recipe.load("w4a16", **keys).plan(scan_model(model)).tables()}


def test_which_tables_are_planned():
    t5 = texts.model("T5EncoderModel")
    assert tables(t5) == {}
    assert tables(t5, embeddings="w8") == {"shared": "also the weight of encoder.embed_tokens"}
    assert tables(t5, embeddings="w8", exclude=["vocab"]) == {}
    clip = texts.model("CLIPTextModel")  # not its positions
    assert tables(clip, embeddings="w8") == {"embeddings.token_embedding": ""}
    small = transformers.BertModel(transformers.BertConfig(**texts.SMALL | {"vocab_size": 20}))
    assert tables(small.eval(), embeddings="w8") == {}  # less than 2 % of the weights
    with torch.device("meta"):
        empty = texts.model("T5GemmaEncoderModel")
    assert not scan_model(empty).traced
    assert tables(empty, embeddings="w4") == {"encoder.embed_tokens": ""}


def test_a_width_that_4_bits_do_not_fit_takes_8():
    model = transformers.BertModel(transformers.BertConfig(**texts.SMALL | {"hidden_size": 48}))
    plan = Recipe.load("w4a16", embeddings="w4").plan(scan_model(model.eval()))
    (table,) = plan.tables()
    assert table.weight_format == "int8-row"
    assert "48" in table.note


def test_a_weight_that_something_else_reads_is_no_table():
    model = texts.model("T5EncoderModel")
    model.other = torch.nn.Linear(64, 99)
    model.other.weight = model.shared.weight
    assert tables(model, embeddings="w8") == {}
