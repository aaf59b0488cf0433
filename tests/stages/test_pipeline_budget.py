# SPDX-License-Identifier: Apache-2.0
"""One budget for all weight files of a pipeline, spent by measured error."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pipelines
import pytest
import torch
from click.testing import CliRunner
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin

import dtq
from dtq.checkpoint.config import DTQConfig
from dtq.cli import main
from dtq.cli.quantize_output import print_result
from dtq.errors import InputError
from dtq.linalg.relative_error import relative_error
from dtq.nn import QuantLinear
from dtq.nn.conv import QuantConv
from dtq.pipelines.loading import load_transformer
from dtq.pipelines.recorded_sampling import RecordedSampling
from dtq.pipelines.sampling import run_pipeline
from dtq.pipelines.settings import SamplingSettings
from dtq.plan import LayerPlan, LayerSpec, Plan
from dtq.stages import sanity_check
from dtq.stages.autoencoder import latent_error, quantize_weights
from dtq.stages.budget_rounds import ROUNDS, BudgetRounds
from dtq.stages.pipeline_sizes import PipelineBudget, saved_files
from dtq.stages.report import Report
from dtq.stages.sanity_check import Failure

SMALL = {**pipelines.SMALL["flux"], "max_sequence_length": 16}
SETTINGS = SamplingSettings(
    prompts="prompts-64", samples=2, batch_size=2, steps=2, pipeline_args=SMALL
)
CALIBRATION = {"samples": 2, "batch_size": 2, "steps": 2, "pipeline_args": SMALL}
OPTIONS = ["--recipe=rtn-w4a8", "--samples=2", "--steps=2"]
OPTIONS += [f"--arg={key}={value}" for key, value in SMALL.items()]
OPTIONS += ["--set=calibration.batch_size=2", "--set=allocate.num_inputs=1"]


def command(*words, code: int = 0):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def sizes_of(folder):
    """Bytes of the weight files by component."""
    return {f.parent.name: f.stat().st_size for f in folder.glob("*/*.safetensors")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float Flux pipeline, and what ``dtq plan`` says of its sizes."""
    where = tmp_path_factory.mktemp("budget") / "float"
    pipelines.flux().save_pretrained(where)
    told = command("plan", where, *OPTIONS, "--budget=1GB", "--json").stdout
    return where, SimpleNamespace(**json.loads(told)["transformer"]["pipeline"])


@pytest.fixture(scope="module")
def half(folder, tmp_path_factory):
    """The same within a budget halfway between the least and the most."""
    where, planned = folder
    assert not planned.fixed
    budget = (sum(planned.least.values()) + sum(planned.most.values())) // 2
    out = tmp_path_factory.mktemp("half") / "q"
    options = [*OPTIONS, f"--budget={budget}b", "--no-sanity-check"]
    shown = command("quantize", where, *options, "-o", out).stdout
    return SimpleNamespace(budget=budget, out=out, shown=shown)


def test_all_files_together_are_within_the_budget(half):
    files = sizes_of(half.out)
    assert 0.98 * half.budget < sum(files.values()) <= half.budget
    report = json.loads((half.out / "dtq_report.json").read_text())
    parts = report["pipeline"]["components"]
    assert {name: part["bytes"] for name, part in parts.items()} == files
    assert report["pipeline"]["bytes"] == sum(files.values())
    assert sum(part["error_share"] for part in parts.values()) == pytest.approx(1)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        rows = report[name]["allocation"]["rows"]
        assert sum(row["sensitivity"] for row in rows) == pytest.approx(parts[name]["error"])
    chosen = {row["option"] for name in report if name[:4] == "text" for row in
              report[name]["allocation"]["rows"]}  # fmt: skip
    assert len(chosen) > 1  # not one format for all
    card = (half.out / "README.md").read_text()
    for name, size in files.items():
        assert f"| `{name}` | {size} | {size / sum(files.values()):.0%} |" in card
        assert f"\n{name} " in half.shown
    assert f"of a budget of {half.budget}" in card
    assert half.shown.count("load it:") == 1


def test_a_component_that_stays_float_is_shown_as_such(capsys, tmp_path):
    pipe = pipelines.flux()
    allocation = {"bytes": 8, "rows": [{"option": "float"}, {"option": "float"}]}
    reports = {"text_encoder": Report(allocation=allocation)}
    print_result(load_transformer(pipe), reports, {}, tmp_path, 1.0, "")
    told = capsys.readouterr().out
    assert "text_encoder: stays float" in told
    assert "0.00 bits" not in told


