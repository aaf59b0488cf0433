# SPDX-License-Identifier: Apache-2.0
"""A killed run over a whole pipeline goes on in the text encoder, and ends in the same bytes."""

from __future__ import annotations

import kill  # scripts/kill.py
import pipelines
import pytest
from click.testing import CliRunner

from dtq.cli import main
from dtq.pipelines.recorded_sampling import RecordedSampling
from dtq.stages import solve

OPTIONS = ["--recipe=rtn-w4a8", "--samples=2", "--steps=1", "--set=calibration.batch_size=1"]
OPTIONS += ["--arg=height=16", "--arg=width=16", "--arg=max_sequence_length=16"]
OPTIONS += ["--arg=use_resolution_binning=false", "--set=allocate.num_inputs=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """PixArt with T5."""
    where = tmp_path_factory.mktemp("resume") / "float"
    pipelines.pixart().save_pretrained(where)
    return where


def run(folder, out, *more, code: int | None = 0):
    command = ["quantize", str(folder), *OPTIONS, *more, "-o", str(out)]
    result = CliRunner().invoke(main, command)
    assert code is None or result.exit_code == code, result.output + str(result.exception)
    return result


def test_a_run_that_dies_in_the_text_encoder_is_continued_there(folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "whole", "--text-encoder=w8a8")
    before, solved = solve.solve_input_group, []

    def crash(layers, *others):
        if len([name for name in solved if name.startswith("encoder.")]) == 2:
            raise MemoryError("a crash")
        solved.append(layers[0].name)
        return before(layers, *others)

    monkeypatch.setattr(solve, "solve_input_group", crash)
    run(folder, tmp_path / "q", "--text-encoder=w8a8", code=None)
    work = tmp_path / ".q.work"
    assert len(list((work / "text_encoder" / "quantize").iterdir())) == 2
    first, solved[:] = list(solved), []
    told = run(folder, tmp_path / "q", "--text-encoder=w4a16", code=1).stderr
    assert "- text encoders.text_encoder." in told
    run(folder, tmp_path / "q", "--text-encoder=w8a8")
    assert solved
    assert all(name.startswith("encoder.") for name in solved)
    assert not {*solved} & {*first}
    assert kill.digest(tmp_path / "q") == kill.digest(tmp_path / "whole")


def test_a_run_that_dies_while_a_budget_is_measured_is_continued(folder, tmp_path, monkeypatch):
    told = run(folder, tmp_path / "q", "--budget=1kB", code=1).stderr
    least = int(told.split("take at least ")[1].split()[0])
    budget = [f"--budget={int(1.1 * least)}b", "--no-sanity-check"]
    measured, again = [], RecordedSampling.again
    monkeypatch.setattr(RecordedSampling, "again", lambda self: measured.append(1) or again(self))
    run(folder, tmp_path / "whole", *budget)
    count = len(measured)
    assert count > 4

    def crash(self):
        if len(measured) == count + 3:
            raise MemoryError("a crash")
        measured.append(1)
        return again(self)

    monkeypatch.setattr(RecordedSampling, "again", crash)
    run(folder, tmp_path / "q", *budget, code=None)
    assert len(measured) == count + 3
    told = run(folder, tmp_path / "q", f"--budget={2 * least}b", code=1).stderr
    assert f"- budget: {int(1.1 * least)} before, {2 * least} now" in told
    monkeypatch.setattr(RecordedSampling, "again", lambda self: measured.append(1) or again(self))
    run(folder, tmp_path / "q", *budget)
    assert len(measured) == 2 * count  # what was measured was not measured again
    assert kill.digest(tmp_path / "q") == kill.digest(tmp_path / "whole")
