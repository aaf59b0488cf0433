# SPDX-License-Identifier: Apache-2.0
"""A fine-tuned block as a task: its state is stored, and loaded by the same run after a restart."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from accelerate.utils import recursively_apply
from torch import nn

from dtq.finetune.block_order import layers_of
from dtq.finetune.report import BlockReport, FinetuneConfig
from dtq.finetune.trainable import set_state, state_of
from dtq.io.checksum import bytes_digest, checksum
from dtq.nn.linear import QuantLinear
from dtq.pipelines.recorded_calls import RecordedCall
from dtq.runs.tasks import TaskStore

log = logging.getLogger("dtq")


def load_or_train(
    tasks: TaskStore | None, task: str, model: nn.Module, train: Callable[[], BlockReport]
) -> BlockReport:
    """Load the state of a finished block into the model, or train the block and store its state.

    Args:
        tasks: the store; without one, or without a folder, every block is trained.
        task: name of the block's task.
        model: changed in place.
        train: trains the block in the model.
    """
    if tasks is None or tasks.folder is None:
        return train()
    if task in tasks:
        tensors, data = tasks.load(task)
        report = BlockReport(**data)
        for name, layer in layers_of(model, report.name).items():
            state = {key: tensors[f"{name}.{key}"] for key in state_of(layer)}
            set_state(layer, {key: t.to(layer.weight.device) for key, t in state.items()})
        log.info("finetune: %s was finished before, loaded", report.name)
        return report
    report = train()
    state = {
        f"{name}.{key}": tensor
        for name, layer in layers_of(model, report.name).items()
        for key, tensor in state_of(layer).items()
    }
    tasks.save(task, state, asdict(report))
    return report


def fingerprint(
    model: nn.Module,
    floats: Mapping[str, nn.Linear],
    calls: Sequence[RecordedCall],
    config: FinetuneConfig,
) -> str:
    """Digest of everything that the result of fine-tuning depends on.

    Args:
        model: with quantized linears in place.
        floats: the float linears that they replaced, by name.
        calls: recorded calls of the float model.
        config: method and knobs.

    Returns:
        16 hex digits.
    """
    lines = [json.dumps(asdict(config))]
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            lines.append(f"{name} {json.dumps(module.spec.to_json())}")
            lines += [f"{key} {checksum(tensor)}" for key, tensor in state_of(module).items()]
            lines.append(str(checksum(floats[name].weight)))
    for call in calls:
        recursively_apply(lambda t: lines.append(str(checksum(t))), (call.args, call.kwargs))
    return bytes_digest("\n".join(lines).encode())[:16]
