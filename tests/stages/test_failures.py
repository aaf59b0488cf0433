# SPDX-License-Identifier: Apache-2.0
"""Broken numbers and broken machines: one line that says what and where, and nothing half-written."""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

import dtq
from dtq import cli
from dtq.checkpoint import writer
from dtq.errors import InputError, NonFiniteError
from dtq.formats import FORMATS
from dtq.formats.activations import ACTIVATION_FORMATS
from dtq.io.atomic import atomic_save_tensors, atomic_write
from dtq.nn import QuantLinear, nan_check
from dtq.pipelines import loading, prompts
from dtq.pipelines.tracing import dummy_inputs
from dtq.plan.layers import LayerSpec

WEIGHTS = "diffusion_pytorch_model.safetensors"
FAST = ["--recipe", "rtn-w4a8", "--samples", "2", "--steps", "2", "--no-sanity-check"]
SEEN = ["--set", "correct_bias=true"]  # so that rounding needs calibration
Q = "transformer_blocks.0.attn1.to_q"


def failed(*arguments) -> str:
    """What a command that fails prints: one line, no traceback."""
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments])
    assert result.exit_code == 1, result.output + repr(result.exception)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    return lines[-1]


@pytest.fixture
def float_copy(float_folder, tmp_path) -> Path:
    shutil.copytree(float_folder, tmp_path / "float")
    return tmp_path / "float"


def plant(folder: Path, name: str, value: float) -> None:
    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors[name].view(-1)[5] = value
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_weight_is_named(value, float_copy, tmp_path):
    plant(float_copy, f"{Q}.weight", value)
    told = failed("quantize", float_copy, *FAST, "-o", tmp_path / "q")
    assert f"{Q}: the weight has 1 entries that are NaN or infinite" in told
    assert not (tmp_path / "q").exists()


def test_broken_activations_are_named_with_their_place_in_the_trajectory(float_copy, tmp_path):
    plant(float_copy, "pos_embed.proj.bias", math.nan)
    told = failed("quantize", float_copy, *FAST, *SEEN, "-o", tmp_path / "q")
    assert "timestep bins" in told
    assert "what calibration saw of the input has" in told
    assert Q in told


def test_pictures_of_nan_are_refused_and_the_alarm_names_the_layer(
    float_copy, tmp_path, monkeypatch
):
    plant(float_copy, "transformer_blocks.1.ff.net.2.bias", math.nan)
    told = failed("sample", float_copy, "-n", 1, "--steps", 2, "-o", tmp_path / "o")
    assert "DTQ_DEBUG_NAN=1" in told
    assert not (tmp_path / "o").exists()


def quantized(activations: str = "int8-row", **more) -> torch.nn.Module:
    return dtq.quantize(
        tiny.dit(), "rtn-w4a8", activations=activations, progress=False, sanity_check=False, **more
    )


def test_the_alarm_names_the_first_layer_and_the_step(monkeypatch):
    monkeypatch.setenv(nan_check.VARIABLE, "1")
    model = quantized()
    calls = [dummy_inputs(model, 1, t, 0) for t in (900.0, 500.0, 500.0, 100.0)]
    with torch.no_grad():
        for call in calls:
            model(**call)
        name = "transformer_blocks.1.attn1.to_v"
        model.get_submodule(name).bias.data[3] = math.nan
        for call in calls[:2]:
            with pytest.raises(NonFiniteError) as caught:
                model(**call)
    step = {0: "step 0 (timestep 900)", 1: "step 1 (timestep 500)"}[1]
    assert f"{name} (QuantLinear): " in str(caught.value)
    assert f"at {step} are NaN or infinite; its input is finite" in str(caught.value)


def test_the_alarm_listens_on_loaded_models_and_only_when_asked(tmp_path, monkeypatch):
    quantized().save_pretrained(tmp_path / "m")
    quiet = DiTTransformer2DModel.from_pretrained(tmp_path / "m")
    assert not any(m._forward_hooks for m in quiet.modules())
    monkeypatch.setenv(nan_check.VARIABLE, "1")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "m")
    inputs = dummy_inputs(model, 1, 500.0, 0)
    with torch.no_grad():
        want = quiet(**inputs).sample
        assert torch.equal(model(**inputs).sample, want)
        inputs["hidden_states"][0, 0, 0, 0] = math.inf
        with pytest.raises(NonFiniteError, match=r"pos_embed.*entries of its input are, too"):
            model(**inputs)


def layer_of(weights: str, activations: str, w: torch.Tensor, dtype=torch.float32) -> QuantLinear:
    n, k = w.shape
    layer = QuantLinear(k, n, True, LayerSpec(weights, activations), bins=2, compute_dtype=dtype)
    fmt = FORMATS[weights]
    parts = fmt.pack(w, fmt.compute_qparams(w))
    if ACTIVATION_FORMATS[activations].static:
        parts["input_scale"] = torch.full(layer.tensor_specs()["input_scale"].shape, 0.1)
    layer.fill(parts)
    layer.bias.data.zero_()
    return layer


