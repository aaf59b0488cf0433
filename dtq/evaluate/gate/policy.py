# SPDX-License-Identifier: Apache-2.0
"""The gate's policy: which metrics decide, their margins, and the error probability."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtq.errors import InputError, RecipeError
from dtq.evaluate.fingerprint import digest
from dtq.evaluate.gate.metrics import METRICS, MIN_IMAGES
from dtq.evaluate.run_file import MATCHABLE
from dtq.io.package_data import find_yaml
from dtq.io.safe_parse import LARGEST_YAML, parse_yaml, read_text
from dtq.io.schema import check_name, plain
from dtq.io.schema import read as read_fields

MIN_PROMPTS = 8
"""With fewer prompts an interval is meaningless."""

MAX_RESAMPLES = 1_000_000
"""They take seconds per metric."""

MIN_MARGIN, MAX_MARGIN = 1e-12, 1e9
"""Of differences, where a factor is its logarithm; no measured difference is outside."""


@dataclass(frozen=True)
class Limit:
    """How much worse a candidate may be in one metric.

    Attributes:
        metric: a name of ``METRICS``.
        margin: in the unit of the metric: a factor above 1 for errors, dB for PSNR. The gate raises
            it to twice the measured noise if it is smaller.
        parts: into how many parts the trajectory is divided. Each part is tested separately, so 4
            finds a regression in one quarter of the steps.
        features: extractor of a set metric; ``auto``: the one that the run used.
        num_images: images that a set metric needs; with fewer it is inconclusive.
    """

    metric: str
    margin: float
    parts: int = 1
    features: str = "auto"
    num_images: int = MIN_IMAGES


@dataclass(frozen=True)
class Policy:
    """The contents of a policy file. ``docs/gate.md`` explains every key.

    Attributes:
        name: of the file, without ``.yaml``.
        about: one line.
        primary: these decide; all of them must pass.
        secondary: these must be present, and are tested and shown, but do not decide.
        alpha: probability of a wrong verdict, over all primary metrics and looks.
        looks: numbers of prompts at which the gate may decide, increasing.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        match: conditions that must be equal in addition to those of the job; names of
            ``MATCHABLE``.
    """

    name: str = ""
    about: str = ""
    primary: tuple[Limit, ...] = ()
    secondary: tuple[Limit, ...] = ()
    alpha: float = 0.05
    looks: tuple[int, ...] = (32, 64, 96)
    resamples: int = 9999
    seed: int = 0
    match: tuple[str, ...] = ("hardware", "torch")

    @classmethod
    def load(cls, what: str | Path | Policy) -> Policy:
        """Load a policy by name or by path to a YAML file; a :class:`Policy` is returned as it is.

        Raises:
            InputError: no policy of that name, no such file.
            RecipeError: the file has mistakes; all of them are in the message.
        """
        if isinstance(what, Policy):
            return what
        path = find_yaml(what, "gate", "policy", "Or give a file that ends in .yaml.")
        try:
            data = parse_yaml(read_text(path, LARGEST_YAML), str(path))
        except InputError as error:
            raise RecipeError(str(path), [str(error).removeprefix(f"{path}: ")]) from error
        if not isinstance(data, dict):
            raise RecipeError(str(path), ["a policy is a mapping of keys to values"])
        problems: list[str] = []
        policy: Policy = read_fields(cls, {**data, "name": path.stem}, "", problems)
        problems += policy.problems() if not problems else []
        if problems:
            raise RecipeError(str(path), problems)
        return policy

    def problems(self) -> list[str]:
        """Mistakes: unknown names, and numbers out of range."""
        problems: list[str] = []
        if not self.primary:
            problems.append("primary: at least one metric must decide")
        for kind in ("primary", "secondary"):
            for i, limit in enumerate(getattr(self, kind)):
                problems += _limit_problems(limit, f"{kind}[{i}]")
        rows = Counter(f"{x.metric} in {x.parts}" for x in (*self.primary, *self.secondary))
        twice = sorted(row for row, count in rows.items() if count > 1)
        problems += [f"primary, secondary: {row} part(s) is there twice" for row in twice]
        if not 1e-6 <= self.alpha < 0.5:
            problems.append(f"alpha: must be between 0 and 0.5, 0.000001 at least, is {self.alpha}")
        if self.resamples > MAX_RESAMPLES:
            problems.append(f"resamples: at most {MAX_RESAMPLES}, is {self.resamples}")
        if self.seed < 0:
            problems.append(f"seed: must not be below 0, is {self.seed}")
        problems += self._look_problems()
        for i, name in enumerate(self.match):
            check_name(name, MATCHABLE, f"match[{i}]", problems, "condition")
        return problems

    def _look_problems(self) -> list[str]:
        if not self.looks or list(self.looks) != sorted(set(self.looks)):
            return [f"looks: must be rising numbers of prompts, is {list(self.looks)}"]
        if self.looks[0] < MIN_PROMPTS:
            return [f"looks[0]: below {MIN_PROMPTS} prompts no interval holds, is {self.looks[0]}"]
        if not self.primary or not 1e-6 <= self.alpha < 0.5:
            return []
        smallest = self.alpha / len(self.looks) / sum(x.parts for x in self.primary)
        if self.resamples * smallest >= 5:
            return []
        return [
            f"resamples: {self.resamples} are too few for alpha {self.alpha} over "
            f"{len(self.looks)} looks and these metrics; at least {int(5 / smallest) + 1}"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every default filled in."""
        data: dict[str, Any] = plain(self)
        return data

    def key(self) -> str:
        """Fingerprint of everything except the name and the description."""
        return digest({k: v for k, v in self.to_dict().items() if k not in ("name", "about")})


def _limit_problems(limit: Limit, at: str) -> list[str]:
    problems: list[str] = []
    if not check_name(limit.metric, METRICS, f"{at}.metric", problems, "metric"):
        return problems
    metric = METRICS[limit.metric]
    if metric.ratio and limit.margin <= 1:
        problems.append(f"{at}.margin: {metric.name} takes a factor above 1, is {limit.margin}")
    elif not metric.ratio and limit.margin <= 0:
        problems.append(f"{at}.margin: must be above 0, is {limit.margin}")
    elif not MIN_MARGIN <= metric.to_difference(limit.margin) <= MAX_MARGIN:
        problems.append(f"{at}.margin: {limit.margin} is beyond what is measured")
    if not metric.of_sets and (limit.features, limit.num_images) != ("auto", MIN_IMAGES):
        problems.append(f"{at}: features and num_images are keys of set metrics")
    if limit.num_images < MIN_IMAGES:
        problems.append(f"{at}.num_images: at least {MIN_IMAGES}, is {limit.num_images}")
    if limit.parts < 1:
        problems.append(f"{at}.parts: must be at least 1, is {limit.parts}")
    if limit.parts > 1 and not metric.steps:
        problems.append(f"{at}.parts: {metric.name} has no value per step")
    return problems
