# SPDX-License-Identifier: Apache-2.0
"""Write docs/models.md: the transformers of diffusers, quantized with three recipes, and its U-Nets.

    python scripts/models.py

Tiny random models of the real classes (``tests/zoo.json``) are scanned, quantized, saved, loaded
and run. ``tests/models/test_models.py`` repeats this on every commit.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import diffusers
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
import zoo  # noqa: E402

import dtq  # noqa: E402
from dtq.models import Scan, find_family  # noqa: E402
from dtq.models.linears import shape_of  # noqa: E402
from dtq.pipelines.recorded_calls import first_tensor  # noqa: E402
from dtq.pipelines.tracing import scan_model  # noqa: E402
from dtq.recipe import Recipe  # noqa: E402

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


HEAD = """# Models

The table has every transformer class in `diffusers.models.transformers` of diffusers {version}: {count} classes, each as a tiny
random model. Each model is scanned, quantized with three recipes on two random inputs, saved, loaded and run.
`python scripts/models.py` writes this page, and the tests repeat these checks on every commit. **{passed} of {count} classes pass
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

UNETS = """
## U-Nets

{count} classes. The tests quantize each with the same three recipes, save, load and run it; the output is bit-identical
after loading. Of the U-Net of Stable Diffusion XL, in its real size, `w4a8` quantizes 87 % of the weights
(`tests/models/test_unets.py`). The role `proj` are the 1 x 1 convolutions and linears between the parts of a block:
shortcuts of ResNets, and the projections into and out of transformers. Other convolutions stay float.

| class | family | linears | weights | roles | also not quantized |
| --- | --- | ---: | ---: | --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "models.md")
    parser.add_argument("--unets", action="store_true", help="only the part of the U-Nets")
    parser.add_argument("names", nargs="*", help="only these classes")
    options = parser.parse_args()
    names = options.names or zoo.names()
    head = options.out.read_text().partition(UNETS[:10])[0]
    if not options.unets:
        rows = [row(name) for name in names if is_transformer(name)]
        passed = sum("differs" not in line for line in rows)
        head = HEAD.format(version=diffusers.__version__, count=len(rows), passed=passed)
        head += "\n".join(rows) + "\n"
    unets = [row(name) for name in names if not is_transformer(name)]
    options.out.write_text(head + UNETS.format(count=len(unets)) + "\n".join(unets) + "\n")


if __name__ == "__main__":
    main()