def test_the_pipeline_loads_and_samples(half):
    pipe = DiffusionPipeline.from_pretrained(half.out)
    assert any(isinstance(m, QuantLinear) for m in pipe.transformer.modules())
    assert pipelines.sample(pipe, "flux", 1).isfinite().all()


def test_the_smallest_size_is_named_and_can_be_had(folder, half, tmp_path):
    where, planned = folder
    least = sum(planned.least.values())
    for verb in (["plan"], ["quantize", "-o", tmp_path / "q"]):
        told = command(*verb, where, *OPTIONS, f"--budget={least - 1}b", code=1).stderr
        assert f"all weight files take at least {least} bytes (transformer at least" in told
    options = [*OPTIONS, f"--budget={least}b", "--no-sanity-check"]
    command("quantize", where, *options, "-o", tmp_path / "q")
    assert sizes_of(tmp_path / "q") == planned.least
    reports = [json.loads((f / "dtq_report.json").read_text()) for f in (tmp_path / "q", half.out)]
    errors = [sum(p["error"] for p in r["pipeline"]["components"].values()) for r in reports]
    assert errors[0] > errors[1]  # more bytes, less error


def test_components_that_the_user_fixes_count_as_they_are(folder):
    where, planned = folder
    options = {"text_encoder": "keep", "vae": "w8", "calibration": CALIBRATION}
    whole = planned.most["text_encoder"] + planned.most["text_encoder_2"]
    least = whole + planned.least["vae"] + planned.least["transformer"]
    with pytest.raises(InputError, match=rf"at least {least} bytes.* text_encoder \d+ as it is"):
        dtq.quantize(where, "rtn-w4a8", budget=f"{least - 1}b", progress=False, **options)
    pipe = dtq.quantize(
        where, "rtn-w4a8", budget=f"{least}b", progress=False, sanity_check=False, **options
    )
    assert not any(isinstance(m, QuantLinear) for m in pipe.text_encoder_2.modules())
    assert pipe.vae.hf_quantizer.report["layers"]
    formats = {m.weight_format for m in pipe.transformer.modules() if isinstance(m, QuantLinear)}
    assert "int8-row" not in formats


def test_sampling_is_repeated_with_the_latents_of_the_float_run():
    loaded = load_transformer(pipelines.flux())
    recorded = RecordedSampling.record(loaded, SETTINGS, 2)
    ran = []
    linear = next(m for m in loaded.model.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda *_: ran.append(1))
    again = recorded.again()
    assert not ran
    assert "forward" not in vars(loaded.model)
    assert len(again) == len(recorded.calls) == 2
    for call, want in zip(again, recorded.calls, strict=True):
        for key, value in want.kwargs.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(call.kwargs[key], value)
    with torch.no_grad():
        loaded.pipeline.text_encoder_2.encoder.block[0].layer[1].DenseReluDense.wo.weight.zero_()
    for call, want in zip(recorded.again(), recorded.calls, strict=True):
        same = {k for k, v in want.kwargs.items() if isinstance(v, torch.Tensor)
                and torch.equal(call.kwargs[k], v)}  # fmt: skip
        assert {"hidden_states", "timestep", "pooled_projections"} <= same
        assert "encoder_hidden_states" not in same
        assert torch.equal(call.output, want.output)


@torch.no_grad()
def test_noise_of_that_error_in_the_latents_changes_the_decodes_as_much(monkeypatch):
    pipe = pipelines.flux()
    larger = replace(SETTINGS, steps=1, pipeline_args={**SMALL, "height": 64, "width": 64})
    recorded = RecordedSampling.record(load_transformer(pipe), larger, 1)
    error = latent_error(recorded, "int8-row")
    assert not any(isinstance(m, QuantConv) for m in pipe.vae.modules())  # a copy was quantized
    decoded, decode = [], pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda x, **o: decoded.append(x) or decode(x, **o))
    with recorded.answered():
        list(run_pipeline(pipe, recorded.requests, recorded.settings))
    (latents,) = decoded
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    noise *= (error * latents.square().mean()).sqrt()
    want, noisy = (decode(x).sample for x in (latents, latents + noise))
    quantize_weights(pipe.vae, "int8-row")
    changed = relative_error(decode(latents).sample, want)
    assert relative_error(noisy, want) == pytest.approx(changed, rel=0.3)


def test_plan_shows_an_8_bit_autoencoder_without_a_budget(folder):
    where, planned = folder
    shown = command("plan", where, *OPTIONS, "--vae=w8", "--json").stdout
    files = json.loads(shown)["pipeline"]["fixed"]
    assert files["vae"] == planned.least["vae"]
    assert files["text_encoder"] == planned.most["text_encoder"]
    assert {*files} == {*planned.most}
    told = command("plan", where / "transformer", "--vae=w8", code=1).stderr
    assert "has no autoencoder that dtq can quantize; leave --vae out" in told


