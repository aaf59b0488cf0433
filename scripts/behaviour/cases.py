# SPDX-License-Identifier: Apache-2.0
"""The cases, by name: functions that run commands and return entries."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from digests import (
    checkpoint_entries,
    file_digests,
    metadata,
    numbers,
    picture_entries,
    sha,
    tensors,
)
from session import CHECKPOINTS, FEW, PARTS, Failed, Session

DEMO, VIDEO_DEMO = Path("dtq/demo/pipeline"), Path("dtq/demo/video")
BASELINE = Path("gate/demo-w4a8.json")
"""In the checkout; ``zoo.json`` is anywhere in ``tests``."""


def statistics(session: Session) -> dict[str, str]:
    """``dtq calibrate``: tensors by their contents, since their names may change."""
    out = session.folder / "statistics.safetensors"
    session.dtq("calibrate", "demo", *PARTS, "-o", str(out))
    found: dict[str, str] = {}
    for text in sorted(tensors(out).values()):
        kind, _, digest = text.rpartition(" ")
        found[f"tensors {kind}"] = sha(found.get(f"tensors {kind}", "") + digest)
    edges = [json.loads(v) for k, v in metadata(out).items() if "edges" in k]
    return found | {"timestep edges": repr(edges)}


def from_statistics(session: Session) -> dict[str, str]:
    """``dtq quantize --stats``."""
    path, out = session.folder / "statistics.safetensors", session.folder / "from-statistics"
    if not path.exists():
        statistics(session)
    session.dtq("quantize", "demo", *PARTS, *FEW, "--stats", str(path), "-o", str(out))
    return checkpoint_entries(out)


def library(session: Session) -> dict[str, str]:
    """Pictures of the plain pipeline of diffusers, quantizing while loading, compiling."""
    names = ["w4a8", "w8a8", "w4a16", "hq-dit", "lrq-dit", "w4a8 step-policy"]
    out = session.folder / "library.json"
    session.child("library", out, session.package / DEMO, *map(session.checkpoint, names))
    return json.loads(out.read_text())


def sampled(session: Session) -> dict[str, str]:
    """``dtq sample`` of a float and of a quantized model, and of a video."""
    found = {}
    for title, model, options in (
        ("float", "demo", ("-p", "cat-face", "-p", "face-smiling", "--steps", "4")),
        ("w4a8", str(session.checkpoint("w4a8")), ("-n", "3", "--steps", "4", "--batch", "2")),
        ("video", str(session.checkpoint("lrq-dit video")), ("-n", "1", "--steps", "2")),
    ):
        out = session.folder / "pictures" / title
        session.dtq("sample", model, *options, "--seed", "7", "-o", str(out))
        found |= {f"{title} {k}": v for k, v in picture_entries(out).items()}
    return found


def evaluated(session: Session) -> dict[str, str]:
    """``dtq eval``, with metrics of image sets."""
    found = {}
    for name in ("w4a8", "rtn-w4a8"):
        more = ("--fid", "8", "--metric", "fid,kid,precision,recall")
        run = session.compared(name, "--samples", "4", "--steps", "4", *more)
        found |= numbers(json.loads((run / "eval.json").read_text()), f"eval {name}")
    return found


def gated(session: Session) -> dict[str, str]:
    """``dtq gate``: against the shipped baseline, against itself, and of another job."""
    shipped = str(session.package / BASELINE)
    long = session.compared("w4a8", "--samples", "32", "--steps", "8")
    short = session.compared("rtn-w4a8", "--samples", "4", "--steps", "4")
    mine = session.folder / "accepted.json"
    mine.unlink(missing_ok=True)
    accept = ("--baseline", str(mine), "--reason", "a test", "--who", "nobody")
    session.dtq("gate", "accept", str(long), *accept)
    found = {}
    for title, run, baseline, policy in (
        ("shipped", long, shipped, "bundled"),
        ("itself", long, str(mine), "default"),
        ("other", short, shipped, "bundled"),
    ):
        out = session.folder / f"gate-{title}.json"
        options = ("--baseline", baseline, "--policy", policy, "--out", str(out))
        code, _ = session.dtq("gate", str(run), *options, codes=(0, 1, 2, 3))
        found[f"exit code {title}"] = str(code)
        found |= numbers(json.loads(out.read_text()), f"gate {title}")
    return found


def processes(session: Session) -> dict[str, str]:
    """Two processes, and a run that is killed twice: the bytes of one process."""
    session.folder.joinpath("processes").mkdir(exist_ok=True)
    made = {name: session.folder / "processes" / name for name in ("one", "two", "killed")}
    job = ("quantize", "demo", *PARTS, *FEW, "--set", "solver.gptq.damp=0.02")
    session.dtq(*job, "-o", str(made["one"]))
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    session.python(*several, "-m", "dtq", *session.spelled((*job, "-o", str(made["two"]))))
    last = ["-m", "dtq", *session.spelled((*job, "-o", str(made["killed"])))]
    for count in (5, 16):
        kill(session.start(last), session.folder / "processes", made["killed"], count)
    session.python(*last)
    want = file_digests(made["one"])
    for name in ("two", "killed"):
        found = file_digests(made[name])
        if wrong := [k for k in sorted(want.keys() | found) if want.get(k) != found.get(k)]:
            raise Failed(f"{name}: other bytes than one process in {', '.join(wrong)}")
    return checkpoint_entries(made["one"])


def kill(process: subprocess.Popen[str], folder: Path, output: Path, count: int) -> None:
    """End a run by SIGKILL when so many files lie in a hidden folder next to its output."""
    hidden = f".{output.name}.*/**/*.safetensors"
    while process.poll() is None and len(list(folder.glob(hidden))) < count:
        time.sleep(0.02)
    if process.poll() is not None:
        raise Failed(f"ended before it was killed\n{process.communicate()[0][-1000:]}")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def two_transformers(session: Session) -> dict[str, str]:
    """A video pipeline with a transformer for noisy and one for clean steps."""
    float_model, out = session.folder / "wan", session.folder / "wan-w4a8"
    session.child("two_transformers", float_model, session.package / VIDEO_DEMO)
    size = [f"--arg={key}" for key in ("height=16", "width=16", "num_frames=5")]
    recipe = ("--recipe", "w4a8", "--samples", "2", "--steps", "4")
    session.dtq("quantize", str(float_model), *recipe, *size, "-o", str(out))
    return checkpoint_entries(out)


def families(session: Session) -> dict[str, str]:
    """A tiny random model of every class: its checkpoint, and what it makes of one input."""
    out = session.folder / "families"
    (zoo,) = (session.package / "tests").rglob("zoo.json")
    session.child("families", out, zoo)
    found: dict[str, str] = json.loads((out / "outputs.json").read_text())
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        found |= {f"{folder.name} {k}": v for k, v in checkpoint_entries(folder).items()}
    return found


def quantized(name: str) -> Callable[[Session], dict[str, str]]:
    """A case of one checkpoint."""
    return lambda session: checkpoint_entries(session.checkpoint(name))


CASES: dict[str, Callable[[Session], dict[str, str]]] = {
    **{f"quantize {name}": quantized(name) for name in CHECKPOINTS},
    "calibrate": statistics,
    "quantize from statistics": from_statistics,
    "library": library,
    "sample": sampled,
    "eval": evaluated,
    "gate": gated,
    "processes": processes,
    "two transformers": two_transformers,
    "families": families,
}
