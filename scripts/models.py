# SPDX-License-Identifier: Apache-2.0
"""Write docs/models.md: every transformer class of diffusers through three recipes.

    python scripts/models.py

Tiny random models of the real classes (``tests/zoo.json``) are scanned, quantized, saved, loaded
and run; ``tests/models/test_models.py`` holds the same on every commit.
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
from dtq.pipelines.loading import scan_model  # noqa: E402
from dtq.pipelines.recorded_calls import first_tensor  # noqa: E402
from dtq.recipe import Recipe  # noqa: E402

RECIPES = ("w4a8", "w4a16", "nvfp4")
QUICK = {"calibration": {"samples": 2, "batch_size": 1, "steps": 4, "num_timestep_bins": 2}}


def measure(name: str, recipe: str) -> str:
    """The error of the quantized model, or why there is none."""
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


def row(name: str) -> str:
    model = zoo.model(name)
    scan = scan_model(model, lambda model: model(**zoo.inputs(name)))
    plan = Recipe.load("w4a8").plan(scan, tuple(model._keep_in_fp32_modules or ()))
    done = {x.name for x in plan.quantized()}
    sizes = {x.name: math.prod(shape_of(model.get_submodule(x.name))) for x in scan.linears()}
    roles = Counter(linear.role.split(".")[0] for linear in scan.linears() if linear.name in done)
    family = find_family(model)
    cells = [
        name,
        family.name if family else "",
        f"{len(done)} of {len(sizes) + len(scan.uncalled)}",
        f"{sum(v for n, v in sizes.items() if n in done) / sum(sizes.values()):.0%}",
        ", ".join(f"{count} {role}" for role, count in sorted(roles.items())),
        *(measure(name, recipe) for recipe in RECIPES),
        notes(scan, model),
    ]
    print(" | ".join(cells), flush=True)
    return f"| {' | '.join(cells)} |"


def notes(scan: Scan, model: torch.nn.Module) -> str:
    """What stays float besides embedders and heads, and why."""
    found = []
    if scan.uncalled:
        found.append(f"not called: {', '.join(sorted({_short(n) for n in scan.uncalled})[:3])}")
    unmatched = {_short(n): what for n, what in scan.unsupported.items()}
    found += [f"{what}: {n}" for n, what in list(unmatched.items())[:3]]
    if wide := getattr(model, "_keep_in_fp32_modules", None):
        found.append(f"diffusers keeps in fp32: {', '.join(wide)}")
    return "; ".join(found)


def _short(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


HEAD = """# Models

Every transformer class in `diffusers.models.transformers` of diffusers {version}, {count} of them, as a tiny random model
through three recipes: scanned, quantized on two calls, saved, loaded, run. `python scripts/models.py` writes this page;
`tests/models/test_models.py` holds it on every commit. **{passed} of {count} classes pass all three**, their outputs bit-identical
after loading.

Family: the classes for which dtq makes up inputs by itself when it is given a bare transformer. The others need their
pipeline, or `inputs=[...]`; nothing else depends on it. Linears: quantized by `w4a8`, of all; their share of all linear
weights is that of the tiny models, whose embedders are large. What is kept are embedders of patches, time and text, and
heads; the last column says what else. Errors are relative squared errors of the output: of random weights of width 16 to 64,
so they only say that nothing is broken.

| class | family | linears | weights | roles | w4a8 | w4a16 | nvfp4 | kept besides |
| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "models.md")
    parser.add_argument("names", nargs="*", help="only these classes")
    options = parser.parse_args()
    rows = [row(name) for name in options.names or zoo.names()]
    passed = sum("differs" not in line for line in rows)
    head = HEAD.format(version=diffusers.__version__, count=len(rows), passed=passed)
    options.out.write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
