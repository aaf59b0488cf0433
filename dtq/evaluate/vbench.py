# SPDX-License-Identifier: Apache-2.0
"""The package ``vbench``, run in a separate environment, and a reader of its results.

vbench 0.1.5 pins old versions of transformers and numpy, so it cannot be installed together with
dtq. If some videos are missing, it returns the mean of the others. dtq therefore requires one
finite value of every video for each dimension.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtq.errors import InputError
from dtq.evaluate.gate.metrics import VBENCH

SUFFIXES = (".mp4", ".gif")

_SCRIPT = """
import json, os, sys
job = json.loads(sys.argv[1])
import torch
try:
    import torchvision
except ModuleNotFoundError as error:
    if error.name != "torchvision":
        raise
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    # the compiled operators of PyPI's torchvision need a torch with CUDA; vbench calls none of them, but
    # the import fails if nobody has declared these
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import vbench
info = os.path.join(os.path.dirname(vbench.__file__), "VBench_full_info.json")
device = job["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
vbench.VBench(device, info, job["out"]).evaluate(
    videos_path=job["videos"], name="dtq", prompt_list=job["prompts"],
    dimension_list=job["dimensions"], local=True, read_frame=False, mode="custom_input",
)
"""


@dataclass(frozen=True)
class Scores:
    """The scores of one dimension.

    Attributes:
        reported: vbench's aggregate; for some dimensions it has another scale than the values.
        mean: of the values of the videos.
        videos: file name to value.
    """

    reported: float
    mean: float
    videos: dict[str, float]


def run(
    videos: Path,
    dimensions: Sequence[str],
    out: Path,
    *,
    python: Path,
    cache: Path | None = None,
    prompts: Mapping[str, str] | None = None,
    device: str = "",
    timeout: float = 3600.0,
) -> dict[str, Scores]:
    """Score a folder of videos.

    Args:
        videos: folder of ``.mp4`` or ``.gif`` files.
        dimensions: names of ``VBENCH``.
        out: empty folder for the files of vbench; an older result can then not be read.
        python: interpreter of the environment that has vbench.
        cache: folder of its weights (``VBENCH_CACHE_DIR``). Nothing is downloaded.
        prompts: file name to prompt, for dimensions that use it; default: the file names.
        device: for vbench; empty: a GPU if its torch finds one.
        timeout: in seconds, for all dimensions; an hour by default.

    Raises:
        InputError: wrong arguments, vbench failed or timed out, or a result is incomplete.
    """
    if unknown := [d for d in dimensions if d not in VBENCH]:
        raise InputError(
            f"vbench scores a user's videos in {', '.join(VBENCH)}; not in {', '.join(unknown)}"
        )
    files = sorted(p.name for p in videos.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{videos}: no {' or '.join(SUFFIXES)} file")
    if prompts is not None and (missing := sorted(set(files) - set(prompts))):
        raise InputError(f"{videos}: no prompt for {', '.join(missing)}")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: not empty; an older result could be read as a new one")
    job = {"device": device, "out": str(out), "videos": str(videos), "dimensions": [*dimensions],
           "prompts": dict(prompts or {})}  # fmt: skip
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if cache is not None:
        settings["VBENCH_CACHE_DIR"] = str(cache)
    try:
        done = subprocess.run(
            [str(python), "-c", _SCRIPT, json.dumps(job)],
            env=settings, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise InputError(f"vbench took longer than {timeout:.0f} s") from error
    except OSError as error:
        raise InputError(f"{python}: cannot be run ({error})") from error
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise InputError(f"vbench failed with code {done.returncode}:\n{last}")
    return read(out / "dtq_eval_results.json", dimensions, files)


def read(file: Path, dimensions: Sequence[str], files: Sequence[str]) -> dict[str, Scores]:
    """Read a result file of vbench, which must be complete.

    Args:
        file: ``<name>_eval_results.json``.
        dimensions: that must be present.
        files: names of the videos; each must have a value in each dimension.

    Raises:
        InputError: a dimension or a video is missing or duplicated, or has no finite value.
    """
    if not file.is_file():
        raise InputError(f"{file}: vbench wrote no result")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error})") from error
    problems: list[str] = []
    scores = {}
    for dimension in dimensions:
        entry = data.get(dimension) if isinstance(data, dict) else None
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
            problems.append(f"{dimension}: missing")
            continue
        values = _values(entry[1], dimension, problems)
        missing, extra = sorted(set(files) - set(values)), sorted(set(values) - set(files))
        if missing:
            names = ", ".join(missing[:3])
            problems.append(f"{dimension}: no value of {names} ({len(missing)} missing)")
        if extra:
            problems.append(f"{dimension}: values of unknown videos {', '.join(extra[:3])}")
        reported = _number(entry[0])
        if reported is None:
            problems.append(f"{dimension}: the aggregate is {entry[0]!r}")
        elif values:
            mean = sum(values.values()) / len(values)
            scores[dimension] = Scores(reported, mean, values)
    if problems:
        raise InputError(f"{file}: incomplete:\n" + "\n".join(f"  - {p}" for p in problems))
    return scores


def _number(value: Any) -> float | None:
    """A finite number as float, else None; ``dynamic_degree`` writes true and false."""
    valid = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if valid else None


def _values(rows: list[Any], dimension: str, problems: list[str]) -> dict[str, float]:
    values: dict[str, float] = {}
    for row in rows:
        entry = row if isinstance(row, dict) else {"video_path": row}
        name, result = Path(str(entry.get("video_path"))).name, entry.get("video_results")
        value = _number(result)
        if value is None:
            problems.append(f"{dimension}: {name} has the value {result!r}")
        elif name in values:
            problems.append(f"{dimension}: {name} is there twice")
        else:
            values[name] = value
    return values
