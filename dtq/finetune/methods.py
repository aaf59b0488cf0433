# SPDX-License-Identifier: Apache-2.0
"""Methods ``(model, floats, calls, *, progress, tasks, **knobs) -> FinetuneReport``."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from dtq.errors import InputError
from dtq.finetune.block_order import in_order, layers_of
from dtq.finetune.report import BlockReport, FinetuneConfig, FinetuneReport
from dtq.finetune.resume import BlockTasks, fingerprint
from dtq.finetune.targets import Example, error, examples_of, split
from dtq.finetune.trainable import TrainableLinear, TrainableVq, set_state, state_of, trainable_of
from dtq.nn.swap import temporarily_replaced
from dtq.pipelines.recorded_calls import RecordedCall
from dtq.runs.tasks import TaskStore

log = logging.getLogger("dtq")


def blocks(
    model: nn.Module,
    floats: Mapping[str, nn.Linear],
    calls: Sequence[RecordedCall],
    *,
    progress: bool = True,
    tasks: TaskStore | None = None,
    steps: int = 100,
    lr: float = 0.05,
    lr_other: float = 0.02,
    clip: float = 1.0,
    seed: int = 0,
) -> FinetuneReport:
    """Train scales, lookup tables, codebooks, biases and low-rank branches.

    Integer weights and codebook indices are frozen.

    Args:
        model: with quantized linears in place, in evaluation mode. Changed in place.
        floats: the float linears that they replaced, by dotted name.
        calls: recorded calls of the float model.
        progress: show a progress bar.
        tasks: where finished blocks are stored; the same run continues there after an
            interruption.
        steps: optimizer steps per block, one call each.
        lr: of scales and tables, in units of their size and of the block's relative error: the
            rate is ``lr * sqrt(before)``, so that a block that is nearly right moves little.
        lr_other: of low-rank branches, in the same units, and of biases, in units of the layer's
            output and of that error.
        clip: largest gradient norm, of the error in units of the error before training.
        seed: of the order of the calls.

    Returns:
        What became of each block.

    Raises:
        InputError: there are no calls, or less than one step.
    """
    config = FinetuneConfig("blocks", steps, lr, lr_other, clip, seed)
    return _finetune(model, floats, calls, config, progress, tasks)


def vq4dit(
    model: nn.Module,
    floats: Mapping[str, nn.Linear],
    calls: Sequence[RecordedCall],
    *,
    progress: bool = True,
    tasks: TaskStore | None = None,
    steps: int = 100,
    lr: float = 0.05,
    lr_other: float = 0.02,
    clip: float = 1.0,
    seed: int = 0,
    candidates: int = 2,
    lr_logits: float = 0.2,
    ratio_penalty: float = 0.1,
) -> FinetuneReport:
    """VQ4DiT (2408.17131, sec. 3.2): :func:`blocks`, and codewords are assigned anew.

    Each sub-vector of a layer in a vector format mixes its ``n`` candidate codewords,
    ``W = sum_n r_n C[a_n]`` with ``r = softmax(z)``; codebook, biases and ``z`` learn together from
    the first step, on ``L_d + ratio_penalty * mean(1 - |2 r - 1|)``. A sub-vector is fixed when its
    largest ratio passes 0.99. Departures: the present codeword is a candidate and starts with
    nearly all of the mix, so that only a steady gradient moves a sub-vector (the paper starts
    uniform; a start near that left a block of the bundled model worse than k-means after 100
    steps); ``L_d`` is in units of the error before, with a smaller penalty on the ratios (lambda_r
    is 1 in the paper); whatever is not fixed after three quarters of the steps is fixed then; and
    Adam replaces RMSprop.

    Args:
        model: as for :func:`blocks`, and so are the arguments up to ``seed``.
        floats: the float linears, by dotted name.
        calls: recorded calls of the float model.
        progress: show a progress bar.
        tasks: where finished blocks are stored.
        steps: optimizer steps per block, one call each.
        lr: of scales, tables and codebooks.
        lr_other: of low-rank branches and biases.
        clip: largest gradient norm.
        seed: of the order of the calls.
        candidates: codewords per sub-vector, ``n``.
        lr_logits: learning rate of ``z``.
        ratio_penalty: weight of the term that drives ratios to 0 or 1.

    Returns:
        What became of each block.

    Raises:
        InputError: there are no calls, less than one step or less than two candidates.
    """
    if candidates < 2:
        raise InputError(f"vq4dit: candidates must be at least 2, is {candidates}")
    config = FinetuneConfig(
        "vq4dit", steps, lr, lr_other, clip, seed, candidates, lr_logits, ratio_penalty
    )
    return _finetune(model, floats, calls, config, progress, tasks)


def _finetune(
    model: nn.Module,
    floats: Mapping[str, nn.Linear],
    calls: Sequence[RecordedCall],
    config: FinetuneConfig,
    progress: bool,
    tasks: TaskStore | None,
) -> FinetuneReport:
    if not calls:
        raise InputError(f"finetune: {config.method} needs recorded calls of the float model")
    if config.steps < 1:
        raise InputError(f"finetune: {config.method} needs at least one step, got {config.steps}")
    names = in_order(model, calls[0])
    tasks = tasks or TaskStore()
    run = "" if tasks.folder is None else fingerprint(model, floats, calls, config)
    finished = BlockTasks(tasks, run)
    report = FinetuneReport(config.method)
    with tqdm(
        total=len(names) * config.steps,
        desc=f"finetune {config.method}",
        unit="step",
        disable=not progress,
        dynamic_ncols=True,
    ) as bar:
        for i, name in enumerate(names):
            train = partial(_train_block, model, name, floats, calls, config, config.seed + i, bar)
            block = finished.get_or_train(i, model, train)
            bar.update((i + 1) * config.steps - bar.n)
            errors = {"before": block.before, "after": block.after}
            bar.set_postfix({"block": name, **{k: f"{v:.2e}" for k, v in errors.items() if v}})
            report.blocks.append(block)
    return report


def _train_block(
    model: nn.Module,
    name: str,
    floats: Mapping[str, nn.Linear],
    calls: Sequence[RecordedCall],
    config: FinetuneConfig,
    seed: int,
    bar: Any,
) -> BlockReport:
    """Train one block, and keep the result if its error on the held-out calls is lower."""
    layers = layers_of(model, name)
    examples = examples_of(model, name, floats, calls)
    if not examples:
        return BlockReport(name, None, None, False, "no call reached it")
    train, held_out = split(examples)
    state_before = {n: state_of(layer) for n, layer in layers.items()}
    before = error(model.get_submodule(name), held_out or train)
    finite = math.isfinite(before)
    if finite:
        trainable = {n: trainable_of(layer, floats[n], config) for n, layer in layers.items()}
        with temporarily_replaced(model, trainable):
            block = model.get_submodule(name)
            finite = _train(block, list(trainable.values()), train, config, before, seed, bar)
    if not finite:
        log.warning("finetune: the error of %s is not finite; left as it was", name)
        return BlockReport(name, _finite_or_none(before), None, False, "non-finite error")
    for n, layer in layers.items():
        set_state(layer, trainable[n].state())
    after = error(model.get_submodule(name), held_out or train)
    if not after < before:
        for n, layer in layers.items():
            set_state(layer, state_before[n])
    log.info("finetune: %s from %.2e to %.2e", name, before, after)
    return BlockReport(name, _finite_or_none(before), _finite_or_none(after), after < before)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _train(
    block: nn.Module,
    trainable: Sequence[TrainableLinear],
    examples: Sequence[Example],
    config: FinetuneConfig,
    unit: float,
    seed: int,
    bar: Any,
) -> bool:
    """Adam with a cosine schedule, one call a step; False as soon as the loss is not finite."""
    vector_layers = [t for t in trainable if isinstance(t, TrainableVq)]
    vectors = sum(len(t.logits) for t in vector_layers)
    groups = [group for t in trainable for group in t.groups(config, math.sqrt(unit))]
    parameters = [p for group in groups for p in group["params"]]
    if not parameters:
        return True
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    order = _shuffled_forever(len(examples), seed)
    with _frozen(block, parameters), torch.enable_grad():
        for step in range(config.steps):
            example = examples[next(order)]
            loss = example.loss(block) / max(unit, 1e-30)
            for t in vector_layers:
                loss = loss + config.ratio_penalty * t.indecision() * len(t.logits) / vectors
            if not torch.isfinite(loss):
                return False
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            schedule.step()
            for t in vector_layers:
                t.fix(everything=step + 1 >= 0.75 * config.steps)
            bar.update()
    return True


def _shuffled_forever(count: int, seed: int) -> Iterator[int]:
    """Indices of a list over and over, each round in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@contextmanager
def _frozen(block: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only these parameters of the block have gradients meanwhile."""
    ids = {id(p) for p in trained}
    flags = [(p, p.requires_grad) for p in block.parameters() if id(p) not in ids]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
