# SPDX-License-Identifier: Apache-2.0
"""A run that was killed goes on where it stopped, and ends in the same bytes; one run a folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import kill  # scripts/kill.py
import pytest
import tiny
import torch
from builders import quantized
from click.testing import CliRunner
from conftest import hasty
from safetensors.torch import load_file

from dtq.calibrate import distributed
from dtq.cli import main
from dtq.errors import CheckpointError, InputError
from dtq.io import checksum
from dtq.io.run_lock import locked
from dtq.pipelines.loading import load_transformer
from dtq.recipe import Recipe
from dtq.runs.tasks import TaskStore
from dtq.stages import solve

FEW = [
    "--samples", "4", "--steps", "2", "--set", "calibration.batch_size=1",
    "--set", "transform=hadamard", "--set", "transform_candidates=[none]",
]  # fmt: skip


def run(*arguments, code: int | None = 0, command: str = "quantize"):
    result = CliRunner().invoke(main, [command, *map(str, arguments)])
    assert code is None or result.exit_code == code, result.output + str(result.exception)
    return result


@pytest.fixture
def dies(monkeypatch):
    """Make solving stop, as a crash would, after so many inputs."""
    before = solve.solve_input_group

    def after(count: int) -> None:
        left = [count]

        def crash(*arguments):
            if not left[0]:
                raise MemoryError("a crash")
            left[0] -= 1
            return before(*arguments)

        monkeypatch.setattr(solve, "solve_input_group", crash)

    yield after
    monkeypatch.setattr(solve, "solve_input_group", before)


def test_killed_runs_end_in_the_same_bytes(float_folder, tmp_path):
    count = kill.kill_and_continue([str(float_folder), *FEW], 3, folder=tmp_path)
    assert count.kills == 3
    assert count.finished >= 1


def test_what_is_finished_is_not_done_again(float_folder, tmp_path, dies, caplog):
    out = tmp_path / "q"
    run(float_folder, *FEW, "-o", tmp_path / "whole")
    dies(3)
    run(float_folder, *FEW, "-o", out, code=None)
    assert not out.exists()
    assert len(list((tmp_path / ".q.work" / "quantize").iterdir())) == 3
    assert not (tmp_path / ".q.lock").exists()
    dies(1)  # and once more
    run(float_folder, *FEW, "-o", out, code=None)
    dies(1000)
    run(float_folder, *FEW, "-o", out)
    assert caplog.text.count("continuing the interrupted run") == 2
    assert kill.digest(out) == kill.digest(tmp_path / "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"q", "whole"}


def dies_after(monkeypatch, count: int) -> list[range]:
    """Calibration crashes when that many parts were seen; the parts, to be emptied to go on."""
    see, parts = distributed.collect_shard, []

    def crash(*arguments, **options):
        if len(parts) == count:
            raise MemoryError("a crash")
        parts.append(arguments[-1])
        return see(*arguments, **options)

    monkeypatch.setattr(distributed, "collect_shard", crash)
    return parts


def test_the_calibration_is_continued_part_by_part(float_folder, tmp_path, monkeypatch):
    run(float_folder, *FEW, "-o", tmp_path / "whole")
    parts = dies_after(monkeypatch, 2)
    run(float_folder, *FEW, "-o", tmp_path / "q", code=None)
    assert parts == [range(0, 1), range(1, 2)]
    del parts[:]
    run(float_folder, *FEW, "-o", tmp_path / "q", code=None)
    assert parts == [range(2, 3), range(3, 4)]
    monkeypatch.undo()
    run(float_folder, *FEW, "-o", tmp_path / "q", code=None)
    assert kill.digest(tmp_path / "q") == kill.digest(tmp_path / "whole")


def test_statistics_are_continued_part_by_part(float_folder, tmp_path, monkeypatch):
    def calibrate(name: str, *more: str, code: int | None = 0):
        out = tmp_path / f"{name}.safetensors"
        return run(float_folder, *FEW, *more, "-o", out, code=code, command="calibrate")

    calibrate("whole")
    parts = dies_after(monkeypatch, 2)
    calibrate("killed", code=None)
    assert parts == [range(0, 1), range(1, 2)]
    assert not (tmp_path / "killed.safetensors").exists()
    told = calibrate("killed", "--seed", "5", code=1).stderr
    assert "- recipe.calibration.seed: 0 before, 5 now" in told
    del parts[:]
    calibrate("killed")
    assert parts == [range(2, 3), range(3, 4)]
    want = (tmp_path / "whole.safetensors").read_bytes()
    assert (tmp_path / "killed.safetensors").read_bytes() == want
    del parts[:]
    calibrate("killed", "--seed", "5", code=None)  # over the file that is there
    assert (tmp_path / "killed.safetensors").read_bytes() == want
    monkeypatch.undo()
    calibrate("killed", "--fresh")
    assert (tmp_path / "killed.safetensors").read_bytes() == want
    assert {p.name for p in tmp_path.iterdir()} == {"whole.safetensors", "killed.safetensors"}


def test_statistics_are_of_the_entries_whatever_the_recipe_needs(tmp_path, monkeypatch):
    model, entries = tmp_path / "float", tmp_path / "set.txt"
    tiny.pipeline().save_pretrained(model)
    arguments = [model, "--recipe", "w4a16", "--set", "transform=none", "--set", "solver=rtn"]
    arguments += ["--set", "correct_bias=false", *FEW[:6], "--calibration-set", entries]
    assert not Recipe.load("w4a16", transform="none", solver="rtn", correct_bias=False).needs()
    out = tmp_path / "s.safetensors"
    dies_after(monkeypatch, 1)
    entries.write_text("1\n2\n3\n4\n")
    run(*arguments, "-o", out, code=None, command="calibrate")
    entries.write_text("1\n2\n3\n5\n")
    told = run(*arguments, "-o", out, code=1, command="calibrate").stderr
    assert "- calibration prompts: " in told


def test_a_folder_is_no_place_for_statistics(float_folder, tmp_path):
    told = run(float_folder, *FEW, "-o", tmp_path, code=1, command="calibrate").stderr
    assert f"{tmp_path} is a folder; give a file" in told


CHANGES = {
    "recipe.solver": ["--set", "solver=search"],
    "recipe.calibration.seed": ["--seed", "5"],
    "exclude": ["--exclude", "transformer_blocks.0"],
    "dtype": ["--dtype", "bf16"],
}


@pytest.mark.parametrize("key", CHANGES)
def test_other_inputs_do_not_continue_it(float_folder, tmp_path, dies, key):
    out = tmp_path / "q"
    dies(1)
    run(float_folder, *FEW, "-o", out, code=None)
    told = run(float_folder, *FEW, *CHANGES[key], "-o", out, code=1).stderr
    assert f"- {key}" in told
    assert "--fresh" in told
    assert len(list((tmp_path / ".q.work" / "quantize").iterdir())) == 1  # still there


def test_another_model_does_not_continue_it_and_fresh_starts_over(tmp_path, dies):
    model, out = tmp_path / "float", tmp_path / "q"
    tiny.pipeline().save_pretrained(model)
    dies(1)
    run(model, *FEW, "-o", out, code=None)
    tiny.pipeline(seed=1).save_pretrained(model)
    told = run(model, *FEW, "-o", out, code=1).stderr
    assert "- model: " in told
    dies(1000)
    run(model, *FEW, "-o", tmp_path / "alone")
    run(model, *FEW, "--fresh", "-o", out)
    assert kill.digest(out) == kill.digest(tmp_path / "alone")


def test_units_without_a_manifest_are_not_trusted(float_folder, tmp_path, dies):
    other = [*FEW, "--seed", "5"]
    dies(1)
    run(float_folder, *FEW, "-o", tmp_path / "q", code=None)
    (tmp_path / ".q.work" / "manifest.json").unlink()  # killed as it removed the folder
    dies(1000)
    run(float_folder, *other, "-o", tmp_path / "q")
    run(float_folder, *other, "-o", tmp_path / "alone")
    assert kill.digest(tmp_path / "q") == kill.digest(tmp_path / "alone")


def test_a_continued_run_takes_over_the_number_of_threads(float_folder, tmp_path, dies):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        dies(1)
        run(float_folder, *FEW, "-o", tmp_path / "q", code=None)
        torch.set_num_threads(2)
        run(float_folder, *FEW, "-o", tmp_path / "q", code=None)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_run_killed_right_before_its_end_is_known_to_be_finished(float_folder, tmp_path):
    out, work = tmp_path / "q", tmp_path / ".q.work"
    run(float_folder, "--recipe", "rtn-w4a8", *FEW[:6], "-o", out)
    work.mkdir()
    digest = checksum.folder_digest(out)
    (work / "finished.json").write_text(json.dumps({"output": digest}))
    told = run(float_folder, "--recipe", "rtn-w4a8", *FEW[:6], "-o", out).stdout
    assert "has finished it" in told
    assert [p.name for p in tmp_path.iterdir()] == ["q"]
    told = run(float_folder, "--recipe", "rtn-w4a8", *FEW[:6], "-o", out, code=1).stderr
    assert "not empty" in told


def test_what_a_killed_writer_left_is_cleared(float_folder, tmp_path):
    out = tmp_path / "q"
    (tmp_path / ".q.abc.partial").mkdir()
    (tmp_path / ".q.abc.partial" / "half").write_text("x")
    (tmp_path / ".q.abc.old").mkdir()  # --overwrite was killed between its two renames
    (tmp_path / ".q.abc.old" / "mine").write_text("x")
    told = run(float_folder, "--recipe", "rtn-w4a8", *FEW[:6], "-o", out, code=1).stderr
    assert "not empty" in told
    assert (out / "mine").read_text() == "x"
    run(float_folder, "--recipe", "rtn-w4a8", *FEW[:6], "--overwrite", "-o", out)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_a_living_run_keeps_others_out(float_folder, tmp_path):
    out, lock = tmp_path / "q", tmp_path / ".q.lock"
    with locked(lock):
        told = run(float_folder, *FEW, "-o", out, code=1).stderr
        assert f"process {os.getpid()} on " in told
        assert lock.read_text().startswith(f"{os.getpid()}\n")
    assert not lock.exists()


def test_a_dead_run_does_not(tmp_path, caplog):
    lock = tmp_path / "lock"
    code = (
        "import os, signal, sys; from pathlib import Path; from dtq.io.run_lock import locked\n"
        "with locked(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, lock]).returncode == -signal.SIGKILL
    pid, host, started, *_ = lock.read_text().splitlines()
    with locked(lock):
        assert "its owner is dead, the lock is taken over" in caplog.text
    lock.write_text(f"{os.getpid()}\n{host}\n{started}\n")  # its number was given again
    with locked(lock):
        pass
    lock.write_text(f"{pid}\nelsewhere\n{started}\n")
    with pytest.raises(InputError, match=f"process {pid} on elsewhere"), locked(lock):
        pass
    lock.write_text("")
    with pytest.raises(InputError, match="another run is writing here"), locked(lock):
        pass


def _lock_often(lock: Path, inside: Path, count: int) -> int:
    held = 0
    for _ in range(count):
        with suppress(InputError), locked(lock):
            inside.touch(exist_ok=False)  # raises where another process is inside
            inside.unlink()
            held += 1
    return held


def test_the_lock_is_held_by_one_process_at_a_time(tmp_path):
    arguments = [(tmp_path / "lock", tmp_path / "inside", 100)] * 4
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert sum(pool.starmap(_lock_often, arguments)) > 0
    assert list(tmp_path.iterdir()) == []


def test_units_are_the_same_in_memory_and_in_a_folder(tmp_path):
    states = []
    for work in (TaskStore(), TaskStore(tmp_path)):
        source = load_transformer(tiny.pipeline())
        recipe = hasty("w4a8", allocate={"budget": 5, "formats": ["int4-2l-g64", "int8-row"]})
        quantized(source, recipe, progress=False, tasks=work)
        states.append(source.model.state_dict())
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert {p.name for p in tmp_path.iterdir()} >= {
        "statistics",
        "quantize",
        "int8-row",
        "allocate",
    }


def test_a_damaged_unit_is_named(tmp_path):
    work = TaskStore(tmp_path)
    work.save("a/b.c", {"x": torch.ones(3)}, {"y": 0.1})
    assert "a/b.c" in work
    tensors, data = work.load("a/b.c")
    assert data == {"y": 0.1}
    assert torch.equal(tensors["x"], torch.ones(3))
    assert list(load_file(tmp_path / "a" / "b.c.safetensors")) == ["x"]
    (tmp_path / "a" / "b.c.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"b\.c\.safetensors: damaged"):
        work.load("a/b.c")
