# SPDX-License-Identifier: Apache-2.0
"""Fine-tuned blocks as tasks: an interrupted run continues at the first block that is missing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

from accelerate.utils import recursively_apply
from torch import Tensor, nn

from dtq.finetune.block_order import layers_of
from dtq.finetune.report import BlockReport, FinetuneConfig
from dtq.finetune.trainable import set_state, state_of
from dtq.io.checksum import checksum, digest
from dtq.nn.linear import QuantLinear
from dtq.pipelines.recorded_calls import RecordedCall
from dtq.runs.tasks import TaskStore

log = logging.getLogger("dtq")


class BlockTasks:
    """Results of the blocks of one fine-tuning run: their packed tensors and reports.

    Args:
        tasks: where they are stored; without a folder nothing is.
        fingerprint: of the run, see :func:`fingerprint`; results of another run are replaced.
    """

    def __init__(self, tasks: TaskStore, fingerprint: str) -> None:
        self.tasks, self.fingerprint = tasks, fingerprint
        self.resuming = True  # until the first block that has to be trained

    def get_or_train(
        self, index: int, model: nn.Module, train: Callable[[], BlockReport]
    ) -> BlockReport:
        """Load a finished block into the model, or train and store it.

        Args:
            index: position of the block in the order in which blocks run.
            model: with quantized linears in place; changed in place.
            train: trains the block in place.
        """
        task = f"block-{index}"
        self.resuming = self.resuming and task in self.tasks
        if self.resuming:
            stored, data = self.tasks.load(task)
            if data["fingerprint"] == self.fingerprint:
                report = BlockReport(**data["report"])
                self._load(model, report.name, stored)
                return report
            path = self.tasks.path(task)
            log.warning("finetune: %s is of another run; ignored and replaced", path)
            self.resuming = False
        report = train()
        if self.tasks.folder is not None:
            tensors = {
                f"{name}.{key}": tensor
                for name, layer in layers_of(model, report.name).items()
                for key, tensor in state_of(layer).items()
            }
            data = {"fingerprint": self.fingerprint, "report": asdict(report)}
            self.tasks.save(task, tensors, data)
        return report

    def _load(self, model: nn.Module, block: str, stored: Mapping[str, Tensor]) -> None:
        for name, layer in layers_of(model, block).items():
            state = {key: stored[f"{name}.{key}"] for key in state_of(layer)}
            set_state(layer, {key: t.to(layer.weight.device) for key, t in state.items()})
        log.info("finetune: %s was finished before, loaded", block)


def fingerprint(
    model: nn.Module,
    floats: Mapping[str, nn.Linear],
    calls: Sequence[RecordedCall],
    config: FinetuneConfig,
) -> str:
    """Digest of everything that a fine-tuning run depends on.

    Args:
        model: with quantized linears in place.
        floats: the float linears that they replaced, by dotted name.
        calls: recorded calls of the float model.
        config: the method and its knobs.
    """

    def chunks() -> Iterator[str]:
        yield json.dumps(asdict(config))
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                yield f"{name} {json.dumps(module.spec.to_json())}"
                for key, tensor in state_of(module).items():
                    yield f"{key} {checksum(tensor)}"
                yield str(checksum(floats[name].weight))
        for call in calls:
            tensors: list[Tensor] = []
            recursively_apply(tensors.append, (call.args, call.kwargs))
            yield from (str(checksum(tensor)) for tensor in tensors)

    return digest(chunk.encode() for chunk in chunks())
