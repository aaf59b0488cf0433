# SPDX-License-Identifier: Apache-2.0
"""A quantized table of token embeddings, and a head that computes with the same table.

Only the rows of the tokens of a call are unpacked: there is never a float copy of the table.
``weight`` holds the packed integers of the table (N, D). A module whose weight is tied to the table
holds the same packed tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtq.errors import InputError
from dtq.formats import FORMATS
from dtq.models.linears import matrix_shape
from dtq.models.tables import tied_modules
from dtq.nn.weight_only import WeightOnly

HEAD_CHUNK = 2**24
"""Weights of a head that are unpacked at a time: 64 MB in float32."""


class QuantEmbedding(WeightOnly):
    """An ``nn.Embedding`` with a packed table; combined with the class that it replaces.

    Attributes:
        lookup_class: the replaced class above :class:`_Lookup`, for its own forward.
    """

    lookup_class: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        kind = cls.__bases__[1]
        bases = (_Lookup,) if kind is nn.Embedding else (kind, _Lookup)
        cls.lookup_class = type(kind.__name__, bases, {"__module__": __name__})

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float table (N, D), in ``dtype`` or ``compute_dtype``."""
        return self.matrix().to(dtype or self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table, as the replaced class computes with them.

        Args:
            input: ids of tokens (...), integers from 0 to N - 1.

        Returns:
            (..., D) in ``compute_dtype``.
        """
        kind = self.replaced_class
        if kind.forward is nn.Embedding.forward:
            return _look_up(self, input)
        # a class with a forward of its own, such as one that scales what nn.Embedding gives
        plain: Any = object.__new__(self.lookup_class)
        plain.__dict__.update(vars(self))
        # the weight has no rows: a class that reads them gets an error
        empty = torch.empty(0, matrix_shape(self)[1], dtype=self.compute_dtype, device=input.device)
        plain._parameters = {**self._parameters, "weight": empty}
        plain._table = (self,)
        made: Tensor = kind.forward(plain, input)
        return made


class _Lookup(nn.Embedding):
    """In place of ``nn.Embedding`` below a class with a forward of its own."""

    _table: tuple[QuantEmbedding]  # in a tuple, so that it is no submodule

    def forward(self, input: Tensor) -> Tensor:
        return _look_up(self._table[0], input)


def _look_up(table: QuantEmbedding, ids: Tensor) -> Tensor:
    rows = unpack_rows(table, ids.reshape(-1))  # (M, D)
    return rows.reshape(*ids.shape, rows.shape[-1])


class QuantHead(WeightOnly):
    """An ``nn.Linear`` whose weight is tied to a table; combined with the class of the linear."""

    prefix = "QuantHead"

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight (N, D), in ``dtype`` or ``compute_dtype``."""
        return self.matrix().to(dtype or self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """``x W^T + b`` in float, with a part of the rows of ``W`` unpacked at a time.

        Args:
            input: float (..., D).

        Returns:
            (..., N) in the dtype of ``input``.
        """
        assert isinstance(self, nn.Linear)
        rows, columns = self.out_features, self.in_features
        step = max(1, HEAD_CHUNK // columns)
        parts = []
        for start in range(0, rows, step):
            ids = torch.arange(start, min(rows, start + step), device=input.device)
            parts.append(F.linear(input, unpack_rows(self, ids, input.dtype)))
        y = torch.cat(parts, -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def unpack_rows(layer: WeightOnly, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Some rows of a packed matrix.

    Args:
        layer: its format stores every row by itself, see :func:`row_misfit`.
        ids: of the rows (M,), integers.
        dtype: of the result; None for ``compute_dtype``.

    Returns:
        Float (M, K), bit for bit those rows of ``dequantize``.
    """
    packed = layer.packed_tensors()
    chosen = {name: tensor.index_select(0, ids) for name, tensor in packed.items()}
    rows = FORMATS[layer.weight_format].unpack(chosen)
    return rows.to(dtype or layer.compute_dtype)


def row_misfit(name: str) -> str:
    """Why single rows of a table cannot be unpacked in a format; empty if they can."""
    shared = FORMATS[name].matrix_tensors
    return f"{name} has {', '.join(shared)} for all rows together" if shared else ""


def put_table(model: nn.Module, name: str, table: QuantEmbedding) -> None:
    """Put a packed table into a model, and its tensors into every module that is tied to it.

    Args:
        model: its ``all_tied_weights_keys``, by which transformers ties, saves and loads, get an
            entry for every packed tensor.
        name: dotted name of the float table.
        table: takes its place.
    """
    for other in tied_modules(model, name):
        old = model.get_submodule(other)
        kind = QuantEmbedding if isinstance(old, nn.Embedding) else QuantHead
        made = kind.in_place_of(old, table.spec, compute_dtype=table.compute_dtype, device="meta")
        model.set_submodule(other, made)
        parts = {f"{other}.{part}": f"{name}.{part}" for part in table.tensor_specs()}
        model.all_tied_weights_keys |= parts  # type: ignore[operator]
    model.set_submodule(name, table)
    retie(model)


def retie(model: nn.Module) -> None:
    """Let the modules that are tied to a table hold its tensors, after these were replaced."""
    for name, table in list(model.named_modules()):
        if isinstance(table, QuantEmbedding):
            for other in tied_modules(model, name):
                twin = model.get_submodule(other)
                twin._parameters.update({k: table._parameters[k] for k in table.tensor_specs()})


def float_table(model: nn.Module, name: str) -> None:
    """Undo :func:`put_table` with the values of the packed table."""
    table = model.get_submodule(name)
    assert isinstance(table, QuantEmbedding)
    plain = table.unquantized()
    for other in tied_modules(model, name):
        twin = model.get_submodule(other)
        assert isinstance(twin, WeightOnly)
        model.set_submodule(other, twin.with_weight(plain.weight))  # type: ignore[arg-type]
    model.set_submodule(name, plain)


def tied_to_tables(model: nn.Module) -> set[str]:
    """Names of the modules that hold the tensors of a packed table that is elsewhere."""
    tables = [name for name, module in model.named_modules() if isinstance(module, QuantEmbedding)]
    return {other for name in tables for other in tied_modules(model, name)}


def forget_packed_ties(model: nn.Module) -> None:
    """Remove the entries of packed tensors from the ties of a model that has none any more."""
    ties: Any = getattr(model, "all_tied_weights_keys", None) or {}
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key in [key for key in ties if key not in known]:
        del ties[key]


def refuse_resizing(*args: object, **kwargs: object) -> None:
    """Takes the place of ``resize_token_embeddings``, by which textual inversion adds tokens.

    Raises:
        InputError: always.
    """
    raise InputError(
        "a quantized table of embeddings takes no new tokens: add them to the float text encoder "
        "and quantize it then, or quantize with embeddings=keep"
    )
