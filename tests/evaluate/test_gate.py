# SPDX-License-Identifier: Apache-2.0
"""The gate: its interval against simulation, its verdicts on dummy runs."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import yaml

import gate as measured  # scripts/gate.py
from dtq.errors import InputError, RecipeError
from dtq.evaluate import run_file
from dtq.evaluate.gate.bootstrap import holm, paired, samples_needed, sign_test
from dtq.evaluate.gate.decision import Outcome, decide
from dtq.evaluate.gate.metrics import EQUAL_DB
from dtq.evaluate.gate.policy import Limit, Policy
from dtq.evaluate.metrics import sound
from dtq.evaluate.metrics.sound import sound_metrics
from dtq.evaluate.run_file import Run, Sample
from dtq.io import safe_parse
from dtq.io.package_data import yaml_names

ERROR = Policy(name="error", primary=(Limit("error", 1.05),), looks=(32, 64, 96))


def a_run(n=32, seed=0, worse=1.0, spread=0.0, steps=4, **conditions) -> Run:
    """A run with random errors: the level of a prompt, times ``worse``, times its noise."""
    level = np.exp(np.random.default_rng(7).normal(size=(200, 1)))[:n]
    own = np.exp(spread * np.random.default_rng(seed + 100).normal(size=(n, 1)))
    errors = 0.01 * level * own * worse * np.linspace(1, 2, steps)
    ids = [f"{i:04d}" for i in range(n)]
    values = {
        "error": dict(zip(ids, errors.tolist(), strict=True)),
        "psnr": dict(zip(ids, (-10 * np.log10(errors.mean(1))).tolist(), strict=True)),
    }
    job = {
        "prompts": "auto", "samples": n, "steps": steps, "sampler": "DDIM", "guidance": 4.0, "seed": 1,
        "pipeline_args": {}, "dtype": "float32", "hardware": "cpu", "torch": "2.13", "dtq": "0", "batch_size": 8,
    }  # fmt: skip
    return Run(
        "candidate",
        "float",
        job | conditions,
        {"checkpoint": f"c{seed}", "reference": "r", "recipe": "w4a8"},
        [Sample(x, f"prompt {x}", 1000 + i) for i, x in enumerate(ids)],
        values,
        copy.deepcopy(values),
    )


# --- the interval


SHAPES = {name: draw for name, draw in measured.SHAPES.items() if "not promised" not in name}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bound_covers_the_mean(shape):
    """At least 0.92 of 95 % bounds at n = 32; 600 sets have a standard error of 0.01."""
    g = np.random.default_rng(0)
    sets = [SHAPES[shape](g, 32) for _ in range(600)]
    found = [paired(d, floor=1e-3, resamples=800, seed=i) for i, d in enumerate(sets)]
    assert np.mean([p.upper(0.05) >= 0 for p in found]) > 0.92 - 0.01
    assert np.mean([p.lower(0.05) <= 0 for p in found]) > 0.92 - 0.01
    # and it is not simply long: it excludes a mean that is far away
    assert np.mean([p.upper(0.05) < 1.5 for p in found]) > 0.8


def test_the_percentile_interval_would_not_do():
    """Why bootstrap-t: in the skewed shape the percentile interval covers less."""
    g = np.random.default_rng(0)
    ours = theirs = 0
    for i in range(400):
        d = SHAPES["exponential"](g, 16)
        ours += paired(d, floor=1e-3, resamples=800, seed=i).upper(0.05) >= 0
        drawn = d[g.integers(0, 16, (800, 16))].mean(1)
        theirs += np.quantile(drawn, 0.95) >= 0
    assert ours > theirs + 10


def test_bounds_and_p_values_say_the_same():
    d = np.random.default_rng(3).normal(0.3, 1, 40)
    p = paired(d, floor=1e-3, resamples=1999)
    for alpha in (0.01, 0.05, 0.2):
        assert p.p_below(p.upper(alpha) + 1e-9) <= alpha < p.p_below(p.upper(alpha) - 1e-3)
        assert p.p_above(p.lower(alpha) - 1e-9) <= alpha < p.p_above(p.lower(alpha) + 1e-3)
    assert p.lower(0.05) < p.mean < p.upper(0.05)


def test_equal_runs_have_a_short_interval():
    p = paired([0.0] * 32, floor=1e-3)
    assert p.mean == p.upper(0.01) == p.lower(0.01) == 0
    odd = paired([0.0] * 31 + [1e-6], floor=1e-3)
    assert 0 <= odd.upper(0.01) < 1e-4


def test_one_prompt_far_off_is_not_called_good():
    assert paired([0.0] * 31 + [3.0], floor=1e-3).upper(0.05) > 1


@pytest.mark.parametrize("bad", [[1.0], [1.0, float("nan")], []])
def test_no_interval_of_nothing(bad):
    with pytest.raises(ValueError, match="at least two finite"):
        paired(bad, floor=1e-3)


def test_holm():
    assert holm([0.01, 0.03, 0.03], 0.05) == [True, False, False]
    assert holm([0.03, 0.01, 0.02], 0.06) == [True, True, True]
    assert holm([0.2, 0.01], 0.05) == [False, True]
    assert holm([], 0.05) == []


def test_sign_test_and_sample_size():
    assert sign_test([1.0] * 5) == pytest.approx(1 / 32)
    assert sign_test([1, -1, 0, 0]) == 0.75
    assert sign_test([0.0] * 9) == 1.0
    for margin, prompts in ((0.05, 25), (0.03, 69), (0.02, 155), (0.01, 618)):
        assert samples_needed(0.10, margin, 0.05) == pytest.approx(prompts, abs=1)


# --- verdicts


def test_the_same_run_passes():
    verdict = decide(a_run(), a_run(), ERROR)
    assert verdict.outcome is Outcome.PASS
    assert (verdict.look, verdict.prompts) == (1, 32)
    assert verdict.alpha == pytest.approx(0.05 / 3)


def test_clearly_worse_is_a_regression_and_better_passes():
    assert decide(a_run(worse=1.2, spread=0.05), a_run(), ERROR).outcome is Outcome.REGRESSION
    assert decide(a_run(worse=0.8, spread=0.05), a_run(), ERROR).outcome is Outcome.PASS


def test_close_to_the_margin_is_inconclusive_until_there_are_more_prompts():
    run, base = a_run(96, worse=1.02, spread=0.07), a_run(96)
    first = decide(a_run(32, worse=1.02, spread=0.07), base, ERROR)
    assert first.outcome is Outcome.INCONCLUSIVE
    assert "at least 64 prompts" in first.sentence
    later = decide(run, base, ERROR)
    assert (later.outcome, later.look) == (Outcome.PASS, 3)


def test_too_few_prompts_are_inconclusive():
    for worse in (1.0, 9.0):
        verdict = decide(a_run(16, worse=worse), a_run(96), ERROR)
        assert verdict.outcome is Outcome.INCONCLUSIVE
        assert "16 prompts are too few" in verdict.sentence


def test_seeds_of_one_prompt_are_one_unit():
    def paired_up(run):
        run.samples = [Sample(s.id, f"prompt {i // 2}", s.seed) for i, s in enumerate(run.samples)]
        return run

    verdict = decide(paired_up(a_run(48)), paired_up(a_run(48)), ERROR)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "24 prompts" in verdict.sentence
    assert decide(paired_up(a_run(64)), paired_up(a_run(64)), ERROR).prompts == 32


def test_one_quarter_of_the_trajectory_is_enough():
    run = a_run()
    for steps in (*run.values["error"].values(), *run.rerun["error"].values()):
        steps[0] *= 1.15  # the whole is 1.025 times as bad
    parts = Policy(primary=(Limit("error", 1.05), Limit("error", 1.1, parts=4)))
    assert decide(run, a_run(), ERROR).outcome is Outcome.PASS
    verdict = decide(run, a_run(), parts)
    assert verdict.outcome is Outcome.REGRESSION
    assert [r.name for r in verdict.rows if r.outcome is Outcome.REGRESSION] == ["error 1/4"]


def test_a_secondary_metric_does_not_decide_but_must_be_there():
    policy = Policy(primary=(Limit("error", 9.0),), secondary=(Limit("psnr", 0.5),))
    run = a_run(worse=1.5)
    verdict = decide(run, a_run(), policy)
    assert verdict.outcome is Outcome.PASS
    assert verdict.rows[1].outcome is Outcome.REGRESSION
    assert verdict.rows[1].mean == pytest.approx(10 * np.log10(1.5))  # dB lost
    del run.values["psnr"]
    assert decide(run, a_run(), policy).outcome is Outcome.INVALID


def noisy(factor, **more):
    run = a_run(**more)
    for steps in run.rerun["error"].values():
        steps[:] = [x * factor for x in steps]
    return run


def test_the_margin_is_never_below_twice_the_noise():
    verdict = decide(noisy(1.08, worse=1.1), a_run(), ERROR)
    (row,) = verdict.rows
    assert row.noise == pytest.approx(np.log(1.08))
    assert row.margin == pytest.approx(2 * row.noise)
    assert row.policy_margin == pytest.approx(np.log(1.05))
    assert verdict.outcome is Outcome.PASS
    assert verdict.notes == [
        "error: the margin was raised from x1.05 to x1.166, twice the measured noise"
    ]


def test_noise_cannot_make_a_regression_pass():
    """A job that does not repeat proves nothing, however wide it makes the margin."""
    verdict = decide(noisy(1.3, worse=1.2), a_run(), ERROR)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "changes error x1.3, far above the policy's margin" in verdict.sentence
    assert decide(noisy(1.3, worse=9.0), a_run(), ERROR).outcome is Outcome.REGRESSION


def test_holm_keeps_one_verdict_in_twenty():
    """Eight metrics with no difference, each noisy: few runs may be called a regression."""
    policy = Policy(primary=(Limit("error", 1.0001, parts=8),), looks=(32,), resamples=1999)
    g, called = np.random.default_rng(0), 0
    for _ in range(60):
        run = a_run(steps=8)
        for name, steps in run.values["error"].items():
            steps[:] = (np.array(steps) * np.exp(0.05 * g.normal(size=8))).tolist()
            run.rerun["error"][name] = steps
        called += decide(run, a_run(steps=8), policy).outcome is Outcome.REGRESSION
    assert called <= 7  # 3 expected, 24 were it 0.05 for each


@pytest.mark.parametrize(("count", "look", "used"), [(32, 1, 32), (80, 2, 64), (99, 3, 96)])
def test_the_gate_uses_the_largest_look_that_a_run_reaches(count, look, used):
    """Harm that the first prompts do not show is not passed over when it was measured."""
    run = a_run(count)
    for name in list(run.values["error"])[32:]:
        run.values["error"][name] = run.rerun["error"][name] = [9.0] * 4
    verdict = decide(run, a_run(count), ERROR)
    assert (verdict.look, verdict.prompts) == (look, used)
    assert verdict.outcome is (Outcome.PASS if count == 32 else Outcome.REGRESSION)
    unused = [note for note in verdict.notes if "were not used" in note]
    assert len(unused) == (count != used)


# --- what makes a run invalid


def drop(run, name):
    del run.values["error"][name]


BROKEN = {
    "a metric": (lambda r: r.values.pop("error"), "error was not measured"),
    "a sample's value": (lambda r: drop(r, "0003"), "error is missing for 0003"),
    "a sample": (lambda r: r.samples.pop(), "32 samples were requested, 31 are listed"),
    "a sample in the middle": (lambda r: r.samples.pop(4), "sample 0005 ('prompt 0005'"),
    "the noise": (lambda r: r.rerun.clear(), "noise of error was not measured"),
    "a finite value": (
        lambda r: r.values["error"].update({"0001": [1.0, float("nan"), 1.0, 1.0]}),
        "error is not a finite number for 0001",
    ),
    "any value": (
        lambda r: r.values["error"].update({"0001": [1.0, None, 1.0, 1.0]}),
        "error is not a finite number for 0001",
    ),
    "a number that can be squared": (
        lambda r: r.values["error"].update({"0001": [1.0, 1e308, 1.0, 1.0]}),
        "error is beyond 1e+100 for 0001",
    ),
    "the steps of its noise": (
        lambda r: r.rerun.update(error={k: v[:2] for k, v in r.rerun["error"].items()}),
        "error has 4 steps, its noise 2",
    ),
    "a step": (lambda r: r.values["error"]["0001"].pop(), "error has 3, 4 steps"),
    "steps": (lambda r: r.values["error"].update({"0001": 0.1}), "not a finite number for 0001"),
    "a requested metric": (
        lambda r: r.missing.update({"cmmd": "no weights"}),
        "cmmd was requested and is missing: no weights",
    ),
    "a picture": (lambda r: r.failures.update({"0002": "empty"}), "sample 0002 failed: empty"),
    "the same seed": (
        lambda r: r.samples.__setitem__(0, Sample("0000", "prompt 0000", 5)),
        "seed 5",
    ),
    "the same prompt": (
        lambda r: r.samples.__setitem__(0, Sample("0000", "another", 1000)),
        "'another'",
    ),
    "the same float model": (lambda r: r.identity.update(reference="x"), "float models differ"),
    "a listed sample": (
        lambda r: r.values["error"].update({"9999": [1.0] * 4}),
        "samples that are not listed: 9999",
    ),
    "unique ids": (lambda r: r.samples.__setitem__(1, r.samples[0]), "ids are not unique"),
    **{
        f"the same {name}": (lambda r, name=name: r.conditions.update({name: "x"}), f"{name}: ")
        for name in (*run_file.JOB, "hardware", "torch")
    },
    **{
        f"the recorded {name}": (
            lambda r, name=name: r.conditions.pop(name),
            f"{name} was not recorded",
        )
        for name in (*run_file.JOB, "hardware")
    },
}


@pytest.mark.parametrize(("what", "side"), itertools.product(BROKEN, ("run", "baseline")))
def test_without_it_a_run_is_invalid(what, side):
    change, words = BROKEN[what]
    run, base = a_run(), a_run()
    change(run if side == "run" else base)
    verdict = decide(run, base, ERROR)
    assert verdict.outcome is Outcome.INVALID
    assert any(words in reason for reason in verdict.reasons), verdict.reasons


def test_trajectories_of_other_lengths_are_not_compared():
    """Whatever the conditions say."""
    quarters = Policy(primary=(Limit("error", 1.05, parts=4),))
    long = a_run(steps=8)
    long.conditions["steps"] = 4
    verdict = decide(long, a_run(steps=4), quarters)
    assert verdict.outcome is Outcome.INVALID
    assert verdict.reasons == ["error: 8 steps in the run, 4 in the baseline"]


def test_reasons_do_not_steer_a_terminal():
    run = a_run()
    run.failures["0001"] = "\x1b[31mred"
    assert decide(run, a_run(), ERROR).reasons == [r"run: sample 0001 failed: \x1b[31mred"]


def test_every_reason_is_given_at_once():
    run = a_run(torch="other", prompts="mine")
    del run.values["error"]
    assert len(decide(run, a_run(), ERROR).reasons) == 3


def test_differences_that_the_policy_allows_are_said():
    run = a_run(dtq="1", batch_size=4)
    run.identity["recipe"] = "rtn-w4a8"
    verdict = decide(run, a_run(), ERROR)
    assert verdict.outcome is Outcome.PASS
    assert any("rtn-w4a8 in the run, w4a8 in the baseline" in note for note in verdict.notes)
    strict = Policy(primary=ERROR.primary, match=("recipe",))
    assert decide(run, a_run(), strict).outcome is Outcome.INVALID


# --- files


def test_a_run_file_reads_back(tmp_path):
    run = a_run()
    run.values["error"]["0001"][2] = float("inf")
    file = tmp_path / "eval.json"
    file.write_text(run_file.text(run.to_json()))
    assert "Infinity" not in file.read_text()
    again = run_file.read(tmp_path)
    assert again.samples == run.samples
    assert again.values["error"]["0001"][2] is None
    assert again.values["psnr"] == run.values["psnr"]
    assert decide(again, a_run(), ERROR).outcome is Outcome.INVALID


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"rows": []}', "make it again"),
        ('{"format": 99}', "this dtq reads 2"),
        ('{"format": 1}', "this dtq reads 2; make it again with dtq eval"),
        ('{"format": 2, "samples": 3}', "candidate: missing"),
        ('{"format": 1, "format": 1}', "'format' is there twice"),
        ('{"format": NaN}', "NaN is not a number"),
        ("[" * 100 + "]" * 100, "nested deeper than 64 levels"),
    ],
)
def test_what_is_no_run_file(tmp_path, text, words):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(InputError, match=words):
        run_file.read(tmp_path)
    with pytest.raises(InputError, match="dtq eval"):
        run_file.read(tmp_path / "nothing.json")


def test_damaged_parts_of_a_run_file():
    good = a_run().to_json()
    for key, value in (("samples", [3]), ("values", {"error": 3})):
        with pytest.raises(InputError, match=key):
            run_file.parse({**json.loads(json.dumps(good)), key: value})


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", "", "a b"])
def test_ids_of_samples_are_names_of_files(name):
    good = json.loads(json.dumps(a_run().to_json()))
    good["samples"][3]["id"] = name
    with pytest.raises(InputError, match=r"samples\[3\]\.id: expected letters"):
        run_file.parse(good)


def test_a_run_file_has_a_size(tmp_path, monkeypatch):
    (tmp_path / "eval.json").write_text(run_file.text(a_run().to_json()))
    monkeypatch.setattr(safe_parse, "LARGEST_JSON", 1000)
    with pytest.raises(InputError, match="larger than 1000 bytes"):
        run_file.read(tmp_path)


def test_the_shipped_policies_are_good():
    assert "default" in yaml_names("gate")
    for name in yaml_names("gate"):
        shipped = Policy.load(name)
        assert shipped.about
        assert shipped.primary
        assert yaml.safe_dump(shipped.to_dict())


def test_a_policy_reports_every_mistake_at_once(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "primary: [{metric: eror, margin: 1.05}, {metric: error, margin: 0.9}, {metric: psnr, margin: 1, parts: 4}]\n"
        "secondary: [{metric: ssim, margin: -1}]\n"
        "alpha: 0.7\nlooks: [4, 2]\nmatch: [hardwear]\n"
    )
    with pytest.raises(RecipeError) as caught:
        Policy.load(file)
    told = "\n".join(caught.value.problems)
    for words in (
        "did you mean error", "a factor above 1", "no value per step", "must be above 0",
        "between 0 and 0.5", "rising numbers", "did you mean hardware",
    ):  # fmt: skip
        assert words in told
    assert len(caught.value.problems) == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("primay: []", "did you mean 'primary'"),
        ("looks: [32, many]", "a list of whole numbers"),
        ("looks: [true, 32]", "a list of whole numbers"),
        ("primary: []", "at least one metric"),
        ("primary: [{metric: error}]", "margin: missing"),
        ("primary: [{metric: error, margin: 1.1}]\nlooks: [4]", "below 8 prompts"),
        ("primary: [{metric: error, margin: 1.1}]\nresamples: 100", "too few for alpha"),
        (
            "primary: [{metric: error, margin: 1.1}, {metric: error, margin: 1.2}]",
            "error in 1 part(s) is there twice",
        ),
        ("- 1", "a mapping"),
        ("a: [", "not YAML"),
        ("a: &x [1]\nprimary: *x", "the alias *x"),
        ("primary: [{metric: psnr, margin: 1.0e+300}]", "beyond what is measured"),
        ("primary: [{metric: psnr, margin: 1.0e-300}]", "beyond what is measured"),
        ("primary: [{metric: error, margin: 1.1}]\nalpha: 1.0e-300", "0.000001 at least"),
        ("primary: [{metric: error, margin: 1.1}]\nresamples: 2000000000", "at most 1000000"),
        ("primary: [{metric: error, margin: 1.1}]\nseed: -1", "must not be below 0"),
    ],
)
def test_what_is_no_policy(tmp_path, text, words):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        Policy.load(tmp_path / "p.yaml")
    assert words in str(caught.value)


def test_a_policy_by_name():
    with pytest.raises(InputError, match="did you mean default"):
        Policy.load("defualt")
    with pytest.raises(InputError, match="no such policy file"):
        Policy.load("nowhere.yaml")
    a, b = Policy.load("default"), Policy(**{**vars(Policy.load("default")), "alpha": 0.01})
    assert a.key() == Policy(**{**vars(a), "name": "other"}).key() != b.key()


# --- sounds


def test_sounds_have_a_policy_of_their_own():
    """Quieter or noisier sounds are found although the error of the transformer is the same."""
    t = torch.arange(4000) / 16000
    tones = torch.stack([(2 * torch.pi * (200 + 50 * i) * t).sin() for i in range(32)])[:, None]
    noise = 0.01 * torch.randn(tones.shape, generator=torch.Generator().manual_seed(0))
    cases = {
        "same": tones,
        "quiet": 0.8 * tones,
        "noisy": tones + noise,
        "inverted": -tones,
    }
    runs = {}
    for name, sounds in cases.items():
        runs[name] = a_run()
        for table in (runs[name].values, runs[name].rerun):
            found = sound_metrics(sounds, tones)
            found["snr"] = found["snr"].clamp(max=EQUAL_DB)
            del table["psnr"]
            table["divergence"] = table["error"]
            table |= {
                k: dict(zip(table["error"], v.tolist(), strict=True)) for k, v in found.items()
            }
    chosen = Policy.of_runs("auto", *runs.values())
    assert chosen.name == "sound"
    assert Policy.of_runs("auto", runs["same"], a_run()).name == "default"
    chosen = dataclasses.replace(chosen, resamples=2999)
    verdicts = {name: decide(run, runs["same"], chosen) for name, run in runs.items()}
    assert verdicts["same"].outcome is Outcome.PASS, verdicts["same"].reasons
    worse = {
        n: {r.name for r in v.rows if r.outcome is Outcome.REGRESSION} for n, v in verdicts.items()
    }
    assert "level" in worse["quiet"]
    assert "spectrum" in worse["noisy"]
    assert worse["inverted"] == {"snr"}, "another waveform that sounds the same"
    assert verdicts["inverted"].outcome is Outcome.PASS


def test_metrics_of_sounds_have_their_units():
    t = torch.arange(8000) / 16000
    tone = (2 * torch.pi * 440 * t).sin().expand(2, 2, -1)
    assert torch.allclose(
        sound.level_change(0.5 * tone, tone), torch.tensor(6.0206).double(), atol=1e-3
    )
    assert torch.allclose(sound.snr(0.9 * tone, tone), torch.tensor(20.0).double(), atol=1e-3)
    assert sound.spectral_distance(tone, tone).abs().max() == 0
    assert sound.spectral_distance(torch.zeros_like(tone), tone).isfinite().all()


def test_silent_sounds_are_equal_or_not():
    silent, tone = torch.zeros(1, 1, 4000), torch.sin(torch.arange(4000.0) / 8).reshape(1, 1, -1)
    assert sound_metrics(silent, silent)["snr"].isposinf().all()
    found = sound_metrics(tone, silent)
    assert all(value.isfinite().all() for value in found.values())
    assert found["snr"] < -100
    assert found["level"] > 100
