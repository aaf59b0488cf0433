# SPDX-License-Identifier: Apache-2.0
"""The command line as a person uses it: the journey, bad input, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import tiny
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline

from dtq.checkpoint import reader
from dtq.cli import main
from dtq.cli.inputs import sampling_settings
from dtq.cli.output import fold
from dtq.pipelines.settings import SamplingSettings

FAST = ["--samples", "4", "--steps", "4"]
ROOT = Path(__file__).parent.parent.parent

FORKING = """
import gc, json, os, signal, sys
import dtq.api, dtq.cli, dtq.demo, dtq.evaluate.evaluate, diffusers.pipelines.dit, torch._dynamo
# a runner in the background ignores SIGINT, and its children would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.freeze()  # else the children look through all of it, and copy it
for line in sys.stdin:
    arguments, stdout, stderr = json.loads(line)
    if not (child := os.fork()):
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
unread, written = os.pipe()
os.close(unread)
for stream, path in ((1, stdout), (2, stderr)):
    os.dup2(os.open(path, os.O_WRONLY) if path else written, stream)
os.close(written)
sys.argv = ["dtq", *arguments]
dtq.cli.main()
"""
"""Runs commands as ``python -m dtq.cli`` does, forked after the imports, which take the time."""


class Forking:
    """Commands in processes of their own; streams without a file are pipes that nobody reads."""

    def __init__(self) -> None:
        self.parent = subprocess.Popen(
            [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def start(self, *arguments, stdout=None, stderr=None) -> int:
        for path in (stdout, stderr):
            if path is not None:
                path.touch()
        files = [None if path is None else str(path) for path in (stdout, stderr)]
        self.parent.stdin.write(json.dumps([[str(a) for a in arguments], *files]) + "\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def wait(self) -> int:
        return int(self.parent.stdout.readline())


@pytest.fixture(scope="module")
def forking():
    forks = Forking()
    yield forks
    forks.parent.communicate()


def dtq(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def test_the_journey(float_folder, tmp_path):
    out = tmp_path / "q"
    plan = json.loads(dtq("plan", float_folder, "--set", "promote.to=", "--json").stdout)
    done = dtq("quantize", float_folder, "--set", "promote.to=", *FAST, "-o", out).stdout
    assert "transformer: 14 of " in done
    assert "import dtq; DiffusionPipeline.from_pretrained" in done
    file = out / "transformer" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_size == plan["bytes"]
    shown = dtq("inspect", out, "--kernels").stdout
    assert "checksums good" in shown
    assert "w4a8-two-level: used" in shown
    assert len(json.loads(dtq("inspect", out, "--json").stdout)["layers"]) == 14
    dtq("sample", out, "-p", "3", "-p", "5", "--steps", "2", "-o", tmp_path / "pictures")
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {
        "0000.png",
        "0001.png",
        "sheet.png",
    }
    told = dtq(
        "eval",
        out,
        "--reference",
        float_folder,
        "--samples",
        "2",
        "--steps",
        "2",
        "-o",
        tmp_path / "report",
    ).stdout
    assert "Close to the float model" in told
    assert (tmp_path / "report" / "report.html").stat().st_size > 20_000
    assert json.loads((tmp_path / "report" / "eval.json").read_text())["rows"][0]["error"] < 0.01
    assert torch.isfinite(tiny.sample(DiffusionPipeline.from_pretrained(out))).all()


def test_calibrate_once_quantize_twice(float_folder, tmp_path):
    stats = tmp_path / "s.safetensors"
    dtq("calibrate", float_folder, *FAST, "-o", stats)
    for recipe in ("w4a8", "w8a8"):
        dtq("quantize", float_folder, "--recipe", recipe, "--stats", stats, "-o", tmp_path / recipe)
        reader.verify(tmp_path / recipe)


def test_a_bare_transformer_folder(float_folder, tmp_path):
    base = float_folder / "transformer"
    told = dtq("quantize", base, "--recipe", "rtn-w4a8", "-o", tmp_path / "t").stdout
    assert f"import dtq; DiTTransformer2DModel.from_pretrained({str(tmp_path / 't')!r})" in told
    assert reader.verify(tmp_path / "t") == {"transformer": (tmp_path / "t", None)}


def test_json_is_only_json(float_folder, tmp_path):
    result = dtq("quantize", float_folder, *FAST, "--json", "-o", tmp_path / "q")
    assert json.loads(result.stdout)["recipe"] == "w4a8"
    result = dtq(
        "eval",
        tmp_path / "q",
        "--reference",
        float_folder,
        "--samples",
        "2",
        "--steps",
        "2",
        "--json",
    )
    assert json.loads(result.stdout)["conditions"]["samples"] == 2


def test_sample_and_eval_sample_as_their_options_ask():
    values = {"samples": 3, "steps": 2, "guidance": 1.5, "seed": 4, "batch_size": 5}
    assert sampling_settings(
        arguments=("height=16", "max_area=[1]"), images="cat.png", **values
    ) == (
        SamplingSettings(**values, pipeline_args={"height": 16, "max_area": [1]}, images="cat.png")
    )
    assert sampling_settings(arguments=(), images=None, **values) == SamplingSettings(**values)


def test_recipes(tmp_path):
    assert "w4a8" in dtq("recipe", "ls").stdout
    assert "weights: int4-2l-g64" in dtq("recipe", "show", "w4a8").stdout
    dtq("recipe", "cp", "w4a8", tmp_path / "my.yaml")
    assert "good" in dtq("recipe", "check", tmp_path / "my.yaml").stdout
    assert "exists" in dtq("recipe", "cp", "w4a8", tmp_path / "my.yaml", code=1).stderr
    (tmp_path / "my.yaml").write_text("wieghts: int4-g64\nactivations: int7\n")
    told = dtq("recipe", "check", tmp_path / "my.yaml", code=1).stderr
    assert "did you mean 'weights'" in told


def test_doctor():
    told = dtq("doctor").stdout
    assert "torch" in told
    assert "kernels" in told


def commands(command=main, path=()):
    """Every command, groups included, by what a user types."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


