# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and what their words mean."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from diffusers.utils import is_transformers_available
from diffusers.utils import logging as diffusers_logging

from dtq.errors import InputError
from dtq.io.safe_parse import parse_yaml
from dtq.pipelines import loading
from dtq.pipelines.settings import SamplingSettings
from dtq.recipe.resolve import Recipe


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--recipe, --set and the calibration shortcuts."""
    for option in reversed(
        (
            click.option(
                "--recipe",
                default="w4a8",
                show_default=True,
                help="Name (dtq recipe ls) or YAML file.",
            ),
            click.option(
                "--set",
                "settings",
                multiple=True,
                metavar="KEY=VALUE",
                help="Override a recipe key: modulation=w4a16, calibration.steps=30.",
            ),
            click.option(
                "--calibration", help="Calibration set: shipped name, file, hub:OWNER/NAME."
            ),
            click.option(
                "--budget",
                metavar="BITS|SIZE",
                help="Mixed precision within this: 4.8 bits per weight, 12MB (ViDiT-Q-MP).",
            ),
            click.option("--samples", type=click.IntRange(1), help="Pictures to calibrate on."),
            click.option("--steps", type=click.IntRange(1), help="Sampler steps."),
            click.option("--guidance", type=float, help="Guidance scale."),
            click.option("--seed", type=click.IntRange(0), help="Seed of the calibration latents."),
        )
    ):
        command = option(command)
    return call_options(command)


def call_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a pipeline is called with: --arg and --images."""
    argument = click.option(
        "--arg",
        "arguments",
        multiple=True,
        metavar="NAME=VALUE",
        help="Argument of the pipeline's call: height=512, num_frames=17. Repeat for more.",
    )
    images = click.option(
        "--images",
        type=click.Path(),
        help="A picture or a folder of them, for pipelines that edit or continue pictures.",
    )
    return argument(images(command))


memory_option = click.option(
    "--memory",
    metavar="SIZE",
    help="What statistics may take, 8GB; the float model runs more often where it is little. "
    "Default: half of what is free.",
)
component_option = click.option(
    "--component",
    "components",
    multiple=True,
    metavar="NAME",
    help="Which model of the pipeline; repeat for more. Default: every diffusion transformer.",
)


dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", *loading.DTYPES]),
    default="auto",
    show_default=True,
    help="Of everything that is not quantized. auto: as on disk (fp32 for fp16 files without a GPU).",
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--component and --dtype."""
    return component_option(dtype_option(command))


def sampling_options(seed: int, about: str | None = None) -> Callable[..., Callable[..., Any]]:
    """How a pipeline is sampled: --steps, --guidance, --seed, --batch, --dtype, --arg, --images.

    Args:
        seed: the default, and ``about`` it, for the help.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        command = dtype_option(call_options(command))
        for option in reversed(
            (
                click.option("--steps", default=20, show_default=True, type=click.IntRange(1)),
                click.option("--guidance", default=0.0, help="0: the pipeline's default."),
                click.option("--seed", default=seed, show_default=True, help=about),
                click.option(
                    "--batch",
                    default=8,
                    show_default=True,
                    type=click.IntRange(1),
                    help="Generated together.",
                ),
            )
        ):
            command = option(command)
        return command

    return add


def recipe_with(choices: dict[str, Any]) -> Recipe:
    """The recipe with --set and the shortcuts applied."""
    chosen = Recipe.load(choices["recipe"])
    data = chosen.to_dict()
    data.pop("name")
    settings = list(choices["settings"])
    for option, key in (
        ("calibration", "prompts"),
        ("samples", "samples"),
        ("steps", "steps"),
        ("guidance", "guidance"),
        ("seed", "seed"),
        ("images", "images"),
    ):
        if choices[option] is not None:
            data["calibration"][key] = choices[option]
    data["calibration"]["pipeline_args"] |= arguments_of(choices["arguments"])
    if choices["budget"] is not None:
        data["allocate"]["budget"] = choices["budget"]
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected KEY=VALUE")
        value = parse_yaml(text, f"--set {setting}") if text else ""
        _put(data, key.split("."), value, setting)
    return Recipe.load(chosen, **data)


def _put(data: dict[str, Any], path: list[str], value: Any, setting: str) -> None:
    for step in path[:-1]:
        below: Any = data.get(step)
        if isinstance(below, str):  # a method without knobs: solver.gptq.damp
            below = {below: {}}
        if not isinstance(below, dict):
            raise InputError(f"--set {setting}: {step!r} has no keys")
        if below is not data.get(step):
            data[step] = below
        data = below
    data[path[-1]] = value


def calibration_of(*, arguments: Sequence[str], images: str | None, **job: Any) -> SamplingSettings:
    """What a pipeline is to run: the job's own options, and those of :func:`call_options`."""
    job["batch_size"] = job.pop("batch")
    return SamplingSettings(**job, pipeline_args=arguments_of(arguments), images=images or "")


def arguments_of(options: Sequence[str]) -> dict[str, Any]:
    """Arguments of the pipeline's call; values as YAML reads them."""
    found = pairs(options, "--arg")
    return {name: parse_yaml(text, f"--arg {name}={text}") for name, text in found.items()}


def listed(options: Sequence[str]) -> list[str]:
    """Words of an option that takes commas and may be repeated."""
    return [word.strip() for option in options for word in option.split(",") if word.strip()]


def pairs(options: Sequence[str], option: str) -> dict[str, str]:
    """NAME=VALUE of an option that may be repeated."""
    found = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{option} {text}: expected NAME=VALUE")
        found[name] = value
    return found


@contextmanager
def quiet(really: bool = True) -> Iterator[None]:
    """Without the bars of other libraries: for JSON, and where another process shows them."""
    noisy: list[Any] = [diffusers_logging] if really else []
    if really and is_transformers_available():
        noisy.append(importlib.import_module("transformers.utils.logging"))
    for library in noisy:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in noisy:
            library.enable_progress_bar()
