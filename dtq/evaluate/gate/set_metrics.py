# SPDX-License-Identifier: Apache-2.0
"""``SET_METRICS``: metrics of whole image sets in the gate, and their jackknife.

The value of a run is the distance of the candidate's images from the float model's images of the
same prompts and seeds, so it is the change that quantization causes in this job. The gate compares
the values of run and baseline. Their difference has no value per prompt; the delete-a-block
jackknife gives one (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 11; blocks of
unequal size: Busing, Meijer and van der Leeden, Statistics and Computing 9, 1999, eq. 5). The mean
of these pseudo-values is the value without its bias of order 1/N, and the gate treats them as the
paired differences of its other metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtq.evaluate import feature_file
from dtq.evaluate.gate.metrics import METRICS
from dtq.evaluate.gate.policy import MIN_PROMPTS, Limit
from dtq.evaluate.metrics.distributions import DISTRIBUTIONS
from dtq.evaluate.metrics.fid import frechet
from dtq.evaluate.metrics.mmd import cubic_kernel, gaussian_kernel
from dtq.evaluate.metrics.precision_recall import distances, inception_score, is_covered
from dtq.evaluate.run_file import Run

BLOCKS = 64
"""Prompts are divided into at most so many blocks: as many values as 64 prompts have."""


@dataclass(frozen=True)
class SetMetric:
    """A metric of a set of images.

    Attributes:
        name: of the metric in a policy and in ``DISTRIBUTIONS``.
        value: of candidate and float features, each (N, D); image i of both has the same prompt
            and seed.
        without: the same for each block of positions that is left out, (B,).
    """

    name: str
    value: Callable[[Tensor, Tensor], float]
    without: Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]

    @property
    def kind(self) -> str:
        """Of the features: ``pool``, ``spatial`` or ``logits``."""
        return DISTRIBUTIONS[self.name].kind


def blocks_of(prompts: Sequence[str], count: int = BLOCKS) -> dict[str, Tensor]:
    """Positions of the images of each block; all images of a prompt are in one block.

    Args:
        prompts: of each image (N,).
        count: number of blocks, at most.

    Returns:
        Block to positions. A block is named by its first prompt and the number of the others.
    """
    members: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(i)
    names = list(members)
    parts = [names[i :: min(count, len(names))] for i in range(min(count, len(names)))]
    return {
        part[0] + (f" and {len(part) - 1} more" if len(part) > 1 else ""): torch.tensor(
            [i for name in part for i in members[name]]
        )
        for part in parts
    }


def pseudo_values(
    metric: SetMetric, candidate: Tensor, floats: Tensor, blocks: Sequence[Tensor]
) -> Tensor:
    """Jackknife pseudo-values of a set metric, one per block (B,), float64.

    Their mean is the delete-a-block jackknife estimate, also for blocks of unequal size.

    Args:
        metric: of ``SET_METRICS``.
        candidate: its features (N, D).
        floats: features (N, D) of the float model's images of the same prompts and seeds.
        blocks: positions, each in one block.
    """
    whole = metric.value(candidate, floats)
    weight = len(candidate) / torch.tensor([len(block) for block in blocks]).double()
    values = weight * whole - (weight - 1) * metric.without(candidate, floats, blocks)
    estimate = (values / weight).sum()
    return estimate + len(blocks) / weight * (values - estimate)


def paired_mmd(
    kernel: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0
) -> Callable[..., Tensor]:
    """Unbiased MMD^2 of paired samples (Gretton et al., JMLR 13, 2012, eq. 3).

    It leaves the kernel of image i of one side and image i of the other out. Both come from the
    same seed, so the estimator for independent samples would be too small.

    Returns:
        A function of candidate and float features (N, D) and blocks; with each block left out,
        or for no block the value itself: (B,) or (1,), float64.
    """

    def values(x: Tensor, y: Tensor, blocks: Sequence[Tensor] = ()) -> Tensor:
        x, y = x.double(), y.double()
        cross = kernel(x, y)
        h = (kernel(x, x) + kernel(y, y) - cross - cross.T).fill_diagonal_(0)
        rows, total = h.sum(1), h.sum()
        sums, counts = [total], [len(x)]
        if blocks:
            sums = [total - 2 * rows[b].sum() + h[b][:, b].sum() for b in blocks]
            counts = [len(x) - len(b) for b in blocks]
        n = torch.tensor(counts, dtype=torch.float64)
        return scale * torch.stack(sums) / (n * (n - 1))

    return values


def _recomputed(value: Callable[[Tensor, Tensor], float]) -> Callable[..., Tensor]:
    """``without`` of a metric that is computed anew for each block."""

    def without(x: Tensor, y: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        kept = torch.ones(len(x), dtype=torch.bool)
        values = []
        for block in blocks:
            kept[block] = False
            values.append(value(x[kept], y[kept]))
            kept[block] = True
        return torch.tensor(values, dtype=torch.float64)

    return without


def _covered(x: Tensor, y: Tensor, blocks: Sequence[Tensor] = ()) -> Tensor:
    """Precision of x against y, or its mean over the images outside of each block.

    The manifold of y stays whole. It is not a smooth function of the images, so it has no
    jackknife: a block that is left out would uncover some images of the other side for good.
    """
    inside = is_covered(distances(x.double(), y.double()), distances(y.double(), y.double()))
    total, sums, counts = inside.sum(), [inside.sum()], [len(x)]
    if blocks:
        sums = [total - inside[block].sum() for block in blocks]
        counts = [len(x) - len(block) for block in blocks]
    return torch.stack(sums).double() / torch.tensor(counts)


def _metric(name: str, value: Callable[[Tensor, Tensor], float]) -> SetMetric:
    return SetMetric(name, value, _recomputed(value))


def _at_once(name: str, values: Callable[..., Tensor]) -> SetMetric:
    """A metric whose ``values`` share the work between blocks."""
    return SetMetric(name, lambda x, y: float(values(x, y)), values)


SET_METRICS: dict[str, SetMetric] = {
    m.name: m
    for m in (
        _metric("fid", frechet),
        _metric("sfid", frechet),
        _metric("fd-dinov2", frechet),
        _metric("fvd", frechet),
        _at_once("kid", paired_mmd(cubic_kernel)),
        _at_once("cmmd", paired_mmd(gaussian_kernel, 1000.0)),
        _metric("is", lambda x, y: inception_score(x) - inception_score(y)),
        _at_once("precision", _covered),
        _at_once("recall", lambda x, y, blocks=(): _covered(y, x, blocks)),
    )
}


def flaws(run: Run, limit: Limit) -> list[str]:
    """Reasons why the image sets of a run cannot be used for a set metric.

    Raises:
        InputError: the features cannot be read.
    """
    info, name = run.image_sets, limit.metric
    if info is None or name not in info.extractor_of:
        return [f"{name} was not measured"]
    used = info.extractor_of[name]
    if limit.features not in ("auto", used):
        return [f"{name}: the policy asks for features of {limit.features}, not {used}"]
    sides = [feature_name(run, limit, side) for side in ("candidate", "float", "rerun")]
    if reasons := feature_file.flaws(run.features, sides, len(info.prompts)):
        return [f"{name}: {reason}" for reason in reasons]
    prompts = len(set(info.prompts[: limit.num_images]))
    if prompts < MIN_PROMPTS:
        reasons.append(
            f"{name}: the images have {prompts} prompts, and an interval needs {MIN_PROMPTS}; give "
            f"another --set-prompts"
        )
    width = run.features[sides[0]].shape[1]
    if DISTRIBUTIONS[name].frechet and limit.num_images < 2 * width:
        reasons.append(
            f"{name}: {limit.num_images} images are too few for {width} features, whose bias a "
            f"jackknife removes from {2 * width} images on; raise num_images, or take kid"
        )
    return reasons


def differences(run: Run, baseline: Run, limit: Limit) -> dict[str, float]:
    """Difference of the values of run and baseline by block of prompts, positive is worse.

    Args:
        run: of the candidate, with the features that the limit needs.
        baseline: of the same job.
        limit: of a set metric. Its ``num_images`` first images of both runs are compared.

    Returns:
        Block, named by its prompts, to pseudo-value; none if a run has too few images.
    """
    prompts = _prompts(run, baseline)[: limit.num_images]
    if len(prompts) < limit.num_images:
        return {}
    row, metric = SET_METRICS[limit.metric], METRICS[limit.metric]
    blocks = blocks_of(prompts)
    mine, theirs = (
        pseudo_values(row, *_features(side, limit, len(prompts)), list(blocks.values())).tolist()
        for side in (run, baseline)
    )
    pairs = zip(blocks, mine, theirs, strict=True)
    return {name: metric.worse(own, other) for name, own, other in pairs}


def noise_of(run: Run, limit: Limit) -> float:
    """Change of the value between the two runs of the float model, on the images of the second."""
    row, features = SET_METRICS[limit.metric], run.features
    again = features[feature_name(run, limit, "rerun")]
    candidate, floats = _features(run, limit, len(again))
    return abs(row.value(candidate, again) - row.value(candidate, floats))


def feature_name(run: Run, limit: Limit, side: str) -> str:
    """Name of the features of a side (``candidate``, ``float``, ``rerun``) in the file of a run."""
    assert run.image_sets is not None
    return f"{side}.{run.image_sets.extractor_of[limit.metric]}.{SET_METRICS[limit.metric].kind}"


def _features(run: Run, limit: Limit, count: int) -> tuple[Tensor, Tensor]:
    sides = (run.features[feature_name(run, limit, side)] for side in ("candidate", "float"))
    candidate, floats = (tensor[:count] for tensor in sides)
    return candidate, floats


def _prompts(run: Run, baseline: Run) -> list[str]:
    """Prompts of the images that both runs have."""
    assert run.image_sets is not None and baseline.image_sets is not None  # noqa: PT018
    return run.image_sets.prompts[: len(baseline.image_sets.prompts)]
