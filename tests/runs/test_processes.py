# SPDX-License-Identifier: Apache-2.0
"""Several processes make the bytes that one makes; when one dies the others say so, and stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import kill  # scripts/kill.py
import pipelines
import pytest
import quanto

from dtq.bench.other_libraries import installed
from dtq.calibrate import store
from dtq.errors import WorkerError
from dtq.runs.gather import check_ids
from dtq.runs.workers import Workers

RECIPE = {
    "whole model": ["--set", "transform=hadamard", "--set", "transform_candidates=[none]"],
    "budget": [
        "--budget", "5", "--set", "allocate.formats=[int4-2l-g64, int8-row]",
        "--set", "allocate.num_inputs=2", "--set", "transform_candidates=[]", "--set", "transform=hadamard",
    ],
    "fine-tuned": [
        "--recipe", "rtn-w4a8", "--set", "finetune={blocks: {steps: 2}}",
        "--set", "step_policy={precisions: [native, a16]}",
    ],
}  # fmt: skip
OTHERS = installed("optimum.quanto")
FEW = ["--samples", "5", "--steps", "2", "--set", "calibration.batch_size=1"]


class Processes:
    """``dtq quantize`` in several processes, as a launcher starts them."""

    def __init__(
        self,
        arguments: list[str],
        size: int,
        log: Path,
        command: str = "quantize",
        **environment: str,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
        self.children = [
            kill.forked(
                arguments,
                log.with_name(f"{log.name}{rank}"),
                {**shared, "RANK": str(rank)},
                command,
                quanto.in_python if "--compare-with" in arguments else int,
            )
            for rank in range(size)
        ]

    def codes(self, timeout: float = 300.0) -> list[int | None]:
        """Exit codes, None of what still runs."""
        end = time.monotonic() + timeout
        for child in self.children:
            child.join(max(0.0, end - time.monotonic()))
        return [child.exitcode for child in self.children]


def bytes_of(folder: Path, arguments: list[str], size: int) -> dict[str, str]:
    out, log = folder / f"q{size}", folder / f"log{size}-"
    codes = Processes([*arguments, "-o", str(out)], size, log).codes()
    assert codes == [0] * size, "".join(p.read_text() for p in folder.glob("log*"))
    return kill.digest(out)


@pytest.mark.parametrize("kind", RECIPE)
def test_one_and_two_processes_make_the_same_bytes(float_folder, tmp_path, kind):
    arguments = [str(float_folder), *FEW, *RECIPE[kind]]
    assert bytes_of(tmp_path, arguments, 2) == bytes_of(tmp_path, arguments, 1)
    shown = [(tmp_path / f"log2-{rank}").read_text() for rank in (0, 1)]
    assert "quantize: " in shown[0]
    assert shown[1] == ""  # one prints


def evaluated(folder: Path, arguments: list[str], size: int) -> tuple[dict, dict]:
    """``eval.json`` and the digests of the other files that ``dtq eval`` leaves."""
    out, log = folder / f"run{size}", folder / f"log{size}-"
    codes = Processes([*arguments, "-o", str(out)], size, log, "eval").codes()
    assert codes == [0] * size, "".join(p.read_text() for p in folder.glob("log*"))
    data = json.loads((out / "eval.json").read_text())
    assert data["conditions"].pop("processes", 1) == size
    digests = kill.digest(out)
    return data, {k: v for k, v in digests.items() if Path(k).suffix in (".png", ".safetensors")}


def test_one_and_two_processes_evaluate_alike(float_folder, quantized_folder, tmp_path):
    arguments = [
        str(quantized_folder), "--reference", str(float_folder), "--samples", "6", "--batch", "2",
        "--steps", "2", "--num-images", "10", "--features", "random", "--metric", "fid",
        "--keep-images", *(["--compare-with", "quanto-int4"] if OTHERS else []),
    ]  # fmt: skip
    single, files = evaluated(tmp_path, arguments, 1)
    two, same = evaluated(tmp_path, arguments, 2)
    assert two == single
    assert same == files
    assert len([name for name in files if name.endswith(".png")]) == 12
    assert len(single["values"]["error"]) == 6
    assert len(single["rows"]) == 1 + OTHERS
    assert (tmp_path / "log2-1").read_text() == ""  # one prints


def test_one_and_two_processes_make_the_same_pictures(float_folder, tmp_path):
    found = []
    for size in (1, 2):
        out, log = tmp_path / f"out{size}", tmp_path / f"log{size}-"
        arguments = [str(float_folder), "-n", "5", "--steps", "2", "--batch", "2", "-o", str(out)]
        assert Processes(arguments, size, log, "sample").codes() == [0] * size
        found.append(kill.digest(out))
    assert found[0] == found[1]
    assert len(found[0]) == 6
    assert "5 images and sheet.png" in (tmp_path / "log2-0").read_text()


def test_too_few_pictures_for_the_processes_are_refused(float_folder, tmp_path):
    arguments = [str(float_folder), "-n", "4", "--batch", "4", "-o", str(tmp_path / "out")]
    codes = Processes(arguments, 2, tmp_path / "log", "sample").codes()
    assert codes == [1, 1]
    assert "4 in batches of 4 are too few for 2 processes" in (tmp_path / "log0").read_text()


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (["0000", "0001"], "0002"),
        (["0000", "0001", "0001"], "0001, 0002"),
        (["0000", "0001", "0002", "0003"], "beyond the last"),
    ],
)
def test_a_sample_that_nobody_or_two_made_is_an_error(ids, says):
    check_ids(["0002", "0000", "0001"], 3)
    with pytest.raises(WorkerError, match=says):
        check_ids(ids, 3)


@pytest.mark.slow
def test_four_processes_too(float_folder, tmp_path):
    arguments = [str(float_folder), *FEW, *RECIPE["whole model"]]
    assert bytes_of(tmp_path, arguments, 4) == bytes_of(tmp_path, arguments, 1)


@pytest.mark.slow
def test_two_transformers_too(tmp_path):
    pipelines.wan(two=True).save_pretrained(tmp_path / "float")
    arguments = [str(tmp_path / "float"), "--samples", "2", "--steps", "4", *RECIPE["whole model"]]
    arguments += ["--set", "calibration.batch_size=1", "--set", "solver=rtn"]
    arguments += ["--arg", "height=32", "--arg", "width=32", "--arg", "num_frames=5"]
    assert bytes_of(tmp_path, arguments, 2) == bytes_of(tmp_path, arguments, 1)


def test_one_dies_the_other_says_so_and_one_process_goes_on(float_folder, tmp_path):
    arguments = [str(float_folder), *FEW, *RECIPE["whole model"]]
    want = bytes_of(tmp_path, arguments, 1)
    out, work = tmp_path / "q", tmp_path / ".q.work"
    run = Processes([*arguments, "-o", str(out)], 2, tmp_path / "killed")
    while not list(work.glob("statistics/*.safetensors")):
        time.sleep(0.01)
        assert run.codes(0) == [None, None]
    os.kill(run.children[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    assert run.codes() == [1, -signal.SIGKILL]
    assert time.monotonic() - killed < 60
    told = (tmp_path / "killed0").read_text()
    assert "another process died or does not answer" in told
    assert "Traceback" not in told
    assert not out.exists()
    assert not (tmp_path / ".q.lock").exists()
    assert list(work.rglob("*.safetensors"))
    codes = Processes([*arguments, "-o", str(out)], 1, tmp_path / "again").codes()
    assert codes == [0]
    assert "continuing the interrupted run" in (tmp_path / "again0").read_text()
    assert kill.digest(out) == want


def test_statistics_of_one_and_two_processes_and_a_killed_run_have_the_same_bytes(
    float_folder, tmp_path
):
    made = {}

    def start(name: str, size: int) -> Processes:
        made[name] = tmp_path / f"{name}.safetensors"
        arguments = [str(float_folder), *FEW, "-o", str(made[name])]
        return Processes(arguments, size, tmp_path / f"{name}-", "calibrate")

    assert start("one", 1).codes() == [0]
    assert start("two", 2).codes() == [0, 0]
    run, work = start("killed", 2), tmp_path / ".killed.safetensors.work"
    while not list(work.glob("statistics/*.safetensors")):
        time.sleep(0.01)
        assert run.codes(0) == [None, None]
    os.kill(run.children[0].pid, signal.SIGKILL)
    assert run.codes() == [-signal.SIGKILL, 1]
    assert not made["killed"].exists()
    assert start("killed", 1).codes() == [0]
    told = (tmp_path / "killed-0").read_text()
    assert "continuing the interrupted run" in told
    assert {p.name for p in tmp_path.iterdir() if p.suffix != ".safetensors"} == {
        *("one-0", "two-0", "two-1", "killed-0", "killed-1")
    }
    assert len({file.read_bytes() for file in made.values()}) == 1
    about = store.load(made["one"]).about
    assert (about["samples"], about["num_shards"]) == (5, 5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_work_is_shared_by_cost_and_nothing_is_left_out(size):
    costs = {f"layer.{i}": float(cost) for i, cost in enumerate([1, 9, 2, 8, 3, 7, 1, 1])}
    shares = [Workers(rank, size).assign(costs) for rank in range(size)]
    assert sorted(name for share in shares for name in share) == sorted(costs)
    loads = [sum(costs[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 2
    assert all(share == [name for name in costs if name in share] for share in shares)
