# SPDX-License-Identifier: Apache-2.0
"""More text to calibrate a text encoder on, made from its prompts and its own vocabulary.

A calibration has few prompts, and error feedback trusts what it has seen. So the encoder is called
again with a half of the tokens of every prompt replaced by random ones: positions, lengths and part
of the context stay those of real prompts, and the tokens are those that other prompts may have.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dtq.models.text_encoders import special_ids

REPLACED = 0.5
"""Probability that a token is replaced."""


class MixedPrompts:
    """Follows every call of a text encoder by calls with mixed prompts.

    Tokens that the config names as special, that every prompt of a call has, or that begin or end
    a prompt are kept. A call without ids of tokens, or with a cache, has no such calls.

    Args:
        model: a text encoder.
        count: calls with mixed prompts for each call.
        seed: of the tokens.
    """

    def __init__(self, model: nn.Module, count: int, seed: int) -> None:
        self.model, self.count, self.seed = model, count, seed
        self._signature = inspect.signature(model.forward)
        self._special = special_ids(model.config)
        self._rng = torch.Generator()
        self._inside = False

    def begin(self, batch: int) -> None:
        """Draw the tokens of a batch alike, whichever process runs it and whatever ran before."""
        self._rng.manual_seed(self.seed * 1_000_003 + batch)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hook on the model, removed at the end; after the hooks that watch its calls."""
        handle = self.model.register_forward_hook(self._again, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _again(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        if self._inside:
            return
        given = self._signature.bind_partial(*args, **kwargs).arguments | kwargs
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if not isinstance(ids, Tensor) or given.get("past_key_values") is not None:
            return
        if "input_ids" not in kwargs:  # then it is among the positional ones
            kwargs = {**kwargs, **dict(zip(self._signature.parameters, args, strict=False))}
            args = ()
        self._inside = True
        try:
            for _ in range(self.count):
                module(*args, **{**kwargs, "input_ids": self.mixed(ids, mask)})
        finally:
            self._inside = False

    def mixed(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Ids of tokens (B, tokens), a part of them replaced.

        Args:
            ids: int (B, tokens).
            mask: (B, tokens), 0 for padding; None, or of another shape: padding is not known.
        """
        here = ids.cpu()
        real = torch.ones_like(here, dtype=torch.bool)
        if mask is not None and mask.shape == ids.shape:
            real = mask.cpu() != 0
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        kept = self._special | _of_every_row(here) | _at_the_ends(here, real)
        vocabulary = torch.ones(embeddings.num_embeddings, dtype=torch.bool)
        vocabulary[[token for token in kept if 0 <= token < len(vocabulary)]] = False
        choice = vocabulary.nonzero().flatten()
        if not len(choice):
            return ids
        drawn = choice[torch.randint(0, len(choice), here.shape, generator=self._rng)]
        replaced = torch.rand(here.shape, generator=self._rng) < REPLACED
        replaced &= real & vocabulary[here.clamp(0, len(vocabulary) - 1)]
        return torch.where(replaced, drawn.to(here), here).to(ids)


def _of_every_row(ids: Tensor) -> set[int]:
    """Ids that each of several rows has: of templates, and of beginnings and ends."""
    first, *others = ({*row} for row in ids.tolist())
    return first.intersection(*others) if others else set()


def _at_the_ends(ids: Tensor, real: Tensor) -> set[int]:
    """Ids at the first and the last position of a row that is no padding."""
    rows = (row[keep].tolist() for row, keep in zip(ids, real, strict=True))
    return {token for row in rows if row for token in (row[0], row[-1])}
