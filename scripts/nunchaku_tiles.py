# SPDX-License-Identifier: Apache-2.0
"""Hashes of what Nunchaku's packer makes of known numbers: ``tests/assets/nunchaku_tiles.json``.

``PYTHONPATH=tests python scripts/nunchaku_tiles.py CLONE`` runs the packer of a clone of
https://github.com/mit-han-lab/deepcompressor (Apache-2.0), which is no package on PyPI. It needs
``deepcompressor/backend`` of the clone alone. ``tests/engines/test_nunchaku.py`` compares dtq's tiles with the
hashes, so that the test needs no clone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import types
from pathlib import Path

import torch
from nunchaku_numbers import ASSET, digest, numbers


def packages(clone: Path) -> None:
    """Make ``deepcompressor.backend`` importable without the rest of the project."""
    for name in ("deepcompressor", "deepcompressor.backend"):
        module = types.ModuleType(name)
        module.__path__ = [str(clone.joinpath(*name.split(".")))]
        sys.modules[name] = module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", type=Path)
    clone = parser.parse_args().clone
    packages(clone)
    from deepcompressor.backend.nunchaku.utils import NunchakuWeightPacker
    from deepcompressor.backend.tinychat.utils import convert_to_tinychat_w4x16y16_linear_weight

    given, packer = numbers(), NunchakuWeightPacker(bits=4)
    scale = given["scale"].reshape(len(given["scale"]), 1, -1, 1)
    groups = given["awq_scale"].shape[1]
    columns = given["awq_codes"].shape[1] // groups
    weight = (given["awq_codes"].float() - 8) * given["awq_scale"].float().repeat_interleave(
        columns, 1
    )
    awq = convert_to_tinychat_w4x16y16_linear_weight(
        weight.to(torch.bfloat16), given["awq_scale"], 8 * given["awq_scale"].float()
    )
    made = {
        "codes": packer.pack_weight(given["codes"].to(torch.int32)),
        "scale": packer.pack_scale(scale, group_size=64),
        "vector": packer.pack_scale(given["vector"].reshape(-1, 1), group_size=-1),
        "down": packer.pack_lowrank_weight(given["down"], down=True),
        "up": packer.pack_lowrank_weight(given["up"], down=False),
        "awq_codes": awq[0].view(torch.int32),
        "awq_scale": awq[1][:groups],  # groups beyond these are padding
        "awq_zero": awq[2][:groups],
    }
    commit = subprocess.run(
        ["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    found = {
        "project": "mit-han-lab/deepcompressor",
        "commit": commit.stdout.strip(),
        "tensors": {name: digest(tensor) for name, tensor in made.items()},
    }
    ASSET.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
