# SPDX-License-Identifier: Apache-2.0
"""Files from anywhere: nothing runs, nothing is read outside the folder, nothing huge is made."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from diffusers import DiffusionPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dtq
from dtq.calibrate import store
from dtq.checkpoint import reader, writer
from dtq.cli import main
from dtq.errors import CheckpointError, DtqError, InputError, RecipeError
from dtq.evaluate.report.quantization_report import quantization_report
from dtq.io import safe_parse
from dtq.io.safe_parse import parse_json, parse_yaml, read_json
from dtq.parallel import load_sharded
from dtq.pipelines import loading
from dtq.pipelines.validation import check_folder
from dtq.recipe import Recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"
FEW = {"calibration": {"samples": 4, "batch_size": 4, "steps": 4, "num_timestep_bins": 4}}


@pytest.fixture(scope="module")
def quick_folder(tmp_path_factory, float_folder) -> Path:
    """A quantized pipeline, rounded to nearest: made in a moment."""
    pipe = dtq.quantize(float_folder, "rtn-w4a8", progress=False, sanity_check=False, **FEW)
    return writer.write(pipe, tmp_path_factory.mktemp("quick") / "pipe")


@pytest.fixture
def copy(quick_folder, tmp_path) -> Path:
    shutil.copytree(quick_folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def float_copy(float_folder, tmp_path) -> Path:
    shutil.copytree(float_folder, tmp_path / "float")
    return tmp_path / "float"


def edit(file: Path, change) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def refused(folder: Path, words: str) -> None:
    """Every way in says no with dtq's own error, at once."""
    started = time.monotonic()
    with pytest.raises(DtqError, match=words):
        loading.load_transformers(str(folder))
    for command in (["inspect"], ["sample", "-o", str(folder.parent / "o")]):
        result = CliRunner().invoke(main, [command[0], str(folder), *command[1:]])
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: "), result.stderr
    assert not (folder.parent / "o").exists()
    assert time.monotonic() - started < 60


JSON = {
    "twice": ('{"a": 1, "a": 2}', "'a' is there twice"),
    "nan": ('{"a": NaN}', "NaN is not a number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is not a number"),
    "beyond floats": ('{"a": 1e999}', "1e999 is beyond"),
    "beyond integers": ('{"a": {"b": 99999999999999999999}}', "a.b: a number beyond 64 bits"),
    "digits": ('{"a": ' + "9" * 9999 + "}", "not JSON"),
    "deep": ("[" * 100_000, "nested too deep|not JSON"),
    "rather deep": ("[" * 100 + "]" * 100, "nested deeper than 64"),
    "text": ("hello", "not JSON"),
    "surrogate": ('{"a": {"b": ["\\ud800"]}}', "a.b: no Unicode text"),
    "surrogate key": ('{"a": {"\\udfff": 1}}', "a: a key that is no Unicode text"),
}


@pytest.mark.parametrize("kind", JSON)
def test_json_is_small_shallow_and_plain(kind):
    text, words = JSON[kind]
    with pytest.raises(InputError, match=rf"^x\.json: .*({words})"):
        parse_json(text, "x.json")


def test_schedulers_of_diffusers_say_infinity(tmp_path):
    DPMSolverMultistepScheduler().save_config(tmp_path)
    file = tmp_path / "scheduler_config.json"
    assert "-Infinity" in file.read_text()
    assert safe_parse.read_json(file)["lambda_min_clipped"] == -math.inf
    file.write_text('{"a": NaN}')
    with pytest.raises(InputError, match="NaN is not a number"):
        safe_parse.read_json(file)


def test_json_files_are_files(tmp_path, monkeypatch):
    (tmp_path / "list").write_text("[1]")
    (tmp_path / "bytes").write_bytes(b'{"a": "\xff"}')
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    monkeypatch.setattr(safe_parse, "LARGEST_JSON", 100)
    (tmp_path / "large").write_text('{"a": "' + "x" * 100 + '"}')
    for name, words in {
        "list": "expected a JSON object",
        "bytes": "not text",
        "folder": "not a file",
        "pipe": "not a file",
        "large": "larger than 100 bytes",
        "nothing": "No such file",
    }.items():
        with pytest.raises(InputError, match=f"{name}: {words}"):
            read_json(tmp_path / name)


