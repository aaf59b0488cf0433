# SPDX-License-Identifier: Apache-2.0
"""Measure the memory of diffusers' group offloading to disk, for a quantized model.

    python scripts/offload_memory.py --billion 0.5

Builds the random FLUX-shaped model of ``scripts/big.py``, quantizes it with a recipe that needs no
data, and runs one forward in a process of its own for each way of offloading on a CPU. Prints the
resident memory beyond the imports: after loading, after offloading is on, and at the peak of the
forward, which the kernel reports (``VmHWM``, reset before it).
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from big import build, bytes_of
from diffusers import FluxTransformer2DModel
from sampling_memory import resident

import dtq
from dtq.io.memory import trim_malloc
from dtq.pipelines.tracing import dummy_inputs

MODES = {
    "none": None,
    "leaf level": {"offload_type": "leaf_level"},
    "one block": {"offload_type": "block_level", "num_blocks_per_group": 1},
}


def measure(folder: Path, mode: str, disk: Path) -> None:
    """Load, offload and run the model in this process, and print one row of the table."""
    gc.collect()
    start = resident("VmRSS")
    model = FluxTransformer2DModel.from_pretrained(folder)
    loaded = resident("VmRSS")
    if options := MODES[mode]:
        device = torch.device("cpu")
        model.enable_group_offload(device, offload_to_disk_path=str(disk), **options)
    gc.collect()
    trim_malloc()
    ready = resident("VmRSS")
    calls = dummy_inputs(model, 1, 500.0, 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    begin = time.monotonic()
    with torch.no_grad():
        model(**calls)
    numbers = (loaded - start, ready - start, resident("VmHWM") - start)
    cells = " | ".join(f"{number / 1e9:.3f} GB" for number in numbers)
    print(f"| {mode} | {cells} | {time.monotonic() - begin:.1f} s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--billion", type=float, default=0.5)
    parser.add_argument("--recipe", default="rtn-w4a8", help="default: rtn-w4a8")
    parser.add_argument("--out", type=Path, default=Path(".big"))
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)  # the child's
    args = parser.parse_args()
    source = args.out / f"flux-{args.billion:g}b"
    folder = args.out / f"{source.name}-{args.recipe}-no-data"
    if args.mode:
        with tempfile.TemporaryDirectory(dir=args.out) as disk:
            measure(folder, args.mode, Path(disk))
        return
    if not source.exists():
        build(source, args.billion)
    if not folder.exists():
        config = dtq.DTQConfig(recipe=args.recipe)
        model = FluxTransformer2DModel.from_pretrained(
            source, quantization_config=config, torch_dtype=torch.bfloat16
        )
        dtq.save(model, folder)
    print(f"file {bytes_of(folder) / 1e9:.3f} GB")
    print("| group offloading to disk | after loading | when it is on | peak of a forward | time |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    for mode in MODES:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--mode", mode], check=True)


if __name__ == "__main__":
    main()
