# SPDX-License-Identifier: Apache-2.0
"""Finished blocks on disk: the same job goes on there after an interruption."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dtq.finetune.block_order import layers_of
from dtq.finetune.report import BlockReport, FinetuneConfig
from dtq.finetune.trainable import set_state, state_of
from dtq.io.atomic import atomic_replace, atomic_write
from dtq.nn.linear import QuantLinear
from dtq.pipelines.recorded_calls import RecordedCall

log = logging.getLogger("dtq")


class Shelf:
    """A folder with ``block-<i>.safetensors``, the parts of a finished block, and its report.

    The report is written last: where it is and names the same job, the block is done.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.current = True  # until the first block that is not there
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, i: int, model: nn.Module) -> BlockReport | None:
        """Put the parts of a finished block into the model; None when it is not finished."""
        tensors, about = self._files(i)
        self.current = self.current and about.exists() and tensors.exists()
        if not self.current:
            return None
        data = json.loads(about.read_text())
        if data["fingerprint"] != self.fingerprint:
            log.warning("refine: %s is of another job; ignored and replaced", self.folder)
            self.current = False
            return None
        report = BlockReport(**data["report"])
        stored = load_file(tensors)
        for name, layer in layers_of(model, report.name).items():
            state = {n: stored[f"{name}.{n}"] for n in state_of(layer)}
            set_state(layer, {n: t.to(layer.weight.device) for n, t in state.items()})
        log.info("refine: %s was finished before, loaded", report.name)
        return report

    def save(self, i: int, report: BlockReport, model: nn.Module) -> None:
        tensors, about = self._files(i)
        about.unlink(missing_ok=True)
        state = {
            f"{name}.{part}": tensor.detach().cpu().contiguous().clone()
            for name, layer in layers_of(model, report.name).items()
            for part, tensor in state_of(layer).items()
        }
        data = json.dumps({"fingerprint": self.fingerprint, "report": asdict(report)}, indent=1)
        atomic_replace(tensors, lambda path: save_file(state, path))
        atomic_write(about, data)

    def _files(self, i: int) -> tuple[Path, Path]:
        return self.folder / f"block-{i}.safetensors", self.folder / f"block-{i}.json"


def fingerprint(
    model: nn.Module,
    floats: Mapping[str, nn.Linear],
    calls: Sequence[RecordedCall],
    config: FinetuneConfig,
) -> str:
    """Of the method, the calls, and the quantized layers before and after they were."""
    digest = hashlib.sha256(json.dumps(asdict(config)).encode())
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            digest.update(f"{name} {json.dumps(module.spec.to_json())}".encode())
            for part, tensor in state_of(module).items():
                digest.update(f"{part} {_checksum(tensor)}".encode())
            digest.update(str(_checksum(floats[name].weight)).encode())
    for call in calls:
        recursively_apply(
            lambda t: digest.update(str(_checksum(t)).encode()), (call.args, call.kwargs)
        )
    return digest.hexdigest()


def _checksum(tensor: Tensor) -> int:
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(data)
