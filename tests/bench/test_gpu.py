# SPDX-License-Identifier: Apache-2.0
"""The script that a machine with a GPU runs, run without one; its checks as tests where there is one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import agreement
import golden
import gpu
import gpu_checks
import gpu_run
import gpu_targets
import products
import pytest
import torch
from click.testing import CliRunner

from dtq.bench import cases, gpu_linears
from dtq.bench import gpu as bench_gpu
from dtq.cli import main
from dtq.kernels import gpu_dispatch

HERE = torch.device("cpu")


ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def session(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    return gpu_run.Session(
        device, gpu.clock_of(device), 3, False, gpu_run.Results(tmp_path / "a.json")
    )


@pytest.mark.gpu
@pytest.mark.parametrize("check", gpu.COMMANDS["checks"](), ids=lambda c: c.key)
def test_the_checks_of_the_script(session, check):
    try:
        check.run(session)
    except gpu_run.Skipped as reason:
        pytest.skip(str(reason))
    assert not session.results.failed


@pytest.mark.slow
def test_the_script_runs_without_a_gpu(tmp_path):
    assert gpu.main(["--fake", "--rounds", "2", "--out", str(tmp_path)]) == 0
    for command in ("checks", "targets"):
        data = json.loads((tmp_path / f"{command}.json").read_text())
        assert data["complete"]
        assert data["done"] == [check.key for check in gpu.COMMANDS[command]()]
    told = " ".join(f["what"] for f in data["findings"])
    assert all(target.name in told for target in gpu_targets.TARGETS)
    assert {"bf16", "w8a8", "w4a8"} <= {row["name"] for row in data["rows"]}
    assert "## targets" in (tmp_path / "targets.md").read_text()


def test_a_child_has_the_options_of_its_parent(tmp_path):
    given = ["--fake", "--parts", "targets", "--only", "T1", "--rounds", "2"]
    options = gpu.parse([*given, "--out", "checks"])
    assert options.command == ["targets"]
    command = gpu.child("targets", tmp_path / "targets.json", options)
    child = vars(gpu.parse(command[2:]))
    assert child.pop("file") == tmp_path / "targets.json"
    given = vars(options) | {"out": child["out"]}  # which the child does not use
    given.pop("file")
    assert child == given


def test_a_run_without_checks_is_an_error(capsys):
    for given in (["--only", "nonsense"], ["checks", "--parts", "targets"]):
        with pytest.raises(SystemExit) as ended:
            gpu.parse(given)
        assert ended.value.code == 2
    assert gpu.parse(["--only", "T12"]).command == ["targets"]
    assert "no check whose name contains 'nonsense'" in capsys.readouterr().err


@pytest.fixture
def without_gpu(tmp_path):
    results = gpu_run.Results(tmp_path / "checks.json")
    return gpu_run.Session(HERE, gpu.clock_of(HERE), 2, True, results)


def test_the_file_names_a_check_that_runs_until_the_last_is_done(without_gpu):
    seen = []

    class Seen(gpu_run.Results):
        def save(self):
            super().save()
            running = json.loads(self.path.read_text())["running"]
            seen.append((len(self.data["done"]), running and running["check"]))

    without_gpu.results = Seen(without_gpu.results.path)
    checks = [gpu_run.Check("a", name, lambda s: None) for name in ("first", "second")]
    assert gpu_run.run_checks(checks, without_gpu) == 0
    assert list(dict.fromkeys(seen)) == [(0, "a: first"), (1, "a: second"), (2, None)]


def test_a_check_that_only_the_reference_answers_fails(without_gpu, monkeypatch):
    calls = []
    monkeypatch.setattr(gpu_checks, "references", lambda: len(calls))

    def sometimes(ops, device, seed, limit):
        if seed:
            calls.append(seed)

    assert "1 of them by the torch reference" in gpu_checks.agrees(sometimes, without_gpu)
    with pytest.raises(AssertionError, match="the torch reference ran for every size"):
        gpu_checks.agrees(lambda *given: calls.append(0), without_gpu)


WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "transformers", "accelerate", "huggingface_hub", "yaml"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Without())
sys.path.insert(0, "tests")
import gpu
sys.exit(gpu.main(["--fake", "--list"]))
"""


