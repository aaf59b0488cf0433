# SPDX-License-Identifier: Apache-2.0
"""Figures that a user asks for by name, and what became of each: a value, or a reason.

A figure that cannot be computed goes into ``missing``, which makes the run invalid for the gate
and the exit code of ``dtq eval`` 3. Nothing that was asked for is silently absent.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dtq import demo
from dtq.errors import InputError
from dtq.evaluate.metrics import adm_suite, extractors
from dtq.evaluate.metrics.distributions import (
    DISTRIBUTIONS,
    MetricValue,
    ReferenceSet,
    metric_value,
)
from dtq.evaluate.metrics.extractors import Extractor, Features
from dtq.evaluate.metrics.images import as_bytes, flaw, shown
from dtq.evaluate.metrics.perceptual import PERCEPTUAL, UNPAIRED
from dtq.io.safe_parse import read_json
from dtq.pipelines import prompts
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.sampling import run_pipeline
from dtq.pipelines.settings import SamplingSettings
from dtq.runs.gather import check_ids, gather
from dtq.runs.workers import SINGLE_PROCESS, Workers


@dataclass(frozen=True)
class MetricRequest:
    """Figures beyond those that every run has.

    Attributes:
        metrics: names of ``DISTRIBUTIONS`` and ``PERCEPTUAL``.
        samples: pictures of each model for the distributions.
        features: extractor of distributions that leave the choice, or ``auto``.
        where: extractor or metric to local path or hub id of its weights.
        reference: an ADM npz to compare with beside the float model's pictures.
    """

    metrics: tuple[str, ...] = ()
    samples: int = 0
    features: str = "auto"
    where: Mapping[str, str] = field(default_factory=dict)
    reference: Path | None = None

    def check(self) -> None:
        """Refuse what can be refused before anything runs.

        Raises:
            InputError: unknown names, or distributions without pictures to compute them from.
        """
        known = [*DISTRIBUTIONS, *PERCEPTUAL]
        for name in self.metrics:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise InputError(f"unknown metric {name!r}; {hint}")
        for name in [self.features, *self.where]:
            if name not in ("auto", *extractors.EXTRACTORS, *PERCEPTUAL):
                have = ", ".join(extractors.EXTRACTORS)
                raise InputError(f"unknown extractor {name!r}; there are {have}")
        if self.distributions and self.samples < 2:
            raise InputError(
                f"{', '.join(self.distributions)} compare sets of pictures; say how many: --fid 256"
            )

    @property
    def distributions(self) -> list[str]:
        return [name for name in self.metrics if name in DISTRIBUTIONS]

    @property
    def pairs(self) -> list[str]:
        return [name for name in self.metrics if name in PERCEPTUAL]


@dataclass
class ImageSet:
    """Many pictures of one model, as features.

    Attributes:
        features: by extractor.
        bytes: uint8 (N, 3, H, W).
        failed: what went wrong, by place.
    """

    features: dict[str, Features]
    bytes: Tensor
    failed: dict[int, str]

    @property
    def images(self) -> Tensor:
        """Float (N, 3, H, W) in [0, 1]."""
        return self.bytes.float() / 255

    def tensors(self) -> dict[str, Tensor]:
        """Features as ``<extractor>.<kind>`` (N, D)."""
        return {f"{n}.{k}": t for n, every in self.features.items() for k, t in every.items()}

    def save(self, file: Path) -> None:
        """:meth:`tensors` as safetensors, for figures of another day."""
        save_file(self.tensors(), file)


@dataclass
class MetricResults:
    """What became of the distributions that were asked for."""

    metrics: list[MetricValue] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    image_sets: dict[str, ImageSet] = field(default_factory=dict)


def distributions(
    candidate: LoadedModel,
    reference: LoadedModel,
    settings: SamplingSettings,
    request: MetricRequest,
    progress: Callable[[str], None] = lambda line: None,
    workers: Workers = SINGLE_PROCESS,
    folder: Path | None = None,
) -> MetricResults:
    """Generate with both models, from the same seeds, and compare the sets.

    Args:
        candidate, reference: pipelines.
        how: of the run; the seed is the next one and every label is asked for evenly, whatever
            the contact sheet shows.
        asked: which figures, of how many pictures.
        say: told what is being done.
        team, folder: processes that share the pictures, and where; only the first computes figures.
    """
    found = MetricResults()
    ready: dict[str, Extractor] = {}
    wanted: dict[str, str] = {}  # metric to extractor
    for metric in request.distributions:
        try:
            name = DISTRIBUTIONS[metric].extractor or _chosen(request.features, reference.pipeline)
            if name not in ready:
                ready[name] = extractors.load(name, request.where.get(name, ""))
            wanted[metric] = name
        except InputError as error:
            found.missing[metric] = str(error)
    if not wanted:
        return found
    more = replace(settings, prompts="auto", samples=request.samples, seed=settings.seed + 1)
    requests = prompts.load(more.prompts, reference.pipeline, more.samples)
    for side, source in (("float", reference), ("candidate", candidate)):
        progress(f"{side}, {request.samples} pictures for {', '.join(wanted)}")
        places = workers.shard(len(requests.entries), more.batch_size)
        made = image_set(source.pipeline, requests, more, ready, places)
        shared = _whole(workers, folder, side, made, places)
        if shared is None:
            continue
        found.image_sets[side] = shared
    if not workers.is_main:
        return found
    failed = {side: made.failed for side, made in found.image_sets.items() if made.failed}
    if failed:
        words = "; ".join(
            f"{len(whys)} of {request.samples} pictures of {side} failed: {next(iter(whys.values()))}"
            for side, whys in failed.items()
        )
        found.missing |= dict.fromkeys(wanted, words)
        return found
    for metric, name in wanted.items():
        try:
            found.metrics += _of(metric, ready[name], name, found.image_sets, candidate.name,
                                 request.reference, requests.entries)  # fmt: skip
        except InputError as error:
            found.missing[metric] = str(error)
    return found


def _of(
    metric: str,
    extractor: Extractor,
    name: str,
    crowds: dict[str, ImageSet],
    who: str,
    file: Path | None,
    units: Sequence[Any],
) -> list[MetricValue]:
    """A metric against the float model's pictures, the training set, and a reference file."""
    made, floats = (crowds[side].features[name] for side in ("candidate", "float"))
    row = DISTRIBUTIONS[metric]
    own = ReferenceSet("float model's pictures", floats)
    if row.alone:
        return [metric_value(metric, extractor, made, own, of=who, floats=floats, units=units)]
    found = [metric_value(metric, extractor, made, own, of=who, units=units)]
    if extractor.real is not None and row.frechet and row.kind == "pool":
        real = ReferenceSet("training pictures", None, {"pool": extractor.real})
        found.append(
            metric_value(metric, extractor, made, real, of=who, floats=floats, units=units)
        )
    if file is not None:
        against = _reference(adm_suite.read(file), extractor, name)
        found.append(
            metric_value(metric, extractor, made, against, of=who, floats=floats, units=units)
        )
    return found


