# SPDX-License-Identifier: Apache-2.0
"""The package gguf decodes the files bit for bit, and diffusers' GGUF layers run them."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from engine_models import FAMILIES, error, float_output, layer_input, model_errors, quantized

import dtq
from dtq.engines import gguf
from dtq.engines.gguf_blocks import BLOCK_TYPES, from_blocks, to_blocks
from dtq.engines.gguf_file import GgufTensor, read_gguf, write_gguf
from dtq.engines.runtimes import run_by
from dtq.engines.target import Contents
from dtq.errors import InputError
from dtq.formats import FORMATS
from dtq.nn import QuantLinear

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="needs gguf: see docs/engines/README.md"
)
TYPES = pytest.mark.parametrize("name", BLOCK_TYPES)
RECIPES = ("gguf-q8", "gguf-q4", "gguf-q3", "gguf-q2")


@needs_gguf
@TYPES
def test_the_package_decodes_blocks_to_the_same_bits(name):
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind, fmt = BLOCK_TYPES[name], FORMATS[name]
    number = GGMLQuantizationType(kind.number)
    assert number.name.lower() == name
    assert GGML_QUANT_SIZES[number] == (kind.columns, kind.nbytes)
    w = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0)) * 0.05
    tensors = fmt.pack(w, fmt.compute_qparams(w))
    theirs = torch.from_numpy(dequantize(to_blocks(name, tensors).numpy(), number))
    assert torch.equal(theirs, fmt.unpack(tensors))


@TYPES
def test_any_block_comes_back(name):
    kind = BLOCK_TYPES[name]
    count = 1024 // kind.columns * kind.nbytes
    g = torch.Generator().manual_seed(1)
    data = torch.randint(0, 256, (5, count), dtype=torch.uint8, generator=g)
    tensors = from_blocks(name, data)
    assert torch.equal(to_blocks(name, tensors), data)
    specs = FORMATS[name].tensor_specs((5, 1024))
    assert {k: (s.shape, s.dtype) for k, s in specs.items()} == {
        k: (tuple(t.shape), t.dtype) for k, t in tensors.items()
    }


MEASURED = {
    "q8_0": 2.83e-5,
    "q6_k": 2.94e-4,
    "q5_k": 1.196e-3,
    "q4_k": 4.87e-3,
    "iq4_nl": 5.34e-3,
    "q3_k": 2.07e-2,
    "q2_k": 6.76e-2,
}
"""Error of a normal matrix when the fit of the scales was accepted; another seed moves it by 1 %."""


@TYPES
def test_scales_are_as_good_as_when_they_were_accepted(name):
    fmt = FORMATS[name]
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(2))
    assert error(fmt.fake_quantize(w, fmt.compute_qparams(w)), w) < 1.05 * MEASURED[name]


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    """The float model, the quantized one, and its file."""
    model, made = quantized(request.param, "gguf-q4", "gguf")
    file = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    dtq.export(made, "gguf", file, names="diffusers")
    return request.param, model, made, file


@needs_gguf
def test_layers_and_model_have_the_error_of_dtq(exported):
    from diffusers.quantizers.gguf.utils import GGUFLinear

    _, model, made, file = exported
    engine = run_by("gguf", file, model)
    layers = {n: m for n, m in made.named_modules() if isinstance(m, QuantLinear)}
    assert {n for n, m in engine.named_modules() if isinstance(m, GGUFLinear)} == set(layers)
    assert {layer.weight_format for layer in layers.values()} == {"q4_k", "q8_0"}
    for name, layer in layers.items():
        x = layer_input(layer.in_features)
        want = float_output(model, name, x)
        with torch.no_grad():
            own, theirs = error(layer(x), want), error(engine.get_submodule(name)(x), want)
        assert 0 < own < 0.1
        assert theirs <= 1.01 * own, name
    ours, theirs = model_errors(model, made, engine)
    assert ours > 0
    assert theirs <= 1.01 * ours


@needs_gguf
def test_the_package_reads_the_container(exported):
    from gguf import GGUFReader

    _, model, _, file = exported
    reader = GGUFReader(file)
    config = json.loads(reader.get_field("dtq.config").contents())
    assert config["_class_name"] == type(model).__name__
    assert reader.get_field("general.architecture").contents() == "diffusers"
    tensors = {t.name: t for t in reader.tensors}
    _, ours = read_gguf(file)
    assert set(tensors) == set(ours)
    for name, tensor in ours.items():
        assert tuple(reversed(tensors[name].shape.tolist())) == (tensor.shape or (1,)), name
        assert tensors[name].data.tobytes() == tensor.data.numpy().tobytes(), name


def test_a_container_comes_back(tmp_path):
    g = torch.Generator().manual_seed(3)
    tensors = {
        "a": GgufTensor("", (3, 5), torch.randn(3, 5, generator=g)),
        "b": GgufTensor("", (7,), torch.randn(7, generator=g).bfloat16()),
        "c": GgufTensor(
            "q8_0", (2, 64), torch.randint(0, 256, (2, 68), dtype=torch.uint8, generator=g)
        ),
        "d": GgufTensor("", (2, 1, 3, 2), torch.arange(12, dtype=torch.int32).reshape(2, 1, 3, 2)),
    }
    write_gguf(tmp_path / "x.gguf", {"one": "text", "two": 7}, tensors)
    entries, read = read_gguf(tmp_path / "x.gguf")
    assert entries == {"one": "text", "two": 7}
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert (read[name].kind, read[name].shape) == (tensor.kind, tensor.shape)
        assert torch.equal(read[name].data, tensor.data)


@pytest.mark.parametrize("recipe", RECIPES)
def test_calibration_lowers_the_error_of_every_recipe(recipe):
    """GPTQ on the grids of the file, against rounding to the same grids."""
    model, made = quantized("dit", recipe, "gguf")
    _, plain = quantized("dit", recipe, "gguf", solver="rtn", correct_bias=False)
    errors = model_errors(model, made, plain)
    assert errors[0] < errors[1]


def test_dtypes_that_gguf_lacks_and_five_dimensions_come_back(tmp_path):
    others = {
        "patch": torch.randn(4, 3, 1, 2, 2),
        "half": torch.randn(5).bfloat16(),
        "flag": torch.tensor([True, False]),
        "byte": torch.arange(3, dtype=torch.uint8),
    }
    gguf.write(Contents({}, others, compute_dtype="bfloat16"), tmp_path / "x.gguf")
    read = gguf.read(tmp_path / "x.gguf")
    assert read.compute_dtype == "bfloat16"
    for name, tensor in others.items():
        assert read.others[name].dtype == tensor.dtype
        assert torch.equal(read.others[name], tensor)
    with pytest.raises(InputError, match="patch: GGUF has no 6 dimensions"):
        gguf.write(Contents({}, {"patch": torch.ones(1, 1, 1, 1, 1, 1)}), tmp_path / "x.gguf")
