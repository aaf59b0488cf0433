# SPDX-License-Identifier: Apache-2.0
"""Text encoders: models of transformers that read token ids. They are recognized by structure.

A text encoder has no timestep: all its calls are in one timestep bin. Its embeddings, its head and
towers for other inputs than text have roles that recipes leave as they are.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dtq.models.base import Family
from dtq.models.dummy_inputs import WORDS, ForwardInputs, arguments


def is_text_encoder(model: nn.Module) -> bool:
    """Whether a model is one of transformers that reads text, and text alone.

    Models that compare text with images or sound (``get_text_features``) are not: a pipeline calls
    a part of them, and not their forward.
    """
    reads_ids = getattr(model, "main_input_name", "") == "input_ids"
    return is_of_transformers(model) and reads_ids and not hasattr(model, "get_text_features")


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is one of transformers, or of a class derived from those."""
    bases = {f"{kind.__module__}.{kind.__name__}" for kind in type(model).__mro__}
    return "transformers.modeling_utils.PreTrainedModel" in bases


def _token_ids(forward: ForwardInputs) -> Any:
    """(B, tokens) int64: random tokens of the vocabulary, without those of images and sound."""
    config = forward.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    tokens = min(WORDS, int(getattr(text, "max_position_embeddings", None) or WORDS))
    ids = torch.randint(0, text.vocab_size, (forward.batch, tokens), generator=forward.rng)
    special = special_ids(config)
    plain = next(i for i in range(text.vocab_size) if i not in special)
    for value in special:
        ids[ids == value] = plain
    return ids


def special_ids(config: Any) -> set[int]:
    """Ids that a configuration names; some are not set, and Llama 3 has several ends of text."""
    named = [v for k, v in vars(config).items() if k.endswith(("token_id", "token_index"))]
    every = [each for value in named for each in (value if isinstance(value, list) else [value])]
    return {value for value in every if isinstance(value, int)}


_OTHER_TOWERS = r"(^|\.)(vision|visual|image|audio)(_(model|tower|encoder|transformer))?\."

TEXT = Family(
    "text encoder",
    (),
    arguments(input_ids=_token_ids),
    roles=((_OTHER_TOWERS, "embed"),),  # which recipes leave as they are
    largest_timestep=1.0,
)
"""The family of every text encoder."""

_WITH_DECODER = replace(TEXT, inputs=arguments(input_ids=_token_ids, decoder_input_ids=_token_ids))


def family_of(model: nn.Module) -> Family:
    """The family of a text encoder; a whole encoder-decoder (``T5Model``) reads two texts."""
    decodes = "decoder_input_ids" in inspect.signature(type(model).forward).parameters
    return _WITH_DECODER if decodes and model.config.is_encoder_decoder else TEXT  # type: ignore[union-attr]
