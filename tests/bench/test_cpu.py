# SPDX-License-Identifier: Apache-2.0
"""``dtq bench``: ratios of interleaved runs, and a verdict that never recommends what is slower."""

from __future__ import annotations

import json
import logging
import sys
from functools import partial

import profile_step
import pytest
import quanto
import tiny
import torch
from click.testing import CliRunner

from dtq.bench import cases, compare, layers
from dtq.bench import cpu as bench
from dtq.bench.compare import BenchRow, Candidate
from dtq.cli import main
from dtq.kernels.compile import cpu
from dtq.pipelines.tracing import dummy_inputs


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


def of(rows):
    return {row.name: row for row in rows}


@pytest.fixture
def eager(monkeypatch):
    """No compiled rows."""
    monkeypatch.setattr(bench, "_inductor_compiles", lambda: False)


def test_the_compared_layers_do_the_same_work(eager):
    quanto.in_python()
    layers = bench._layers(128, 48)
    assert layers["w8a8"].transform().block == 64
    x = torch.randn(20, 128).bfloat16()
    found = of(bench.compare_linears(layers, x, 2))
    assert layers["w8a8"](x).dtype == torch.bfloat16
    for row in found.values():
        assert row.error < (0.03 if "4" in row.name.replace("bf16", "") else 1e-3), row
        assert any(char.isdigit() for char in row.about), row
    assert found["w4a8"].bytes < 0.4 * found["bf16"].bytes
    assert found["fp32"].error == 0 < found["bf16"].error < found["w8a8"].error


def small(name, blocks=2):
    """A model of a benchmark with little work."""
    model, inputs = {
        "dit": lambda: cases.dit_like(blocks, 16, heads=2, head_width=64),
        "flux": lambda: cases.flux_like(1, 1, heads=2, text_width=128, image=16, text=8),
        "pixart": lambda: (tiny.pixart(), dummy_inputs(tiny.pixart(), 2, 500.0, 1)),
    }[name]()
    return cases.Case(name, model, inputs, 16)


ERRORS = {
    "w8a8": 3e-3, "w8a8 attention": 3e-3, "w8a8 attention embed": 3e-3, "w4a8": 0.06,
    "w4a8 attention": 0.06, "bf16": 1e-3, "fp32": 1e-9
}  # fmt: skip
"""Largest errors of the rows of a model; a row that computes something else has about 1 or 2."""


@pytest.mark.parametrize("name", ["dit", "flux", "pixart"])
def test_the_compared_models_compute_the_same(name, eager, monkeypatch):
    monkeypatch.setattr(bench.openvino, "MODES", {})
    rows = bench.compare_models(small(name), 2)
    assert [row.name for row in rows] == list(ERRORS)
    for row in rows:
        assert row.error < ERRORS[row.name], row
        assert row.about.startswith(("dtq ", "torch "))
        assert row.seconds > 0


def test_layers_that_rotate_only_their_inputs_have_errors_that_show(eager, monkeypatch):
    monkeypatch.setattr(bench.openvino, "MODES", {})
    monkeypatch.setattr(layers.OnlineTransform, "w", lambda self, w: w)
    rows = of(bench.compare_linears(bench._layers(128, 48), torch.randn(20, 128).bfloat16(), 2))
    assert rows["w8a8"].error > 0.5
    assert rows["bf16"].error < 1e-3


@pytest.mark.slow
def test_compiled_steps_compute_the_same(monkeypatch):
    if not bench._inductor_compiles():
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(bench.openvino, "MODES", {})
    both, names = bench._eager_and_compiled, ("w8a8 attention", "bf16")
    monkeypatch.setattr(  # each compilation takes 8 s
        bench, "_eager_and_compiled",
        lambda name, *given, **options: both(name, *given, **options) if name in names else [],
    )  # fmt: skip
    rows = of(bench.compare_models(small("dit", blocks=1), 2))
    for name in names:
        assert rows[f"{name} compiled"].error < ERRORS[name], rows


def test_openvino_computes_the_same_in_every_mode(capsys):
    for module in bench.openvino.PACKAGES:
        pytest.importorskip(module)
    case = small("dit")
    with torch.no_grad():
        reference = case.model(**case.inputs)[0]
    calls = cases.calibration_calls(case.inputs)
    found = bench.openvino.models(case.model, case.inputs, calls)
    rows = compare.compare(case.name, 64, [*found], 2, reference=reference)
    assert [row.name for row in rows] == list(bench.openvino.MODES)
    for row in rows:
        assert 1e-6 < row.error < (0.1 if "int4" in row.name else 0.05), row
        assert "openvino 20" in row.about
        assert "nncf" in row.about
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "largest"), [("Q8_0", 1e-4), ("Q4_0", 0.02)])
def test_ggml_computes_the_same(name, largest):
    pytest.importorskip("ggml")
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(128, 48), torch.randn(20, 128)
    made = {c.name: c for c in bench.ggml.linears(layer, x)}[f"ggml {name}"]
    with torch.no_grad():
        (row,) = compare.compare("128 x 48", 20, [made], 2, reference=layer(x))
    assert 1e-6 < row.error < largest
    assert row.about.startswith("ggml-python 0.")


