# SPDX-License-Identifier: Apache-2.0
"""Write docs/models.md: transformers, U-Nets and text encoders, quantized with three recipes.

    python scripts/models.py

Tiny random models of the real classes (``tests/zoo.json``, ``tests/text_encoders.py``) are scanned,
quantized, saved, loaded and run. The tests in ``tests/models`` repeat this on every commit.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
import text_encoders as texts  # noqa: E402
import zoo  # noqa: E402

import dtq  # noqa: E402
from dtq.models import Scan, find_family  # noqa: E402
from dtq.models.linears import shape_of  # noqa: E402
from dtq.pipelines.recorded_calls import first_tensor  # noqa: E402
from dtq.pipelines.tracing import scan_model  # noqa: E402
from dtq.recipe import Recipe  # noqa: E402
from dtq.stages.float_model import kept_in_float  # noqa: E402

RECIPES = ("w4a8", "w4a16", "nvfp4")
QUICK = {"calibration": {"samples": 2, "batch_size": 1, "steps": 4, "num_timestep_bins": 2}}


def measure(name: str, recipe: str) -> str:
    """The error of the quantized model, or a note that it differs after loading."""
    model = zoo.model(name)
    with torch.no_grad():
        want = first_tensor(model(**zoo.inputs(name))).double()
    calls = [zoo.inputs(name, seed) for seed in range(2)]
    dtq.quantize(model, recipe, inputs=calls, progress=False, **QUICK)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        got = first_tensor(model(**zoo.inputs(name)))
        model.save_pretrained(folder)
        again = first_tensor(type(model).from_pretrained(folder)(**zoo.inputs(name)))
    if not torch.equal(got, again):
        return "differs after loading"
    return f"{float((got.double() - want).square().sum() / want.square().sum()):.0e}"


def is_transformer(name: str) -> bool:
    """Whether a class is one of diffusers' transformers, not of its U-Nets."""
    return "transformers" in zoo.classes()[name].__module__


def row(name: str) -> str:
    """The row of a class; errors for transformers only."""
    model = zoo.model(name)
    scan = scan_model(model, lambda model: model(**zoo.inputs(name)))
    plan = Recipe.load("w4a8").plan(scan, tuple(model._keep_in_fp32_modules or ()))
    quantized = {x.name for x in plan.quantized()}
    sizes = {x.name: math.prod(shape_of(model.get_submodule(x.name))) for x in scan.linears()}
    roles = Counter(
        linear.role.split(".")[0] for linear in scan.linears() if linear.name in quantized
    )
    family = find_family(model)
    cells = [
        name,
        family.name if family else "",
        f"{len(quantized)} of {len(sizes) + len(scan.uncalled)}",
        f"{sum(v for n, v in sizes.items() if n in quantized) / sum(sizes.values()):.0%}",
        ", ".join(f"{count} {role}" for role, count in sorted(roles.items())),
        *(measure(name, recipe) for recipe in RECIPES if is_transformer(name)),
        notes(scan, model),
    ]
    print(" | ".join(cells), flush=True)
    return f"| {' | '.join(cells)} |"


def notes(scan: Scan, model: torch.nn.Module) -> str:
    """Layers other than embedders and heads that stay float, and why."""
    texts = []
    if scan.uncalled:
        texts.append(f"not called: {', '.join(sorted({_short(n) for n in scan.uncalled})[:3])}")
    unsupported = {_short(n): what for n, what in scan.unsupported.items()}
    texts += [f"{what}: {n}" for n, what in list(unsupported.items())[:3]]
    if float32 := getattr(model, "_keep_in_fp32_modules", None):
        texts.append(f"diffusers keeps in fp32: {', '.join(float32)}")
    return "; ".join(texts)


