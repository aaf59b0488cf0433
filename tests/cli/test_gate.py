# SPDX-License-Identifier: Apache-2.0
"""``dtq gate`` as a person and as a workflow use it; planted regressions on a tiny model."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny
import yaml
from click.testing import CliRunner

import dtq as library
from dtq.cli import main
from dtq.errors import InputError
from dtq.evaluate import paired_run, run_file
from dtq.evaluate.fingerprint import fingerprint
from dtq.evaluate.gate import baseline_file
from dtq.evaluate.gate.decision import Outcome, decide
from dtq.evaluate.gate.policy import Limit, Policy
from dtq.pipelines.loading import load_transformer
from dtq.pipelines.settings import SamplingSettings
from gate import scaled, swapped, without_bias  # scripts/gate.py

HOW = SamplingSettings(samples=16, steps=4, batch_size=8, seed=3)
gate_group = main.commands["gate"].commands
POLICY = Policy(
    name="tiny",
    about="for tests",
    primary=(Limit("error", 1.05), Limit("error", 1.1, parts=4)),
    secondary=(Limit("psnr", 1.0),),
    looks=(16,),
    resamples=1999,
)


def dtq(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


@pytest.fixture(scope="module")
def job(float_folder):
    return paired_run.observe(load_transformer(float_folder), HOW)


@pytest.fixture(scope="module")
def candidate(quantized_folder):
    return load_transformer(quantized_folder)


@pytest.fixture(scope="module")
def base(job, candidate):
    return paired_run.compare(job, candidate).run


@pytest.fixture
def place(tmp_path, base):
    """An evaluated folder, a policy, and the baseline file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval.json").write_text(run_file.text(base.to_json()))
    (tmp_path / "tiny.yaml").write_text(
        "primary: [{metric: error, margin: 1.05}]\nsecondary: [{metric: psnr, margin: 1}]\n"
        "looks: [16, 32]\nresamples: 1999\n"
    )
    baseline_file.accept(base, tmp_path / "base.json", "first", POLICY, "me")
    return tmp_path


def gate(place, *more, code=0, run="run"):
    arguments = (place / run, "--baseline", place / "base.json", "--policy", place / "tiny.yaml")
    return dtq("gate", *arguments, *more, code=code)


def changed(place, change):
    """The run of the place after a change of its file."""
    file = place / "run" / "eval.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


# --- planted regressions


@pytest.mark.parametrize("defect", [scaled, swapped, without_bias])
def test_a_planted_defect_is_a_regression(defect, job, base, quantized_folder):
    broken = load_transformer(quantized_folder)
    with defect(broken.model, "transformer_blocks.1.ff.net.2"):
        verdict = decide(paired_run.compare(job, broken).run, base, POLICY)
    assert verdict.outcome is Outcome.REGRESSION, verdict.sentence
    assert fingerprint(broken.model) == base.identity["checkpoint"]  # it was taken back


def test_one_mis_scaled_step_bin_is_a_regression(job, float_folder):
    pipe = library.quantize(
        float_folder, "rtn-w4a8", activations="int8-static-timestep", progress=False,
        calibration={"samples": 4, "batch_size": 4, "steps": 8, "num_timestep_bins": 4},
    )  # fmt: skip
    source = load_transformer(pipe)
    right = paired_run.compare(job, source).run
    for module in source.model.modules():
        if (
            isinstance(module, library.QuantLinear)
            and module.problem.activation_format.per_timestep
        ):
            module.packed_tensor("input_scale").reshape(-1)[1] *= 0.5
    verdict = decide(paired_run.compare(job, source).run, right, POLICY)
    assert verdict.outcome is Outcome.REGRESSION
    quarters = {r.name: r.outcome for r in verdict.rows if "/" in r.name}
    assert Outcome.REGRESSION in quarters.values()
    assert Outcome.PASS in quarters.values()  # the others are as they were


def test_a_recipe_that_changed_silently_is_a_regression(job, base, float_folder):
    naive = load_transformer(library.quantize(float_folder, "rtn-w4a8", progress=False))
    verdict = decide(paired_run.compare(job, naive).run, base, POLICY)
    assert verdict.outcome is Outcome.REGRESSION
    assert any("recipe: rtn-w4a8 in the run" in note for note in verdict.notes)


