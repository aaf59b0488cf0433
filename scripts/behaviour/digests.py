# SPDX-License-Identifier: Apache-2.0
"""What a folder or a report holds, as entries: a name and a text with digests.

Texts that differ are split at "; ", and only the parts that differ are shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORDS = {
    "weights": "weight_format", "acts": "activation_format", "block": "hadamard_block_size",
    "turns": "num_rotations", "permute": "permutation", "pre_quant_order": "pre_quant_perm",
}  # fmt: skip
"""Keys of the entries of ``layers`` in ``config.json``, and parts of layers."""
FORMAT_NAMES = {"int8-step": "int8-static-timestep"}
"""Formats with another name."""
VERDICTS = ("pass", "regression", "inconclusive", "invalid")


def sha(data: bytes | str) -> str:
    """The first half of a SHA-256."""
    data = data.encode() if isinstance(data, str) else data
    return hashlib.sha256(data).hexdigest()[:32]


def canonical(value: Any, key: str = "") -> Any:
    """JSON with the new names."""
    if isinstance(value, dict):
        return {WORDS.get(k, k): canonical(v, WORDS.get(k, k)) for k, v in value.items()}
    if isinstance(value, str) and key in ("weight_format", "activation_format"):
        return FORMAT_NAMES.get(value, value)
    return value


def leaves(value: Any) -> Iterator[Any]:
    """Everything in JSON that has no parts."""
    below = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list):
        for each in below:
            yield from leaves(each)
    else:
        yield value


def tensors(path: Path) -> dict[str, str]:
    """Name -> dtype, shape and digest of every tensor in a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, spec in json.loads(data[8:start]).items():
        if name not in ("__metadata__", "dtq_checksums"):
            low, high = spec["data_offsets"]
            shape = "x".join(map(str, spec["shape"]))
            found[name] = f"{spec['dtype']} {shape} {sha(data[start + low : start + high])}"
    return found


def metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__", {})


def numbers(value: Any, label: str, depth: int = 3) -> dict[str, str]:
    """Digests of the floats and verdicts in a report: by key, and by name in lists."""
    if depth and isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        parts, depth = {v.get("name", i): v for i, v in enumerate(value)}, 1
    elif depth and isinstance(value, dict):
        parts = value
    else:
        found = sorted(repr(v) for v in leaves(value) if isinstance(v, float) or v in VERDICTS)
        return {label: f"{len(found)} values {sha(' '.join(found))}"} if found else {}
    below = [numbers(v, f"{label} {key}", depth - 1) for key, v in parts.items()]
    return {name: text for each in below for name, text in each.items()}


def checkpoint_entries(folder: Path) -> dict[str, str]:
    """Every quantized layer of a folder, with its entry in ``config.json``, and everything else."""
    found: dict[str, str] = {}
    quantized = []
    for path in sorted(folder.rglob("config.json")):
        config = json.loads(path.read_text())
        plan = config.pop("quantization_config", None)
        if plan is None:
            continue
        quantized.append(path.parent)
        weights: dict[str, str] = {}
        for file in sorted(path.parent.glob("*.safetensors")):
            weights |= tensors(file)
        where = path.parent.name if path.parent != folder else "model"
        for layer, entry in plan.pop("layers").items():
            texts = [f"{k}={v}" for k, v in canonical(entry).items()]
            for name in [n for n in weights if n.rpartition(".")[0] == layer]:
                part = name.rpartition(".")[2]
                texts.append(f"{WORDS.get(part, part)} {weights.pop(name)}")
            found[f"{where} {layer}"] = "; ".join(sorted(texts))
        found[f"{where} other tensors"] = f"{len(weights)} {sha(repr(sorted(weights.items())))}"
        plan.pop("format_version")
        found[f"{where} config"] = json.dumps(canonical(plan), sort_keys=True)
        found[f"{where} model config"] = sha(json.dumps(config, sort_keys=True))
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"):
        if path.name == "dtq_report.json":
            found |= numbers(json.loads(path.read_text()), "report")
        elif path.name.startswith("dtq_call"):
            values = sorted(map(str, leaves(json.loads(path.read_text()))))
            found["file dtq_call"] = ", ".join(values)
        elif path.parent not in quantized:
            found[f"file {path.relative_to(folder)}"] = sha(path.read_bytes())
    return found


def picture_entries(folder: Path) -> dict[str, str]:
    """Pixels of pictures in a folder."""
    from PIL import Image

    found = {}
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as image:
            pixels = sha(image.convert("RGBA").tobytes())
            found[f"picture {path.relative_to(folder)}"] = f"{image.size} {pixels}"
    return found


def file_digests(folder: Path) -> dict[str, str]:
    """Every file of a folder, bytes as they are."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): sha(p.read_bytes()) for p in files}
