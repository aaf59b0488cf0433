# SPDX-License-Identifier: Apache-2.0
"""``DISTRIBUTIONS``: figures of a whole set of pictures against another set, from their features.

Feature sets are made once and every figure is computed from them, resamples included. Absolute
values depend on N, extractor and resizer; what is comparable is the difference to the float
model's figure of the same job, so that is what gets an interval.
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
from dtq.evaluate.metrics.precision_recall import NEIGHBOURS, inception_score, precision_recall

RESAMPLES = 200
"""Of the bootstrap; a Frechet distance of 2048 features takes a second."""


@dataclass(frozen=True)
class ReferenceSet:
    """The reference side: features of its pictures, or only their moments.

    Attributes:
        name: said beside the figure.
        features: of its pictures, when there are pictures.
        moments: by kind of feature, for a file that has nothing else.
    """

    name: str
    features: Features | None = None
    moments: dict[str, FeatureMoments] | None = None

    def of(self, kind: str) -> Tensor:
        """Features of a kind.

        Raises:
            InputError: this reference has moments alone.
        """
        if self.features is None:
            raise InputError(f"{self.name} has no pictures, only moments; this figure needs them")
        return _kind(self.features, kind, self.name)

    def gaussian(self, kind: str) -> FeatureMoments:
        """Moments of a kind of features, from the file or from the pictures."""
        if self.moments is not None and kind in self.moments:
            return self.moments[kind]
        return FeatureMoments.of(self.of(kind))


@dataclass(frozen=True)
class Distribution:
    """One figure of a set.

    Attributes:
        name, about: for people.
        kind: of features: ``pool``, ``spatial``, ``logits``.
        value: features of the made pictures (N, D) and the reference, to a number.
        extractor: the only one it is defined with, or ``""`` for the one of the run.
        alone: needs no reference.
        frechet: resampled through cached roots; others have no interval.
    """

    name: str
    about: str
    kind: str
    value: Callable[[Tensor, ReferenceSet], float]
    extractor: str = ""
    alone: bool = False
    frechet: bool = False


@dataclass(frozen=True)
class MetricValue:
    """A value and everything it depends on.

    Attributes:
        metric: name in ``DISTRIBUTIONS``.
        of: which model's pictures.
        against: the reference's name, empty for figures that have none.
        value: the figure.
        change: value minus the float model's against the same reference, where that is another.
        low, high: 95 % interval of ``change``, for Frechet distances.
        samples, reference_samples: N on both sides; None for a reference of moments.
        extractor, resizer: of the features.
    """

    metric: str
    of: str
    against: str
    value: float
    samples: int
    reference_samples: int | None
    extractor: str
    resizer: str
    change: float | None = None
    low: float | None = None
    high: float | None = None


def _frechet(kind: str) -> Callable[[Tensor, ReferenceSet], float]:
    return lambda made, against: against.gaussian(kind).to_features(made)


DISTRIBUTIONS: dict[str, Distribution] = {
    d.name: d
    for d in (
        Distribution("fid", "Frechet distance of pooled features", "pool",
                     _frechet("pool"), frechet=True),
        Distribution("sfid", "Frechet distance of 7 channels of a map", "spatial",
                     _frechet("spatial"), frechet=True),
        Distribution("kid", "unbiased MMD^2, cubic kernel", "pool",
                     lambda made, against: kid(made, against.of("pool"))[0]),
        Distribution("is", "Inception score", "logits",
                     lambda made, against: inception_score(made), alone=True),
        Distribution("precision", f"made within {NEIGHBOURS}-NN of the reference", "pool",
                     lambda made, against: precision_recall(made, against.of("pool"))[0]),
        Distribution("recall", f"reference within {NEIGHBOURS}-NN of the made", "pool",
                     lambda made, against: precision_recall(made, against.of("pool"))[1]),
        Distribution("fd-dinov2", "Frechet distance of DINOv2 features", "pool",
                     _frechet("pool"), extractor="dinov2", frechet=True),
        Distribution("cmmd", "MMD^2 of CLIP features x 1000", "pool",
                     lambda made, against: cmmd(made, against.of("pool")), extractor="clip"),
    )
}  # fmt: skip


def metric_value(
    metric: str,
    extractor: Extractor,
    made: Features,
    against: ReferenceSet,
    *,
    of: str,
    floats: Features | None = None,
    units: Sequence[Any] = (),
) -> MetricValue:
    """One figure of a set of pictures.

    Args:
        metric: name in ``DISTRIBUTIONS``.
        extractor: that made all features.
        made: features of the candidate's pictures.
        against: the reference.
        of: name of the candidate.
        floats: features of the float model's pictures of the same requests and seeds; given for a
            reference other than these.
        units: of each picture, what was asked for; pictures of one request are resampled together.

    Raises:
        InputError: the extractor or the reference lacks what the figure needs, or there are too
            few pictures, or features are not finite.
    """
    row = DISTRIBUTIONS[metric]
    x = _kind(made, row.kind, extractor.name)
    y = None if floats is None else _kind(floats, row.kind, extractor.name)
    for side in (x, *([] if y is None else [y])):
        if not torch.isfinite(side).all():
            raise InputError(f"{metric}: a picture of {of} or of the float model has no features")
    try:
        value = row.value(x, against)
        change = None if y is None else value - row.value(y, against)
    except ValueError as error:
        raise InputError(f"{metric}: {error}") from error
    low = high = None
    if row.frechet and y is not None and units:
        low, high = interval(x, y, against.gaussian(row.kind), units)
    size = None
    if against.features is not None and not row.alone:
        size = len(against.of(row.kind))
    return MetricValue(
        metric, of, "" if row.alone else against.name, value, len(x), size, extractor.name,
        extractor.resizer, change, low, high,
    )  # fmt: skip


def interval(
    made: Tensor, floats: Tensor, reference: FeatureMoments, units: Sequence[Any]
) -> tuple[float, float]:
    """95 % bootstrap interval of how far a Frechet distance is from the float model's.

    Requests are drawn, both sides with the same ones. A resample has fewer distinct pictures and
    so a larger distance, nearly the same on both sides; what is left of it is taken out by moving
    the bootstrap's mean back to the value.

    Args:
        made: features (N, D).
        floats: of the float model (N, D).
        reference: the fixed side.
        units: what was asked for (N,).
    """
    places: dict[Any, list[int]] = {}
    for i, unit in enumerate(units):
        places.setdefault(unit, []).append(i)
    groups = list(places.values())
    g = torch.Generator().manual_seed(0)

    def of(rows: list[int]) -> float:
        return reference.to_features(made[rows]) - reference.to_features(floats[rows])

    centre = of(list(range(len(made))))
    found = []
    for _ in range(RESAMPLES):
        drawn = torch.randint(len(groups), (len(groups),), generator=g).tolist()
        found.append(of([i for k in drawn for i in groups[k]]))
    values = torch.tensor(found, dtype=torch.float64)
    low, high = torch.quantile(values - values.mean(), torch.tensor([0.025, 0.975]).double())
    return centre + float(low), centre + float(high)


def _kind(features: Features, kind: str, who: str) -> Tensor:
    if kind not in features:
        raise InputError(f"{who} gives {', '.join(features)} features, this figure needs {kind}")
    return features[kind]
