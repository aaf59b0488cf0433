# SPDX-License-Identifier: Apache-2.0
"""``DISTRIBUTIONS``: metrics of an image set against a reference set, computed from features.

Features are extracted once, and every metric and every resample uses them. The values depend on N,
extractor and resizer. The comparable quantity is the change from the float model's value in the
same job, so the interval is an interval of the change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtq.errors import InputError
from dtq.evaluate.metrics.extractors import Extractor, Features
from dtq.evaluate.metrics.fid import FeatureMoments
from dtq.evaluate.metrics.mmd import cmmd, kid
from dtq.evaluate.metrics.precision_recall import inception_score, precision_recall

RESAMPLES = 200
"""Of the bootstrap; a Frechet distance of 2048 features takes a second."""


@dataclass(frozen=True)
class ReferenceSet:
    """The images that a metric compares with.

    Attributes:
        name: shown next to the value.
        features: of the images, if the images are known.
        moments: of the features by kind, for a file that has only moments.
    """

    name: str
    features: Features | None = None
    moments: dict[str, FeatureMoments] | None = None

    def features_of(self, kind: str) -> Tensor:
        """Features of a kind (N, D).

        Raises:
            InputError: this reference has moments only.
        """
        if self.features is None:
            raise InputError(f"{self.name} has moments only; this metric needs its images")
        return _features_of(self.features, kind, self.name)

    def moments_of(self, kind: str) -> FeatureMoments:
        """Moments of a kind of features, from the file or from the images."""
        if self.moments is not None and kind in self.moments:
            return self.moments[kind]
        return FeatureMoments.of(self.features_of(kind))


@dataclass(frozen=True)
class Distribution:
    """A metric of image sets; ``dtq.evaluate.gate.metrics`` says in words what it is.

    Attributes:
        name: as users write it.
        kind: of the features: ``pool``, ``spatial`` or ``logits``.
        value: the metric of features (N, D) of generated images and a reference.
        extractor: the only one that the metric is defined with, or ``""`` for any.
        reference_free: whether the metric ignores the reference.
        frechet: whether it is a Frechet distance; only these have an interval.
    """

    name: str
    kind: str
    value: Callable[[Tensor, ReferenceSet], float]
    extractor: str = ""
    reference_free: bool = False
    frechet: bool = False


@dataclass(frozen=True)
class MetricValue:
    """A value and everything that it depends on.

    Attributes:
        metric: name in ``DISTRIBUTIONS``.
        model: name of the model whose images were compared.
        reference: name of the reference, empty for reference-free metrics.
        value: of the metric.
        samples: N of the model's images.
        reference_samples: N of the reference; None for a reference of moments.
        extractor: name of the feature extractor.
        resizer: how images were resized for the extractor.
        change: value minus the float model's value against the same reference; None if the
            reference is the float model.
        low: lower end of the 95 % interval of ``change``, for Frechet distances.
        high: upper end.
    """

    metric: str
    model: str
    reference: str
    value: float
    samples: int
    reference_samples: int | None
    extractor: str
    resizer: str
    change: float | None = None
    low: float | None = None
    high: float | None = None


def _frechet(kind: str) -> Callable[[Tensor, ReferenceSet], float]:
    return lambda x, reference: reference.moments_of(kind).distance_to_features(x)


DISTRIBUTIONS: dict[str, Distribution] = {
    d.name: d
    for d in (
        Distribution("fid", "pool", _frechet("pool"), frechet=True),
        Distribution("sfid", "spatial", _frechet("spatial"), frechet=True),
        Distribution("kid", "pool", lambda x, reference: kid(x, reference.features_of("pool"))[0]),
        Distribution("is", "logits", lambda x, reference: inception_score(x), reference_free=True),
        Distribution("precision", "pool",
                     lambda x, reference: precision_recall(x, reference.features_of("pool"))[0]),
        Distribution("recall", "pool",
                     lambda x, reference: precision_recall(x, reference.features_of("pool"))[1]),
        Distribution("fd-dinov2", "pool", _frechet("pool"), extractor="dinov2", frechet=True),
        Distribution("fvd", "pool", _frechet("pool"), extractor="i3d", frechet=True),
        Distribution("cmmd", "pool",
                     lambda x, reference: cmmd(x, reference.features_of("pool")), extractor="clip"),
    )
}  # fmt: skip


def metric_value(
    metric: str,
    extractor: Extractor,
    features: Features,
    reference: ReferenceSet,
    *,
    model: str,
    floats: Features | None = None,
    groups: Sequence[Any] = (),
) -> MetricValue:
    """Compute a metric of an image set.

    Args:
        metric: name in ``DISTRIBUTIONS``.
        extractor: that computed all features.
        features: of the candidate's images.
        reference: to compare with.
        model: name of the candidate.
        floats: features of the float model's images for the same requests and seeds, if the
            reference is another set. They give ``change``.
        groups: the request of each image. Images of one request are resampled together. Empty: no
            interval.

    Raises:
        InputError: the extractor or the reference lacks what the metric needs, there are too few
            images, or features are not finite.
    """
    row = DISTRIBUTIONS[metric]
    x = _features_of(features, row.kind, extractor.name)
    y = None if floats is None else _features_of(floats, row.kind, extractor.name)
    for side in (x, *([] if y is None else [y])):
        if not torch.isfinite(side).all():
            raise InputError(
                f"{metric}: features of an image of {model} or of the float model are not finite"
            )
    try:
        value = row.value(x, reference)
        change = None if y is None else value - row.value(y, reference)
    except ValueError as error:
        raise InputError(f"{metric}: {error}") from error
    low = high = None
    if row.frechet and y is not None and groups:
        low, high = interval(x, y, reference.moments_of(row.kind), groups)
    known = reference.features is not None and not row.reference_free
    size = len(reference.features_of(row.kind)) if known else None
    return MetricValue(
        metric, model, "" if row.reference_free else reference.name, value, len(x), size,
        extractor.name, extractor.resizer, change, low, high,
    )  # fmt: skip


def interval(
    features: Tensor, floats: Tensor, reference: FeatureMoments, groups: Sequence[Any]
) -> tuple[float, float]:
    """95 % bootstrap interval of the change of a Frechet distance from the float model's.

    Requests are resampled, the same ones for both models. A resample has fewer distinct images, so
    its distances are larger, by nearly the same amount for both models. The remaining bias is
    removed: the mean of the bootstrap is shifted to the measured change.

    Args:
        features: of the candidate (N, D).
        floats: of the float model (N, D).
        reference: fixed.
        groups: the request of each image (N,).
    """
    members: dict[Any, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    lists = list(members.values())
    g = torch.Generator().manual_seed(0)

    distance = reference.distance_to_features

    def change(rows: list[int]) -> float:
        return distance(features[rows]) - distance(floats[rows])

    center = change(list(range(len(features))))
    resampled = []
    for _ in range(RESAMPLES):
        drawn = torch.randint(len(lists), (len(lists),), generator=g).tolist()
        resampled.append(change([i for k in drawn for i in lists[k]]))
    values = torch.tensor(resampled, dtype=torch.float64)
    low, high = torch.quantile(values - values.mean(), torch.tensor([0.025, 0.975]).double())
    return center + float(low), center + float(high)


def _features_of(features: Features, kind: str, source: str) -> Tensor:
    if kind not in features:
        raise InputError(f"{source} has {', '.join(features)} features; this metric needs {kind}")
    return features[kind]