def test_unchanged_checkpoints_pass_whatever_the_batch(candidate):
    policy = Policy(**{**vars(POLICY), "looks": (8,)})
    reference, outcomes, moved = load_transformer(tiny.pipeline()), [], 0
    for seed in range(4):
        runs = []
        for batch in (8, 1):
            how = SamplingSettings(samples=8, steps=2, batch_size=batch, seed=seed)
            small = paired_run.observe(reference, how)
            runs.append(paired_run.compare(small, candidate).run)
        moved += runs[0].values != runs[1].values
        halves = Policy(**{**vars(policy), "primary": (Limit("error", 1.05, parts=2),)})
        outcomes.append(decide(runs[1], runs[0], halves).outcome)
    assert outcomes == [Outcome.PASS] * 4
    assert moved  # they are runs, not copies


# --- the command


def test_a_run_passes_against_itself(place, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place / "summary.md"))
    (place / "summary.md").write_text("before\n")
    more = ("--junit", place / "gate.xml", "--out", place / "gate.json")
    told = gate(place, *more).stdout
    assert "pass: Not worse than the baseline" in told
    summary = (place / "summary.md").read_text()
    assert summary.startswith("before\n")
    assert "dtq gate: pass" in summary
    assert summary.count("\n| error") == 1
    saved = json.loads((place / "gate.json").read_text())
    assert saved["exit_code"] == 0
    assert len(saved["rows"][0]["differences"]) == 16
    assert set(saved["key"]) == {"checkpoint", "recipe", "policy", "hardware", "key"}
    suite = ElementTree.parse(place / "gate.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "0", "0")


def test_worse_is_exit_1(place):
    def worse(data):
        for part in ("values", "rerun"):
            data[part]["error"] = {k: [1.2 * x for x in v] for k, v in data[part]["error"].items()}

    changed(place, worse)
    result = gate(place, "--json", "--junit", place / "gate.xml", code=1)
    assert json.loads(result.stdout)["outcome"] == "regression"
    failure = ElementTree.parse(place / "gate.xml").getroot().find("testcase/failure")
    assert failure.get("type") == "regression"
    assert "x1.2" in failure.get("message")


def test_too_few_are_exit_2(place):
    def fewer(data):
        data["samples"] = data["samples"][:8]
        data["conditions"]["samples"] = 8
        kept = {s["id"] for s in data["samples"]}
        for part in ("values", "rerun"):
            for metric, table in data[part].items():
                data[part][metric] = {k: v for k, v in table.items() if k in kept}

    changed(place, fewer)
    result = gate(place, "--junit", place / "gate.xml", code=2)
    assert "8 prompts are too few" in result.stdout
    assert ElementTree.parse(place / "gate.xml").getroot().get("failures") == "1"


@pytest.mark.parametrize("metric", ["error", "psnr"])
def test_a_removed_metric_is_exit_3(place, metric):
    changed(place, lambda data: data["values"].pop(metric))
    result = gate(place, "--junit", place / "gate.xml", code=3)
    assert f"run: {metric} was not measured" in result.stdout
    assert ElementTree.parse(place / "gate.xml").getroot().get("errors") == "1"


def test_a_removed_sample_is_exit_3(place):
    changed(place, lambda data: data["samples"].pop())
    assert "16 samples were requested, 15 are listed" in gate(place, code=3).stdout


WRONG = {
    "no run": (["nowhere", "--baseline", "base.json"], "no such run file"),
    "no baseline": (["run", "--baseline", "nothing.json"], "no such run file"),
    "no option": (["run"], "Missing option '--baseline'"),
    "an unknown option": (["run", "--base", "x"], "No such option"),
    "options first": (["--baseline", "base.json"], "Missing argument 'RUN'"),
    "an unknown policy": (["run", "--baseline", "base.json", "--policy", "defualt"], "did you mean default"),
    "a bad policy": (["run", "--baseline", "base.json", "--policy", "bad.yaml"], "did you mean 'primary'"),
    "an old run file": (["old", "--baseline", "base.json"], "make it again"),
    "no pictures": (["run", "--baseline", "base.json", "--policy", "tiny.yaml", "--sheet", "x.html"], "--keep-images"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_usage_is_neither_a_regression_nor_inconclusive(what, place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "bad.yaml").write_text("primay: []")
    (place / "old").mkdir()
    (place / "old" / "eval.json").write_text('{"rows": []}')
    arguments, words = WRONG[what]
    assert words in dtq("gate", *arguments, code=3).stderr


def test_options_may_come_first(place):
    dtq("gate", "--baseline", place / "base.json", "--policy", place / "tiny.yaml", place / "run")


def test_help_teaches():
    told = dtq("gate", "--help").stdout
    for words in ("exit code", "inconclusive", "--baseline", "accept", "dtq gate run --baseline"):
        assert words in told
    assert "alpha: 0.05" in dtq("gate", "policy").stdout


def test_the_sheet_is_sorted_by_harm(place, base):
    worst = base.samples[11]

    def worse(data):
        for part in ("values", "rerun"):
            data[part]["error"][worst.id] = [2 * x for x in data[part]["error"][worst.id]]

    changed(place, worse)
    for side in ("float", "candidate"):
        (place / "run" / "pictures" / side).mkdir(parents=True)
        for sample in base.samples:
            file = place / "run" / "pictures" / side / f"{sample.id}.png"
            file.write_bytes(f"{side} {sample.id}".encode())
    result = CliRunner().invoke(
        main,
        [str(x) for x in ("gate", place / "run", "--baseline", place / "base.json",
         "--policy", place / "tiny.yaml", "--sheet", place / "sheet.html")],
    )  # fmt: skip
    assert result.exit_code in (0, 2), result.output
    page = (place / "sheet.html").read_text()
    assert page.count("<figure>") == 16
    assert "http" not in page
    assert page.index(f"x2 · {worst.prompt}") == page.index("figcaption>x") + len("figcaption>")


# --- the GitHub action


ACTION = yaml.safe_load((Path(__file__).parent.parent.parent / "action.yml").read_text())


def step(words):
    return next(s["run"] for s in ACTION["runs"]["steps"] if words in s.get("run", ""))


def test_the_action_names_options_that_exist():
    for words, command in (("dtq eval", main.commands["eval"]), ("dtq gate", gate_group["check"])):
        known = {option for p in command.params for option in p.opts}
        script = step(words)
        used = set(re.findall(r"(?<= )--[a-z-]+|(?<= )-o", script[script.index(words) :]))
        assert used
        assert used <= known
    used = set(re.findall(r"inputs\.(\w+)", json.dumps(ACTION)))
    assert used == set(ACTION["inputs"])


@pytest.mark.parametrize(
    ("code", "rule", "verdict", "ends"),
    [
        (0, "fail", "pass", 0),
        (1, "pass", "regression", 1),
        (2, "fail", "inconclusive", 2),
        (2, "pass", "inconclusive", 0),
        (3, "pass", "invalid", 3),
        (130, "pass", "invalid", 130),
    ],
)
def test_the_action_passes_the_verdict_on(tmp_path, code, rule, verdict, ends):
    (tmp_path / "dtq").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "dtq").chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "RUNNER_TEMP": str(tmp_path),
        "GITHUB_WORKSPACE": str(tmp_path), "GITHUB_OUTPUT": str(tmp_path / "output"),
        "BASELINE": "b.json", "POLICY": "default", "INCONCLUSIVE": rule,
    }  # fmt: skip
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", step("dtq gate")], env=env, check=False)
    assert done.returncode == ends
    assert (tmp_path / "output").read_text() == f"verdict={verdict}\n"


# --- baselines


def test_a_baseline_keeps_its_history(place, base):
    other = copy.deepcopy(base)
    other.identity["checkpoint"] = "another"
    for part in (other.values, other.rerun):
        part["error"] = {k: [1.5 * x for x in v] for k, v in part["error"].items()}
    (place / "run" / "eval.json").write_text(run_file.text(other.to_json()))
    arguments = ("--baseline", place / "base.json", "--policy", place / "tiny.yaml", "--who", "you")
    told = dtq("gate", "accept", place / "run", *arguments, "--reason", "faster").stdout
    assert "against the last one: regression" in told
    first, second = baseline_file.history(place / "base.json")
    assert (first["who"], first["why"], second["who"], second["why"]) == (
        "me",
        "first",
        "you",
        "faster",
    )
    assert (first["checkpoint"], second["checkpoint"]) == (base.identity["checkpoint"], "another")
    assert second["against_the_last"]["verdict"] == "regression"
    assert first["key"] != second["key"]
    gate(place)  # the run is the baseline now
    shown = dtq("gate", "log", place / "base.json").stdout
    assert shown.index("first") < shown.index("faster")


def test_what_cannot_be_accepted(place, monkeypatch):
    monkeypatch.chdir(place)
    before = (place / "base.json").read_bytes()
    arguments = ["accept", "run", "--baseline", "base.json", "--policy", "tiny.yaml"]
    assert "needs a reason" in dtq("gate", *arguments, "--reason", " ", code=3).stderr
    assert "Missing option '--reason'" in dtq("gate", *arguments, code=3).stderr
    into = ["--baseline", "run/eval.json", "--policy", "tiny.yaml", "--reason", "x"]
    assert "is not a dtq baseline" in dtq("gate", "accept", "run", *into, code=3).stderr
    into[1] = "nowhere/base.json"
    assert "no such folder" in dtq("gate", "accept", "run", *into, code=3).stderr
    wide = [*arguments[:-1], "default", "--reason", "x"]
    assert "16 prompts; the policy's first look is at 32" in dtq("gate", *wide, code=3).stderr
    changed(place, lambda data: data["values"].pop("error"))
    told = dtq("gate", *arguments, "--reason", "x", code=3).stderr
    assert "cannot be a baseline" in told
    assert "error was not measured" in told
    assert (place / "base.json").read_bytes() == before


@pytest.mark.parametrize(
    "entry",
    [3, {}, {"why": 3}, {"who": None}, {"against_the_last": "pass"}, {"against_the_last": {}}],
)
def test_a_history_that_is_none(place, entry):
    data = json.loads((place / "base.json").read_text())
    data["history"].append(
        {**data["history"][0], **entry} if isinstance(entry, dict) and entry else entry
    )
    (place / "base.json").write_text(json.dumps(data))
    before = (place / "base.json").read_bytes()
    words = "base.json is not a dtq baseline; pass another --baseline: history"
    assert words in dtq("gate", "log", place / "base.json", code=3).stderr
    arguments = ("--baseline", place / "base.json", "--policy", place / "tiny.yaml")
    assert words in dtq("gate", "accept", place / "run", *arguments, "--reason", "x", code=3).stderr
    assert (place / "base.json").read_bytes() == before


def test_what_the_policy_leaves_out_may_be_missing_in_a_baseline(place, base):
    run = copy.deepcopy(base)
    run.values["divergence"] = {s.id: None for s in run.samples}
    run.values["ssim"] = {}
    entry = baseline_file.accept(run, place / "base.json", "again", POLICY)
    assert entry["means"]["divergence"] is entry["means"]["ssim"] is None
    assert entry["means"]["psnr"] > 0


def test_a_baseline_is_written_whole_or_not_at_all(place, base, monkeypatch):
    before = (place / "base.json").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    files = set(place.iterdir())
    with pytest.raises(InputError, match=r"base.json: could not be written .*No space"):
        baseline_file.accept(base, place / "base.json", "again", POLICY)
    assert (place / "base.json").read_bytes() == before
    assert set(place.iterdir()) == files


def test_eval_writes_what_the_gate_reads(float_folder, quantized_folder, place):
    arguments = ("--reference", float_folder, "--samples", 16, "--steps", 2, "--keep-images")
    for name, batch in (("one", 8), ("two", 5)):
        dtq("eval", quantized_folder, *arguments, "--batch", batch, "-o", place / name)
    (place / "tiny.yaml").write_text(
        "primary: [{metric: error, margin: 1.05, parts: 2}]\n"
        "secondary: [{metric: divergence, margin: 1.2}, {metric: psnr, margin: 1}, {metric: ssim, margin: 0.01}]\n"
        "looks: [16]\n"
    )
    more = ("--policy", place / "tiny.yaml", "--sheet", place / "sheet.html")
    told = dtq("gate", place / "two", "--baseline", place / "one", *more).stdout
    assert "batch_size: 5 in the run, 8 in the baseline" in told
    assert (place / "sheet.html").read_text().count("<figure>") == 16


def test_a_fault_has_the_exit_code_of_an_invalid_run(monkeypatch, tmp_path):

    def broken(path):
        raise ValueError("a fault")

    monkeypatch.setattr(run_file, "read", broken)
    result = CliRunner().invoke(main, ["gate", "run", "--baseline", "base.json"])
    assert result.exit_code == 3