ALL = {" ".join(("dtq", *path)): command for path, command in commands()}
OPTIONS = {
    f"{name} {param.opts[-1]}": (command, param)
    for name, command in ALL.items()
    for param in command.params
    if isinstance(param, click.Option)
}


@pytest.mark.parametrize("name", ALL)
def test_every_help_has_a_sentence_an_example_and_its_arguments(name):
    told = dtq(*name.split()[1:], "--help").stdout
    first = ALL[name].help.split("\n")[0]
    assert first.endswith(".")
    assert len(first) < 60 or name == "dtq"  # else the list of commands cuts it
    assert re.search(rf"\n  {name}\b", told.split("\n\n", 1)[1])
    for param in ALL[name].params:
        if isinstance(param, click.Argument):
            assert param.name.upper() in ALL[name].help


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_a_sentence_and_a_default(name):
    command, option = OPTIONS[name]
    assert option.help.endswith(".")
    assert option.help[0].isupper()
    root = click.Context(main, **main.context_settings)
    context = click.Context(command, parent=root)
    _, shown = option.get_help_record(context)
    stated = "Default: " in option.help or "[default: " in shown or "[required]" in shown
    assert stated or (option.is_flag and not option.get_default(context))
    assert not ("Default: " in option.help and "[default: " in shown)


def test_no_flag_means_two_things():
    """It takes the same kind of value, as often, in every command."""
    kinds: dict[str, set[tuple]] = {}
    for name, (_, option) in OPTIONS.items():
        kind = option.type.name.removesuffix(" range"), option.is_flag, option.multiple
        kinds.setdefault(name.split()[-1], set()).add(kind)
    assert not {flag: kind for flag, kind in kinds.items() if len(kind) > 1}


