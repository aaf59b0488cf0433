# SPDX-License-Identifier: Apache-2.0
"""VBench as metrics of a run, with a stand-in for the package that measures the files themselves."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dtq.errors import InputError
from dtq.evaluate.gate.decision import Outcome, decide
from dtq.evaluate.gate.policy import Limit, Policy
from dtq.evaluate.metrics.images import as_bytes
from dtq.evaluate.metrics.video import temporal_flickering
from dtq.evaluate.run_file import JOB, Run, Sample
from dtq.evaluate.vbench_metrics import VBenchRequest, score

pytest.importorskip("imageio_ffmpeg")
NAME = "vbench.temporal_flickering"
COUNT = 8

PACKAGE = """
import json, os
import imageio.v2
import numpy as np
class VBench:
    def __init__(self, device, info, out):
        self.out = out
        os.makedirs(out, exist_ok=True)
    def evaluate(self, videos_path, name, prompt_list, dimension_list, **_):
        rows = []
        for file in sorted(os.listdir(videos_path)):
            assert file in prompt_list
            frames = [f.astype(np.float64) for f in imageio.v2.get_reader(f"{videos_path}/{file}")]
            moved = np.mean([np.abs(a - b).mean() for a, b in zip(frames, frames[1:])])
            rows.append({"video_path": file, "video_results": (255 - moved) / 255})
        rows = rows[int(os.environ.get("DROPPED", 0)):]
        data = {d: [0.5, rows] for d in dimension_list}
        json.dump(data, open(f"{self.out}/{name}_eval_results.json", "w"))
"""


# importing the real one takes longer than the rest
TORCH = """
class cuda:
    def is_available():
        return False
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    folder = site / "vbench"
    folder.mkdir()
    (folder / "VBench_full_info.json").write_text("[]")
    (folder / "__init__.py").write_text(PACKAGE)
    (site / "torch.py").write_text(TORCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        yield VBenchRequest(("temporal_flickering",), Path(sys.executable))


@pytest.fixture(scope="module")
def scored_once(package, tmp_path_factory):
    """A run whose candidate does not flicker, and its folder."""
    folder = tmp_path_factory.mktemp("base") / "run"
    return scored(package, folder)[0], folder


@pytest.fixture
def base(scored_once):
    return copy.deepcopy(scored_once[0])


def a_run():
    samples = [Sample(f"{i:04d}", f"prompt {i}", i) for i in range(COUNT)]
    conditions = dict.fromkeys((*JOB, "hardware", "torch"), "x") | {"samples": COUNT}
    return Run("c", "r", conditions, {"reference": "r"}, samples, {}, {})


def videos(flicker=0.0):
    g = torch.Generator().manual_seed(0)
    still = torch.rand(COUNT, 1, 3, 16, 16, generator=g) * 0.5
    floats = (still + 0.1 * torch.rand(COUNT, 6, 3, 16, 16, generator=g)).clamp(0, 1)
    again = (floats + 0.002 * torch.rand(floats.shape, generator=g)).clamp(0, 1)
    own = (floats + flicker * torch.rand(floats.shape, generator=g)).clamp(0, 1)
    return {"float": floats, "rerun": again, "candidate": own}


def scored(package, folder, flicker=0.0):
    run, made = a_run(), videos(flicker)
    score(package, run, made, folder)
    return run, made


def test_every_video_has_a_value_and_its_noise(package, tmp_path):
    run, made = scored(package, tmp_path / "run", 0.1)
    first, again, own = (temporal_flickering(as_bytes(batch)) for batch in made.values())
    assert list(run.values[NAME].values()) == pytest.approx(own.tolist(), abs=1e-9)
    want = own + again - first
    assert list(run.rerun[NAME].values()) == pytest.approx(want.tolist(), abs=1e-9)
    files = (tmp_path / "run" / "videos" / "candidate").iterdir()
    assert sorted(f.name for f in files) == [f"{i:04d}.mp4" for i in range(COUNT)]


def test_a_flickering_candidate_is_a_regression_of_the_gate(base, package, tmp_path):
    worse, _ = scored(package, tmp_path / "c", 0.3)
    policy = Policy(primary=(Limit(NAME, 0.01),), looks=(8,))
    assert decide(copy.deepcopy(base), base, policy).outcome is Outcome.PASS
    assert decide(worse, base, policy).outcome is Outcome.REGRESSION


def test_a_missing_dimension_makes_the_run_invalid(base, package, tmp_path, monkeypatch):
    monkeypatch.setenv("DROPPED", "1")
    run, _ = scored(package, tmp_path / "b")
    assert "no value of 0000.mp4" in run.missing[NAME]
    verdict = decide(run, base, Policy(primary=(Limit(NAME, 0.01),), looks=(8,)))
    assert verdict.outcome is Outcome.INVALID
    sounds = a_run()
    score(package, sounds, {"float": torch.zeros(COUNT, 2, 100)}, tmp_path / "c")
    assert "makes none" in sounds.missing[NAME]


def test_a_result_made_elsewhere_is_imported_by_file_name(scored_once, tmp_path):
    run, folder = scored_once
    file = tmp_path / "dtq_eval_results.json"
    shutil.copyfile(folder / "vbench" / "candidate" / file.name, file)
    imported = a_run()
    score(VBenchRequest(results=file), imported, videos(), tmp_path / "other")
    assert imported.values[NAME] == run.values[NAME]
    assert imported.conditions["vbench"]["noise"] == "not measured"
    assert not (tmp_path / "other").exists()
    data = json.loads(file.read_text())
    data["temporal_flickering"][1].pop()
    file.write_text(json.dumps(data))
    short = a_run()
    score(VBenchRequest(("temporal_flickering",), results=file), short, videos(), tmp_path)
    assert "no value of 0007.mp4 (1 missing)" in short.missing[NAME]
    file.write_text("{}")
    empty = a_run()
    score(VBenchRequest(results=file), empty, videos(), tmp_path)
    assert "has none of the dimensions" in str(empty.missing)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (VBenchRequest(("color",), Path(sys.executable)), "--vbench: unknown"),
        (VBenchRequest(("temporal_flickering",)), "make vbench-env"),
        (VBenchRequest(("temporal_flickering",), Path("/none")), "--vbench-python /none: no such"),
        (VBenchRequest(results=Path("/none")), "--vbench-results /none: no such"),
    ],
)
def test_mistakes_are_found_before_anything_runs(request_, words):
    with pytest.raises(InputError, match=words):
        request_.check()
