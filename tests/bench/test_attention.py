# SPDX-License-Identifier: Apache-2.0
"""``dtq bench --suite attention``: the candidates compute the same, and every row has its error."""

from __future__ import annotations

import json

from click.testing import CliRunner

from dtq.bench import attention as bench
from dtq.cli import main


def test_every_candidate_computes_attention():
    rows = bench.compare_attention(bench.Shape("small", 1, 2, 40, 70, 24), 3)
    errors = {row.name: row.error for row in rows}
    assert errors["fp32"] < 1e-12
    assert 1e-7 < errors["bf16"] < 1e-4
    assert errors["bf16"] < errors["int8"] < 5e-4
    assert 1e-6 < errors["int8 of fp32"] <= errors["int8"] * 1.2
    assert all((row.ratio == {}) == (row.name == bench.REFERENCE) for row in rows)
    assert all(row.seconds > 0 for row in rows)


def test_the_command_prints_and_writes_the_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "SHAPES", (bench.Shape("small", 1, 2, 40, 70, 24),))
    file = tmp_path / "out.json"
    command = ["bench", "--suite", "attention", "--device", "cpu", "--rounds", "2"]
    done = CliRunner().invoke(main, [*command, "-o", str(file)])
    assert done.exit_code == 0, done.output
    assert "int8 of fp32" in done.output
    saved = json.loads(file.read_text())
    assert [row["name"] for row in saved["rows"]] == ["int8", "int8 of fp32", "bf16", "fp32"]
    assert saved["conditions"]["rounds"] == 2
    done = CliRunner().invoke(main, [*command, "--json"])
    assert json.loads(done.stdout)["suite"] == "attention"
    done = CliRunner().invoke(main, ["bench", "--suite", "attention", "--device", "cuda"])
    assert done.exit_code != 0
    assert "CPU" in done.output
    done = CliRunner().invoke(main, [*command, "--case", "large"])
    assert done.exit_code != 0
    assert "no case whose name contains 'large'" in done.output
