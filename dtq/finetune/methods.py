# SPDX-License-Identifier: Apache-2.0
"""The methods: ``(model, floats, calls, **knobs) -> RefineReport``, and the loop over blocks."""

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
from dtq.finetune.resume import fingerprint, load_or_train
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
    """Train scales, lookup tables, codebooks, biases and low-rank branches; no code changes.

    Args:
        model: with quantized linears in place, in evaluation mode. Changed in place.
        floats: the float linears that they replaced, by dotted name.
        calls: of the float model.
        progress: show a progress bar.
        tasks: where finished blocks are stored; the same run continues there after an
            interruption. None: nowhere.
        steps: per block, one call each.
        lr: of scales and tables, in units of their size and of the block's relative error: the
            rate is ``lr * sqrt(before)``, so that a block which is nearly right moves little.
        lr_other: of low-rank branches, in the same units, and of biases, in units of the layer's
            output and of that error.
        clip: largest gradient norm, of the error in units of what it was before.
        seed: of the order of the calls.

    Raises:
        InputError: no calls, or less than one step.
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
    """VQ4DiT (2408.17131, sec. 3.2): as :func:`blocks`, and codewords are assigned again.

    Each sub-vector of a layer in a vector format mixes its ``n`` candidate codewords,
    ``W = sum_n r_n C[a_n]`` with ``r = softmax(z)``. Codebook, biases and ``z`` learn together from
    the first step, on ``L_d + ratio_penalty * mean(1 - |2 r - 1|)``. A sub-vector is fixed when its
    largest ratio passes 0.99.

    Departures from the paper: the current codeword is a candidate and starts with nearly all of the
    mix, so that only a steady gradient moves a sub-vector (from a uniform start, as in the paper, a
    block of the bundled model was worse than k-means after 100 steps). ``L_d`` is in units of the
    error before training. The penalty on the ratios is smaller (lambda_r is 1 in the paper). After
    three quarters of the steps every sub-vector is fixed. Adam replaces RMSprop.

    Args:
        candidates: codewords per sub-vector, ``n``.
        lr_logits: of ``z``.
        ratio_penalty: weight of the term that makes ratios 0 or 1.

    The other arguments are those of :func:`blocks`.

    Raises:
        InputError: no calls, less than one step or less than two candidates.
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
    stored = tasks is not None and tasks.folder is not None
    key = fingerprint(model, floats, calls, config) if stored else ""
    report = FinetuneReport(config.method)
    with tqdm(
        total=len(names) * config.steps, desc=f"finetune {config.method}",
        unit="step", disable=not progress, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        for i, name in enumerate(names):
            train = partial(
                _finetune_block, model, name, floats, calls, config, config.seed + i, bar
            )
            done = load_or_train(tasks, f"{key}/block-{i}", model, train)
            bar.update((i + 1) * config.steps - bar.n)
            errors = (("before", done.before), ("after", done.after))
            bar.set_postfix({"block": name, **{k: f"{v:.2e}" for k, v in errors if v}})
            report.blocks.append(done)
    return report


def _finetune_block(
    model: nn.Module,
    name: str,
    floats: Mapping[str, nn.Linear],
    calls: Sequence[RecordedCall],
    config: FinetuneConfig,
    seed: int,
    bar: Any,
) -> BlockReport:
    """Train one block, judge it, keep the better parts."""
    layers = layers_of(model, name)
    examples = examples_of(model, name, floats, calls)
    if not examples:
        return BlockReport(name, None, None, False, "no call reached it")
    train, held = split(examples)
    kept = {n: state_of(layer) for n, layer in layers.items()}
    before = error(model.get_submodule(name), held or train)
    finite = math.isfinite(before)
    if finite:
        trainees = {n: trainable_of(layer, floats[n], config) for n, layer in layers.items()}
        with temporarily_replaced(model, trainees):
            block = model.get_submodule(name)
            finite = _train(block, list(trainees.values()), train, config, before, seed, bar)
    if not finite:
        log.warning("finetune: the error of %s is not finite; left as it was", name)
        return BlockReport(name, _finite(before), None, False, "non-finite error")
    for n, layer in layers.items():
        set_state(layer, trainees[n].state())
    after = error(model.get_submodule(name), held or train)
    if not after < before:
        for n, layer in layers.items():
            set_state(layer, kept[n])
    log.info("finetune: %s from %.2e to %.2e", name, before, after)
    return BlockReport(name, _finite(before), _finite(after), after < before)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _train(
    block: nn.Module,
    trainees: Sequence[TrainableLinear],
    examples: Sequence[Example],
    config: FinetuneConfig,
    unit: float,
    seed: int,
    bar: Any,
) -> bool:
    """Adam with a cosine schedule, one call a step; False as soon as the loss is not finite."""
    soft = [t for t in trainees if isinstance(t, TrainableVq)]
    vectors = sum(len(t.logits) for t in soft)
    groups = [group for t in trainees for group in t.groups(config, math.sqrt(unit))]
    chosen = [p for group in groups for p in group["params"]]
    if not chosen:
        return True
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    order = _cycled(len(examples), seed)
    with _frozen(block, chosen), torch.enable_grad():
        for step in range(config.steps):
            example = examples[next(order)]
            loss = example.loss(block) / max(unit, 1e-30)
            for t in soft:
                loss = loss + config.ratio_penalty * t.indecision() * len(t.logits) / vectors
            if not torch.isfinite(loss):
                return False
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(chosen, config.clip)
            optimizer.step()
            schedule.step()
            for t in soft:
                t.fix(everything=step + 1 >= 0.75 * config.steps)
            bar.update()
    return True


def _cycled(count: int, seed: int) -> Iterator[int]:
    """Places in a list over and over, each round in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@contextmanager
def _frozen(block: nn.Module, but: Sequence[nn.Parameter]) -> Iterator[None]:
    """Nothing of the block learns but these."""
    learn = {id(p) for p in but}
    flags = [(p, p.requires_grad) for p in block.parameters() if id(p) not in learn]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