def test_bits_are_not_for_pipelines_and_a_size_not_for_statistics(folder, tmp_path):
    where, _ = folder
    with pytest.raises(InputError, match="write 8GB"):
        dtq.quantize(where, "rtn-w4a8", budget="4.8", progress=False)
    told = command("calibrate", where, "--budget=1GB", "-o", tmp_path / "s", code=1).stderr
    assert "statistics do not depend on a size" in told


def fails(monkeypatch, layers):
    """The sanity check fails layers with 4 bits, of those that begin with one of the names."""

    def failures(report):
        return [
            Failure(name, "made to fail")
            for name in sorted(report.errors)
            if name.startswith(layers) and report.errors[name][0] > 1e-3
        ]

    monkeypatch.setattr(sanity_check, "failures", failures)


def test_other_layers_pay_for_what_the_sanity_check_promotes(folder, tmp_path, monkeypatch, caplog):
    where, planned = folder
    others = sum(size for name, size in planned.most.items() if name != "transformer")
    least, most = (others + sizes["transformer"] for sizes in (planned.least, planned.most))
    budget, out = least + (most - least) // 3, tmp_path / "q"
    fails(monkeypatch, ("transformer_blocks.0.attn.to_",))
    alone = ["--text-encoder=keep", "--vae=keep", "--steps=1", f"--budget={budget}b", "-o", out]
    command("quantize", where, *OPTIONS, *alone)
    assert "the formats of the other layers are chosen again" in caplog.text
    files, report = sizes_of(out), json.loads((out / "dtq_report.json").read_text())
    assert sum(files.values()) <= budget
    assert {n: part["bytes"] for n, part in report["pipeline"]["components"].items()} == files
    formats = {x["name"]: x["weight_format"] for x in report["layers"]}
    promoted = {x["layer"] for x in report["sanity_check"]["promoted"]}
    assert promoted
    assert {formats[name] for name in promoted} == {"int8-row"}
    loaded = DiffusionPipeline.from_pretrained(out).transformer
    assert {n: loaded.get_submodule(n).weight_format for n in formats} == formats


@pytest.mark.parametrize("reason", ["no choice is small enough", "every round promotes"])
def test_a_budget_that_promotions_exceed_is_refused(reason):
    """With the layers' names; the floats are back in the model."""
    model = torch.nn.ModuleDict({"b": torch.nn.Linear(64, 64)})
    layer = LayerPlan("b", "ffn.up", (64, 64), LayerSpec("int4-2l-g64", "none"))
    loaded = SimpleNamespace(component="t", name="m", dtype=torch.float32)
    run = SimpleNamespace(
        loaded=loaded, model=model, plan=Plan("r", (layer,)), results={}, config=DTQConfig(),
        floats={}, promoted={}, report=Report(),
    )  # fmt: skip
    budget, spent = PipelineBudget(1000), []

    def spend():
        spent.append(1)
        if reason == "no choice is small enough" and len(spent) > 1:
            raise InputError("m: too small")
        budget.outcome = {"components": {"t": {"bytes": 900}}}

    shared = SimpleNamespace(
        runs=[run], shared={"t": run}, budget=budget, spend=spend, counted={}, kept={"t": {}},
        fix=lambda *_: True,
    )  # fmt: skip

    def rounds():
        for (changed,) in BudgetRounds(shared):
            changed.floats["b"] = model["b"]
            changed.model["b"] = torch.nn.Identity()
            changed.promoted["b"] = None
            changed.report.sanity_check = {"promoted": [{"layer": "b"}]}

    with pytest.raises(InputError, match=r"promoted.* Raise the budget \(--budget \d+b") as error:
        rounds()
    assert " b, " in str(error.value)
    assert len(spent) == (2 if reason == "no choice is small enough" else ROUNDS)
    assert isinstance(model["b"], torch.nn.Linear)


def test_files_of_models_without_parameters(tmp_path):
    class Empty(ModelMixin, ConfigMixin):
        pass

    empty, buffers = Empty(), Empty()
    buffers.register_buffer("mean", torch.zeros(3, dtype=torch.float16))
    files = saved_files({"empty": empty, "buffers": buffers}, nf4=False)
    for name, model in {"empty": empty, "buffers": buffers}.items():
        model.save_pretrained(tmp_path / name)
        written = (tmp_path / name).glob("*.safetensors")
        assert files[name][1] == sum(f.stat().st_size for f in written)
