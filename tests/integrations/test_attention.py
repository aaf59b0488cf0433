# SPDX-License-Identifier: Apache-2.0
"""int8 attention in every transformer class of diffusers."""

from __future__ import annotations

import pytest
import torch
import zoo
from attention import Recorder, relative_error

from dtq.nn.attention import attention_modules, int8_attention_modules, use_int8_attention
from dtq.pipelines.recorded_calls import first_tensor

OTHER = {"Kandinsky6SRTransformer3DModel", "T5FilmDecoder", "UNet1DModel"}
"""Classes that compute attention by other functions than torch's."""
EXACT = {"TransformerTemporalModel"}
"""Attention over a single frame: the output is the mean of V, which is not rounded."""


@pytest.mark.parametrize("name", zoo.names())
def test_every_class_runs_with_int8_attention(name):
    model = zoo.model(name)

    def run():
        return first_tensor(model(**zoo.inputs(name))).float()

    with torch.no_grad():
        with Recorder() as before:
            want = run()
        names = attention_modules(model, run)
        assert bool(before.calls) == bool(names) == (name not in OTHER)
        use_int8_attention(model, names)
        assert int8_attention_modules(model) == sorted(
            names, key=[*dict(model.named_modules())].index
        )
        error = relative_error(run(), want)
        use_int8_attention(model, [])
        assert torch.equal(run(), want)
    assert error < 1e-3
    assert bool(error) == (name not in OTHER | EXACT)
