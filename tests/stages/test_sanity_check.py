# SPDX-License-Identifier: Apache-2.0
"""The sanity check promotes what fails, says why, and changes nothing when nothing is wrong."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from torch import nn

import dtq
from dtq.checkpoint import writer
from dtq.cli import main
from dtq.errors import NonFiniteError
from dtq.nn import QuantLinear
from dtq.pipelines.tracing import dummy_inputs
from dtq.stages import calibrate, replace_layers, sanity_check

Q = "transformer_blocks.1.attn1.to_v"
FEW = {"calibration": {"samples": 4, "batch_size": 4, "steps": 4, "num_timestep_bins": 4}}
STATIC = {"activations": "int8-static-timestep", "correct_bias": False}


def run(pipe, **more):
    return dtq.quantize(pipe, "rtn-w4a8", progress=False, **FEW, **more)


def report_of(pipe):
    return pipe.transformer.hf_quantizer.report


@pytest.mark.parametrize("recipe", ["rtn-w4a8", "w8a8", "terdit"])
def test_nothing_changes_when_nothing_is_wrong(recipe, tmp_path):
    folders = []
    # the searches of w8a8 are over before the check
    more = {"transform": "smooth"} if recipe == "w8a8" else {}
    for check in (True, False):
        pipe = dtq.quantize(
            tiny.pipeline(),
            recipe,
            finetune="none",
            progress=False,
            sanity_check=check,
            **FEW,
            **more,
        )
        folders.append(writer.write(pipe, tmp_path / str(check)))
        seen = report_of(pipe).sanity_check
        assert bool(seen) == check
        assert not seen or seen["promoted"] == []
    for file in folders[0].rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (folders[1] / file.relative_to(folders[0])).read_bytes()


def test_the_model_is_as_if_nobody_had_looked():
    pipe = run(tiny.pipeline())
    model = pipe.transformer
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(isinstance(model.get_submodule(x.name), QuantLinear)
               for x in report_of(pipe).plan.quantized())  # fmt: skip
    seen = report_of(pipe).sanity_check
    assert seen["calls"] == 4
    assert min(min(each) for each in seen["block_snr_db"].values()) > 15
    assert all(0.8 < v < 1.25 for v in seen["variance"] + seen["latent_variance"])
    json.dumps(seen, allow_nan=False)


def sabotage(monkeypatch, name: str, change) -> list[int]:
    """Damage the layer that is built for ``name``, the first time only."""
    built, count = replace_layers.build_quantized, []

    def broken(result, old, bins, dtype):
        new = built(result, old, bins, dtype)
        if result.plan.name == name:
            count.append(1)
            change(new)
        return new

    monkeypatch.setattr(replace_layers, "build_quantized", broken)
    return count


def with_scale(factor: float, columns=slice(None)):
    def change(layer: QuantLinear) -> None:
        scale = layer.packed_tensor("weight_scale").clone()
        scale[:, columns] *= factor
        layer.fill({**layer.packed_tensors(), "weight_scale": scale})

    return change


@pytest.mark.parametrize("factor", [math.nan, math.inf, 40.0])
def test_a_broken_layer_is_promoted_to_int8_with_the_reason(factor, monkeypatch, tmp_path, caplog):
    assert sabotage(monkeypatch, Q, with_scale(factor)) == []
    pipe = run(tiny.pipeline())
    (done,) = report_of(pipe).sanity_check["promoted"]
    assert (done["layer"], done["to"]) == (Q, "int8-row")
    words = "relative output error" if math.isfinite(factor) else "its output is not finite"
    assert words in done["why"]
    assert f"sanity check: promoted {Q} to int8-row" in caplog.text
    plan = report_of(pipe).plan
    assert plan[Q].weight_format == "int8-row"
    assert plan[Q].note.startswith("sanity check: ")
    assert pipe.transformer.get_submodule(Q).weight_format == "int8-row"
    writer.write(pipe, tmp_path / "q")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "q")
    assert torch.equal(tiny.sample(loaded), tiny.sample(pipe))
    monkeypatch.undo()
    good = run(tiny.pipeline(), rules=[{"match": Q, "weights": "int8-row", "transform": "none"}])
    assert torch.equal(tiny.sample(pipe), tiny.sample(good))


def test_int8_that_fails_too_goes_back_to_the_float_layer(monkeypatch, tmp_path):
    sabotage(monkeypatch, Q, with_scale(math.nan))
    promoted = sanity_check.build_quant_linear
    monkeypatch.setattr(
        sanity_check,
        "build_quant_linear",
        lambda *a: (new := promoted(*a), with_scale(math.nan)(new))[0],
    )
    pipe = run(tiny.pipeline())
    steps = [(x["layer"], x["to"]) for x in report_of(pipe).sanity_check["promoted"]]
    assert steps == [(Q, "int8-row"), (Q, "float32")]
    layer = pipe.transformer.get_submodule(Q)
    assert type(layer) is nn.Linear
    assert report_of(pipe).plan[Q].unquantized
    assert Q not in [x.name for x in report_of(pipe).layers]
    writer.write(pipe, tmp_path / "q")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "q")
    assert torch.equal(tiny.sample(loaded), tiny.sample(pipe))


class Late(nn.Module):
    """A feed-forward whose output explodes when the model is late in the trajectory."""

    def __init__(self, inner: nn.Module, clock: list[float], factor: float) -> None:
        super().__init__()
        self.inner, self.clock, self.factor = inner, clock, factor

    def forward(self, x, *args, **kwargs):
        return self.inner(x * self.factor if self.clock[0] < 200 else x, *args, **kwargs)


def late(pipe, factor: float):
    clock = [1000.0]

    def tell(module, args, kwargs):
        clock[0] = float(torch.as_tensor(kwargs["timestep"]).reshape(-1)[0])

    pipe.transformer.register_forward_pre_hook(tell, with_kwargs=True)
    block = pipe.transformer.transformer_blocks[1]
    block.ff = Late(block.ff, clock, factor)
    return pipe


def test_activations_that_explode_at_a_late_step_are_seen(monkeypatch):
    """Calibration sees the early steps only; static scales of the late ones are too small."""
    calm = run(tiny.pipeline(), **STATIC)
    assert report_of(calm).sanity_check["promoted"] == []
    statistics = {}

    collect = calibrate.collect

    def early(run, needs):
        statistics["x"] = collect(run, needs)
        return statistics["x"]

    monkeypatch.setattr(calibrate, "collect", early)
    run(late(tiny.pipeline(), 1.0), sanity_check=False, **STATIC)
    pipe = run(late(tiny.pipeline(), 50.0), statistics=statistics["x"], **STATIC)
    done = report_of(pipe).sanity_check["promoted"]
    assert done
    assert {x["layer"] for x in done} <= {
        "transformer_blocks.1.ff.inner.net.0.proj", "transformer_blocks.1.ff.inner.net.2",
        "proj_out_1", "transformer_blocks.1.norm1.linear",
    }  # fmt: skip
    assert "of its input is beyond its static scale at call 3" in done[0]["why"]
    for x in done:
        assert pipe.transformer.get_submodule(x["layer"]).activation_format == "int8-row"


def test_overflow_of_float16_goes_up_until_it_fits(monkeypatch):
    """The float model stays just below 65504, and what 4 bits add to it is too much."""
    model = tiny.dit().half()
    layer = model.get_submodule("transformer_blocks.1.ff.net.0.proj")
    inputs = [dummy_inputs(model, 1, t, 0) for t in (900.0, 500.0, 100.0)]
    peaks = []
    handle = layer.register_forward_hook(lambda m, a, y: peaks.append(float(y.abs().max())))
    with torch.no_grad():
        for each in inputs:
            model(**each)
    handle.remove()
    layer.weight.data *= 60000 / max(peaks)
    layer.bias.data *= 60000 / max(peaks)
    model.get_submodule("transformer_blocks.1.ff.net.2").weight.data *= max(peaks) / 60000
    sabotage(monkeypatch, "transformer_blocks.1.ff.net.0.proj", with_scale(1.2))
    dtq.quantize(model, "rtn-w4a8", inputs=inputs, progress=False, **FEW)
    (done,) = model.hf_quantizer.report.sanity_check["promoted"]
    assert done["layer"] == "transformer_blocks.1.ff.net.0.proj"
    assert "not finite" in done["why"]
    with torch.no_grad():
        assert all(model(**each).sample.isfinite().all() for each in inputs)


def test_a_float_model_that_is_broken_itself_is_refused():
    model = tiny.dit()
    model.transformer_blocks[1].norm1.linear.bias.data[0] = math.nan
    inputs = [dummy_inputs(model, 1, 500.0, 0)]
    words = r"the float model itself .* at step 0 \(timestep 500\).*transformer_blocks.1"
    with pytest.raises(NonFiniteError, match=words):
        dtq.quantize(model, "rtn-w4a8", inputs=inputs, exclude=["transformer_blocks.1*", "head"],
                     progress=False, **FEW)  # fmt: skip


def test_what_no_layer_is_to_blame_for_is_said():
    seen = sanity_check.SanityReport(
        2, snr={"a": [30.0, 30.0], "b": [29.0, 1.0]}, variance=[1.0, math.nan]
    )
    assert sanity_check.failures(seen) == []
    assert sanity_check.warnings(seen) == [
        "b has 1.0 dB of signal left at call 1, 30.0 dB before it",
        "the variance of its outputs is nan times the float model's at call 1",
    ]
    seen.errors = {"b.x": [0.1, 0.2], "b.y": [0.0, 0.01], "c": [0.01, 0.01]}
    assert [x.layer for x in sanity_check.failures(seen)] == ["b.x"]
    seen.errors = {"b.x": [0.01, 0.04], "b.y": [0.0, 0.01], "c": [0.001, 0.001]}
    assert sanity_check.failures(seen) == []  # they err less than what is seen behind them


def test_the_command_line_switches_it_off(float_folder, tmp_path, monkeypatch):
    sabotage(monkeypatch, Q, with_scale(math.nan))
    base = ["quantize", str(float_folder), "--recipe", "rtn-w4a8", "--samples", "2", "--steps", "2"]
    result = CliRunner().invoke(main, [*base, "-o", str(tmp_path / "a")])
    assert f"sanity check: promoted {Q} to int8-row" in result.stdout
    assert f"`{Q}`" in (tmp_path / "a" / "README.md").read_text()
    config = json.loads((tmp_path / "a" / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["layers"][Q]["weight_format"] == "int8-row"
    result = CliRunner().invoke(main, [*base, "--no-sanity-check", "-o", str(tmp_path / "b")])
    assert "sanity check" not in result.stdout
