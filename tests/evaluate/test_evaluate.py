# SPDX-License-Identifier: Apache-2.0
"""The metrics against known answers and other libraries, and the report."""

from __future__ import annotations

import json
import math
import re

import pipelines
import pytest
import quanto
import tiny
import torch

import dtq
from dtq.errors import InputError
from dtq.evaluate import baselines, evaluate, merge, paired_run, run_file, trajectory
from dtq.evaluate.fingerprint import fingerprint
from dtq.evaluate.gate import render
from dtq.evaluate.gate.decision import Outcome, Verdict
from dtq.evaluate.gate.metrics import METRICS
from dtq.evaluate.metrics import fid, images
from dtq.evaluate.metrics.distributions import MetricValue
from dtq.evaluate.report import html, plots
from dtq.pipelines import prompts
from dtq.pipelines.loading import load_transformer
from dtq.pipelines.settings import SamplingSettings

HOW = SamplingSettings(samples=4, steps=3, batch_size=2, seed=5)


def test_a_model_has_no_error_against_itself():
    pipe = tiny.pipeline()
    truth = trajectory.record(pipe, pipe.transformer, prompts.load("auto", pipe, 4), HOW)
    again = trajectory.record(pipe, pipe.transformer, prompts.load("auto", pipe, 4), HOW)
    assert truth.steps() == 3
    assert trajectory.teacher_forced(truth, pipe.transformer) == [0.0] * 3
    assert trajectory.mean_by_step(trajectory.free_running(truth, again)) == [0.0] * 3


def test_teacher_forced_error_has_the_known_value():
    pipe = tiny.pipeline()
    truth = trajectory.record(pipe, pipe.transformer, prompts.load("auto", pipe, 4), HOW)
    pipe.transformer.proj_out_2.weight.data *= 1.1
    pipe.transformer.proj_out_2.bias.data *= 1.1
    for value in trajectory.teacher_forced(truth, pipe.transformer):
        assert value == pytest.approx(0.01, rel=1e-3)


def test_samples_of_a_batch_have_errors_of_their_own():
    """The error of a sample in a batch is the error of the sample alone."""
    pipe = tiny.pipeline()
    requests = prompts.load("auto", pipe, 4)
    found = []
    for batch in (4, 1):
        how = SamplingSettings(samples=4, steps=3, batch_size=batch, seed=5)
        truth = trajectory.record(pipe, pipe.transformer, requests, how)
        other = tiny.dit()
        other.proj_out_2.bias.data += 0.1
        outputs = truth.by_sample(trajectory.replayed(truth, other))
        floats = truth.by_sample([call.output for call in truth.calls])
        found.append(torch.tensor(trajectory.sample_errors(outputs, floats)))
    assert found[0].shape == (4, 3)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=0)
    assert found[0].std(0).min() > 1e-3 * found[0].mean()


def test_more_samples_begin_with_the_same_ones():
    pipe = tiny.pipeline()
    few, many = (prompts.load("auto", pipe, n, nested=True).entries for n in (32, 96))
    assert many[:32] == few
    gaps = torch.tensor(sorted(few)).diff()
    assert gaps.max() < 64  # of 1000 labels, 32 evenly would be 31 apart


def test_a_broken_model_has_infinite_error():
    assert trajectory.relative_error(torch.tensor([1.0, math.nan]), torch.ones(2)) == math.inf


def test_requests_do_not_depend_on_the_batch_size():
    pipe = tiny.pipeline()
    requests = prompts.load("auto", pipe, 4)
    a, b = (
        torch.cat(
            trajectory.record(
                pipe, pipe.transformer, requests, SamplingSettings(samples=4, steps=2, batch_size=n)
            ).images
        )
        for n in (1, 4)
    )
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_frechet_distance():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(500, 16, generator=g), 2 * torch.randn(400, 16, generator=g) + 1
    assert fid.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert fid.frechet(a, b) == pytest.approx(fid.frechet(b, a))
    # Gaussians N(0, I) and N(1, 4 I): 16 * (1 + (2 - 1)^2)
    big = torch.randn(200_000, 4, generator=g), 2 * torch.randn(200_000, 4, generator=g) + 1
    assert fid.frechet(*big) == pytest.approx(8, rel=0.02)