YAML = {
    "bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "alias \\*a.*line 2"),
    "object": ("a: !!python/object/apply:os.system ['touch pwned']", "not YAML.*python/object"),
    "name": ("a: !!python/name:os.system", "not YAML"),
    "tag": ("a: !mine 3", "not YAML"),
    "twice": ("activations: none\nactivations: int8-row", "'activations' is there twice"),
    "deep": ("a: " + "[" * 5000, "nested deeper than 64"),
    "digits": ("a: " + "9" * 9999, "not YAML"),
    "beyond integers": ("a: 99999999999999999999", "beyond 64 bits"),
    "date": ("a: 2020-13-45", "not YAML"),
    "infinite": ("a: [1.0, .inf]", "a: a number that is not finite"),
    "nan": ("a: .nan", "a: a number that is not finite"),
    "key": ("? [1, 2]\n: 3", "not YAML"),
    "control": ("a: \x07", "not YAML"),
    "large": ("# " + "x" * 2**18, "larger than"),
}


@pytest.mark.parametrize("kind", YAML)
def test_recipes_are_data(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, words = YAML[kind]
    with pytest.raises(InputError, match=rf"(?s)^there: .*{words}"):
        parse_yaml(text, "there")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError):
        Recipe.load("r.yaml")
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("calibration: {samples: 1000000000000}", "at most 1000000"),
        ("calibration: {steps: 100000}", "at most 10000"),
        ("transform: {search: {step: .nan}}", "search.step: a number that is not finite"),
        ("solver: {gptq: {damp: 1.0e+300}}", "gptq.damp: expected a number"),
        ("promote: {max_error: .inf}", "promote.max_error: a number that is not finite"),
        (f"weights: {['x'] * 5000}", r"got \['x'.{90,120} \.\.\.$"),
    ],
)
def test_recipes_ask_for_nothing_huge(text, words, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=words):
        Recipe.load(tmp_path / "r.yaml")


