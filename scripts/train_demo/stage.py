# SPDX-License-Identifier: Apache-2.0
"""One training stage of a bundled model: seeded, with averaged weights, resumable at any time."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn


def prepare(work: Path, threads: int) -> str:
    """Make the folder of state files, and choose the device.

    Args:
        work: the folder.
        threads: of the CPU; 0 for torch's default.

    Returns:
        ``cuda`` if there is a GPU, else ``cpu``.
    """
    if threads:
        torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    return "cuda" if torch.cuda.is_available() else "cpu"


class Run:
    """One training stage: optimizer, learning rate schedule, averaged weights, saving and resuming.

    Args:
        name: of the stage and of its state file.
        model: trained in place.
        work: folder of state files; an existing state is loaded.
        steps: total number of steps.
        lr: peak learning rate, after 200 steps of warm-up and before the cosine decay.
        muon: whether hidden matrices are trained with Muon instead of AdamW; or a function that
            decides by the name of a matrix whether it is hidden.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        work: Path,
        steps: int,
        lr: float,
        muon: bool | Callable[[str], bool] = False,
    ) -> None:
        self.name, self.model, self.steps, self.lr = name, model, steps, lr
        self.path = work / f"{name}.pt"
        self.average = copy.deepcopy(model).requires_grad_(False)
        hidden = muon if callable(muon) else _is_hidden if muon else None
        self.optimizers = _optimizers(model, lr, hidden)
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            if len(state["optimizers"]) == len(self.optimizers):
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)

    def save(self) -> None:
        """Write the state to another file and rename it, so that a kill cannot damage the old state."""
        partial = self.path.with_suffix(".tmp")
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, partial)
        partial.replace(self.path)

    def loop(self, loss_of: Callable[[torch.Generator], Tensor]) -> Iterator[None]:
        """Run the remaining steps; ``loss_of`` draws with the generator of its step."""
        started, first, smooth = time.monotonic(), self.step, math.nan
        while self.step < self.steps:
            rng = torch.Generator().manual_seed(1_000_003 * self.step + 17)
            progress = self.step / self.steps
            rate = self.lr * min(1.0, (self.step + 1) / 200)
            rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            loss = loss_of(rng)
            self.model.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            # the average covers the last tenth of the steps, at most 1000
            keep = min(0.999, 1 - 10 / (self.step + 10))
            with torch.no_grad():
                for mean, now in zip(
                    self.average.parameters(), self.model.parameters(), strict=True
                ):
                    mean.lerp_(now, 1 - keep)
            smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
            if self.step % 50 == 0 or self.step == self.steps:
                pace = (time.monotonic() - started) / (self.step - first)
                left = pace * (self.steps - self.step) / 60
                where = f"{self.name} {self.step}/{self.steps} loss {smooth:.5f}"
                print(f"{where} {pace:.2f} s/step {left:.0f} min left", flush=True)
            if self.step % 250 == 0 or self.step == self.steps:
                self.save()
                yield


def _is_hidden(name: str) -> bool:
    return "embedding_table" not in name and "proj_out" not in name


def _optimizers(
    model: nn.Module, lr: float, hidden: Callable[[str], bool] | None
) -> list[torch.optim.Optimizer]:
    """AdamW; hidden matrices, if any, get Muon instead (Jordan 2024, RMS-matched rate)."""
    named = list(model.named_parameters())
    inner = [p for name, p in named if p.ndim == 2 and hidden is not None and hidden(name)]
    inside = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in inside]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))]
    if inner:
        rule = "match_rms_adamw"
        optimizers.append(torch.optim.Muon(inner, lr=lr, weight_decay=0.01, adjust_lr_fn=rule))
    return optimizers


def portable(out: Path, files: Iterable[str]) -> None:
    """Write the name of the tokenizer class that every version of transformers knows.

    Args:
        out: folder of a pipeline.
        files: of the folder that name the class.
    """
    for file in files:
        text = (out / file).read_text()
        text = text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
        (out / file).write_text(text)
