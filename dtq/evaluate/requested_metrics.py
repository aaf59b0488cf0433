# SPDX-License-Identifier: Apache-2.0
"""Metrics that a user requests by name: each gets a value, or a reason why it is missing.

A metric that cannot be computed goes into ``missing``. This makes the run invalid for the gate, and
the exit code of ``dtq eval`` 3, so no requested metric is silently absent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dtq import demo
from dtq.errors import InputError
from dtq.evaluate.feature_file import FeatureFile
from dtq.evaluate.image_sets import ImageSet, gather_images, image_set
from dtq.evaluate.metrics import extractors
from dtq.evaluate.metrics.distributions import DISTRIBUTIONS, MetricValue, metric_value
from dtq.evaluate.metrics.extractors import Extractor
from dtq.evaluate.metrics.perceptual import PERCEPTUAL, UNPAIRED
from dtq.evaluate.references import reference_set, references
from dtq.io.safe_parse import read_json
from dtq.io.schema import check_name
from dtq.pipelines import prompts
from dtq.pipelines.loading import LoadedModel
from dtq.pipelines.settings import SamplingSettings
from dtq.runs.workers import SINGLE_PROCESS, Workers

RERUN_IMAGES = 256
"""The float model samples at most so many images a second time, to measure the noise."""


@dataclass(frozen=True)
class MetricRequest:
    """Metrics in addition to those of every run.

    Attributes:
        metrics: names of ``DISTRIBUTIONS`` and ``PERCEPTUAL``.
        num_images: of each model, for distribution metrics.
        features: extractor of distribution metrics that do not prescribe one; ``auto``: the bundled
            classifier for the bundled models, else Inception.
        weights: extractor or metric to local path or hub id of its weights.
        reference: an ADM npz or a folder of images or videos, an additional reference of
            distribution metrics.
        prompts: prompt set of the image sets; ``auto`` is every label, or the set that fits.
    """

    metrics: tuple[str, ...] = ()
    num_images: int = 0
    features: str = "auto"
    weights: Mapping[str, str] = field(default_factory=dict)
    reference: Path | None = None
    prompts: str = "auto"

    def check(self) -> None:
        """Find mistakes before anything runs.

        Raises:
            InputError: unknown names, or distribution metrics without a number of images; the
                message lists all mistakes.
        """
        problems: list[str] = []
        for name in self.metrics:
            check_name(name, [*DISTRIBUTIONS, *PERCEPTUAL], "--metric", problems, "metric")
        known = ["auto", *extractors.EXTRACTORS, *PERCEPTUAL]
        for name in (self.features, *self.weights):
            check_name(name, known, "--features, --extractor", problems, "extractor")
        if self.distributions and self.num_images < 2:
            names = ", ".join(self.distributions)
            problems.append(f"{names}: needs sets of images; give their size: --num-images 256")
        if self.reference is not None and not self.reference.exists():
            problems.append(f"--reference-set {self.reference}: no such file or folder")
        if problems:
            raise InputError("\n".join(problems))

    @property
    def distributions(self) -> list[str]:
        """The requested metrics of whole image sets."""
        return [name for name in self.metrics if name in DISTRIBUTIONS]

    @property
    def perceptual(self) -> list[str]:
        """The requested metrics of single images."""
        return [name for name in self.metrics if name in PERCEPTUAL]


@dataclass
class MetricResults:
    """Results of the requested distribution metrics.

    Attributes:
        metrics: the values.
        missing: a metric without a value, to the reason.
        image_sets: of the float model and the candidate.
        file: what the run file says about them.
        rerun: features of the float model's images once more, in other batches, for the noise.
    """

    metrics: list[MetricValue] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    image_sets: dict[str, ImageSet] = field(default_factory=dict)
    file: FeatureFile | None = None
    rerun: dict[str, Tensor] = field(default_factory=dict)

    def features(self) -> dict[str, Tensor]:
        """Features (N, D) of the requested metrics by ``<side>.<extractor>.<kind>``."""
        if self.file is None:
            return {}
        needed = {f"{e}.{DISTRIBUTIONS[m].kind}" for m, e in self.file.extractor_of.items()}
        sides = {side: images.features for side, images in self.image_sets.items()}
        sides["rerun"] = self.rerun
        return {
            f"{side}.{name}": features[name]
            for side, features in sides.items()
            for name in sorted(needed & features.keys())
        }


def distributions(
    candidate: LoadedModel,
    reference: LoadedModel,
    settings: SamplingSettings,
    request: MetricRequest,
    progress: Callable[[str], None] = lambda line: None,
    workers: Workers = SINGLE_PROCESS,
    folder: Path | None = None,
    *,
    rerun_batch_size: int = 1,
) -> MetricResults:
    """Sample both models with the same seeds, and compare the image sets.

    Args:
        candidate: the quantized pipeline.
        reference: the float pipeline.
        settings: of the run. The image sets have the next seed, and prompts or labels spread evenly
            over ``request.prompts``.
        request: which metrics, of how many images.
        progress: receives a line per model.
        workers: processes that share the images; only the main process computes metrics.
        folder: through which they exchange files; one process needs none.
        rerun_batch_size: batch size of the second run of the float model.
    """
    results = MetricResults()
    loaded, extractor_of = _load_extractors(request, reference.pipeline, results.missing)
    if not extractor_of:
        return results
    settings = replace(
        settings, prompts=request.prompts, samples=request.num_images, seed=settings.seed + 1
    )
    # nested: a run with more images begins with the same images
    requests = prompts.load(settings.prompts, reference.pipeline, settings.samples, nested=True)
    entries = requests.entries
    other = replace(settings, batch_size=rerun_batch_size)
    fewer = replace(requests, entries=entries[:RERUN_IMAGES])
    for name, model, some, job in (
        ("float", reference, requests, settings),
        ("rerun", reference, fewer, other),
        ("candidate", candidate, requests, settings),
    ):
        progress(f"{name}, {len(some.entries)} samples for {', '.join(extractor_of)}")
        places = workers.shard(len(some.entries), job.batch_size)
        shard = image_set(model.pipeline, some, job, loaded, places)
        images = gather_images(workers, folder, name, shard, places)
        if images is not None:
            results.image_sets[name] = images
    if not workers.is_main:
        return results
    results.rerun = results.image_sets["rerun"].features
    for images in results.image_sets.values():
        refused = {m: images.refused[e] for m, e in extractor_of.items() if e in images.refused}
        results.missing |= refused
    extractor_of = {m: e for m, e in extractor_of.items() if m not in results.missing}
    results.file = FeatureFile(
        prompts.texts(requests, reference.pipeline),
        settings.seed,
        {name: f"weights {each.weights}, resizer {each.resizer}" for name, each in loaded.items()},
        extractor_of,
    )
    reasons = _unusable(results.image_sets)
    del results.image_sets["rerun"]
    if reasons:
        results.missing |= dict.fromkeys(extractor_of, "; ".join(reasons))
        return results
    frames = results.image_sets["float"].frames
    reference_of = functools.cache(partial(reference_set, request.reference, loaded, frames))
    for metric, name in extractor_of.items():
        extractor = loaded[name]
        if frames > 1:  # their moments are of images
            extractor = replace(extractor, real=None)
        floats, made = (images.features_of(name) for images in results.image_sets.values())
        value = partial(metric_value, metric, extractor, made, model=candidate.name, groups=entries)
        try:
            pairs = references(metric, name, extractor, floats, reference_of)
            results.metrics += [value(other, floats=own) for other, own in pairs]
        except InputError as error:
            results.missing[metric] = str(error)
    return results


def _unusable(image_sets: dict[str, ImageSet]) -> list[str]:
    """A sentence for each set in which samples failed: it cannot be compared."""
    return [
        f"{len(images.failed)} of {len(images.bytes)} samples of the {name} model cannot be used: "
        f"the first {next(iter(images.failed.values()))}"
        for name, images in image_sets.items()
        if images.failed
    ]


def _load_extractors(
    request: MetricRequest, pipeline: Any, missing: dict[str, str]
) -> tuple[dict[str, Extractor], dict[str, str]]:
    """Extractors by name, and the name of the extractor of each metric.

    ``missing`` gets the reason for each metric whose extractor cannot be loaded.
    """
    loaded: dict[str, Extractor] = {}
    extractor_of: dict[str, str] = {}
    for metric in request.distributions:
        try:
            name = DISTRIBUTIONS[metric].extractor or request.features
            if name == "auto":
                name = "emoji" if is_bundled(pipeline) else "inception"
            if name not in loaded:
                loaded[name] = extractors.load(name, request.weights.get(name, ""))
            extractor_of[metric] = name
        except InputError as error:
            missing[metric] = str(error)
    return loaded, extractor_of


def perceptual(
    metric: str,
    candidate: Tensor,
    reference: Tensor,
    rerun: Tensor,
    texts: Sequence[str],
    weights: str,
) -> tuple[list[float], list[float]]:
    """A perceptual metric of each image, and the same against the float model's second run.

    Args:
        metric: name in ``PERCEPTUAL``.
        candidate: images (B, 3, H, W) in [0, 1] of the candidate.
        reference: the same of the float model.
        rerun: the same of its second run.
        texts: prompt of each image.
        weights: local path or hub id of the metric's weights, or empty.

    Raises:
        InputError: the metric cannot be computed.
    """
    measure = PERCEPTUAL[metric]
    values = measure(candidate, reference, texts, weights).double()
    if metric in UNPAIRED:  # the noise is the change of the float model's own value
        first, second = (measure(x, x, texts, weights) for x in (reference, rerun))
        again = values + (second - first).double()
    else:
        again = measure(candidate, rerun, texts, weights).double()
    return values.tolist(), again.tolist()


def is_bundled(pipeline: Any) -> bool:
    """Whether a pipeline has the labels of the bundled models and of the bundled classifier."""
    known = read_json(demo.folder() / "model_index.json")["id2label"]
    return getattr(pipeline, "labels", None) == {name: int(n) for n, name in known.items()}
