# SPDX-License-Identifier: Apache-2.0
"""Whatever goes into a folder comes out of it bit for bit, or with a clear error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from builders import EVERYTHING, collected, planned
from conftest import hasty
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import dtq
from dtq.checkpoint import reader, writer
from dtq.checkpoint.file_size import file_bytes
from dtq.errors import CheckpointError, InputError
from dtq.io.package_data import yaml_names
from dtq.pipelines.loading import LoadedModel, load_transformer, meta_models
from dtq.stages.file_tensors import file_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_survive_every_cast(dtype, quantized_folder):
    disk = load_file(quantized_folder / "transformer" / WEIGHTS)
    model = DiTTransformer2DModel.from_pretrained(
        quantized_folder, subfolder="transformer", torch_dtype=dtype
    )
    for name, layer in model.named_modules():
        if isinstance(layer, dtq.QuantLinear):
            for part, tensor in layer.packed_tensors().items():
                assert torch.equal(tensor, disk[f"{name}.{part}"])
                assert tensor.dtype == disk[f"{name}.{part}"].dtype
            assert layer.bias.dtype == (dtype or torch.float32)


def test_save_load_save_gives_the_same_bytes(quantized_folder, tmp_path):
    first = DiffusionPipeline.from_pretrained(quantized_folder)
    first.save_pretrained(tmp_path / "a")
    second = DiffusionPipeline.from_pretrained(tmp_path / "a")
    writer.write(second, tmp_path / "b")
    for file in sorted(p for p in quantized_folder.rglob("*") if p.is_file()):
        again = tmp_path / "b" / file.relative_to(quantized_folder)
        assert again.read_bytes() == file.read_bytes(), file.name
    a = tmp_path / "a" / "transformer" / WEIGHTS
    assert a.read_bytes() == (quantized_folder / "transformer" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("heads", [4, 5])
def test_base_3_codes_are_saved_with_and_without_a_tail(heads, tmp_path):
    """128 columns leave three behind the last five, 160 none."""
    given = {"norm_num_groups": 32, "heads": heads, "blocks": 1}
    model = dtq.quantize(
        tiny.dit(**given), "w4a16", weights="trit-row", progress=False, sanity_check=False
    )
    model.save_pretrained(tmp_path)
    q = "transformer_blocks.0.attn1.to_q"
    assert (f"{q}.weight_tail" in load_file(tmp_path / WEIGHTS)) == (heads == 4)
    again = DiTTransformer2DModel.from_pretrained(tmp_path)
    for name, part in model.get_submodule(q).packed_tensors().items():
        assert torch.equal(again.get_submodule(q).packed_tensor(name), part)


def test_two_processes_make_the_same_pictures(quantized_folder, tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import dtq, tiny, torch\n"
        "from diffusers import DiffusionPipeline\n"
        "torch.save(tiny.sample(DiffusionPipeline.from_pretrained(sys.argv[2])), sys.argv[3])\n"
    )
    target = tmp_path / "there"
    paths = [str(p) for p in (Path(__file__).parent.parent, quantized_folder, target)]
    command = [sys.executable, "-c", script, *paths]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent.parent)
    here = tiny.sample(DiffusionPipeline.from_pretrained(quantized_folder))
    assert torch.equal(here, torch.load(target))


@pytest.fixture(scope="module")
def statistics(float_folder):
    """Of the float transformer, for every recipe."""
    return collected(load_transformer(str(float_folder)), hasty("w4a8"), EVERYTHING)


# float32 and every method as it is: tests/recipe/test_published_methods.py
@pytest.mark.parametrize("recipe", yaml_names("recipes"))
def test_the_file_has_the_bytes_of_the_plan_and_the_samples_of_the_model(
    recipe, float_folder, statistics, tmp_path, few_vectors
):
    bfloat16 = torch.bfloat16
    ((model, _),) = meta_models(str(float_folder)).values()
    # how a layer was solved leaves no trace in its size
    quick = {"solver": "rtn", "finetune": "none", "transform_candidates": []}
    chosen = hasty(recipe, promote={"to": ""}, allocate={"budget": ""}, **quick)
    plan = planned(LoadedModel("x", None, "transformer", model), chosen).plan
    predicted = reader.predicted_bytes(file_tensors(model, plan, bfloat16))
    pipe = dtq.quantize(float_folder, chosen, dtype=bfloat16, statistics=statistics, progress=False)
    want = tiny.sample(pipe)
    writer.write(pipe, tmp_path / "q")
    assert (tmp_path / "q" / "transformer" / WEIGHTS).stat().st_size == predicted
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "q", torch_dtype=bfloat16)
    assert torch.equal(tiny.sample(loaded), want)
    # without a dtype the one that was recorded is used, for the transformer
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "q", subfolder="transformer")
    assert model.dtype == bfloat16
    saved = pipe.transformer.state_dict().values()
    pairs = zip(model.state_dict().values(), saved, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_file_bytes_formula(tmp_path):
    dtypes = (torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16,
              torch.int16, torch.int8, torch.uint8, torch.bool)  # fmt: skip
    tensors = {
        f"{n}.{i}": torch.zeros(7 * i + 1, 3, dtype=d) for i, d in enumerate(dtypes) for n in "zä"
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    predicted = file_bytes(
        {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()}, {"format": "pt"}
    )
    assert (tmp_path / "x.safetensors").stat().st_size == predicted


def test_shards(quantized_folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(quantized_folder)
    writer.write(pipe, tmp_path / "s", shard="300kB")
    assert len(list((tmp_path / "s" / "transformer").glob("*.safetensors"))) > 2
    reader.verify(tmp_path / "s")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "s")
    assert torch.equal(tiny.sample(loaded), tiny.sample(pipe))
    (next((tmp_path / "s" / "transformer").glob("*00002*"))).unlink()
    with pytest.raises((CheckpointError, OSError)):
        reader.verify(tmp_path / "s")


@pytest.fixture
def copy(quantized_folder, tmp_path) -> Path:
    shutil.copytree(quantized_folder, tmp_path / "copy")
    return tmp_path / "copy"


def load(folder: Path):
    return DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_a_flipped_bit_is_an_error_that_names_file_and_key(copy, place):
    file = copy / "transformer" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 4
    file.write_bytes(data)
    for read in (reader.verify, load):
        with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: \S+ is damaged"):
            read(copy)


@pytest.mark.parametrize(
    "old", [b"proj_out_1.bias", b'"BF16"', b"[128,64]", b"transformer_blocks.1.ff"]
)
def test_a_flipped_bit_in_the_header_is_an_error(copy, old):
    file = copy / "transformer" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[data.index(old) + len(old) - 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged|missing|has shape|asks for"):
        reader.verify(copy)
    # diffusers itself reads the header of a single file before it asks dtq
    words = r"damaged|missing|has shape|asks for|Unable to load weights"
    with pytest.raises((CheckpointError, OSError), match=words):
        load(copy)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.9999])
def test_a_truncated_file_is_an_error(copy, keep):
    file = copy / "transformer" / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: truncated or damaged"):
        reader.verify(copy)
    with pytest.raises((CheckpointError, OSError, SafetensorError)):
        load(copy)


def edit(folder: Path, change) -> None:
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


Q = "transformer_blocks.0.attn1.to_q"
DAMAGE = {
    "newer version": (lambda q: q.update(format_version=3), "format_version.*pip install -U dtq"),
    "older version": (
        lambda q: q.update(format_version=1),
        "'format_version' is 1, .*: quantize the model again with this version",
    ),
    "no version": (lambda q: q.pop("format_version"), "format_version"),
    "unknown format": (
        lambda q: q["layers"][Q].update(weight_format="int3-x"),
        "unknown format 'int3-x'",
    ),
    "another format": (lambda q: q["layers"][Q].update(weight_format="int8-row"), f"{Q}.weight"),
    "missing key": (
        lambda q: q["layers"][Q].pop("activation_format"),
        "activation_format: missing",
    ),
    "unknown key": (lambda q: q["layers"][Q].update(turns=2), "turns: unknown key"),
    "odd block": (lambda q: q["layers"][Q].update(hadamard_block_size=48), "power of two"),
    "strange layer": (lambda q: q["layers"].update(nowhere=q["layers"][Q]), "no layer 'nowhere'"),
    "layers is a list": (lambda q: q.update(layers=[1]), "layers: expected a mapping"),
    "edges": (lambda q: q.update(timestep_edges=[3, 1]), "rising"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_config_is_an_error_that_names_the_key(copy, kind):
    change, message = DAMAGE[kind]
    edit(copy, change)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_a_config_of_version_1_is_refused_whatever_its_keys_are(copy):
    """They had other names: ``weights``, ``acts``."""

    def old(q):
        q["layers"] = {Q: {"weights": "int4-row", "acts": "int8-row"}}
        q["format_version"] = 1

    edit(copy, old)
    for read in (load, reader.verify):
        with pytest.raises(CheckpointError, match="quantize the model again") as caught:
            read(copy)
        assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_an_error(copy):
    file = copy / "transformer" / WEIGHTS
    tensors = load_file(file)
    del tensors[f"{Q}.weight_scale"]
    save_file(tensors, file, {"format": "pt"})
    for read in (load, reader.verify):
        with pytest.raises(CheckpointError, match=f"the tensor {Q}.weight_scale is missing"):
            read(copy)


@pytest.mark.parametrize("part", ["weight", "weight_scale", "bias"])
def test_a_tensor_that_was_cut_is_named(copy, part):
    file = copy / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors[f"{Q}.{part}"] = tensors[f"{Q}.{part}"][..., :-1].contiguous()
    save_file(tensors, file, {"format": "pt"})
    for read in (load, reader.verify):
        with pytest.raises(CheckpointError, match=rf"{Q}\.{part} "):
            read(copy)


def test_a_file_from_a_newer_dtq_is_refused(copy):
    file = copy / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors[reader.CHECKSUMS][0] = 9
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"format is 9, .*: pip install -U dtq"):
        load(copy)


def test_a_file_from_an_older_dtq_is_refused(copy):
    file = copy / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors[reader.CHECKSUMS][0] = 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"format is 1, .*: quantize the model again"):
        load(copy)


def test_writing_is_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"

    class Fails:
        def save_pretrained(self, folder, **options):
            (Path(folder) / "half.safetensors").write_bytes(b"x")
            raise self.error

    for error, expected in (
        (OSError(28, "No space left on device"), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        Fails.error = error
        with pytest.raises(expected):
            writer.write(Fails(), out)
        assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_left_alone(tmp_path, quantized_folder):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    pipe = DiffusionPipeline.from_pretrained(quantized_folder)
    with pytest.raises(InputError, match="not empty"):
        writer.write(pipe, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    writer.write(pipe, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_no_local_path_is_written(quantized_folder):
    for file in quantized_folder.rglob("*.json"):
        assert "_name_or_path" not in json.loads(file.read_text())