def test_frechet_distance_agrees_with_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.image.fid")

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1)

    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(300, 3, 2, 2, generator=g), torch.rand(200, 3, 2, 2, generator=g) ** 2
    metric = torchmetrics.FrechetInceptionDistance(feature=Flat(), normalize=True)
    metric.set_dtype(torch.float64)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    assert fid.frechet(a.flatten(1), b.flatten(1)) == pytest.approx(
        float(metric.compute()), rel=1e-4
    )


def test_psnr_and_ssim():
    a = torch.rand(2, 3, 32, 32)
    b = (a + 0.1).clamp(0, 1)
    want = -10 * torch.log10((a - b).square().flatten(1).mean(1))
    torch.testing.assert_close(images.psnr(b, a).float(), want)
    assert images.psnr(a, a).isinf().all()
    torch.testing.assert_close(images.ssim(a, a), torch.ones(2))
    assert images.ssim(torch.rand(2, 3, 32, 32), a).max() < 0.5


def test_color_shift_is_in_gray_levels():
    """0.1 brighter moves one of six moments by 25.5; saturation moves color, a flip nothing."""
    image = torch.rand(2, 3, 32, 32) * 0.8
    brighter = images.color_shift(image + 0.1, image)
    torch.testing.assert_close(brighter.float(), torch.full((2,), 25.5 / 6**0.5))
    assert images.color_shift(image.flip(-1), image).max() < 1e-5
    gray = image.mean(1, keepdim=True)
    faint, fainter = (images.color_shift(image.lerp(gray, x), image) for x in (0.1, 0.2))
    assert (faint > 1).all()
    assert (fainter > faint).all()


def test_evaluation_and_report(float_folder, quantized_folder, tmp_path):
    result = evaluate.evaluate(
        load_transformer(quantized_folder), load_transformer(float_folder), HOW
    )
    row = result.rows[0]
    assert 0 < row.error < 0.01
    assert len(row.error_steps) == len(row.divergence) == 3
    assert row.divergence[0] == 0.0  # both start from the same noise
    assert row.psnr > 20
    assert 4 < row.bits < 5
    held = run_file.parse(json.loads(run_file.text(result.to_json())))
    assert [s.seed for s in held.samples] == [5 * 1_000_003 + i for i in range(4)]
    assert len({s.prompt for s in held.samples}) == 4
    every = {name for name, metric in METRICS.items() if metric.when in ("always", "image")}
    assert set(held.values) == set(held.rerun) == every
    errors = torch.tensor(list(held.values["error"].values()))
    assert errors.shape == (4, 3)
    torch.testing.assert_close(errors.mean(0), torch.tensor(row.error_steps), rtol=0.2, atol=0)
    again = torch.tensor(list(held.rerun["error"].values()))
    torch.testing.assert_close(again, errors, rtol=1e-2, atol=0)  # the noise is small, and is there
    assert not torch.equal(again, errors)
    assert held.conditions["sampler"] == "DDIMScheduler"
    assert held.identity["recipe"] == "w4a8"
    assert held.failures == {}
    evaluate.write_images(result, tmp_path)
    assert len(list(tmp_path.glob("pictures/*/*.png"))) == 8
    page = html.render(result)
    close, sentence = html.verdict(result)
    assert close
    assert sentence in page
    assert "data:image/png;base64" in page
    assert page.count("<svg") >= 2
    assert not re.search(r"(src|href)=['\"]?https?:", page)  # self-contained