@torch.no_grad()
def image_set(
    pipeline: Any,
    requests: prompts.Requests,
    settings: SamplingSettings,
    ready: Mapping[str, Extractor],
    places: Sequence[int],
) -> ImageSet:
    """Features of everything a pipeline makes for the requests at some places, batch by batch.

    Raises:
        InputError: it makes videos or sounds.
    """
    parts: dict[str, list[Features]] = {name: [] for name in ready}
    kept: list[Tensor] = []
    failed: dict[int, str] = {}
    for result in run_pipeline(pipeline, requests, settings, only=places):
        made = shown(result)
        if made.ndim != 4:
            raise InputError("distributions compare pictures; this pipeline makes videos or sounds")
        start = sum(map(len, kept))
        for i, picture in enumerate(made):
            if why := flaw(picture):
                failed[places[start + i]] = why
        # as files would hold them: what the ADM suite sees is what is measured
        kept.append(as_bytes(made.nan_to_num()))
        for name, extractor in ready.items():
            parts[name].append(extractor(kept[-1].float() / 255))
    features = {
        name: {key: torch.cat([p[key] for p in every]) for key in every[0]}
        for name, every in parts.items()
    }
    return ImageSet(features, torch.cat(kept), failed)


def _whole(
    workers: Workers, folder: Path | None, side: str, made: ImageSet, places: Sequence[int]
) -> ImageSet | None:
    """The pictures of all processes in the order of their places, on the first; None elsewhere."""
    tensors = {**made.tensors(), "": made.bytes}
    found = gather(workers, folder, side, tensors, {"places": places, "failed": made.failed})
    if found is None:
        return None
    every = [place for _, plain in found for place in plain["places"]]
    check_ids([f"{place:04d}" for place in every], len(every))
    order = torch.tensor(every).argsort()
    held = {key: torch.cat([part[key] for part, _ in found])[order] for key in tensors}
    features = {
        name: {kind: held[f"{name}.{kind}"] for kind in kinds}
        for name, kinds in made.features.items()
    }
    failed = {int(i): why for _, plain in found for i, why in plain["failed"].items()}
    return ImageSet(features, held[""], dict(sorted(failed.items())))


def pair(
    metric: str,
    got: Tensor,
    want: Tensor,
    again: Tensor,
    prompts: Sequence[str],
    where: str,
) -> tuple[list[float], list[float]]:
    """A perceptual figure of each picture, and the same against the float model's second run.

    Args:
        metric: name in ``PERCEPTUAL``.
        got, want, again: pictures (B, 3, H, W) in [0, 1] of the candidate and of the float model's
            two runs. Of videos the middle frame is taken by the caller.
        prompts: what was asked for.
        where: its weights.

    Raises:
        InputError: it cannot run.
    """
    measure = PERCEPTUAL[metric]
    first = measure(got, want, prompts, where).double()
    if metric in UNPAIRED:  # what moves is the float model's own figure
        moved = measure(again, again, prompts, where) - measure(want, want, prompts, where)
        second = first + moved.double()
    else:
        second = measure(got, again, prompts, where).double()
    return first.tolist(), second.tolist()


def to_json(figures: Sequence[MetricValue]) -> list[dict[str, Any]]:
    """Plain data."""
    return [asdict(each) for each in figures]


def bundled(pipeline: Any) -> bool:
    """Whether the bundled classifier knows the pipeline's pictures."""
    known = read_json(demo.folder() / "model_index.json")["id2label"]
    return getattr(pipeline, "labels", None) == {name: int(n) for n, name in known.items()}


def _chosen(features: str, pipeline: Any) -> str:
    if features != "auto":
        return features
    return "emoji" if bundled(pipeline) else "inception"


def _reference(held: adm_suite.AdmReference, extractor: Extractor, name: str) -> ReferenceSet:
    if held.images is not None:
        floats = held.images.permute(0, 3, 1, 2).float() / 255
        return ReferenceSet(held.name, extractor(floats))
    if name != "inception":
        raise InputError(f"{held.name} has Inception moments, these are features of {name}")
    known = {"pool": held.pool, "spatial": held.spatial}
    return ReferenceSet(held.name, None, {k: m for k, m in known.items() if m is not None})
