# SPDX-License-Identifier: Apache-2.0
"""The real ``vbench`` package, run in an environment of its own, and its results read back.

vbench 0.1.5 pins old versions of transformers and numpy, so it cannot live beside dtq. It is also
lenient: a missing file makes a mean of fewer videos. Here every dimension must come back with a
value of every video, or nothing is believed.
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

OFFLINE = ("temporal_flickering",)
"""Dimensions that need no weights."""

CUSTOM = (
    *OFFLINE, "subject_consistency", "background_consistency", "motion_smoothness",
    "dynamic_degree", "aesthetic_quality", "imaging_quality", "human_action", "temporal_style",
    "overall_consistency",
)  # fmt: skip
"""Dimensions that vbench computes for videos of one's own (``mode="custom_input"``)."""

SUFFIXES = (".mp4", ".gif")

_SCRIPT = """
import json, os, sys
job = json.loads(sys.argv[1])
import vbench
info = os.path.join(os.path.dirname(vbench.__file__), "VBench_full_info.json")
vbench.VBench(job["device"], info, job["out"]).evaluate(
    videos_path=job["videos"], name="dtq", prompt_list=job["prompts"],
    dimension_list=job["dimensions"], local=True, read_frame=False, mode="custom_input",
)
"""


@dataclass(frozen=True)
class Scores:
    """One dimension.

    Attributes:
        dimension: name in vbench.
        reported: vbench's own aggregate, which for some dimensions is on another scale.
        mean: over the videos, of the values below.
        videos: file name to value.
    """

    dimension: str
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
    device: str = "cuda",
    timeout: float = 3600.0,
) -> dict[str, Scores]:
    """Score a folder of videos.

    Args:
        videos: ``.mp4`` or ``.gif`` files.
        dimensions: of ``CUSTOM``.
        out: where vbench writes; must be empty, so that no older result is read.
        python: of the environment that has vbench.
        cache: folder of its weights, ``VBENCH_CACHE_DIR``; nothing is downloaded.
        prompts: file name to prompt, for dimensions that read it; file names by default.
        device: that vbench runs on.
        timeout: seconds, for all dimensions.

    Raises:
        InputError: wrong arguments, vbench failed or took too long, a result is not complete.
    """
    if unknown := [d for d in dimensions if d not in CUSTOM]:
        raise InputError(
            f"vbench scores videos of one's own in {', '.join(CUSTOM)}; not in {', '.join(unknown)}"
        )
    files = sorted(p.name for p in videos.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{videos}: no {' or '.join(SUFFIXES)} file")
    if prompts is not None and (lost := sorted(set(files) - set(prompts))):
        raise InputError(f"{videos}: no prompt for {', '.join(lost)}")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: not empty; results of an earlier run could be read as new ones")
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
    """A result file of vbench, believed only when it is complete.

    Args:
        file: ``<name>_eval_results.json``.
        dimensions: that must be there.
        files: names of the videos that must have a value in each of them.

    Raises:
        InputError: a dimension or a video is missing, twice there, or has no finite value.
    """
    if not file.is_file():
        raise InputError(f"{file}: vbench wrote no result")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error})") from error
    wrong: list[str] = []
    found = {}
    for dimension in dimensions:
        entry = data.get(dimension) if isinstance(data, dict) else None
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
            wrong.append(f"{dimension}: missing")
            continue
        values = _values(entry[1], dimension, wrong)
        lost, extra = sorted(set(files) - set(values)), sorted(set(values) - set(files))
        if lost:
            wrong.append(f"{dimension}: no value of {', '.join(lost[:3])} ({len(lost)} missing)")
        if extra:
            wrong.append(f"{dimension}: values of unknown videos {', '.join(extra[:3])}")
        reported = _number(entry[0])
        if reported is None:
            wrong.append(f"{dimension}: the aggregate is {entry[0]!r}")
        elif values:
            mean = sum(values.values()) / len(values)
            found[dimension] = Scores(dimension, reported, mean, values)
    if wrong:
        raise InputError(f"{file}: not complete:\n" + "\n".join(f"  - {w}" for w in wrong))
    return found


def _number(value: Any) -> float | None:
    """A finite number; ``dynamic_degree`` says true and false."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None


def _values(rows: list[Any], dimension: str, wrong: list[str]) -> dict[str, float]:
    values: dict[str, float] = {}
    for row in rows:
        name = Path(str(row.get("video_path"))).name if isinstance(row, dict) else str(row)
        said = row.get("video_results") if isinstance(row, dict) else None
        value = _number(said)
        if value is None:
            wrong.append(f"{dimension}: {name} has the value {said!r}")
        elif name in values:
            wrong.append(f"{dimension}: {name} is there twice")
        else:
            values[name] = value
    return values