def test_the_plot_of_ranges_has_every_denoiser_and_no_text_encoder(monkeypatch):
    def row(name, values, bins):
        return {"name": name, "imbalance": values, "imbalance_after": values, "bins": bins}

    rows = [
        row("text_encoder.x", [9.0], [1]),
        row("transformer.x", [3.0, 2.0, 4.0], [2, 3, 4]),
        row("transformer_2.x", [4.0, 5.0], [1, 2]),
    ]
    shown = html.over_timesteps({"layers": [], "inputs": rows})
    assert shown == rows[1:]
    drawn = []
    monkeypatch.setattr(plots, "_svg", lambda figure: drawn.extend(figure.axes[0].lines) or "")
    plots.ranges(shown)
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn]
    assert lines[:2] == [([2, 3, 4], [3.0, 2.0, 4.0]), ([1, 2], [4.0, 5.0])]
    assert lines[2] == ([1, 2, 3, 4], [4.0, 5.0, 2.0, 4.0])  # the median of those that have the bin


def test_the_pages_escape_all_text(tmp_path):
    """Names, prompts and reports come from files that anybody may have written."""
    evil = "<script>alert(1)</script>'\"|`</style>"
    sample = run_file.Sample("0000", evil, 0)
    run = run_file.Run(
        evil, evil, {"prompts": evil}, {"recipe": evil}, [sample], {"error": {"0000": [0.1]}},
        failures={"0000": evil}, missing={evil: evil},
    )  # fmt: skip
    layer = dict.fromkeys(("name", "role", "weight_format", "transform"), evil)
    layer |= {"promoted": True, "bits": 4.0, "error": 0.1}
    value = MetricValue(evil, evil, evil, 0.0, 2, 2, evil, evil)
    result = evaluate.Evaluation(
        run, [evaluate.ResultRow(evil, 0.1, [0.1, 0.2])], metrics=[value], command=evil
    )
    result.images = {side: torch.rand(1, 3, 8, 8) for side in ("float", "candidate")}
    result.quantization = {"layers": [layer], "inputs": []}
    for folder in ("float", "candidate"):
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        (tmp_path / "pictures" / folder / "0000.png").write_bytes(b"")
    verdict = Verdict(Outcome.INVALID, evil, reasons=[evil], notes=[evil])
    pages = html.render(result), render.sheet(verdict, run, tmp_path), render.markdown(verdict, run)
    for page in pages:
        assert page.count("alert(1)") >= 4
        assert "<script" not in page
        assert evil not in page


def test_the_verdict_of_a_bad_model_is_bad(float_folder, tmp_path):
    pipe = dtq.quantize(float_folder, "rtn-w4a8", progress=False)
    for block in pipe.transformer.transformer_blocks:
        block.ff.net[2].weight_scale.data = (
            block.ff.net[2].packed_tensor("weight_scale") * 3
        ).view(torch.int32)
    result = evaluate.evaluate(load_transformer(pipe), load_transformer(float_folder), HOW)
    assert not html.verdict(result)[0]


def test_what_cannot_be_compared():
    pipe = load_transformer(tiny.pipeline())
    with pytest.raises(InputError, match="bare transformers"):
        evaluate.evaluate(load_transformer(tiny.dit()), pipe, HOW)
    with pytest.raises(InputError, match="unknown baseline"):
        evaluate.evaluate(pipe, pipe, HOW, baselines=["gptqq"])


def test_both_transformers_of_a_pipeline_are_evaluated():
    """Wan 2.2: each step is of whichever runs, and the fingerprints are of both."""
    how = SamplingSettings(
        samples=2, steps=4, batch_size=2, pipeline_args=pipelines.SMALL["wan 2.2"]
    )
    float_model, changed = (load_transformer(pipelines.wan_two()) for _ in range(2))
    assert list(float_model.models()) == ["transformer", "transformer_2"]
    changed.models()["transformer_2"].proj_out.weight.data *= 1.1
    changed.models()["transformer_2"].proj_out.bias.data *= 1.1
    job = paired_run.observe(float_model, how)
    called = [call.model for call in job.truth.calls]
    assert set(called) == {"transformer", "transformer_2"}
    assert [call.step for call in job.truth.calls] == list(range(len(called)))
    candidate = paired_run.compare(job, changed)
    errors = merge.by_step(candidate.errors[candidate.run.candidate])
    for name, error in zip(called, errors, strict=True):
        assert error == pytest.approx(0.01 if name == "transformer_2" else 0.0, rel=1e-3)
    calls = {name: called.count(name) for name in ("transformer", "transformer_2")}
    assert candidate.run.conditions["calls"] == calls
    assert candidate.run.identity["checkpoint"] != candidate.run.identity["reference"]
    assert paired_run.compare(job, float_model).run.identity["checkpoint"] == fingerprint(
        *float_model.models().values()
    )