def test_equal_blocks_share_a_row():
    rows = [
        (f"blocks.{b}.experts.{e}.w{i}", "int4" if b != 2 else "int8")
        for b in range(5)
        for e in range(3)
        for i in (1, 2)
    ]
    assert fold([("in", "-"), *rows, ("norm.0", "-"), ("out", "-")]) == [
        ("in", "-"),
        ("blocks.0 to 1, 3 to 4.experts.0 to 2.w1", "int4"),
        ("blocks.0 to 1, 3 to 4.experts.0 to 2.w2", "int4"),
        ("blocks.2.experts.0 to 2.w1", "int8"),
        ("blocks.2.experts.0 to 2.w2", "int8"),
        ("norm.0", "-"),
        ("out", "-"),
    ]
    assert fold([]) == []


def test_plan_and_inspect_fold_blocks_unless_all_are_asked_for(float_folder, quantized_folder):
    blocks = json.loads((float_folder / "transformer" / "config.json").read_text())["num_layers"]
    for command in (("plan", float_folder), ("inspect", quantized_folder)):
        folded, every = dtq(*command).stdout, dtq(*command, "--all").stdout
        assert f"transformer_blocks.0 to {blocks - 1}.attn1.to_q " in folded
        assert folded.count("attn1.to_q ") == 1
        assert every.count("attn1.to_q ") == blocks


def test_plan_estimates_a_rough_time(float_folder):
    told = dtq("plan", float_folder).stdout
    assert re.search(r"time +about \d+ (s|min|h) \(rough; the progress bar", told)


def test_a_closed_pipe_ends_a_command_silently(tmp_path, forking):
    """Only standard output is closed: nothing is written to the other."""
    command = ("recipe", "ls")
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read(); from dtq.cli import main; main()", *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    process.stdout.close()  # before it writes
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
    forking.start("recipe", "show", "w4a8", stderr=tmp_path / "stderr")
    assert forking.wait() == 141
    assert (tmp_path / "stderr").read_text() == ""


BAD = {
    "no such path": (["quantize", "{tmp}/nowhere", "-o", "{tmp}/o"], "no such folder"),
    "not a diffusers folder": (
        ["quantize", "{tmp}/empty", "-o", "{tmp}/o"],
        "not a diffusers folder",
    ),
    "a file": (["quantize", "{tmp}/file.txt", "-o", "{tmp}/o"], "none of the formats"),
    "unknown recipe": (
        ["quantize", "{float}", "--recipe", "w4a9", "-o", "{tmp}/o"],
        "did you mean w4a8",
    ),
    "unknown key": (
        ["quantize", "{float}", "--set", "wieghts=int4-g64", "-o", "{tmp}/o"],
        "did you mean 'weights'",
    ),
    "bad setting": (["quantize", "{float}", "--set", "weights", "-o", "{tmp}/o"], "KEY=VALUE"),
    "bad knob": (["plan", "{float}", "--set", "solver.yaqa.part=4"], "did you mean parts"),
    "bad value": (["plan", "{float}", "--set", "calibration.steps=many"], "whole number"),
    "output not empty": (["quantize", "{float}", "-o", "{tmp}/full"], "not empty"),
    "output is a file": (["quantize", "{float}", "-o", "{tmp}/file.txt"], "is a file"),
    "unknown component": (
        ["quantize", "{float}", "--component", "unet", "-o", "{tmp}/o"],
        "has no 'unet'",
    ),
    "unknown set": (
        ["quantize", "{float}", "--calibration-set", "coco", "-o", "{tmp}/o"],
        "set 'coco'",
    ),
    "no statistics": (
        ["quantize", "{float}", "--stats", "{tmp}/x.safetensors", "-o", "{tmp}/o"],
        "dtq calibrate",
    ),
    "quantized already": (["quantize", "{quantized}", "-o", "{tmp}/o"], "quantized already"),
    "inspect a float model": (["inspect", "{float}"], "not quantized by dtq"),
    "inspect nothing": (["inspect", "{tmp}/nowhere"], "no such folder"),
    "inspect damage": (["inspect", "{damaged}"], "truncated or damaged"),
    "sample damage": (["sample", "{damaged}", "-o", "{tmp}/o"], "truncated or damaged"),
    "eval damage": (["eval", "{damaged}", "--reference", "{float}"], "truncated or damaged"),
    "eval nothing": (["eval", "{quantized}", "--reference", "{tmp}/nowhere"], "no such folder"),
    "bad label": (["sample", "{quantized}", "-p", "unicorn", "-o", "{tmp}/o"], "not a label"),
    "plan nothing": (["plan", "nowhere"], "MODEL is"),
}


