# SPDX-License-Identifier: Apache-2.0
"""ModelOpt loads the folders with its tensors, and runs them."""

from __future__ import annotations

import importlib.util
import json
import random

import pytest
import torch
from engine_models import agreement, layer_input, quantized, stored_files
from safetensors.torch import load_file, save_file

import dtq
from dtq.engines import modelopt
from dtq.engines.model_folder import CONFIG, WEIGHTS
from dtq.engines.target import Contents, StoredLayer
from dtq.errors import CheckpointError, DtqError
from dtq.formats import FORMATS
from dtq.nn import QuantLinear
from dtq.plan.layers import LayerSpec

needs_modelopt = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None,
    reason="needs nvidia-modelopt: see docs/engines/README.md",
)
RUNS = [("dit", "modelopt-fp8"), ("flux", "modelopt-fp8"), ("sd3", "modelopt-nvfp4")]


@pytest.fixture(scope="module", params=RUNS, ids=lambda pair: "-".join(pair))
def exported(request, tmp_path_factory):
    """The float model, the quantized one, and its folder."""
    family, recipe = request.param
    model, made = quantized(family, recipe, "modelopt")
    folder = tmp_path_factory.mktemp(recipe) / family
    dtq.export(made, "modelopt", folder)
    return model, made, folder


@needs_modelopt
def test_layers_and_model_have_the_error_of_dtq(exported):
    import modelopt.torch.opt as mto
    from modelopt.torch.quantization.nn.modules.quant_linear import RealQuantLinear

    mto.enable_huggingface_checkpointing()
    model, made, folder = exported
    engine = type(model).from_pretrained(folder, low_cpu_mem_usage=False).eval()
    theirs = {n for n, m in engine.named_modules() if isinstance(m, RealQuantLinear)}
    ours = {n for n, m in made.named_modules() if isinstance(m, QuantLinear)}
    assert ours <= theirs

    def run_layer(name, x):
        # in three dimensions, as the model has tokens: a quantizer keeps the axes of its first input
        return engine.get_submodule(name)(x.unsqueeze(0)).squeeze(0)

    layer, whole = agreement(model, made, run_layer, engine, calls=12)
    assert layer <= 1.01
    assert whole <= 1.01


@needs_modelopt
def test_export_import_export_gives_equal_bytes(exported, tmp_path):
    _, _, folder = exported
    dtq.export(dtq.load(folder), "modelopt", tmp_path / "again")
    assert stored_files(tmp_path / "again") == stored_files(folder)


@needs_modelopt
def test_the_state_has_the_same_order_in_every_process(exported):
    """Which also decides the bytes; ModelOpt takes keys from sets, whose order Python draws by chance."""
    _, _, folder = exported
    state = torch.load(folder / modelopt.STATE, weights_only=False)  # the test wrote it
    (_, own), *_ = state["modelopt_state_dict"]
    quantizers = own["metadata"]["quantizer_state"]
    assert len(quantizers) > 40
    for keys in (quantizers, *quantizers.values()):
        assert list(keys) == sorted(keys)


def stored(kind: str, tokens: str = "none") -> StoredLayer:
    w, fmt = layer_input(256, rows=8), FORMATS[kind]
    return StoredLayer(LayerSpec(kind, tokens), (8, 256), fmt.pack(w, fmt.compute_qparams(w)))


@needs_modelopt
@pytest.mark.parametrize("kind", modelopt.LIMITS.formats)
def test_modelopt_decodes_every_format_to_the_values_of_dtq(kind):
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    layer = stored(kind)
    made = modelopt.encode(layer)
    scales = {k.rpartition("._")[2]: t for k, t in made.items()}
    shape, dtype = torch.Size(layer.shape), torch.float32
    if kind.startswith("fp8"):
        theirs = FP8QTensor(shape, dtype, made["weight"]).dequantize(dtype, scale=scales["scale"])
    else:
        theirs = NVFP4QTensor(shape, dtype, made["weight"]).dequantize(
            dtype,
            scale=scales["scale"],
            double_scale=scales["double_scale"],
            block_sizes={-1: 16},
        )
    own = FORMATS[kind].unpack(layer.weights())
    torch.testing.assert_close(theirs, own, rtol=1e-6, atol=0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with an FP8 and an NVFP4 layer, without the state of ModelOpt."""
    monkeypatch.setattr(modelopt, "_state", lambda contents: None)
    layers = {"a.b": stored("fp8-matrix", "fp8-row"), "a.c": stored("nvfp4")}
    modelopt.write(Contents(layers, {"a.d": torch.ones(3)}), tmp_path / "x")
    return tmp_path / "x", layers


def test_layers_come_back_without_the_pickle(folder):
    path, layers = folder
    (path / modelopt.STATE).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # a pickle that runs code
    assert modelopt.is_modelopt(path)
    again = modelopt.read(path).layers
    for name, layer in layers.items():
        assert again[name].spec == layer.spec
        for key, tensor in layer.tensors.items():
            assert again[name].tensors[key].dtype == tensor.dtype
            assert torch.equal(again[name].tensors[key].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("a.b.input_quantizer._amax", torch.ones(()), "static scales of tokens"),
        ("a.b.weight", torch.ones(8, 256, dtype=torch.int8), "dtq reads FP8 and NVFP4"),
        ("a.b.weight_quantizer._scale", torch.ones(8, 2), "or one for each row"),
        ("a.c.weight_quantizer._double_scale", torch.ones(2), "in groups of 16"),
    ],
)
def test_other_layouts_are_refused(key, value, message, folder):
    file = folder[0] / WEIGHTS
    tensors = load_file(file) | {key: value}
    save_file(tensors, file, {"dtq": "{}"})
    with pytest.raises(CheckpointError, match=message):
        modelopt.read(folder[0])


def test_a_folder_of_others_is_read_if_it_is_weight_only(folder):
    path, _ = folder
    file, config = path / WEIGHTS, path / CONFIG
    save_file(load_file(file), file)
    with pytest.raises(CheckpointError, match="a pickle that dtq does not open"):
        modelopt.read(path)
    for kind, reads in (("FP8", True), ("FP8_FP8", False)):
        own = {"quant_method": "modelopt", "quant_type": kind}
        config.write_text(json.dumps({"quantization_config": own}))
        if reads:
            layers = modelopt.read(path).layers.values()
            assert {layer.spec.activation_format for layer in layers} == {"none"}
            continue
        with pytest.raises(CheckpointError, match="a pickle that dtq does not open"):
            modelopt.read(path)


def test_damaged_files_are_read_or_refused(folder):
    """Whatever is wrong with a file, the error is one of dtq."""
    path, _ = folder
    refused = 0
    for name in (WEIGHTS, CONFIG):
        data = (path / name).read_bytes()
        for seed in range(100):
            rng, changed = random.Random(seed), bytearray(data)
            for _ in range(rng.choice((1, 3, 20))):
                changed[rng.randrange(min(len(data), 2000))] = rng.randrange(256)
            (path / name).write_bytes(changed[: rng.choice((len(data), rng.randrange(len(data))))])
            try:
                modelopt.read(path)
            except DtqError:
                refused += 1
        (path / name).write_bytes(data)
    assert refused > 100
