# SPDX-License-Identifier: Apache-2.0
"""Quantize a large model with random weights, and measure what it costs.

    python scripts/big.py --billion 2 --recipe w4a8
    python scripts/big.py --billion 12 --recipe w4a8 --plan

Builds a FLUX-shaped transformer on disk, shard by shard, so that it is never in memory as a whole.
Prints the estimates of ``dtq plan``. Runs ``dtq quantize`` and loads the result, each in a process of
its own, whose peak resident memory the kernel reports. After an interruption the same command
continues, and the earlier measurements count; ``--fresh`` starts over. ``--plan`` stops after the
estimates; its model files are sparse and take no space.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

SHARD = 1_000_000_000
SMALL = ("--set", "calibration.batch_size=1", "--set", "calibration.num_timestep_bins=4")


def config(billion: float) -> dict:
    """A FLUX shape of at least that many parameters: width 1536 to 3072, blocks 1 : 2 as there."""
    heads = 12 if billion < 3 else 24
    width = 128 * heads
    double = math.ceil(billion * 1e9 / (36 + 15 * 2) / width**2)
    return {
        "num_layers": double,
        "num_single_layers": 2 * double,
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "joint_attention_dim": 4096,
        "guidance_embeds": True,
    }


def build(folder: Path, billion: float, hollow: bool = False) -> int:
    """Write the model, or sparse files of its size; returns its number of parameters."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config(billion))
    folder.mkdir(parents=True)
    model.save_config(folder)
    rng = torch.Generator().manual_seed(0)
    where, shard, size, files = {}, {}, 0, 0
    tensors = list(model.state_dict().items())
    for i, (name, meta) in enumerate(tensors):
        ones = name.endswith("norm_q.weight") or (".norm" in name and meta.ndim == 1)
        if hollow:
            shard[name] = meta.bfloat16()
        else:
            made = torch.ones(meta.shape) if ones else torch.randn(meta.shape, generator=rng) * 0.02
            shard[name] = made.bfloat16()
        size += shard[name].nbytes
        if size > SHARD or i == len(tensors) - 1:
            file = f"diffusion_pytorch_model-{files:05d}.safetensors"
            (save_hole if hollow else save_file)(shard, folder / file, {"format": "pt"})
            where |= dict.fromkeys(shard, file)
            shard, size, files = {}, 0, files + 1
    index = {"metadata": {}, "weight_map": where}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (folder / name).write_text(json.dumps(index))
    return sum(t.numel() for _, t in tensors)


def save_hole(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a sparse safetensors file of bfloat16 zeros."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@dataclass
class Cost:
    """Seconds, bytes of memory and disk at their peaks.

    Attributes:
        peak: resident memory with mapped pages of files, which the kernel can reclaim any time.
        own: resident memory without those, sampled twice a second.
    """

    seconds: float = 0.0
    peak: int = 0
    own: int = 0
    disk: int = 0


def run(*command: str, folder: Path | None = None) -> Cost:
    """Run a command and show its output; ``folder`` is where it writes.

    The cost is kept in the folder, so that a continued run counts as one.
    """
    notes = folder / "cost.json" if folder else None
    before = Cost(**json.loads(notes.read_text())) if notes and notes.exists() else Cost()
    started, now = time.monotonic(), before
    child = subprocess.Popen([sys.executable, *command])
    while True:
        done, status, usage = os.wait4(child.pid, os.WNOHANG)
        peak, own = (usage.ru_maxrss * 1024, 0) if done else resident(child.pid)
        disk = sum(size_of(p) for p in folder.rglob("*")) if folder else 0
        seconds = before.seconds + time.monotonic() - started
        now = Cost(seconds, max(now.peak, peak), max(now.own, own), max(now.disk, disk))
        if notes:
            draft = notes.with_suffix(".partial")
            draft.write_text(json.dumps(asdict(now)))
            draft.replace(notes)
        if done:
            break
        time.sleep(0.5)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return now


def resident(process: int) -> tuple[int, int]:
    """Peak of the resident bytes of a process, and its anonymous bytes now; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    peak, own = (int(fields.get(key, ["0"])[0]) * 1024 for key in ("VmHWM", "RssAnon"))
    return peak, own


def size_of(path: Path) -> int:
    """Bytes of a file; 0 for a folder, and for a file that was removed."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def bytes_of(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--billion", type=float, default=2.0)
    parser.add_argument("--recipe", default="w4a8")
    parser.add_argument("--set", nargs="*", default=[], help="recipe keys, KEY=VALUE")
    parser.add_argument("--memory", default="6GB", help="memory limit for statistics")
    parser.add_argument("--out", type=Path, default=Path(".big"))
    parser.add_argument("--plan", action="store_true", help="print the estimates alone")
    parser.add_argument("--fresh", action="store_true", help="do not continue an earlier run")
    options = parser.parse_args()
    source = options.out / f"flux-{options.billion:g}b{'-hollow' if options.plan else ''}"
    target = options.out / f"{source.name}-{options.recipe}" / "quantized"
    if not source.exists():
        # in a process of its own: a child's peak begins with what its parent has resident
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            count = pool.apply(build, (source, options.billion, options.plan))
        print(f"{count / 1e9:.2f} B parameters", flush=True)
    settings = [x for pair in options.set for x in ("--set", pair)]
    plan = ["-m", "dtq.cli", "plan", str(source), "--recipe", options.recipe, *settings]
    plan += ["--memory", options.memory, "--samples", "1"]
    plan += [*SMALL]
    estimate = json.loads(subprocess.check_output([sys.executable, *plan, "--json"]))
    if options.plan:
        for name in ("bytes", "memory", "disk"):
            print(f"{name:8} {estimate[name] / 1e9:8.3f} GB")
        print(f"time     {estimate['seconds'] / 3600:8.1f} h")
        return
    if options.fresh:
        shutil.rmtree(target.parent, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    quantized = run(
        "-m", "dtq.cli", "quantize", str(source), "--recipe", options.recipe, *settings,
        "--memory", options.memory, "--samples", "1", "-o", str(target),
        *SMALL, folder=target.parent,
    )  # fmt: skip
    loaded = run(
        "-c",
        "import sys, dtq, diffusers;diffusers.FluxTransformer2DModel.from_pretrained(sys.argv[1])",
        str(target),
    )
    bare = run("-c", "import dtq, diffusers; diffusers.FluxTransformer2DModel")
    rows = {
        "float file": bytes_of(source),
        "quantized file": bytes_of(target),
        "quantized file, estimated": estimate["bytes"],
        "peak memory of quantize": quantized.peak,
        "of it not pages of files": quantized.own,
        "peak memory of quantize, estimated": estimate["memory"],
        "peak disk of quantize": quantized.disk,
        "peak disk of quantize, estimated": estimate["disk"],
        "peak memory of load": loaded.peak,
        "peak memory of the imports alone": bare.peak,
    }
    print(
        f"{options.recipe}: {quantized.seconds:.0f} s to quantize (estimated {estimate['seconds']:.0f} s), ",
        end="",
    )
    print(f"{loaded.seconds - bare.seconds:.0f} s to load")
    for name, value in rows.items():
        print(f"{name:36} {value / 1e9:8.3f} GB")
    print(
        f"cpu seconds of all children {resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime:.0f}"
    )


if __name__ == "__main__":
    main()
