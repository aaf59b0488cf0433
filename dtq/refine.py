# SPDX-License-Identifier: Apache-2.0
"""``REFINE``: train what is continuous in a quantized model, block by block, against the float one.

Blocks are visited in the order in which they run. A block reads what the quantized model, refined
so far, gives it, and is to return what the float model returns there on its own trajectory: it
learns to undo the error of the blocks before it. Calls are teacher-forced, as in VQ4DiT
(2408.17131, sec. 3.3). A held-out share of the calls judges: new parts stay only where they bring
the block nearer to the float one, so no block gets worse on its own objective.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate.utils import recursively_apply, send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from dtq.errors import InputError
from dtq.formats import Parts
from dtq.formats.acts import ACTS, MODES, Acts, fake_quantize, row_codes
from dtq.formats.base import divide
from dtq.formats.bits import pack_bits, unpack_bits
from dtq.formats.vq import Vq
from dtq.nn.linear import QuantLinear, StepClock

log = logging.getLogger("dtq")

HELD_OUT = 8
"""One call in so many judges and is not trained on."""

SURE = 0.99
"""A sub-vector whose largest ratio is above this has found its codeword (VQ4DiT, sec. 3.2)."""

LEAD = 4.0
"""First logit of the present codeword, the other candidates' being 0."""


class Recorded(Protocol):
    """A call of the float model, on the CPU: ``dtq.evaluate.drift.Recorded`` is one."""

    @property
    def args(self) -> tuple[Any, ...]: ...
    @property
    def kwargs(self) -> dict[str, Any]: ...


@dataclass
class BlockReport:
    """How one block came out.

    Attributes:
        name: dotted path.
        before: relative squared error of its outputs on the judging calls, summed over outputs.
        after: the same with the trained parts, whether or not they were accepted.
        accepted: whether they were.
        note: why not, when it is not the error.

    An error that is not a finite number is None.
    """

    name: str
    before: float | None
    after: float | None
    accepted: bool
    note: str = ""


@dataclass
class RefineReport:
    """How every block came out, in the order in which they run."""

    method: str
    blocks: list[BlockReport] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


# --- the methods -----------------------------------------------------------------------------


def blocks(
    model: nn.Module,
    floats: Mapping[str, nn.Linear],
    calls: Sequence[Recorded],
    *,
    progress: bool = True,
    save: Path | None = None,
    steps: int = 100,
    lr: float = 0.05,
    lr_rest: float = 0.02,
    clip: float = 1.0,
    seed: int = 0,
) -> RefineReport:
    """Train scales, lookup tables, codebooks, biases and low-rank branches; no code changes.

    Args:
        model: with quantized linears in place, in evaluation mode. Changed in place.
        floats: the float linears that they replaced, by dotted name.
        calls: of the float model.
        progress: show a progress bar.
        save: folder for finished blocks; the same job continues there after an interruption.
        steps: per block, one call each.
        lr: of scales and tables, in units of their size and of the block's relative error: the
            rate is ``lr * sqrt(before)``, so that a block which is nearly right moves little.
        lr_rest: of low-rank branches, in the same units, and of biases, in units of the layer's
            output and of that error.
        clip: largest gradient norm, of the error in units of what it was before.
        seed: of the order of the calls.

    Raises:
        InputError: no calls, or less than one step.
    """
    how = _How("blocks", steps, lr, lr_rest, clip, seed)
    return _refine(model, floats, calls, how, progress, save)


