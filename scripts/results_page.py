# SPDX-License-Identifier: Apache-2.0
"""Write docs/results.md and docs/frontier.png from the measurements of ``scripts/results.py``.

python scripts/results_page.py --out .results --date 2026-11-21
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import results

DOCS = Path(__file__).parent.parent / "docs"
Found = dict[str, dict[str, dict]]

PAGE = """# Results

Every number on this page comes with its command and conditions. "Error" is the relative squared error
`|q - f|^2 / |f|^2` of the transformer's output on the inputs of the float run (teacher-forced), mean over 20
steps, both branches of guidance.

## Recipes of dtq, methods of the papers, other libraries

`make results` (`scripts/results.py`, then `scripts/results_page.py`, with defaults) measures these tables.
Evaluation: 16 images of seed 1000, 20 DDIM steps, guidance 4. Calibration: 64 images of seed 0, one set of
statistics for all rows. All rows of a column use the same recorded inputs, each in a separate process.
Conditions: {date}, torch {torch} CPU, float32, one thread per row on 2 shared cores that had other work; the
times are therefore upper bounds and only give orders of magnitude. torchao 0.18, optimum-quanto 0.2.7,
bitsandbytes 0.50. `demo-outliers` computes the same function as `demo`, with activation outliers
([demo.md](demo.md)). Results of `demo-text` and of `w4a8-few-step` are in [demo.md](demo.md#demo-text).

### Recipes of dtq

{ours}

### Methods of the papers

{papers}

### Other libraries on the linears of `w4a8`, and plain rounding

{others}

### Variants

{variants}

![error against bits](frontier.png)

The columns are:

- Bits: stored bits per weight of the attention and feed-forward linears, with all metadata.
- PSNR: median over 16 same-seed images.
- FID: domain FID between those images and the images of the float model, 16 on each side, hence a rough
  number.
- Time and memory: of the quantization only, with statistics given. Memory is the peak above the memory that
  the process used before.

The methods of the papers run as [docs/methods](methods/README.md) describes them, with corrections where
their published code differs from the paper. Methods that leave modulation unquantized have that advantage
over dtq's rows, whose modulation is 8-bit. The other libraries leave it unquantized too. Their scales are
counted in the dtype that they have here (float32; in bfloat16, torchao would be at 4.38 bits and quanto at
4.25).

Error of `w4a8` divided by that of the papers' methods with at least as many bits, on `demo`: {above}. Divided
by that of the methods with 4 bits or more, but fewer than `w4a8`: {below}. With 256 input channels, a 32-bit
scale per output channel costs 0.125 bits per weight. Error of `w4a8-hq` divided by that of `w4a8`: {hq}
(demo), {hq_hard} (demo-outliers). Errors below 4 bits: {low}. In addition to what vq4dit stores, `{two}`
stores a bfloat16 scale per input channel, 16 / N bits per weight: 0.05 here, 0.005 at N = 3072.

## Claims of the papers, checked on `demo`

{claims}

The errors in one table differ slightly if only the random signs of the rotation change: {signs}. Differences
of that size are not significant. A claim counts as true or false only if the errors differ by more than 5 %.
{missing}
## Targets

The targets are ratios of errors, and bits per weight.

| target | required | measured: demo | measured: demo-outliers |
| --- | --- | ---: | ---: |
{targets}

The search picks a transform for each input group separately, and the combined effect is visible only at the
output of the model. `w4a8` therefore also quantizes the whole model with rotation only, and keeps the version
with the lower output error on 24 recorded calls of the float model (`transform_candidates: [hadamard]`).

`tests/checkpoint/test_checkpoint.py` checks for every recipe that the file has exactly the number of bytes that
`dtq plan` predicts.

## Not measured

- Everything on a GPU, because no kernel of dtq has run on one: the targets T1 to T12 of `make gpu` (GEMMs
  over cuBLAS, 4-bit over 8-bit weights, few tokens, quantization passes compared with a copy, a stack of FLUX
  blocks compared with compiled bfloat16), FP4 on sm_120, the gain from `backend="dtq"`, and memory. The table
  of the GPU dispatcher is a model ([kernels.md](kernels.md)).
- Speed on a CPU with AMX, or on Arm.
- Weights of real text-to-image models.
"""


def load(out: Path) -> Found:
    """What is there, by model and row."""
    found: Found = {model: {} for model in results.MODELS}
    for model in results.MODELS:
        for row in results.rows():
            path = results._file(out, model, row)
            if path.exists():
                found[model][row] = json.loads(path.read_text())
    return found


class Numbers:
    """Errors and their ratios, as text."""

    def __init__(self, found: Found) -> None:
        self.found = found

    def error(self, row: str, model: str = "demo") -> float | None:
        return self.found[model].get(row, {}).get("error")

    def ratio(self, a: str, b: str, model: str = "demo") -> str:
        x, y = self.error(a, model), self.error(b, model)
        return f"{x / y:.3f}" if x is not None and y is not None else "not run"

    def against(self, a: str, rows: list[str]) -> str:
        bits = self.found["demo"]
        return ", ".join(f"{r} ({bits[r]['bits']:.2f} bits) {self.ratio(a, r)}" for r in rows)


def target_rows(n: Numbers) -> list[str]:
    """Rows of the target table: label, required value, measured values."""
    rows = [
        (f"w4a8 over {b}", asked, n.ratio("w4a8", b), n.ratio("w4a8", b, "demo-outliers"))
        for b, asked in (
            ("torchao-w4a8", "<= 0.4 (demo)"),
            ("quanto-int4", "<= 0.4 (demo)"),
            ("rtn-w4a8", "<= 0.03 (demo-outliers)"),
        )
    ]
    easy, hard = n.error("w4a8"), n.error("w4a8", "demo-outliers")
    if easy and hard:
        rows.append(("w4a8, demo-outliers over demo", "<= 1.5", "", f"{hard / easy:.2f}"))
    rows.append(
        (
            "w8a8 over w4a8",
            "<= 0.2",
            n.ratio("w8a8", "w4a8"),
            n.ratio("w8a8", "w4a8", "demo-outliers"),
        )
    )
    alone = ("w4a8, no transform", "w4a8, rotation alone", "w4a8, smoothing 0.5 alone")
    cells = []
    for model in results.MODELS:
        errors = [e for row in alone if (e := n.error(row, model))]
        mine = n.error("w4a8", model)
        whole = len(errors) == len(alone) and mine
        cells.append(f"{mine / min(errors):.3f}" if whole else "not run")
    rows.append(("w4a8 over the best of no transform, smoothing, rotation", "<= 1", *cells))
    gemm = [f"{n.found[m]['w4a8']['bits']:.2f}" for m in results.MODELS]
    rows.append(("attention and feed-forward bits", "<= 4.6", *gemm))
    rows.append(("modulation bits", "<= 8.4; w4a16 <= 4.4", "8.25; 4.38", ""))
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".results"))
    parser.add_argument("--date", required=True, help="of the measurements")
    options = parser.parse_args()
    found = load(options.out)
    n, demo = Numbers(found), found["demo"]
    mine = demo["w4a8"]["bits"]
    ours, papers = results.own_recipes(), results.paper_recipes()
    measured = [r for r in papers if r in demo]
    left = [r for r in results.rows() if r not in demo]
    signs = [
        r for r in demo if ", seed " in r or r in ("w4a8, search alone", "w4a8, rotation alone")
    ]
    low = [r for r in (*ours, results.TWO_BITS, *papers) if r in demo and demo[r]["bits"] < 4]
    page = PAGE.format(
        date=options.date,
        torch=demo["w4a8"]["torch"],
        ours="\n".join(results.table(found, ours)),
        papers="\n".join(results.table(found, papers)),
        others="\n".join(results.table(found, [*results.baselines.BASELINES, results.NAIVE])),
        variants="\n".join(results.table(found, [*results.VARIANTS])),
        above=n.against("w4a8", [r for r in measured if demo[r]["bits"] >= mine]),
        below=n.against("w4a8", [r for r in measured if 4 <= demo[r]["bits"] < mine]),
        hq=n.ratio("w4a8-hq", "w4a8"),
        hq_hard=n.ratio("w4a8-hq", "w4a8", "demo-outliers"),
        low=", ".join(f"{r} {n.error(r):.2e} at {demo[r]['bits']:.2f} bits" for r in low)
        or "not run",
        claims="\n".join(results.claims(demo)),
        signs=", ".join(f"{r} {n.error(r):.2e}" for r in signs) or "not run",
        missing=f"\nRows not run yet on this model: {'; '.join(left)}.\n" if left else "",
        two=results.TWO_BITS,
        targets="\n".join(target_rows(n)),
    )
    (DOCS / "results.md").write_text(page)
    results.plot(found, DOCS / "frontier.png")
    print(f"{DOCS / 'results.md'}: {len(demo)} rows, {len(left)} not run")


if __name__ == "__main__":
    main()