def test_a_transformer_that_is_never_called_gives_a_warning(caplog):
    pipe = pipelines.wan_two()
    pipe.register_to_config(boundary_ratio=0.0)  # the first one has every step
    how = SamplingSettings(
        samples=1, steps=2, batch_size=1, pipeline_args=pipelines.SMALL["wan 2.2"]
    )
    paired_run.observe(load_transformer(pipe), how)
    assert "this job never calls transformer_2, so it is not evaluated" in caplog.text


def test_pipelines_of_other_transformers_are_not_compared():
    two, one = load_transformer(pipelines.wan_two()), load_transformer(pipelines.wan())
    with pytest.raises(InputError, match=r"transformer_2.*not the same model"):
        evaluate.evaluate(two, one, HOW)


def test_a_candidate_with_weights_alone_has_baselines(float_folder, monkeypatch):
    """The same linears by another library, though none of them quantizes its input."""
    seen = []
    mine = baselines.Baseline("as it is", lambda model, names: seen.extend(names), lambda x: 4.5)
    monkeypatch.setitem(baselines.BASELINES, "mine", mine)
    pipe = dtq.quantize(float_folder, "rtn-w4a8", activations="none", progress=False)
    candidate, reference = load_transformer(pipe), load_transformer(float_folder)
    result = evaluate.evaluate(candidate, reference, HOW, baselines=["mine"])
    assert seen == list(evaluate.compared_layers(candidate.model))
    assert (result.rows[1].error, result.rows[1].bits) == (0.0, 4.5)
    with pytest.raises(InputError, match="no quantized layer"):
        evaluate.evaluate(reference, reference, HOW, baselines=["mine"])


def test_a_picture_that_is_none_is_a_failure(float_folder):
    pipe = tiny.pipeline()
    pipe.transformer.proj_out_2.bias.data[0] = math.nan
    result = evaluate.evaluate(load_transformer(pipe), load_transformer(float_folder), HOW)
    assert len(result.run.failures) == 4
    assert (
        "the image of the candidate has values that are not finite" in result.run.failures["0000"]
    )
    text = run_file.text(result.to_json())
    assert "NaN" not in text
    assert "Infinity" not in text


def test_a_fingerprint_sees_one_bit():
    model = tiny.dit()
    before = fingerprint(model)
    assert fingerprint(tiny.dit()) == before
    model.proj_out_2.bias.data[3] += 1e-6
    assert fingerprint(model) != before


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_baselines_change_only_the_layers_they_are_given(name):
    packages = {"torchao": "torchao", "quanto": "optimum.quanto", "bnb": "bitsandbytes"}
    pytest.importorskip(packages[name.split("-")[0]])
    quanto.in_python()
    model, plain = tiny.dit(), tiny.dit()
    chosen = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".ff." in n]
    baselines.find(name).apply(model, chosen)
    x = torch.randn(2, 4, 8, 8)
    arguments = {"timestep": torch.tensor([5, 5]), "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        error = trajectory.relative_error(model(x, **arguments)[0], plain(x, **arguments)[0])
    assert 0 < error < 0.1
    assert 4 <= baselines.find(name).bits(model.get_submodule(chosen[0])) < 9
    other = "transformer_blocks.0.attn1.to_q"
    assert torch.equal(model.get_submodule(other).weight, plain.get_submodule(other).weight)
