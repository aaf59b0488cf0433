# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and how an option is declared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

DTYPES = ("auto", "fp32", "bf16", "fp16")
"""``auto`` and the keys of ``dtq.pipelines.loading.DTYPES``, which would import torch."""

flag = partial(click.option, is_flag=True)
several = partial(click.option, multiple=True)
path = partial(click.option, type=click.Path(path_type=Path))
count = partial(click.option, type=click.IntRange(1))


def combined(*options: Decorator) -> Decorator:
    """One decorator that adds several options, which the help shows in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


# fmt: off
call = combined(
    several("--arg", "arguments", metavar="NAME=VALUE",
            help="Argument of the pipeline's call: height=512 (pixels), num_frames=17 (frames). "
                 "Repeat for more. Default: none."),
    click.option("--images", type=click.Path(),
                 help="Image, or folder of images, for pipelines that edit or continue images. "
                      "Default: random images."),
)
"""What a pipeline is called with in addition to the prompt."""

recipe = combined(
    click.option("--recipe", default="w4a8",
                 help="Name of a recipe (see dtq recipe ls), or a YAML file."),
    several("--set", "settings", metavar="KEY=VALUE",
            help="Recipe key and its new value: modulation=w4a16, calibration.steps=30. Repeat "
                 "for more. Default: none."),
    click.option("--calibration-set", "prompts", metavar="NAME",
                 help="Prompt set to calibrate on: a shipped name, a file, or hub:OWNER/NAME. "
                      "Default: the recipe's."),
    click.option("--budget", metavar="BITS|SIZE",
                 help="Mixed precision. A size (12GB) is that of all weight files of the pipeline "
                      "together: the formats of denoisers, text encoders and VAE are chosen by "
                      "measured sensitivity. Bits per weight (4.8) are those of attention and "
                      "feed-forward of each denoiser. Default: the recipe's."),
    count("--samples", help="Number of images to calibrate on. Default: the recipe's."),
    count("--steps", help="Sampler steps per calibration image. Default: the recipe's."),
    click.option("--guidance", type=click.FloatRange(0),
                 help="Guidance scale of the calibration; 0 is passed on as 0. Default: the "
                      "recipe's, else the pipeline's own."),
    click.option("--seed", type=click.IntRange(0),
                 help="Seed of the calibration latents. Default: the recipe's."),
    call,
)
"""A recipe, changes of it, and shortcuts for its calibration."""

component = several(
    "--component", "components", metavar="NAME",
    help="Component of the pipeline. Repeat for more. Default: every diffusion transformer.")
dtype = click.option(
    "--dtype", type=click.Choice(DTYPES), default="auto",
    help="Compute dtype, and dtype of unquantized layers. auto is the stored one, but fp32 for "
         "fp16 files without a GPU.")
variant = click.option(
    "--variant", metavar="NAME",
    help="Variant of the weight files, such as fp16. Default: of each model, the files "
         "without a variant, or its only variant.")
model = combined(component, dtype, variant)
"""Which model of a pipeline, in which dtype, from which files."""

memory = click.option(
    "--memory", metavar="SIZE",
    help="Memory limit for calibration statistics, such as 8GB. With less memory the float model "
         "runs more often. Default: half of the free memory.")
exclude = several(
    "--exclude", metavar="LAYER",
    help="Layer that stays unquantized: a name, a prefix or a path component, as it is or as a glob; "
         "or re:PATTERN. Repeat for more. Default: those of the recipe alone.")
target = click.option(
    "--to", "target", metavar="TARGET", default="", show_default=False,
    help="Engine that will read the model, see dtq export --list: what it cannot hold is adapted, or "
         "refused before calibration. Default: none.")
text_encoder = click.option(
    "--text-encoder", metavar="keep|bnb-nf4|RECIPE",
    help="Recipe of the text encoders, such as w8a8 (nearly no error) or w4a16 (a quarter of the "
         "size); they are calibrated on the same prompts. keep: they stay as they are. bnb-nf4: 4 "
         "bits in the format of bitsandbytes, which loads where dtq is not installed. Default: "
         "keep; with --budget SIZE, float, 8 or 4 bits for each layer, as the budget allows.")
embeddings = click.option(
    "--embeddings", type=click.Choice(["keep", "w8", "w4"]),
    help="Format of the tables of token embeddings of the quantized text encoders: w8 (8 bits, nearly "
         "no error) or w4 (4 bits). Default: those of the recipe, which keeps them.")
vae = click.option(
    "--vae", type=click.Choice(["keep", "w8"]),
    help="Format of the autoencoder: w8 stores it with 8-bit weights, and the report has the PSNR of "
         "its decodes. Default: keep; with --budget SIZE, what the budget allows.")
fresh = flag("--fresh", help="Discard the results of an interrupted run.")
every_layer = flag("--all", "every", help="Show each layer; otherwise equal blocks share a row.")
json = partial(flag, "--json", "as_json")
output = partial(path, "-o", "--output")
prompts = click.option(
    "--prompts", default="auto", metavar="NAME",
    help="Prompt set: a shipped name, a file, or hub:OWNER/NAME. auto fits the model.")


def sampling(seed: int, about: str) -> Decorator:
    """How a pipeline is sampled.

    Args:
        seed: the default of ``--seed``.
        about: help of ``--seed``.
    """
    return combined(
        prompts,
        count("--steps", default=20, help="Sampler steps per image."),
        click.option("--guidance", type=click.FloatRange(0),
                     help="Guidance scale; 0 is passed on as 0. Default: the pipeline's own."),
        click.option("--seed", default=seed, help=about),
        count("--batch", "batch_size", default=8, help="Images generated at a time."),
        dtype,
        variant,
        call,
    )
