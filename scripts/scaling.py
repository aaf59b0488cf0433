# SPDX-License-Identifier: Apache-2.0
"""The speedup from a second process of one thread, the table of docs/large.md.

    python scripts/scaling.py

The processes of ``dtq quantize`` and ``dtq sample`` share tasks and batches; ``dtq.parallel`` splits
every layer in two, in the forward of four FLUX-shaped blocks of width 1536. Measurements with one
process and with two alternate.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel

import dtq
from dtq.parallel import load_sharded

WIDTH = {"num_attention_heads": 12, "attention_head_dim": 128, "joint_attention_dim": 1536}


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--forward", type=Path, help="used by this script under torchrun: time a forward of this folder"
)
def main(rounds: int, forward: Path | None) -> None:
    if forward:
        print(forward_seconds(forward))
        return
    with tempfile.TemporaryDirectory() as work:
        place = Path(work)
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=2, **WIDTH)
        dtq.quantize(model, "rtn-w4a8", progress=False).save_pretrained(place / "flux")
        quantized = place / "q1"
        jobs = {
            "`dtq quantize demo --recipe w4a8`": lambda n: quantize(n, place / f"q{n}"),
            "`dtq sample`, 64 images": lambda n: sample(n, quantized, place / f"p{n}"),
            "one forward, layers split": lambda n: cut(n, place / "flux"),
        }
        print("| | one process | two processes | speed-up |\n| --- | --- | --- | --- |", flush=True)
        for what, job in jobs.items():
            spent = {n: [] for n in (1, 2)}
            for _ in range(rounds):
                for n, seconds in spent.items():
                    seconds.append(job(n))
            one, two = (statistics.median(seconds) for seconds in spent.values())
            print(f"| {what} | {one:.3g} s | {two:.3g} s | {one / two:.2f} |", flush=True)


def started(processes: int, *command: str) -> str:
    """Standard output of a command that runs in that many processes of one thread."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    done = subprocess.run([*launch, *command], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def quantize(processes: int, out: Path) -> float:
    begun = time.perf_counter()
    started(processes, "-m", "dtq", "quantize", "demo", "--recipe", "w4a8", "-o", str(out),
            "--overwrite", "--fresh")  # fmt: skip
    return time.perf_counter() - begun


def sample(processes: int, model: Path, out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    begun = time.perf_counter()
    started(processes, "-m", "dtq", "sample", str(model), "-n", "64", "-o", str(out))
    return time.perf_counter() - begun


def cut(processes: int, model: Path) -> float:
    return float(started(processes, __file__, "--forward", str(model)).split()[0])


def forward_seconds(folder: Path) -> float:
    """Median of nine forwards, after one that is not counted."""
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    if world == 1:
        model = FluxTransformer2DModel.from_pretrained(folder)
    else:
        model = load_sharded(folder, dist.get_rank(), world)
    inputs = {
        "hidden_states": torch.randn(1, 1024, 64),
        "encoder_hidden_states": torch.randn(1, 256, WIDTH["joint_attention_dim"]),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.full((1,), 0.5),
        "img_ids": torch.zeros(1024, 3),
        "txt_ids": torch.zeros(256, 3),
    }
    spent = []
    with torch.no_grad():
        for _ in range(10):
            begun = time.perf_counter()
            model(**inputs)
            spent.append(time.perf_counter() - begun)
    return statistics.median(spent[1:])


if __name__ == "__main__":
    main()