KINDS = [(w, a) for w in ("int4-2l-g64", "int8-row", "int4-g64", "nvfp4", "ternary-row")
         for a in ("none", "int8-row", "int8-static", "nvfp4", "int4-asym-g64")]  # fmt: skip


@pytest.mark.parametrize(("weights", "activations"), KINDS)
def test_no_rows_give_no_rows(weights, activations):
    layer = layer_of(weights, activations, torch.randn(48, 128))
    assert layer(torch.zeros(0, 128)).shape == (0, 48)
    assert layer(torch.zeros(2, 0, 128)).shape == (2, 0, 48)
    assert layer(torch.zeros(0, 5, 128)).shape == (0, 5, 48)


@pytest.mark.parametrize(("weights", "activations"), KINDS)
@pytest.mark.parametrize("kind", ["zero rows", "zero channels", "all zero", "denormal"])
def test_zeros_and_denormals_stay_finite(kind, weights, activations):
    w = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    if kind == "zero rows":
        w[3], x[2] = 0, 0
    elif kind == "zero channels":
        w[:, :70], x[:, 64:] = 0, 0
    elif kind == "all zero":
        w, x = w * 0, x * 0
    else:
        w, x = w * 1e-40, x * 1e-40
    y = layer_of(weights, activations, w)(x)
    assert y.isfinite().all()
    if kind == "all zero":
        assert not y.any()


@pytest.mark.parametrize("weights", ["int4-2l-g64", "int8-row", "int4-g64"])
def test_float16_overflow_is_infinite_and_not_a_number_that_looks_right(weights):
    layer = layer_of(weights, "int8-row", torch.full((48, 128), 1000.0), torch.float16)
    y = layer(torch.full((1, 128), 1000.0, dtype=torch.float16))
    assert y.isinf().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("weights", ["int4-2l-g64", "int8-row", "int4-g64"])
def test_a_token_that_is_broken_does_not_come_out_whole(weights, bad):
    x = torch.randn(4, 128)
    good = layer_of(weights, "int8-row", torch.ones(48, 128))
    want = good(x)
    x[1, 7] = bad
    y = good(x)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2, 3]], want[[0, 2, 3]])  # no other token


def test_widths_that_no_group_divides_are_quantized_all_the_same():
    model = dtq.quantize(
        tiny.dit(heads=3, norm_num_groups=32), "w4a16", progress=False, sanity_check=False
    )
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert {m.in_features % 64 for m in layers} != {0}
    inputs = dummy_inputs(model, 1, 500.0, 0)
    with torch.no_grad():
        assert model(**inputs).sample.isfinite().all()


def test_an_empty_prompt_is_a_prompt():
    pytest.importorskip("transformers")
    import pipelines

    pipe = pipelines.pixart()
    requests = prompts.given([""], pipe)
    from dtq.pipelines.sampling import run_pipeline
    from dtq.pipelines.settings import SamplingSettings

    how = SamplingSettings(steps=1, batch_size=1, pipeline_args={"use_resolution_binning": False})
    (result,) = run_pipeline(pipe, requests, how, "latent")
    assert torch.isfinite(result.images).all()


def test_an_empty_file_of_prompts_is_refused(float_folder, tmp_path):
    for text, words in (("\n \n# nothing\n", "is empty"), (b"\xff\xfe", "not text")):
        file = tmp_path / "prompts.txt"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        told = failed(
            "quantize", float_folder, *FAST, *SEEN, "--calibration-set", file, "-o", tmp_path / "q"
        )
        assert words in told


# machines


