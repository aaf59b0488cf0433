# SPDX-License-Identifier: Apache-2.0
"""The commands of the dtq under test, and the checkpoints that they make."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml
from digests import sha

OPTIONS = {"--no-sentinel": "--no-sanity-check", "--fid": "--num-images", "--keep": "--exclude"}
"""Command line options; the second name is used where ``--help`` does not know the first."""
RECIPE_KEYS = {
    "steps.modes": "step_policy.precisions",
    "refine.blocks.steps": "finetune.blocks.steps",
    "refine.vq4dit.steps": "finetune.vq4dit.steps",
    "calibration.batch": "calibration.batch_size",
}
"""Of ``--set``; the second name is used where ``dtq recipe show`` does not print the first."""
MODELS = {"demo-hard": "demo-outliers"}
"""Bundled models; the second name is used where dtq does not list the first."""
QUICK = ("--samples", "4", "--steps", "4")
PARTS = ("--samples", "8", "--steps", "2", "--set", "calibration.batch=2")
FEW = ("--keep", r"re:transformer_blocks\.[2-7]\.")
VIDEO = ("--samples", "2", "--steps", "2")

CHECKPOINTS: dict[str, tuple[str, ...]] = {
    "w4a8": ("demo", *QUICK),
    "w8a8": ("demo", *QUICK, *FEW),
    "w4a16": ("demo", *QUICK),
    "w4a4": ("demo", *QUICK, *FEW),
    "w3a8": ("demo", *QUICK, *FEW),
    "rtn-w4a8": ("demo", *QUICK, "--no-sentinel"),
    "viditq": ("demo", *QUICK),
    "viditq-mp": ("demo", *QUICK, *FEW),
    "lrq-dit": ("demo", *QUICK),
    "hq-dit": ("demo", *QUICK, *FEW),
    "nvfp4": ("demo", *QUICK, *FEW),
    "mxfp4": ("demo", *QUICK, *FEW, "--set", "transform=hadamard"),
    "svdquant": ("demo", *QUICK, *FEW),
    "ditas": ("demo", *QUICK, *FEW),
    "q-dit": ("demo", *QUICK, *FEW),
    "ptq4dit": ("demo", *QUICK),
    "vq4dit": ("demo", *QUICK, *FEW, "--set", "refine.vq4dit.steps=4"),
    "terdit": ("demo", *QUICK, *FEW, "--set", "refine.blocks.steps=4"),
    "w4a8 budget": ("demo", *QUICK, *FEW, "--budget", "4.8"),
    "w4a8 size": ("demo", *QUICK, *FEW, "--set", "allocate.budget=1MB", "--seed", "5"),
    "w4a8 step-policy": ("demo", *QUICK, *FEW, "--set", "steps.modes=[native, a16]"),
    "w4a8 modulation": ("demo", *QUICK, *FEW, "--set", "modulation=w4a16", "--dtype", "bf16"),
    "w4a8 outliers": ("demo-hard", *QUICK, *FEW),
    "w8a8 video": ("demo-video", *VIDEO, *FEW, "--set", "transform=smooth"),
    "lrq-dit video": ("demo-video", *VIDEO),
}
"""Recipe, and a word where it is there twice; the model and options of ``dtq quantize``."""


class Failed(Exception):
    """A command that did not end as it should."""


class Session:
    """The dtq under test, a temporary folder, and what was made there.

    Args:
        package: the checkout.
        folder: empty.
    """

    def __init__(self, package: Path, folder: Path) -> None:
        self.package, self.folder = package, folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith("DTQ_")}
        kept.pop("GITHUB_STEP_SUMMARY", None)
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        own = {"PYTHONPATH": str(package), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        self.environment = {**kept, **offline, **threads, **own}

    def start(self, arguments: list[str]) -> subprocess.Popen[str]:
        """Python with these arguments, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def python(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> tuple[int, str]:
        """Exit code and output of Python with these arguments."""
        process = self.start(list(arguments))
        try:
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if process.returncode not in codes:
            tail = "\n".join(output.splitlines()[-12:])
            raise Failed(f"exit code {process.returncode}: {' '.join(arguments)}\n{tail}")
        return process.returncode, output

    def dtq(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> tuple[int, str]:
        """Exit code and output of a command."""
        return self.python("-m", "dtq", *self.spelled(arguments), codes=codes)

    def child(self, name: str, *arguments: str | Path) -> None:
        """One of the functions of ``children.py``, which use dtq as a library."""
        script = Path(__file__).resolve().with_name("children.py")
        self.python(str(script), name, *map(str, arguments))

    @functools.cache  # noqa: B019  (the session lives as long as the program)
    def says(self, *arguments: str) -> str:
        """What dtq answers to a question."""
        return self.dtq(*arguments, codes=(0, 1, 2))[1]

    def spelled(self, arguments: tuple[str, ...]) -> list[str]:
        """The arguments with the names that this dtq has."""
        words = []
        for word in arguments:
            key, equals, value = word.partition("=")
            if word in OPTIONS and word not in self.says(arguments[0], "--help"):
                word = OPTIONS[word]
            elif word in MODELS and word not in self.says("plan", "no-such-model"):
                word = MODELS[word]
            elif equals and key in RECIPE_KEYS and not self.has_key(key):
                word = f"{RECIPE_KEYS[key]}={value}"
            words.append(word)
        return words

    def has_key(self, key: str) -> bool:
        """Whether recipes have a key; the knobs of a method are not looked for."""
        found = yaml.safe_load(self.says("recipe", "show", "w4a8"))
        for word in key.split("."):
            if not isinstance(found, dict):
                return True
            if word not in found:
                return False
            found = found[word]
        return True

    def checkpoint(self, name: str) -> Path:
        """The folder of a checkpoint, which is made unless it is there."""
        out = self.folder / "checkpoints" / name.replace(" ", "-")
        if not out.exists():
            model, *options = CHECKPOINTS[name]
            self.dtq("quantize", model, "--recipe", name.split()[0], *options, "-o", str(out))
        return out

    def compared(self, name: str, *options: str) -> Path:
        """The folder of ``dtq eval`` of a checkpoint."""
        out = self.folder / "runs" / sha(" ".join((name, *options)))
        if not out.exists():
            candidate = str(self.checkpoint(name).relative_to(self.folder))  # it is in the report
            self.dtq("eval", candidate, "--reference", "demo", *options, "-o", str(out))
        return out
