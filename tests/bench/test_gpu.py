# SPDX-License-Identifier: Apache-2.0
"""The script that a machine with a GPU runs, run without one; its checks as tests where there is one."""

from __future__ import annotations

import json
import shutil

import agreement
import golden
import gpu
import pytest
import torch
from click.testing import CliRunner

from dtq.bench import cases, gpu_linears
from dtq.bench import gpu as bench_gpu
from dtq.cli import main
from dtq.kernels import CUDA, gpu_dispatch

HERE = torch.device("cpu")


@pytest.fixture
def session(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return gpu.Session(torch.device("cuda"), gpu.clock_of(torch.device("cuda")), 3, False, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("check", agreement.CHECKS, ids=lambda c: c.__name__)
def test_the_gpu_gives_the_bits_of_the_reference(session, check, seed):
    check(torch.ops.dtq, session.device, seed, 2**26)


@pytest.mark.gpu
@pytest.mark.parametrize("check", gpu.ROBUST, ids=lambda c: c.__name__)
def test_the_list_of_what_breaks_kernels(session, check):
    check(session)


@pytest.mark.gpu
def test_the_library_is_in_use(session):
    assert CUDA.load(), CUDA.describe()


@pytest.mark.slow
def test_the_script_runs_without_a_gpu(tmp_path, capsys):
    assert gpu.main(["--fake", "--rounds", "2", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert {f["part"] for f in data["findings"]} == {p.__name__ for p in gpu.PARTS}
    told = " ".join(f["what"] for f in data["findings"])
    assert all(target.name in told for target in gpu.TARGETS)
    assert {"bf16", "w8a8", "w4a8"} <= {row["name"] for row in data["rows"]}
    assert "## targets" in (tmp_path / "gpu.md").read_text()


def test_a_failure_is_in_the_report_and_the_rest_runs(tmp_path, monkeypatch):
    def broken(s):
        raise RuntimeError("it hurts")

    def wrong(s):
        s.tell("this", "wrong", False)

    monkeypatch.setattr(gpu, "PARTS", (broken, wrong))
    assert gpu.main(["--fake", "--out", str(tmp_path)]) == 1
    findings = json.loads((tmp_path / "gpu.json").read_text())["findings"]
    assert [f["good"] for f in findings] == [False, False]
    assert "it hurts" in findings[0]["value"]
    assert (tmp_path / "gpu.md").read_text().count("**FAIL**") == 2


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
    assert {name: golden.digest(library, name) for name in golden.CASES} == golden.EMULATOR


def test_a_wrong_bit_is_found():
    def almost(*args):
        codes, scale = torch.ops.dtq.quantize_rows(*args)
        codes[-1, -1] += 1
        return codes, scale

    class Ops:
        quantize_rows = staticmethod(almost)

    with pytest.raises(AssertionError, match=r"1 of .* differ, first at"):
        agreement.quantize_rows(Ops, "cpu", 0, 10**5)


def test_every_candidate_of_a_linear_does_the_same_work():
    rows = gpu_linears.compare_linears(20, 128, 64, 2, HERE)
    found = {row.name: row for row in rows}
    assert {"w8a8", "w4a8", "w8a8 product", "w4a8 product", "bf16", "_int_mm, bare"} <= set(found)
    assert set(found["bf16"].ratio) == {"w8a8", "w4a8", "w8a8 product", "w4a8 product"}
    assert found["w4a8"].bytes < found["w8a8"].bytes < found["bf16"].bytes


def test_fp4_is_timed_where_there_is_hardware_for_it(monkeypatch):
    monkeypatch.setattr(gpu_dispatch, "multiplies_fp4", lambda x, mx: True)
    rows = gpu_linears.compare_linears(20, 128, 64, 2, HERE)
    found = {row.name: row for row in rows}
    assert "nvfp4" in found["bf16"].ratio
    assert found["nvfp4"].bytes < found["w8a8"].bytes


def test_models_are_quantized_with_their_modulation():
    model, given, tokens = cases.flux(HERE, quick=True)
    made = cases.quantized_model(model, "w4a8", bench_gpu.MODULATION["w4a8"])
    kinds = {n: m.weight_format for n, m in made.named_modules() if hasattr(m, "weight_format")}
    assert kinds["transformer_blocks.0.attn.to_q"] == "int4-2l-g64"
    assert kinds["transformer_blocks.0.norm1.linear"] == bench_gpu.MODULATION["w4a8"]
    eight = cases.quantized_model(model, "w8a8", bench_gpu.MODULATION["w8a8"])
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


def test_operands_are_taken_in_turn():
    seen = []
    run = gpu_linears.round_robin([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        run()
    assert seen == [0, 1, 2, 0, 1, 2, 0]