def vq4dit(
    model: nn.Module,
    floats: Mapping[str, nn.Linear],
    calls: Sequence[Recorded],
    *,
    progress: bool = True,
    save: Path | None = None,
    steps: int = 100,
    lr: float = 0.05,
    lr_rest: float = 0.02,
    clip: float = 1.0,
    seed: int = 0,
    candidates: int = 2,
    lr_logits: float = 0.2,
    pull: float = 0.1,
) -> RefineReport:
    """VQ4DiT (2408.17131, sec. 3.2): :func:`blocks`, and codewords are chosen again with them.

    Each sub-vector of a layer in a vector format mixes its ``n`` candidate codewords,
    ``W = sum_n r_n C[a_n]`` with ``r = softmax(z)``; codebook, biases and ``z`` learn together from
    the first step, on ``L_d + pull * mean(1 - |2 r - 1|)``. A sub-vector is fixed when its largest
    ratio passes 0.99. Departures: the present codeword is a candidate and starts with nearly all of
    the mix, so that only a steady gradient moves a sub-vector (the paper starts uniform; a start
    near that left a block of the bundled model worse than k-means after 100 steps); ``L_d`` is in
    units of the error before, with less pull on the ratios (lambda_r is 1 in the paper); whatever
    is not fixed after three quarters of the steps is fixed then; and Adam replaces RMSprop.

    Args:
        candidates: codewords per sub-vector, ``n``.
        lr_logits: of ``z``.
        pull: weight of the term that makes ratios 0 or 1.

    The other arguments are those of :func:`blocks`.

    Raises:
        InputError: no calls, less than one step or less than two candidates.
    """
    if candidates < 2:
        raise InputError(f"vq4dit: candidates must be at least 2, is {candidates}")
    how = _How("vq4dit", steps, lr, lr_rest, clip, seed, candidates, lr_logits, pull)
    return _refine(model, floats, calls, how, progress, save)


REFINE: dict[str, Callable[..., RefineReport]] = {"blocks": blocks, "vq4dit": vq4dit}


@dataclass(frozen=True)
class _How:
    """A method and its knobs."""

    method: str
    steps: int
    lr: float
    lr_rest: float
    clip: float
    seed: int
    candidates: int = 0
    lr_logits: float = 0.0
    pull: float = 0.0


def _refine(
    model: nn.Module,
    floats: Mapping[str, nn.Linear],
    calls: Sequence[Recorded],
    how: _How,
    progress: bool,
    save: Path | None,
) -> RefineReport:
    if not calls:
        raise InputError(f"refine: {how.method} needs recorded calls of the float model")
    if how.steps < 1:
        raise InputError(f"refine: {how.method} needs at least one step, got {how.steps}")
    names = in_order(model, calls[0])
    shelf = _Shelf(save, _fingerprint(model, floats, calls, how)) if save is not None else None
    report = RefineReport(how.method)
    with tqdm(
        total=len(names) * how.steps,
        desc=f"refine {how.method}",
        unit="step",
        disable=not progress,
        dynamic_ncols=True,
    ) as bar:
        for i, name in enumerate(names):
            done = shelf.load(i, model) if shelf is not None else None
            if done is None:
                done = _refine_block(model, name, floats, calls, how, how.seed + i, bar)
                if shelf is not None:
                    shelf.save(i, done, model)
            bar.update((i + 1) * how.steps - bar.n)
            shown = {
                k: f"{v:.2e}" for k, v in (("before", done.before), ("after", done.after)) if v
            }
            bar.set_postfix({"block": name, **shown})
            report.blocks.append(done)
    return report


def _refine_block(
    model: nn.Module,
    name: str,
    floats: Mapping[str, nn.Linear],
    calls: Sequence[Recorded],
    how: _How,
    seed: int,
    bar: Any,
) -> BlockReport:
    """Train one block, judge it, keep the better parts."""
    layers = layers_of(model, name)
    examples = _examples(model, name, floats, calls)
    if not examples:
        return BlockReport(name, None, None, False, "no call reached it")
    train, held = _split(examples)
    kept = {n: _state(layer) for n, layer in layers.items()}
    before = error(model.get_submodule(name), held or train)
    finite = math.isfinite(before)
    if finite:
        trainees = {n: _trainee(layer, floats[n], how) for n, layer in layers.items()}
        with placed(model, trainees):
            block = model.get_submodule(name)
            finite = _train(block, list(trainees.values()), train, how, before, seed, bar)
    if not finite:
        log.warning("refine: the error of %s is not finite; left as it was", name)
        return BlockReport(name, _finite(before), None, False, "non-finite error")
    for n, layer in layers.items():
        _set_state(layer, trainees[n].state())
    after = error(model.get_submodule(name), held or train)
    if not after < before:
        for n, layer in layers.items():
            _set_state(layer, kept[n])
    log.info("refine: %s from %.2e to %.2e", name, before, after)
    return BlockReport(name, _finite(before), _finite(after), after < before)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _train(
    block: nn.Module,
    trainees: Sequence[Trainee],
    examples: Sequence[Example],
    how: _How,
    unit: float,
    seed: int,
    bar: Any,
) -> bool:
    """Adam with a cosine schedule, one call a step; False as soon as the loss is not finite."""
    soft = [t for t in trainees if isinstance(t, VectorTrainee)]
    vectors = sum(len(t.logits) for t in soft)
    groups = [group for t in trainees for group in t.groups(how, math.sqrt(unit))]
    chosen = [p for group in groups for p in group["params"]]
    if not chosen:
        return True
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    order = _cycled(len(examples), seed)
    with _frozen(block, chosen), torch.enable_grad():
        for step in range(how.steps):
            example = examples[next(order)]
            loss = example.loss(block) / max(unit, 1e-30)
            for t in soft:
                loss = loss + how.pull * t.indecision() * len(t.logits) / vectors
            if not torch.isfinite(loss):
                return False
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(chosen, how.clip)
            optimizer.step()
            schedule.step()
            for t in soft:
                t.fix(everything=step + 1 >= 0.75 * how.steps)
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