@contextmanager
def files_of_at_most(size: int):
    """Writes beyond this fail half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITES = {
    "quantize": (["quantize", "{float}", *FAST, "-o", "{out}"], 100_000),
    "calibrate": (["calibrate", "{float}", *FAST[2:-1], "-o", "{out}"], 100_000),
    "sample": (["sample", "{float}", "-n", "1", "--steps", "1", "-o", "{out}"], 50),
    "eval": (["eval", "{float}", "--reference", "{float}", "--samples", "1", "--steps", "1",
              "-o", "{out}"], 50),
}  # fmt: skip


@pytest.mark.parametrize("command", WRITES)
def test_a_disk_that_fills_up_leaves_nothing_half_written(command, float_folder, tmp_path):
    arguments, size = WRITES[command]
    out = tmp_path / "out"
    with files_of_at_most(size):
        told = failed(*(a.format(float=float_folder, out=out) for a in arguments))
    assert "could not be written" in told
    left = [p for p in tmp_path.rglob("*") if p.is_file() and ".out.work" not in p.parts]
    assert left == []


@pytest.mark.parametrize("command", WRITES)
def test_a_place_that_cannot_be_written_is_named(command, float_folder):
    arguments, _ = WRITES[command]
    out = "/proc/dtq-out/x"  # no user may write there
    told = failed(*(a.format(float=float_folder, out=out) for a in arguments))
    assert "/proc" in told
    assert re.search("cannot be made|no such folder|0 B free|cannot write there", told)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions stop")
def test_permissions_are_named(float_folder, tmp_path):
    tmp_path.chmod(0o500)
    told = failed("quantize", float_folder, *FAST, "-o", tmp_path / "q")
    assert "Permission denied" in told


def test_permission_denied_is_said(float_folder, tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def denied(path, *args, **kwargs):
        if path.name.endswith(".partial"):
            raise PermissionError(13, "Permission denied")
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", denied)
    told = failed("quantize", float_folder, *FAST, "-o", tmp_path / "q")
    assert "cannot write there (Permission denied)" in told
    assert [p.name for p in tmp_path.iterdir()] == [
        ".q.work"
    ]  # the same command goes on from there


def test_files_that_may_not_be_read_are_named(float_copy, monkeypatch):
    opened = Path.open

    def denied(self, *args, **kwargs):
        if self.name == "model_index.json":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    assert "model_index.json: Permission denied" in failed("plan", float_copy)


@pytest.mark.parametrize(
    "run",
    [
        lambda *a, **k: torch.empty(2**59),  # what torch itself says
        lambda *a, **k: bytearray(2**62),
        lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")),
    ],
    ids=["torch", "python", "cuda"],
)
def test_out_of_memory_is_one_line_with_a_way_out(run, float_folder, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        made = run()
        return list(made) if hasattr(made, "send") else made

    monkeypatch.setattr("dtq.api.run_stages", broken)
    told = failed("quantize", float_folder, *FAST, "-o", tmp_path / "q")
    assert "out of memory" in told
    assert "--memory 4GB" in told
    assert list(tmp_path.iterdir()) == []


def test_a_bug_is_still_a_traceback(float_folder, tmp_path, monkeypatch):
    def bug(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("dtq.api.run_stages", bug)
    with pytest.raises(RuntimeError, match="shapes"):
        CliRunner().invoke(
            cli.main, ["quantize", str(float_folder), *FAST, "-o", str(tmp_path / "q")],
            catch_exceptions=False,
        )  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, and a hub that cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def unreachable(*args, **kwargs):
        raise ConnectionError("Connection refused")

    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", unreachable)
    return tmp_path / "hub"


def test_without_hub_and_cache_one_line_says_so(cache, tmp_path):
    for command in (["plan", "me/tiny"], ["quantize", "me/tiny", *FAST, "-o", tmp_path / "q"]):
        told = failed(*command)
        assert "me/tiny: no such folder, and neither the hub nor its local cache has it" in told


def test_without_hub_the_cache_is_used(cache, float_folder, tmp_path, caplog):
    sha = "a" * 40
    shutil.copytree(float_folder, cache / "models--me--tiny" / "snapshots" / sha)
    (cache / "models--me--tiny" / "refs").mkdir()
    (cache / "models--me--tiny" / "refs" / "main").write_text(sha)
    (opened,) = loading.load_transformers("me/tiny")
    want = DiTTransformer2DModel.from_pretrained(float_folder / "transformer")
    assert opened.dtype == torch.float32  # as stored
    assert torch.equal(opened.model.proj_out_2.weight, want.proj_out_2.weight)
    assert "taken from its cache" in caplog.text
    pipe = dtq.quantize("me/tiny", "w4a16", progress=False, sanity_check=False)
    config = pipe.transformer.config["quantization_config"]
    assert config.extra["base_model"] == "me/tiny"


def test_a_file_is_whole_or_absent(tmp_path):
    atomic_write(tmp_path / "a", "old")
    with files_of_at_most(10), pytest.raises(InputError, match="a: could not be written"):
        atomic_write(tmp_path / "a", "x" * 100)
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(InputError, match="b: no such folder"):
        atomic_write(tmp_path / "b" / "a", "x")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_reads_the_files(mask, mode, quantized_folder, tmp_path):
    before = os.umask(mask)
    try:
        atomic_write(tmp_path / "text", "x")
        atomic_save_tensors(tmp_path / "tensors", {"x": torch.zeros(3)}, {})
        writer.write(DiffusionPipeline.from_pretrained(quantized_folder), tmp_path / "model")
    finally:
        os.umask(before)
    for path in (tmp_path / "text", tmp_path / "tensors", *(tmp_path / "model").rglob("*")):
        wanted = mode if path.is_file() else mode | (mode & 0o444) >> 2
        assert path.stat().st_mode & 0o777 == wanted, path
    assert (tmp_path / "model").stat().st_mode & 0o777 == mode | (mode & 0o444) >> 2