def test_the_script_needs_no_diffusers():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "targets: T12" in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_only_what_is_asked_for_runs_and_nothing_is_replaced(tmp_path):
    chosen = ["--fake", "--parts", "correctness", "--only", "quantize_rows", "--out", str(tmp_path)]
    for _ in range(2):
        assert gpu.main(chosen) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checks-2.json", "checks-2.md", "checks.json", "checks.md"
    ]  # fmt: skip
    done = json.loads((tmp_path / "checks.json").read_text())["done"]
    assert done == ["correctness: quantize_rows"]
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "speed"])


@pytest.mark.slow
def test_what_was_found_before_a_kill_is_in_the_folder(tmp_path):
    command = [sys.executable, "tests/gpu.py", "targets", "--fake", "--rounds", "2", "--out"]
    process = subprocess.Popen(
        [*command, str(tmp_path)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    seen = [process.stdout.readline() for _ in range(4)]
    process.kill()  # only the parent
    seen += process.stdout.readlines()  # ends when the child has ended too
    assert process.wait() == -signal.SIGKILL
    assert len(seen) < 30, "it was finished before"
    data = json.loads((tmp_path / "targets.json").read_text())
    found = [f"     {f['part']}: {f['what']}: {f['value']}\n" for f in data["findings"]]
    assert found[: len(seen)] == seen
    assert len(found) <= len(seen) + 1
    assert not data["complete"]
    assert data["running"]["part"] in ("options", "ceilings", "targets")
    assert {p.name for p in tmp_path.iterdir() if not p.name.endswith(".partial")} == {
        "targets.json", "targets.md"
    }  # fmt: skip


FAILING = """
import os, subprocess, sys
from pathlib import Path
import torch
from gpu_run import Check, Results, Session, end_with_parent, run_checks
from dtq.bench.timer import clock_of

def broken(s):
    raise RuntimeError("it hurts")

def wrong(s):
    s.tell("a value", "wrong", False)

def hangs(s):
    started = subprocess.Popen(["sleep", "60"])
    Path(sys.argv[1]).with_name("pid").write_text(str(started.pid))
    started.wait()

checks = [
    Check("a", "broken", broken), Check("a", "wrong", wrong),
    Check("a", "hangs", hangs, limit=1),
    Check("a", "crashes", lambda s: os.abort()), Check("b", "is right", lambda s: None),
]
device = torch.device("cpu")
s = Session(device, clock_of(device), 2, True, Results(Path(sys.argv[1])))
sys.exit(run_checks(checks, s))
"""


def is_alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_checks_that_fail_hang_or_crash_do_not_stop_those_after_them(tmp_path, monkeypatch, capfd):
    script, path = tmp_path / "failing.py", tmp_path / "out" / "checks.json"
    script.write_text(FAILING)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    gpu_run.Results(path).save()
    assert gpu_run.supervise([sys.executable, str(script), str(path)], path) == 4
    data = json.loads(path.read_text())
    assert [(f["what"], f["good"]) for f in data["findings"]] == [
        ("broken", False), ("a value", False), ("hangs", False), ("crashes", False), ("is right", True)
    ]  # fmt: skip
    assert "it hurts" in data["findings"][0]["value"]
    assert data["findings"][2]["value"] == "stopped after 1 s"
    assert not is_alive(int((path.parent / "pid").read_text())), "what the check started goes on"
    assert data["findings"][3]["value"] == f"ended with signal {signal.SIGABRT.value}"
    assert data["complete"]
    assert path.with_suffix(".md").read_text().count("**FAIL**") == 4


def test_a_child_that_does_not_start_is_a_failure(tmp_path, capfd):
    path = tmp_path / "checks.json"
    gpu_run.Results(path).save()
    assert gpu_run.supervise([sys.executable, "-c", "1 / 0"], path) == 1
    assert "before its first check" in json.loads(path.read_text())["findings"][0]["value"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_the_script_and_the_benchmark_say_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err
    done = CliRunner().invoke(main, ["bench", "--device", "cuda"])
    assert done.exit_code != 0
    assert "no GPU that torch can use" in done.output + str(done.exception)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
def test_the_emulator_still_gives_its_results(tmp_path):
    library = golden.emulated(tmp_path)
    assert {name: library.digest(name) for name in library.kernels} == golden.EMULATOR


def test_a_wrong_bit_is_found():
    def almost(*args):
        codes, scale = torch.ops.dtq.quantize_rows(*args)
        codes[-1, -1] += 1
        return codes, scale

    class Ops:
        quantize_rows = staticmethod(almost)

    with pytest.raises(AssertionError, match=r"1 of .* differ, first at"):
        agreement.quantize_rows(Ops, "cpu", 0, 10**5)


def test_a_wrong_value_of_a_product_is_found():
    class Ops:
        def __getattr__(self, name):
            def almost(*args):
                y = getattr(torch.ops.dtq, name)(*args)
                y[-1, -1] = 1.1 * y[-1, -1] + 0.1
                return y

            return almost

    for case in (*products.CASES, *products.FP4):
        products.run(torch.ops.dtq, "cpu", case, (40, 72, 128))
        with pytest.raises(AssertionError, match=r"1 of 2880 differ, first at \[39, 71\]"):
            products.run(Ops(), "cpu", case, (40, 72, 128))
    for name in products.WEIGHT_FORMATS:
        products.weight_only(torch.ops.dtq, "cpu", name, (3, 72, 256))
        with pytest.raises(AssertionError, match="1 of 216 are too far away"):
            products.weight_only(Ops(), "cpu", name, (3, 72, 256))


def test_every_candidate_of_a_linear_does_the_same_work():
    rows = gpu_linears.compare_linears(20, 128, 64, 2, HERE)
    found = {row.name: row for row in rows}
    assert {"w8a8", "w4a8", "w8a8 product", "w4a8 product", "bf16", "_int_mm, bare"} <= set(found)
    assert set(found["bf16"].ratio) == {"w8a8", "w4a8", "w8a8 product", "w4a8 product"}
    assert found["w4a8"].bytes < found["w8a8"].bytes < found["bf16"].bytes
    for row in rows:
        assert row.error < (0.03 if row.name.startswith("w4a8") else 1e-3), row
        assert row.about, row


def test_fp4_is_timed_where_there_is_hardware_for_it(monkeypatch):
    monkeypatch.setattr(gpu_dispatch, "multiplies_fp4", lambda x, mx: True)
    rows = gpu_linears.compare_linears(20, 128, 64, 2, HERE)
    found = {row.name: row for row in rows}
    assert "nvfp4" in found["bf16"].ratio
    assert found["nvfp4"].bytes < found["w8a8"].bytes


def test_models_are_quantized_with_their_modulation():
    model, given, tokens = cases.flux(HERE, quick=True)
    calls = cases.calibration_calls(given)
    made = cases.quantized_model(model, "w4a8", calls, bench_gpu.MODULATION["w4a8"])
    kinds = {n: m.weight_format for n, m in made.named_modules() if hasattr(m, "weight_format")}
    assert kinds["transformer_blocks.0.attn.to_q"] == "int4-2l-g64"
    assert kinds["transformer_blocks.0.norm1.linear"] == bench_gpu.MODULATION["w4a8"]
    eight = cases.quantized_model(model, "w8a8", calls, bench_gpu.MODULATION["w8a8"])
    kept = dict(eight.named_modules())["transformer_blocks.0.norm1.linear"]
    assert type(kept) is torch.nn.Linear
    with torch.no_grad():
        got, want = made(**given)[0], model(**given)[0]
    assert (got - want).float().norm() < 0.5 * want.float().norm()
    assert tokens == 24


def test_a_suite_reports_every_comparison_and_keeps_its_rows(monkeypatch):
    monkeypatch.setattr(bench_gpu, "SHAPES", ((64, 32), (64, 33), (128, 16)))
    monkeypatch.setattr(bench_gpu, "TOKENS", (3, 4, 5))
    told = []
    result = bench_gpu.SUITES["gemm"](quick=True, rounds=2, progress=told.append, device=HERE)
    assert [(rows[0].case, rows[0].tokens) for rows in told] == [
        ("64 x 32", 3), ("64 x 32", 5), ("128 x 16", 3), ("128 x 16", 5)
    ]  # fmt: skip
    assert result.rows == [row for rows in told for row in rows]
    assert (result.suite, result.conditions["rounds"]) == ("gemm", 2)
    told.clear()
    result = bench_gpu.SUITES["e2e"](quick=True, rounds=2, progress=told.append, device=HERE)
    assert [rows[0].case for rows in told] == ["flux shape", "dit shape"]
    assert (result.suite, len(result.rows)) == ("e2e", 6)
    bounds = {"bf16": 1e-3, "w8a8": 3e-3, "w4a8": 0.06}
    assert all(row.error < bounds[row.name] for row in result.rows), result.rows


def test_operands_are_taken_in_turn():
    seen = []
    run = gpu_linears.round_robin([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        run()
    assert seen == [0, 1, 2, 0, 1, 2, 0]
