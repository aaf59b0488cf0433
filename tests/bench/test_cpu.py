# SPDX-License-Identifier: Apache-2.0
"""``dtq bench``: ratios of interleaved runs, and a verdict that never recommends what is slower."""

from __future__ import annotations

import json
import sys

import pytest
import quanto
import tiny
import torch
from click.testing import CliRunner

from dtq.bench import cases, compare
from dtq.bench import cpu as bench
from dtq.bench.compare import BenchRow, Candidate
from dtq.bench.other_libraries import size_of
from dtq.cli import main
from dtq.kernels.compile import cpu
from dtq.pipelines.loading import dummy_inputs


def rows(w4a8, bf16, fp32):
    """Rows of one size with these times."""
    return [
        BenchRow("k", 256, "w4a8", w4a8, 30),
        BenchRow("k", 256, "bf16", bf16, 120, {"w4a8": (bf16 / w4a8,) * 3}),
        BenchRow("k", 256, "fp32", fp32, 240, {"w4a8": (fp32 / w4a8,) * 3}),
    ]


def test_the_verdict_compares_with_the_faster_float():
    verdict = compare.verdict(rows(1.0, 2.6, 5.0))
    assert verdict == "w4a8 is 2.6x faster than bf16 here and 4.0x smaller than bf16"
    assert "1.5x faster than fp32" in compare.verdict(rows(2.0, 9.0, 3.0))


def test_what_is_slower_is_not_recommended():
    verdict = compare.verdict(rows(3.0, 2.0, 4.0))
    assert verdict.startswith("nothing of dtq is faster than bf16 here; w4a8 takes 1.5x as long")
    assert "faster than bf16 here and" not in verdict


def test_a_comparison_gives_ratios_of_the_same_round():
    x = torch.randn(64, 64)

    def times(n):
        return lambda: [x @ x for _ in range(n)]

    candidates = [Candidate("w8a8", times(20), 1), Candidate("twice", times(40), 2)]
    once, twice = compare.compare("case", 64, candidates, 9)
    assert once.ratio == {}
    low, middle, high = twice.ratio["w8a8"]
    assert low <= middle <= high
    assert 1.2 < middle < 3.5


def test_the_compared_layers_do_the_same_work():
    layers = bench._layers(128, 48)
    x = torch.randn(5, 128).bfloat16()
    assert layers["w8a8"].transform().block == 64
    want = layers["fp32"](x.float())
    for name, error in (("w8a8", 0.03), ("w4a8", 0.2)):
        y = layers[name](x)
        assert y.dtype == torch.bfloat16
        assert (y.float() - want).norm() < error * want.norm()
    assert size_of("w4a8", layers["w4a8"]) < 0.4 * size_of("bf16", layers["bf16"])


@pytest.mark.parametrize("case", ["dit", "flux", "pixart"])
def test_the_compared_models_compute_the_same(case):
    model, inputs = {
        "dit": lambda: cases.dit_like(2, 16, heads=2, head_width=64),
        "flux": lambda: cases.flux_like(1, 1, heads=2, text_width=128, image=16, text=8),
        "pixart": lambda: (tiny.pixart(), dummy_inputs(tiny.pixart(), 2, 500.0, 1)),
    }[case]()
    outputs = {}
    for step in bench._steps(model, inputs):
        with torch.no_grad():
            outputs[step.name] = step.run()[0].float()
    for name, error in (("w8a8", 0.05), ("w4a8", 0.3), ("bf16", 0.03)):
        assert (outputs[name] - outputs["fp32"]).norm() < error * outputs["fp32"].norm(), name


@pytest.mark.slow
def test_the_command_writes_every_metric(tmp_path, monkeypatch):
    quanto.in_python()
    monkeypatch.setattr(bench, "SHAPES", ((64, 64), (128, 64)))
    monkeypatch.setattr(bench, "TOKENS", (1, 20))
    file = tmp_path / "bench.json"
    before = torch.get_num_threads()
    plot = tmp_path / "bench.svg"
    command = ["bench", "--rounds", "2", "-o", str(file), "--plot", str(plot)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output + str(done.exception)
    assert torch.get_num_threads() == before
    data = json.loads(file.read_text())
    assert {row["name"] for row in data["rows"]} >= {"w8a8", "w4a8", "fp32", "bf16"}
    assert data["conditions"]["threads"] == 1
    assert data["verdict"] in done.output
    assert plot.read_text().startswith("<svg ")
    shares = [row["share"] for row in data["rows"] if row["name"] == "w4a8"]
    known = cpu.peak() > 0
    assert (data["conditions"]["peak"] != "unknown") == known
    assert all((0 < share < 1.5) if known else share is None for share in shares)


def test_json_is_only_json(tmp_path, monkeypatch):
    result = bench.Result("gemm", {"threads": 1}, rows(1.0, 2.6, 5.0))
    monkeypatch.setitem(bench.SUITES, "gemm", lambda **options: result)
    file = tmp_path / "bench.json"
    done = CliRunner().invoke(main, ["bench", "--device", "cpu", "--json", "-o", str(file)])
    assert (
        json.loads(done.stdout)
        == json.loads(file.read_text())
        == json.loads(json.dumps(result.to_json()))
    )


def test_a_chart_without_matplotlib_is_refused_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench, "compare", lambda *_: pytest.fail("timed"))
    done = CliRunner().invoke(main, ["bench", "--plot", str(tmp_path / "bench.svg")])
    assert "pip install matplotlib" in done.output


def test_a_missing_compiler_is_logged(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    bench._inductor_compiles.cache_clear()
    assert not bench._inductor_compiles()
    bench._inductor_compiles.cache_clear()
    assert "no row of oneDNN with compiled quantizing" in caplog.text
