# SPDX-License-Identifier: Apache-2.0
"""Load, sample, save, over and over: memory must stay flat.

    python tests/soak.py --cycles 500
    python tests/soak.py --cycles 500 --float      what diffusers leaves without dtq's layers

Each cycle opens the same quantized folder, makes a picture and saves the pipeline to another
folder. What the process holds (RSS) is read after every cycle; the slope over the cycles after the
first fifth, in which caches fill, is what is reported.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import tiny
import torch
from diffusers import DiffusionPipeline

import dtq
from dtq.checkpoint import writer

LIMIT = 20_000
"""Bytes a cycle: 500 cycles may leave 10 MB. A leaked layer has 8 kB, a model a megabyte."""


def made(folder: Path, quantized: bool = True) -> Path:
    if not quantized:
        tiny.pipeline().save_pretrained(folder / "f")
        return folder / "f"
    few = {"calibration": {"samples": 2, "batch_size": 2, "steps": 2, "num_timestep_bins": 4}}
    pipe = dtq.quantize(
        tiny.pipeline(), "rtn-w4a8", activations="int8-static-timestep", progress=False, **few
    )
    return writer.write(pipe, folder / "q")


def cycle(folder: Path, out: Path) -> torch.Tensor:
    """One load, sample, save; returns the pictures."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pictures = tiny.sample(pipe, steps=1)
    writer.write(pipe, out, overwrite=True)
    return pictures


def soak(cycles: int, quantized: bool = True) -> tuple[float, list[int]]:
    """Slope of RSS in bytes a cycle, and RSS after every cycle."""
    process, sizes = psutil.Process(), []
    with tempfile.TemporaryDirectory(prefix="dtq-soak-") as place:
        folder, out = made(Path(place), quantized), Path(place) / "out"
        want = cycle(folder, out)
        gc.collect()
        gc.freeze()  # collecting looks at what cycles leave, not at every module imported before
        try:
            for i in range(cycles):
                assert torch.equal(cycle(folder, out), want), f"cycle {i} made another picture"
                gc.collect()
                sizes.append(process.memory_info().rss)
                if (i + 1) % 20 == 0:
                    print(f"{i + 1} cycles, {sizes[-1] / 1e6:.1f} MB", flush=True)
        finally:
            gc.unfreeze()
    return slope(sizes), sizes


def slope(sizes: list[int]) -> float:
    """Least squares over the cycles after the first fifth, bytes a cycle."""
    late = sizes[len(sizes) // 5 :]
    return float(np.polyfit(range(len(late)), late, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--float", action="store_true", help="a float pipeline, to compare with")
    options = parser.parse_args()
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    grows, sizes = soak(options.cycles, not options.float)
    late = sizes[len(sizes) // 5 :]
    print(
        f"{len(sizes)} cycles: {min(late) / 1e6:.1f} to {max(late) / 1e6:.1f} MB after the first "
        f"fifth, slope {grows:.0f} bytes a cycle (limit {LIMIT})"
    )
    sys.exit(grows > LIMIT)


if __name__ == "__main__":
    main()