# --- what learns -----------------------------------------------------------------------------


class Trainee(nn.Linear):
    """A quantized linear whose float parts learn, computed in float32.

    Every part is ``start * exp(d)`` (scales, which keep their sign) or ``start + unit * d``, with
    ``d`` from zero: one learning rate fits all. It is rounded to the stored dtype on the way, the
    gradient passing straight through, as it does through the rounding of activations.
    """

    def __init__(self, layer: QuantLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        # what code that looks at a linear finds there; neither learns
        self.weight, self.bias = layer.weight, layer.bias
        self._layer = [layer]  # in a list: not a submodule
        self.dtypes = {n: s.dtype for n, s in layer.specs().items() if _learns(n, s.dtype)}
        self.start = {n: layer.part(n).detach().float() for n in self.dtypes}
        self.unit = {n: _rms(t) for n, t in self.start.items()}
        if layer.bias is not None:
            self.dtypes["bias"] = layer.bias.dtype
            self.start["bias"] = layer.bias.detach().float().clone()
            # the size of an output when the input's is one
            self.unit["bias"] = _rms(layer.dequantize(torch.float32)) * self.in_features**0.5
        self.moves = nn.ParameterDict({n: torch.zeros_like(t) for n, t in self.start.items()})

    @property
    def layer(self) -> QuantLinear:
        return self._layer[0]

    def groups(self, how: _How, reach: float) -> list[dict[str, Any]]:
        """Parameters and their learning rates, for the optimizer; ``reach`` is sqrt(before)."""
        main = [p for n, p in self.moves.items() if n.startswith("weight_")]
        rest = [p for n, p in self.moves.items() if not n.startswith("weight_")]
        groups = [
            {"params": main, "lr": how.lr * reach},
            {"params": rest, "lr": how.lr_rest * reach},
        ]
        return [group for group in groups if group["params"]]

    def forward(self, x: Tensor) -> Tensor:
        """float (..., K) to (..., N) in the dtype of ``x``."""
        rows = x.reshape(-1, self.in_features).float()  # (M, K)
        changed = self.layer.transform().x(rows)
        with torch.no_grad():
            rounded = self._rounded(changed)
        y = F.linear(_straight(rounded, changed), self.matrix())  # (M, N)
        if self.layer.runtime.rank:
            y = y + F.linear(F.linear(rows, self.now("proj_down")), self.now("proj_up"))
        if "bias" in self.moves:
            y = y + self.now("bias")
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def matrix(self) -> Tensor:
        """The weight (N, K) of the changed input."""
        fmt = self.layer.task.weights
        parts = {n: self.layer.part(n) for n in fmt.layout((self.out_features, self.in_features))}
        return fmt.unpack(parts | {n: self.now(n) for n in parts if n in self.moves})

    def now(self, name: str) -> Tensor:
        """A part with the value it is stored with, float32."""
        start, move = self.start[name], self.moves[name]
        positive = "scale" in name
        value = start * move.exp() if positive else start + self.unit[name] * move
        return _straight(_cast(value, self.dtypes[name]).float(), value)

    def state(self) -> Parts:
        """Every stored part and the bias, with on-disk dtypes."""
        with torch.no_grad():
            found = {n: _cast(self.now(n), dtype) for n, dtype in self.dtypes.items()}
        return self.layer.parts() | found

    def _rounded(self, changed: Tensor) -> Tensor:
        """The changed input (M, K) as the layer's product sees it."""
        acts = _acts_now(self.layer)
        if not acts.static:
            return fake_quantize(changed, acts)
        scale = self.layer._step_scale()
        return row_codes(changed, scale, acts.levels) * scale


class VectorTrainee(Trainee):
    """The same for a vector format, each sub-vector a mix of candidate codewords.

    Args:
        layer: in a vector format: parts ``weight_lut`` (k, d), ``weight``, maybe ``weight_scale``.
        weight: the float weight (N, K) of the raw input.
        candidates: codewords per sub-vector.
    """

    def __init__(self, layer: QuantLinear, weight: Tensor, candidates: int) -> None:
        super().__init__(layer)
        target = layer.transform().w(weight.detach().float().to(layer.weight.device))
        if layer.runtime.rank:
            target = target - self.start["proj_up"] @ layer.transform().w(self.start["proj_down"])
        if "weight_scale" in self.start:
            target = divide(target, self.start["weight_scale"])
        codebook = self.start["weight_lut"]  # (k, d)
        vectors = target.reshape(-1, codebook.shape[1])  # (S, d)
        self.options = _candidates(vectors, codebook, codewords(layer), candidates)  # (S, n)
        logits = torch.zeros_like(self.options, dtype=torch.float32)
        logits[:, 0] = LEAD
        self.logits = nn.Parameter(logits)  # (S, n)

    def groups(self, how: _How, reach: float) -> list[dict[str, Any]]:
        return [*super().groups(how, reach), {"params": [self.logits], "lr": how.lr_logits}]

    def matrix(self) -> Tensor:
        words = F.embedding(self.options, self.now("weight_lut"))  # (S, n, d)
        mixed = (self.logits.softmax(1).unsqueeze(-1) * words).sum(1)  # (S, d)
        w = mixed.reshape(self.out_features, self.in_features)
        return w * self.now("weight_scale") if "weight_scale" in self.moves else w

    def indecision(self) -> Tensor:
        """``mean(1 - |2 r - 1|)``, the paper's L_r: zero when every ratio is 0 or 1."""
        return (1 - (2 * self.logits.softmax(1) - 1).abs()).mean()

    @torch.no_grad()
    def fix(self, everything: bool = False) -> None:
        """Give the sub-vectors that are sure, or all, to their best candidate for good."""
        ratios = self.logits.softmax(1)
        sure = (ratios.amax(1) > SURE) | everything  # (S,)
        # minus infinity: no gradient and no momentum brings a candidate back
        alone = torch.full_like(ratios, -math.inf).scatter_(1, ratios.argmax(1, True), 0.0)
        self.logits.copy_(torch.where(sure.unsqueeze(1), alone, self.logits))

    def state(self) -> Parts:
        best = self.options.gather(1, self.logits.argmax(1, True)).reshape(-1)
        return super().state() | {"weight": with_codewords(self.layer, best)}


def _trainee(layer: QuantLinear, linear: nn.Linear, how: _How) -> Trainee:
    if how.candidates and isinstance(layer.task.weights, Vq):
        return VectorTrainee(layer, linear.weight, how.candidates)
    return Trainee(layer)


def codewords(layer: QuantLinear) -> Tensor:
    """The codeword of each sub-vector, int64 (S,), of a layer in a vector format."""
    return unpack_bits(layer.part("weight"), _bits(layer)).reshape(-1).long()


def with_codewords(layer: QuantLinear, chosen: Tensor) -> Tensor:
    """The stored ``weight`` in which sub-vector s has codeword ``chosen[s]``."""
    return pack_bits(chosen.reshape(layer.out_features, -1), _bits(layer))


def _bits(layer: QuantLinear) -> int:
    return (len(layer.part("weight_lut")) - 1).bit_length()


def _candidates(vectors: Tensor, codebook: Tensor, now: Tensor, count: int) -> Tensor:
    """The present codeword, then the nearest others; int64 (S, n)."""
    count = min(count, len(codebook))
    found = []
    for some, mine in zip(vectors.split(65536), now.split(65536), strict=True):
        distance = torch.cdist(some, codebook)  # (s, k)
        distance.scatter_(1, mine.unsqueeze(1), -1.0)
        found.append(distance.topk(count, largest=False).indices)
    return torch.cat(found)


def _learns(name: str, dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and name.startswith(("weight_", "proj_"))


def _acts_now(layer: QuantLinear) -> Acts:
    """The activation format of this step: the layer's, or what a step policy says."""
    acts: Acts = layer.task.acts
    if layer._clock and layer._clock[0].modes and acts.bits < 16:
        clock = layer._clock[0]
        return ACTS[MODES[clock.modes[int(clock.mode)]] or acts.name]
    return acts


def _straight(value: Tensor, through: Tensor) -> Tensor:
    """``value`` exactly, with the gradient of ``through``."""
    return value.detach() + (through - through.detach())


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a narrower dtype; what is too large takes its largest number."""
    largest = torch.finfo(dtype).max
    return value.detach().clamp(-largest, largest).to(dtype)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _state(layer: QuantLinear) -> Parts:
    """Every stored part, and a copy of the bias."""
    bias = {} if layer.bias is None else {"bias": layer.bias.detach().clone()}
    return layer.parts() | bias


@torch.no_grad()
def _set_state(layer: QuantLinear, state: Mapping[str, Tensor]) -> None:
    layer.fill({n: t for n, t in state.items() if n != "bias"})
    if layer.bias is not None:
        layer.bias.copy_(state["bias"])


# --- what it learns from ---------------------------------------------------------------------


@dataclass
class Example:
    """One call of a block: what it is given and what it should return, on the CPU.

    Attributes:
        want: the floating tensors of the float model's output.
        moment: bin and mode of the step clock, when there is one.
        clock: to be set to it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    want: list[Tensor]
    moment: tuple[Tensor, Tensor] | None = None
    clock: StepClock | None = None

    def loss(self, block: nn.Module) -> Tensor:
        """``sum |got - want|^2 / |want|^2`` over the outputs, float32 scalar."""
        device = next(block.parameters()).device
        if self.clock is not None and self.moment is not None:
            self.clock.bin.copy_(self.moment[0])
            self.clock.mode.copy_(self.moment[1])
        got = _tensors(
            block(*send_to_device(self.args, device), **send_to_device(self.kwargs, device))
        )
        total = torch.zeros((), device=device)
        for mine, theirs in zip(got, self.want, strict=True):
            target = theirs.to(device).float()
            miss = (mine.float() - target).square().sum()
            total = total + miss / target.square().sum().clamp(min=1e-30)
        return total


@torch.no_grad()
def error(block: nn.Module, examples: Sequence[Example]) -> float:
    """Mean loss over the examples."""
    return sum(float(example.loss(block)) for example in examples) / len(examples)


def _split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Calls to train on and calls to judge by, these spread evenly; none of one call."""
    if len(examples) < 2:
        return examples, []
    count = max(1, len(examples) // HELD_OUT)
    held = {(2 * i + 1) * len(examples) // (2 * count) for i in range(count)}
    train = [example for i, example in enumerate(examples) if i not in held]
    return train, [examples[i] for i in sorted(held)]


class _Reached(Exception):
    """Ends a forward as soon as what was wanted of it is there."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def _examples(
    model: nn.Module, name: str, floats: Mapping[str, nn.Linear], calls: Sequence[Recorded]
) -> list[Example]:
    """Inputs of the block in the quantized model, outputs of the same in the float one.

    Of a block that runs several times in a forward, the first time.
    """
    layers = layers_of(model, name).values()
    clock = next((layer._clock[0] for layer in layers if layer._clock), None)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        moment = None if clock is None else (clock.bin.clone(), clock.mode.clone())
        raise _Reached(Example(_copied(args), _copied(kwargs), [], moment, clock))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached([_copied(t) for t in _tensors(output)])

    block = model.get_submodule(name)
    handle = block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        given = [_reach(model, call) for call in calls]
    finally:
        handle.remove()
    with placed(model, floats):
        handle = model.get_submodule(name).register_forward_hook(leave, prepend=True)
        try:
            wanted = [_reach(model, call) for call in calls]
        finally:
            handle.remove()
    examples = []
    for example, want in zip(given, wanted, strict=True):
        if example is not None and want is not None:
            example.want = want
            examples.append(example)
    return examples


@torch.no_grad()
def _reach(model: nn.Module, call: Recorded) -> Any:
    """Run a call until something is reached; None when nothing is."""
    device = next(model.parameters()).device
    try:
        model(*send_to_device(call.args, device), **send_to_device(call.kwargs, device))
    except _Reached as reached:
        return reached.value
    return None


def _tensors(output: Any) -> list[Tensor]:
    """The floating tensors in a block's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for each in output for tensor in _tensors(each)]
    return []


def _copied(value: Any) -> Any:
    return recursively_apply(lambda t: t.detach().cpu().clone(), value)


# --- where the blocks are --------------------------------------------------------------------


def find(model: nn.Module) -> list[str]:
    """Names of the elements of the outermost module lists that have quantized linears."""
    found: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for key, child in module.named_children():
            name = f"{prefix}{key}"
            plain = not isinstance(child, nn.ModuleList | nn.ModuleDict)
            if not (isinstance(module, nn.ModuleList) and plain):
                visit(child, f"{name}.")
            elif any(isinstance(m, QuantLinear) for m in child.modules()):
                found.append(name)

    visit(model, "")
    return found


def in_order(model: nn.Module, call: Recorded) -> list[str]:
    """The blocks that a call runs, the first one first."""
    seen: dict[str, None] = {}
    names = find(model)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name)
        )
        for name in names
    ]
    try:
        _reach(model, call)
    finally:
        for handle in handles:
            handle.remove()
    if left := [name for name in names if name not in seen]:
        log.warning("refine: the first call does not run %s; left as they are", ", ".join(left))
    return list(seen)


def layers_of(model: nn.Module, name: str) -> dict[str, QuantLinear]:
    """The quantized linears of a block, by dotted name in the model."""
    return {
        f"{name}.{inner}".rstrip("."): module
        for inner, module in model.get_submodule(name).named_modules()
        if isinstance(module, QuantLinear)
    }


@contextmanager
def placed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules in place of some, by dotted name, on the device of those they replace."""
    before = {name: model.get_submodule(name) for name in modules}
    homes = {name: _device(module) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module.to(_device(before[name])))
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
        for name, module in modules.items():
            module.to(homes[name])


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


# --- finished blocks on disk -----------------------------------------------------------------


class _Shelf:
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
            state = {n: stored[f"{name}.{n}"] for n in _state(layer)}
            _set_state(layer, {n: t.to(layer.weight.device) for n, t in state.items()})
        log.info("refine: %s was finished before, loaded", report.name)
        return report

    def save(self, i: int, report: BlockReport, model: nn.Module) -> None:
        tensors, about = self._files(i)
        about.unlink(missing_ok=True)
        state = {
            f"{name}.{part}": tensor.detach().cpu().contiguous().clone()
            for name, layer in layers_of(model, report.name).items()
            for part, tensor in _state(layer).items()
        }
        data = json.dumps({"fingerprint": self.fingerprint, "report": asdict(report)}, indent=1)
        _replace(tensors, lambda path: save_file(state, path))
        _replace(about, lambda path: path.write_text(data))

    def _files(self, i: int) -> tuple[Path, Path]:
        return self.folder / f"block-{i}.safetensors", self.folder / f"block-{i}.json"


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, then move it there: it is whole or absent."""
    draft = path.with_name(path.name + ".part")
    write(draft)
    os.replace(draft, path)


def _fingerprint(
    model: nn.Module, floats: Mapping[str, nn.Linear], calls: Sequence[Recorded], how: _How
) -> str:
    """Of the method, the calls, and the quantized layers before and after they were."""
    digest = hashlib.sha256(json.dumps(asdict(how)).encode())
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            digest.update(f"{name} {json.dumps(module.runtime.to_json())}".encode())
            for part, tensor in _state(module).items():
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