def test_settings_of_the_command_line_are_data_too(float_folder):
    result = CliRunner().invoke(
        main, ["plan", str(float_folder), "--set", "weights=!!python/name:os.system"]
    )
    assert result.exit_code == 1
    assert "not YAML" in result.stderr


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_pickle_is_refused_and_never_opened(float_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = float_copy / "transformer"
    (part / WEIGHTS).unlink()
    (part / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    refused(float_copy, "the weights are pickle .*can run code; dtq reads safetensors")
    result = CliRunner().invoke(main, ["plan", str(part)])
    assert "the weights are pickle" in result.stderr
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_with_a_plan_is_refused_by_from_pretrained(copy):
    part = copy / "transformer"
    torch.save(load_file(part / WEIGHTS), part / "diffusion_pytorch_model.bin")
    (part / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="pickle, which can run code"):
        DiTTransformer2DModel.from_pretrained(part)


def shards(folder: Path) -> Path:
    """The transformer in several files; its index."""
    model = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    (folder / "transformer" / WEIGHTS).unlink()
    model.save_pretrained(folder / "transformer", max_shard_size="300kB")
    return folder / "transformer" / f"{WEIGHTS}.index.json"


@pytest.mark.parametrize(
    "name",
    [
        "../../secret.safetensors",
        "x" * 300 + ".safetensors",
        "/etc/passwd",
        "a\x00.safetensors",
        "x.bin",
        3,
        None,
    ],
)
def test_shards_are_plain_names(name, float_copy):
    index = shards(float_copy)
    edit(index, lambda data: data["weight_map"].update({"pos_embed.proj.bias": name}))
    refused(float_copy, r"weight_map\['pos_embed.proj.bias'\] must be the name of a safetensors")


def test_a_missing_shard_and_an_odd_index(float_copy):
    index = shards(float_copy)
    next(index.parent.glob("*-00002-*")).unlink()
    refused(float_copy, "00002.*missing")
    index.write_text("[]")
    refused(float_copy, "expected a JSON object")


def test_a_tensor_in_two_files_is_refused(copy):
    part = copy / "transformer"
    with safe_open(part / WEIGHTS, framework="pt") as file:
        tensor = file.get_tensor("proj_out_1.bias")
    save_file({"proj_out_1.bias": tensor}, part / "more.safetensors")
    names = {"proj_out_1.bias": WEIGHTS, "proj_out_1.weight": "more.safetensors"}
    index = {"metadata": {}, "weight_map": names}
    (part / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"proj_out_1.bias is also in"):
        reader.verify(copy)


@pytest.mark.parametrize("what", ["file", "folder", "loop"])
def test_links_do_not_lead_out_of_the_folder(what, copy, tmp_path):
    part = copy / "transformer"
    if what == "file":
        (part / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
        (part / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    elif what == "folder":
        part.rename(tmp_path / "elsewhere")
        part.symlink_to(tmp_path / "elsewhere")
    else:
        (part / "more.json").symlink_to(part / "more.json")
    refused(copy, "leads nowhere" if what == "loop" else "a link out of the folder")


def test_links_inside_and_those_of_the_hub_cache_are_followed(quick_folder, tmp_path):
    """The hub keeps files in blobs/ and links to them; a user may link to the whole folder."""
    snapshot = tmp_path / "models--me--it" / "snapshots" / "abc"
    shutil.copytree(quick_folder, snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    (snapshot / "transformer" / WEIGHTS).rename(blobs / "1")
    (snapshot / "transformer" / WEIGHTS).symlink_to(Path("../../../blobs/1"))
    (tmp_path / "short").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "short"):
        assert reader.verify(folder)


def test_overwriting_a_link_leaves_what_it_leads_to(copy, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "mine").write_text("x")
    (tmp_path / "out").symlink_to(tmp_path / "precious")
    pipe = DiffusionPipeline.from_pretrained(copy)
    writer.write(pipe, tmp_path / "out", overwrite=True)
    assert (tmp_path / "precious" / "mine").read_text() == "x"
    assert reader.verify(tmp_path / "out")
    assert not (tmp_path / "out").is_symlink()


INDEX = {
    "code": (lambda i: i.update(transformer=["antigravity", "Thing"]), "'antigravity', whose code"),
    "imported": (lambda i: i.update(transformer=["subprocess", "Popen"]), "would be imported"),
    "traversal": (lambda i: i.update({"../../x": ["diffusers", "X"]}), "not the name of a comp"),
    "custom pipeline": (lambda i: i.update(_class_name=["mine", "Mine"]), "come as code"),
    "three": (lambda i: i.update(vae=["a", "b", "c"]), "must be .library, class."),
    "no strings": (lambda i: i.update(vae=[["a"], {}]), "must be .library, class."),
    "attribute": (lambda i: i.update(vae=["diffusers", "a.b"]), "not the name of a class"),
    "unknown class": (lambda i: i.update(vae=["diffusers", "NoSuch"]), "diffusers cannot load"),
    "unknown pipeline": (lambda i: i.update(_class_name="NoSuch"), "diffusers cannot load"),
}


@pytest.mark.parametrize("kind", INDEX)
def test_the_index_names_classes_of_known_libraries(kind, copy):
    change, words = INDEX[kind]
    edit(copy / "model_index.json", change)
    with pytest.raises(DtqError, match=words):
        loading.load_transformers(str(copy))


CONFIG = {
    "layers": ("transformer", {"num_layers": 10**9}, "more than .* modules.*number of layers"),
    "size": ("transformer", {"sample_size": 10**6}, "tables of|cannot be built"),
    "heads": ("transformer", {"num_attention_heads": 2**40}, "cannot be built|shape|cannot load"),
    "zero": ("transformer", {"num_attention_heads": 0}, "cannot be built|has shape"),
    "words": ("transformer", {"num_layers": "many"}, "cannot be built"),
    "steps": ("scheduler", {"num_train_timesteps": 10**12}, "must be 1 to 1000000"),
    "vae": ("vae", {"layers_per_block": 10**9}, "more than .* modules"),
}


@pytest.mark.parametrize("kind", CONFIG)
def test_configs_ask_for_no_more_than_the_files_hold(kind, copy):
    part, change, words = CONFIG[kind]
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    edit(copy / part / name, lambda data: data.update(change))
    with pytest.raises(DtqError, match=words):
        loading.load_transformers(str(copy))


def test_the_name_of_a_folder_excuses_no_config(copy):
    """Classes that read their own weights while they are built are left to diffusers; a path with
    the word in it is none of them."""
    folder = copy.rename(copy.with_name("a meta tensor"))
    edit(folder / "transformer" / "config.json", lambda data: data.update(num_layers="many"))
    with pytest.raises(InputError, match="cannot be built"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["os", ["a"], "AutoencoderKL", "DiTPipeline", 3])
def test_a_bare_model_names_a_transformer(name, copy):
    edit(copy / "transformer" / "config.json", lambda data: data.update(_class_name=name))
    with pytest.raises(
        DtqError, match=r"has no model|has no layer|is neither a diffusion transformer|cannot be"
    ):
        loading.load_transformers(str(copy / "transformer"))


Q = "transformer_blocks.0.attn1.to_q"
FIELDS = {
    "rank": (lambda q: q["layers"][Q].update(rank=10**12), "proj_down is missing"),
    "block": (lambda q: q["layers"][Q].update(hadamard_block_size=2**40), "do not divide K = 128"),
    "edges": (lambda q: q.update(timestep_edges=["x"]), "timestep_edges: expected a list of num"),
    "bool edges": (lambda q: q.update(timestep_edges=[True]), "timestep_edges: expected a list of"),
    "version": (lambda q: q.update(format_version=True), "format_version"),
    "dtype": (lambda q: q.update(compute_dtype="int8"), "not a float dtype"),
    "odd dtype": (lambda q: q.update(compute_dtype="float8_e5m2"), "compute_dtype: expected one of"),
    "recipe": (lambda q: q.update(recipe={"a": 1}), "recipe: expected a name"),
    "newlines": (lambda q: q.update(base_model="x\n# Free money"), "base_model: expected text of one line"),
    "exclude": (lambda q: q.update(modules_to_not_convert=[3]), "modules_to_not_convert: expected a list of names"),
    "runtime": (lambda q: q.update(runtime=[1]), "runtime: expected a mapping"),
    "policy": (
        lambda q: q.update(
            runtime={"diffusion_step_policy": {"edges": [], "modes": [["a16"]]}}
        ),
        "modes: expected a list of names",
    ),
    "no entry": (lambda q: q["layers"].pop(Q), f"{Q}.weight .*(shape|no entry in 'layers')"),
    "float layer": (
        lambda q: q["layers"].update({"norm_out": q["layers"][Q]}),
        "no layer 'norm_out'|not a linear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_of_the_plan_are_checked_before_anything_is_made(kind, copy):
    change, words = FIELDS[kind]
    edit(copy / "transformer" / "config.json", lambda data: change(data["quantization_config"]))
    with pytest.raises(DtqError, match=words):
        DiTTransformer2DModel.from_pretrained(copy / "transformer")


def test_codes_are_not_taken_for_weights(float_folder, tmp_path):
    """int8-row codes have the shape of the weight; without its entry the layer would be noise."""
    pipe = dtq.quantize(
        float_folder, "rtn-w4a8", weights="int8-row", progress=False, sanity_check=False, **FEW
    )
    writer.write(pipe, tmp_path / "q")
    config = tmp_path / "q" / "transformer" / "config.json"
    edit(config, lambda data: data["quantization_config"]["layers"].pop(Q))
    with pytest.raises(CheckpointError, match=f"{Q}.weight is I8 .*no entry in 'layers'"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "q" / "transformer")


def test_booleans_are_not_taken_for_weights(quick_folder, tmp_path):
    copy = Path(shutil.copytree(quick_folder, tmp_path / "q"))
    rewritten(copy, lambda t: t.update({"proj_out_1.bias": t["proj_out_1.bias"] > 0}))
    with pytest.raises(CheckpointError, match=r"proj_out_1\.bias is BOOL in the file"):
        reader.verify(copy)


@pytest.fixture(scope="module")
def two_level_folder(tmp_path_factory, float_folder) -> Path:
    pipe = dtq.quantize(
        float_folder, "rtn-w4a8", weights="int4-2l-g64", progress=False, sanity_check=False, **FEW
    )
    return writer.write(pipe, tmp_path_factory.mktemp("two-level") / "pipe")


@pytest.fixture
def alone():
    """The group of processes that sharded loading asks for, of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def rewritten(folder: Path, change) -> Path:
    """The transformer with other tensors and their right checksums; its weights file."""
    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors.pop(reader.CHECKSUMS)
    change(tensors)
    save_file(reader.with_checksums(tensors), file, {"format": "pt"})
    return file


def group_byte(zero: int, scale2: int):
    def change(tensors):
        tensors[f"{Q}.weight_scale_2"].view(torch.uint8)[3, 1] = zero | (scale2 - 1) << 4

    return change


def order(places: torch.Tensor):
    def change(tensors):
        tensors[f"{Q}.pre_quant_perm"] = places.int().reshape(1, -1)

    return change


VALUES = {  # the largest and smallest of (code - zero) * scale2 are int8, or one more
    "first group byte that fits": (group_byte(8, 16), None),
    "group byte, above": (group_byte(6, 15), "weight_scale_2 holds 1 group bytes"),
    "group byte, below": (group_byte(9, 15), "weight_scale_2 holds 1 group bytes"),
    "order": (order(torch.arange(128).flip(0)), None),
    "order, twice": (
        order(torch.arange(128).clamp(max=126)),
        "values that are not a permutation of 128 channels",
    ),
    "order, beyond": (
        order(torch.arange(128) + 1),
        "values that are not a permutation of 128 channels",
    ),
    "order, negative": (
        order(torch.arange(128) - 1),
        "values that are not a permutation of 128 channels",
    ),
}


@pytest.mark.parametrize("checksums", ["0", "1"])
@pytest.mark.parametrize("kind", VALUES)
def test_values_that_kernels_count_on_are_asked_when_a_file_is_read(
    kind, checksums, two_level_folder, alone, tmp_path, monkeypatch
):
    copy = tmp_path / "copy"
    shutil.copytree(two_level_folder, copy)
    monkeypatch.setenv("DTQ_VERIFY", checksums)
    change, words = VALUES[kind]
    file = rewritten(copy, change)
    if kind.startswith("order"):
        config = copy / "transformer" / "config.json"
        edit(config, lambda data: data["quantization_config"]["layers"][Q].update(permutation=True))
    reads = (
        lambda: DiTTransformer2DModel.from_pretrained(file.parent),
        lambda: reader.verify(copy),
        lambda: load_sharded(file.parent, 0, 1),
    )
    for read in reads:
        if words is None:
            assert read()
        else:
            with pytest.raises(CheckpointError, match=rf"{file}: {Q}\..*{words}"):
                read()


@pytest.fixture(scope="module")
def statistics(tmp_path_factory, float_folder) -> Path:

    from builders import collected

    recipe = Recipe.load("w4a8", **FEW)
    opened = loading.load_transformer(float_folder)
    needs = frozenset({"channels", "hessian", "sample"})
    found = collected(opened, recipe, needs, progress=False)
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    store.save(found, path)
    return path


def tampered(path: Path, out: Path, change) -> Path:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, out, metadata)
    return out


GROUP = "transformer_blocks.0.attn1.to_q"
STATISTICS = {
    "no edges": (lambda t, m: m.pop("edges"), "edges: not JSON"),
    "odd edges": (lambda t, m: m.update(edges='["a"]'), "edges: expected a list of numbers"),
    "nan edges": (lambda t, m: m.update(edges="[NaN]"), "NaN is not a number"),
    "no about": (lambda t, m: m.pop("about"), "about: not JSON"),
    "odd about": (
        lambda t, m: m.update(about='{"origin": []}'),
        "about: expected text and numbers by name",
    ),
    "no input group": (lambda t, m: t.update(x=torch.ones(1)), "'x' is not a statistic"),
    "unknown": (
        lambda t, m: t.update({f"{GROUP}|x": torch.ones(1)}),
        "x: expected no tensor, got F32",
    ),
    "zero channels": (
        lambda t, m: t.update({f"{GROUP}|channels.low": torch.ones(8, 0)}),
        "no channels",
    ),
    "missing": (
        lambda t, m: t.pop(f"{GROUP}|hessian.count"),
        r"hessian.count: expected I64 \[1\], got no",
    ),
    "no channels": (lambda t, m: t.pop(f"{GROUP}|channels.low"), "channels.low: .* got no tensor"),
    "shape": (
        lambda t, m: t.update({f"{GROUP}|hessian.hessian": torch.zeros(3, 128)}),
        r"hessian.hessian: expected F32 \[128, 128\], got F32 \[3, 128\]",
    ),
    "dtype": (
        lambda t, m: t.update({f"{GROUP}|sample.key": t[f"{GROUP}|sample.key"].float()}),
        "sample.key: expected I64 .*, got F32",
    ),
    "scalar": (
        lambda t, m: t.update({f"{GROUP}|channels.low": torch.tensor(1.0)}),
        "channels.* expected",
    ),
    "no axes": (
        lambda t, m: t.update({f"{GROUP}|sample.rows": torch.tensor(1.0)}),
        "sample.* expected",
    ),
    "stratum": (lambda t, m: t[f"{GROUP}|sample.stratum"].fill_(2**40), "outside of 0 to 7"),
    "count": (lambda t, m: t[f"{GROUP}|hessian.count"].fill_(-1), "hessian.count holds numbers"),
}


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_are_checked_by_their_header_first(kind, statistics, tmp_path):
    change, words = STATISTICS[kind]
    bad = tampered(statistics, tmp_path / "s.safetensors", change)
    with pytest.raises(DtqError, match=words):
        dict(store.load(bad).inputs)


def test_good_statistics_load(statistics):
    assert GROUP in dict(store.load(statistics).inputs)


REPORT = {"name": "a", "role": "b", "weight_format": "c", "transform": "d", "promoted": False,
          "bits": 4.0, "error": None}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "layers: missing; inputs: missing"),
        ({"layers": [3], "inputs": []}, "layers: expected a list of layers"),
        (
            {"layers": [{**REPORT, "role": ["x"]}], "inputs": []},
            r"layers\[0\]\.role: expected a name",
        ),
        (
            {"layers": [{**REPORT, "error": "x"}], "inputs": []},
            r"layers\[0\]\.error: expected a number",
        ),
        (
            {"layers": [REPORT], "inputs": [{"name": "x", "imbalance": ["y"]}]},
            "imbalance: expected a list of numbers.*imbalance_after: missing",
        ),
    ],
)
def test_the_report_beside_a_checkpoint_is_checked(data, words, tmp_path):
    (tmp_path / "dtq_report.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=words):
        quantization_report(tmp_path)


def test_what_dtq_writes_is_json_that_it_reads(tmp_path):
    data = {"layers": [{**REPORT, "error": float("inf")}], "inputs": [], "a": (float("nan"), 1.5)}
    (tmp_path / "dtq_report.json").write_text(json.dumps(safe_parse.finite_or_null(data)))
    read = quantization_report(tmp_path)
    assert read["layers"][0]["error"] is None
    assert read["a"] == [None, 1.5]


@pytest.mark.parametrize("alpha", [float("nan"), torch.tensor([[float("inf")]] * 128)])
def test_ternary_scales_are_finite_and_codes_whole(alpha):
    import tiny

    codes = torch.zeros(128, 128, dtype=torch.int8)
    with pytest.raises(InputError, match="alpha must be finite"):
        dtq.load_ternary(tiny.dit(), {Q: (codes, alpha)})
    with pytest.raises(InputError, match="must be -1, 0 or 1"):
        dtq.load_ternary(tiny.dit(), {Q: (codes + 0.5, 1.0)})


def test_messages_are_short_and_steer_no_terminal():
    with pytest.raises(InputError) as caught:
        parse_json(
            '{"a\\u001b[2J": ' + str(2**64) + ', "b": ' + "9" * 30 + "}", "x\x1b" + "y" * 9999
        )
    assert len(str(caught.value)) < 4100
    assert "\x1b" not in str(caught.value)
    assert str(caught.value).startswith("x\\x1byyy")
