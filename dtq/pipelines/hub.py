# SPDX-License-Identifier: Apache-2.0
"""Download models from the Hugging Face hub, or take them from its local cache."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from dtq import demo
from dtq.errors import LIBRARY_ERRORS, InputError, first_line

log = logging.getLogger("dtq")

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def check_hub_id(name: str) -> None:
    """Raise unless a name has the form of a hub id.

    Raises:
        InputError: it has not; says what a model can be given as.
    """
    if not _HUB_ID.fullmatch(name):
        raise InputError(
            f"{name}: no such folder. MODEL is a local diffusers folder, a hub id like "
            f"black-forest-labs/FLUX.1-dev, or one of {', '.join(demo.FOLDERS)}"
        )


def download_configs(name: str) -> Path:
    """Download only the configs of a hub model; without a network, use the cache.

    Raises:
        InputError: the name is not a hub id, or neither the hub nor the cache has it.
    """
    check_hub_id(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json"]))
    except LIBRARY_ERRORS as error:
        raise _unavailable(name, error) from error


def download_pipeline(name: str, variant: str | None = None) -> Path:
    """Download a pipeline, only its safetensors; if the hub is unreachable, use the cache.

    Args:
        name: a hub id.
        variant: of the weights; None downloads files without a variant.

    Raises:
        InputError: the name is not a hub id, or neither the hub nor the cache has it.
    """
    check_hub_id(name)
    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True, variant=variant))
    except LIBRARY_ERRORS as error:
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except LIBRARY_ERRORS:
            raise _unavailable(name, error) from error
        log.warning("%s: the hub cannot be reached, taken from its cache", name)
        return folder


def _unavailable(name: str, error: Exception) -> InputError:
    return InputError(
        f"{name}: no such folder, and neither the hub nor its local cache has it "
        f"({first_line(error)}). Check the name and the network, or give a local folder; a "
        f"repository of one variant needs --variant"
    )