def test_onednn_is_compiled_for_every_size(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    limit = torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
    for columns in (64, 128):
        full, x = torch.nn.Linear(columns, 64), torch.randn(3, columns).bfloat16()
        *_, compiled = bench._onednn(full, x)
        with torch.no_grad(), limit:
            torch.testing.assert_close(
                compiled.run().float(), full(x.float()), atol=0.05, rtol=0.05
            )


def test_libraries_that_are_missing_have_no_rows(monkeypatch):
    for module in (bench.openvino, bench.ggml):
        monkeypatch.setattr(module, "installed", lambda name: False)
    case = small("dit")
    assert [*bench.openvino.models(case.model, case.inputs, [])] == []
    assert [*bench.ggml.linears(torch.nn.Linear(64, 64), torch.randn(2, 64))] == []


def test_calibration_does_not_see_the_input_of_the_comparison():
    inputs = cases.dit_like(1, 8, heads=1, head_width=64)[1]
    calls = cases.calibration_calls(inputs, 4)
    assert [int(call["timestep"][0]) for call in calls] == [125, 375, 625, 875]
    assert len({float(call["hidden_states"].sum()) for call in [inputs, *calls]}) == 5
    assert all(torch.equal(call["class_labels"], inputs["class_labels"]) for call in calls)


def test_the_verdict_on_peers_names_the_fastest_of_each_side():
    made = [
        BenchRow("DiT", 256, "w8a8", 1.4, 1, {"openvino int8": (1.3, 1.38, 1.5)}, 3e-4),
        BenchRow("DiT", 256, "w4a8", 1.5, 1, {"openvino int8": (1.4, 1.45, 1.6)}, 1e-2),
        BenchRow("DiT", 256, "openvino bf16", 1.9, None, {}, 1e-2),
        BenchRow("DiT", 256, "openvino int8", 1.0, None, {}, 6e-2),
        BenchRow("FLUX", 256, "w4a8", 1.5, 1, {}, 1e-2),
    ]
    told = compare.peer_verdicts(made)
    assert told == [
        "DiT: w8a8 takes 1.38x the time of openvino int8, errors 3.0e-04 and 6.0e-02"
    ]  # fmt: skip
    assert compare.Result("e2e", {}, made).to_json()["peers"] == told


def test_a_chart_has_every_row_with_its_error():
    made = rows(1.0, 2.0, 5.0)
    made[0].error, made[1].error = 1e-2, 4e-6
    result = compare.Result("gemm", {}, made)
    assert compare.groups(result, "w4a8") == {
        "M 256": {
            "w4a8": (1.0, pytest.approx(1e-2)),
            "bf16": (pytest.approx(2.0), pytest.approx(4e-6)),
            "fp32": (pytest.approx(5.0), None),
        }
    }


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
    assert all(row["error"] is not None and row["about"] for row in data["rows"])
    assert "error" in done.output
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
    caplog.set_level(
        logging.WARNING, bench._log.name
    )  # other libraries change that of the handlers
    monkeypatch.setenv("CXX", "no-such-compiler")
    bench._inductor_compiles.cache_clear()
    assert not bench._inductor_compiles()
    bench._inductor_compiles.cache_clear()
    assert "so no compiled rows" in caplog.text


def test_ops_of_a_step_are_told_apart():
    x, image = [2, 256, 1152], [2, 1, 1152]
    expected = [
        ("dtq::w8a8_linear", [[512, 1152]], "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [], "attention"),
        ("dtq::quantize_rows", [[512, 1152]], "quantize"),
        ("aten::mul", [x, image], "modulation of the norm"),
        ("aten::mul", [image, x], "gate and residual"),
        ("aten::add", [x, x, []], "gate and residual"),
        ("aten::add", [image, [], []], "views, copies and other ops"),
        ("aten::view", [x], "views, copies and other ops"),
    ]
    assert [profile_step.part(op, shapes) for op, shapes, _ in expected] == [
        name for _, _, name in expected
    ]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "bfloat16"])
def test_the_profile_adds_up(recipe, monkeypatch):
    case = small("dit")
    monkeypatch.setattr(profile_step, "dit_case", lambda blocks, tokens: case)
    options = ["--recipe", recipe, "--steps", "3", "--tokens", "64", "--blocks", "2"]
    done = CliRunner().invoke(profile_step.main, options, catch_exceptions=False)
    shares = [float(line.split("%")[0]) for line in done.output.splitlines() if "% " in line]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert "attention" in done.output
    assert "products" in done.output
    assert (profile_step.FLOAT_LINEARS in done.output) == (recipe != "bfloat16")