@pytest.fixture
def places(float_folder, quantized_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file.txt").write_text("x")
    import shutil

    shutil.copytree(quantized_folder, tmp_path / "damaged")
    file = tmp_path / "damaged" / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    return {
        "tmp": tmp_path,
        "float": float_folder,
        "quantized": quantized_folder,
        "damaged": tmp_path / "damaged",
    }


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_gives_a_reason_and_writes_nothing(kind, places):
    arguments, words = BAD[kind]
    result = dtq(*(a.format(**places) for a in arguments), code=1)
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (places["tmp"] / "o").exists() or not any((places["tmp"] / "o").iterdir())
    assert not list(places["tmp"].glob(".*partial*"))


def test_a_full_disk_leaves_nothing(float_folder, tmp_path, monkeypatch):
    def full(self, folder, **options):
        (Path(folder) / "half.safetensors").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers.DiTPipeline.save_pretrained", full)
    told = dtq(
        "quantize", float_folder, "--recipe", "rtn-w4a8", "-o", tmp_path / "q", code=1
    ).stderr
    assert "No space left" in told
    assert [p.name for p in tmp_path.iterdir()] == [".q.work"]  # goes on when there is room


def test_a_nearly_full_disk_is_noticed_before_the_work(float_folder, tmp_path, monkeypatch):
    import shutil

    # room for the quantized transformer, and not for the float autoencoder that is copied with it
    vae = sum(f.stat().st_size for f in (float_folder / "vae").glob("*.safetensors"))
    plan = json.loads(dtq("plan", float_folder, *FAST, "--json").stdout)
    free = int(1.1 * (plan["bytes"] + vae)) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, free))
    told = dtq("quantize", float_folder, *FAST, "-o", tmp_path / "q", code=1).stderr
    assert "the weight files of the output need" in told
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_half_done(float_folder, tmp_path, forking, sent):
    (tmp_path / "out").mkdir()
    shown = tmp_path / "stderr"
    command = ("quantize", float_folder, "--samples", "4000", "-o", tmp_path / "out" / "q")
    process = forking.start(*command, stdout=tmp_path / "stdout", stderr=shown)
    until = time.monotonic() + 60
    while "calibrate" not in shown.read_text():
        assert time.monotonic() < until, shown.read_text()
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(process, sent)
    assert forking.wait() == 130
    assert "interrupted" in shown.read_text()
    assert "Traceback" not in shown.read_text()
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {".q.work"}
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    "command",
    ["--help", "--version", "quantize --help", "recipe ls", "plan demo", "nosuch", "plan nowhere"],
)
def test_output_that_nobody_reads_ends_silently(command, forking):
    """``dtq ... 2>&1 | head``: the exit code of a shell for SIGPIPE, and no traceback."""
    if command.startswith("plan"):  # imports torch
        forking.start(*command.split())
        assert forking.wait() == 141
        return
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "dtq.cli", *command.split()]
    try:
        done = subprocess.run(words, stdout=write, stderr=write, env=env, timeout=120)
    finally:
        os.close(write)
    assert done.returncode == 141


def test_a_progress_bar_that_nobody_reads_is_no_error_of_the_model(float_folder, tmp_path, forking):
    forking.start("sample", float_folder, "-o", tmp_path)
    assert forking.wait() == 141