def _short(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


TEXT_RECIPES = ("w8a8", "w4a16", "w4a8")


def text_row(name: str) -> str:
    """The row of a text encoder."""
    with tempfile.TemporaryDirectory() as folder:
        texts.model(name).save_pretrained(folder)
        model = texts.kind_of(name).from_pretrained(folder)
        scan = scan_model(model, lambda model: model(**texts.inputs(name)))
        plan = Recipe.load("w4a16").plan(scan, kept_in_float(model))
        roles = Counter(layer.role.split(".")[0] for layer in plan.quantized())
        if not plan.quantized():
            what = "; ".join(sorted(set(scan.unsupported.values())))
            cells = [name, f"0 of {len(plan.layers)}", "", *("-" for _ in TEXT_RECIPES), what]
            return f"| {' | '.join(cells)} |"
        errors = [text_error(texts.kind_of(name), folder, name, recipe) for recipe in TEXT_RECIPES]
    cells = [
        name,
        f"{len(plan.quantized())} of {len(plan.layers)}",
        ", ".join(f"{count} {role}" for role, count in sorted(roles.items())),
        *errors,
        notes(scan, torch.nn.Module()),
    ]
    print(" | ".join(cells), flush=True)
    return f"| {' | '.join(cells)} |"


def text_error(kind: Any, folder: str, name: str, recipe: str) -> str:
    """The error of the first output of a text encoder, or a note that it differs after loading."""
    model, call = kind.from_pretrained(folder), texts.inputs(name)
    want = texts.output(model, call).double()
    inputs = [texts.inputs(name, seed) for seed in range(2)]
    dtq.quantize(model, recipe, inputs=inputs, progress=False)
    got = texts.output(model, call)
    with tempfile.TemporaryDirectory() as out:
        model.save_pretrained(out)
        again = texts.output(kind.from_pretrained(out), call)
    if not torch.equal(got, again):
        return "differs after loading"
    return f"{float((got.double() - want).square().sum() / want.square().sum()):.0e}"


TEXT_HEAD = """## Text encoders

Every class of transformers {version} with `input_ids` that the type hints of diffusers' pipelines name: {count} classes,
checked in the same way on two tiny captions, one with padding. **{passed} of {count} pass**: GPT-2 has no linear layers but
`Conv1D`, and is refused with that reason. A base class in a type hint is represented by one class: `Gemma2PreTrainedModel` by
`Gemma2Model`, `GemmaPreTrainedModel` by `GemmaModel`, `PreTrainedModel` by `BertModel`. Not text encoders, and not quantized:
{others}. Text encoders that diffusers brings itself (ChatGLM of Kolors, MultilingualCLIP, LDMBert) are not in the table.

Embeddings (unless `--embeddings` asks for fewer bits), norms, heads and towers for images and sound stay float. The error is that of the first output (hidden states,
projected embeddings or logits).

| class | linears | roles | w8a8 | w4a16 | w4a8 | also not quantized |
| --- | ---: | --- | ---: | ---: | ---: | --- |
"""

HEAD = """# Models

The table has every transformer class in `diffusers.models.transformers` of diffusers {version}: {count} classes, each as a tiny
random model. Each model is scanned, quantized with three recipes on two random inputs, saved, loaded and run.
`python scripts/models.py` writes this page. The tests repeat these checks on every commit, with `w4a8` and one of the other
recipes in turn, rounded to nearest and without input transforms. **{passed} of {count} classes pass
with all three recipes**, and their outputs are bit-identical after loading.

- **family**: the classes for which dtq generates random inputs when it is given a bare transformer. The others need
  their pipeline, or `inputs=[...]`; nothing else depends on the family.
- **linears**: the linear layers that `w4a8` quantizes, of all linear layers.
- **weights**: their share of all linear weights. The embedders of the tiny models are large, so the share is that of the
  tiny models only.
- **roles**: how many of the quantized layers have each role.
- **w4a8, w4a16, nvfp4**: relative squared error of the output. The models have random weights of width 16 to 64, so the
  errors only show that nothing is broken.
- **also not quantized**: layers that stay float in addition to the heads and the embedders of patches, time and text.

| class | family | linears | weights | roles | w4a8 | w4a16 | nvfp4 | also not quantized |
| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | --- |
"""

UNETS = """## U-Nets

{count} classes. The tests quantize each with the same three recipes, save, load and run it; the output is bit-identical
after loading. Of the U-Net of Stable Diffusion XL, in its real size, `w4a8` quantizes 87 % of the weights
(`tests/models/test_unets.py`). The role `proj` are the 1 x 1 convolutions and linears between the parts of a block:
shortcuts of ResNets, and the projections into and out of transformers. Other convolutions stay float, or take 8 bits (`convolutions: w8`).

The error of the output must be below 0.02 with `w4a8`, and below 0.2 with `w4a16` and `nvfp4`, as for transformers
(`tests/models/test_models.py`). **For Kandinsky3UNet the tests allow twice these errors**: it has thirty ResNets in a row,
and on the same tiny model int8 weights alone have an error of 2.1e-4 (`dtq.quantize(model, "w8a8", activations="none",
transform="none", solver="rtn", inputs=...)` in that test). The steps of 4-bit weights are 16 times as large, so their
error is of the order of 16^2 times that.

| class | family | linears | weights | roles | also not quantized |
| --- | --- | ---: | ---: | --- | --- |
"""


PARTS = ("transformers", "unets", "texts")
"""Sections of the page, in this order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "models.md")
    parser.add_argument("--only", choices=PARTS, help="write this section anew; the others stay")
    parser.add_argument("names", nargs="*", help="only these transformers and U-Nets")
    options = parser.parse_args()
    written = options.out.read_text() if options.out.exists() else ""
    sections = dict(zip(PARTS, re.split(r"\n(?=## )", written), strict=False))
    names = options.names or zoo.names()
    makes = {
        "transformers": lambda: transformers_section([x for x in names if is_transformer(x)]),
        "unets": lambda: unets_section([x for x in names if not is_transformer(x)]),
        "texts": texts_section,
    }
    for part in [options.only] if options.only else PARTS:
        sections[part] = makes[part]()
    options.out.write_text("\n".join(sections[part] for part in PARTS if part in sections))


def transformers_section(names: list[str]) -> str:
    """The page's head and the table of transformers."""
    rows = [row(name) for name in names]
    passed = sum("differs" not in line for line in rows)
    head = HEAD.format(version=diffusers.__version__, count=len(rows), passed=passed)
    return head + "\n".join(rows) + "\n"


def unets_section(names: list[str]) -> str:
    """The table of U-Nets."""
    return UNETS.format(count=len(names)) + "\n".join(row(name) for name in names) + "\n"


def texts_section() -> str:
    """The table of text encoders."""
    rows = [text_row(name) for name in texts.CONFIGS]
    passed = sum("differs" not in line and "| 0 of" not in line for line in rows)
    others = "; ".join(f"`{name}` {why}" for name, why in texts.NOT_TEXT.items())
    head = TEXT_HEAD.format(
        version=transformers.__version__, count=len(rows), passed=passed, others=others
    )
    return head + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
