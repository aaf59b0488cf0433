# SPDX-License-Identifier: Apache-2.0
"""The gate's policy: which metrics decide, how much worse is too much, how sure to be."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtq.errors import InputError, RecipeError
from dtq.evaluate.fingerprint import digest
from dtq.evaluate.gate.metrics import METRICS
from dtq.evaluate.run_file import PLACE
from dtq.io.package_data import folder
from dtq.io.safe_parse import LARGEST_YAML, parse_yaml, read_text
from dtq.io.schema import check_name, plain
from dtq.io.schema import read as read_fields

LEAST = 8
"""Prompts below which no interval means anything."""

RESAMPLES = 1_000_000
"""At most: seconds a metric."""

FINEST, COARSEST = 1e-12, 1e9
"""Margins as they are compared, a factor as its logarithm: nothing is measured beyond."""


@dataclass(frozen=True)
class Limit:
    """How much worse a candidate may be in one metric.

    Attributes:
        metric: a name of ``metrics.METRICS``.
        margin: in its unit: a factor above 1 for errors, dB for PSNR. Never less than twice the
            noise that was measured is used.
        parts: of the trajectory, each judged by itself: 4 sees a quarter of the steps go wrong.
    """

    metric: str
    margin: float
    parts: int = 1


@dataclass(frozen=True)
class Policy:
    """Read from YAML. See docs/gate.md for every key.

    Attributes:
        name: of the file, without ``.yaml``.
        about: one line.
        primary: decide; all of them must hold.
        secondary: are judged and shown, and must be there; they do not decide.
        alpha: probability of a wrong verdict, over all primary metrics and looks.
        looks: numbers of prompts at which the gate may decide; the first is the least.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        match: conditions that must be equal beside those of the job: of ``runfile.PLACE``.
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
        """A policy by name, by path to a YAML file, or itself.

        Raises:
            InputError: no policy of that name, no such file.
            RecipeError: the file has mistakes; all of them are in the message.
        """
        if isinstance(what, Policy):
            return what
        path = find(what)
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
        """Unknown names, and numbers that make no sense."""
        found: list[str] = []
        if not self.primary:
            found.append("primary: at least one metric must decide")
        for kind in ("primary", "secondary"):
            for i, limit in enumerate(getattr(self, kind)):
                found += _limit_problems(limit, f"{kind}[{i}]")
        rows = [(x.metric, x.parts) for x in (*self.primary, *self.secondary)]
        twice = sorted(
            {f"{metric} in {parts}" for metric, parts in rows if rows.count((metric, parts)) > 1}
        )
        found += [f"primary, secondary: {what} part(s) is there twice" for what in twice]
        if not 1e-6 <= self.alpha < 0.5:
            found.append(f"alpha: must be between 0 and 0.5, 0.000001 at least, is {self.alpha}")
        if self.resamples > RESAMPLES:
            found.append(f"resamples: at most {RESAMPLES}, is {self.resamples}")
        if self.seed < 0:
            found.append(f"seed: must not be below 0, is {self.seed}")
        if not self.looks or list(self.looks) != sorted(set(self.looks)):
            found.append(f"looks: must be rising numbers of prompts, is {list(self.looks)}")
        elif self.looks[0] < LEAST:
            found.append(f"looks[0]: below {LEAST} prompts no interval holds, is {self.looks[0]}")
        elif self.primary and 1e-6 <= self.alpha < 0.5:
            least = self.alpha / len(self.looks) / sum(x.parts for x in self.primary)
            if self.resamples * least < 5:
                found.append(
                    f"resamples: {self.resamples} are too few for alpha {self.alpha} over "
                    f"{len(self.looks)} looks and these metrics; at least {int(5 / least) + 1}"
                )
        for i, name in enumerate(self.match):
            check_name(name, PLACE, f"match[{i}]", found, "condition")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default filled in."""
        data: dict[str, Any] = plain(self)
        return data

    def key(self) -> str:
        """Fingerprint of everything in it but its name."""
        return digest({k: v for k, v in self.to_dict().items() if k not in ("name", "about")})


def _limit_problems(limit: Limit, at: str) -> list[str]:
    found: list[str] = []
    if not check_name(limit.metric, METRICS, f"{at}.metric", found, "metric"):
        return found
    metric = METRICS[limit.metric]
    if metric.ratio and limit.margin <= 1:
        found.append(f"{at}.margin: {metric.name} takes a factor above 1, is {limit.margin}")
    elif not metric.ratio and limit.margin <= 0:
        found.append(f"{at}.margin: must be above 0, is {limit.margin}")
    elif not FINEST <= metric.inside(limit.margin) <= COARSEST:
        found.append(f"{at}.margin: {limit.margin} is beyond what is measured")
    if limit.parts < 1:
        found.append(f"{at}.parts: must be at least 1, is {limit.parts}")
    if limit.parts > 1 and not metric.steps:
        found.append(f"{at}.parts: {metric.name} has no value per step")
    return found


def find(what: str | Path) -> Path:
    """The file of a policy given by name or path.

    Raises:
        InputError: neither exists; lists the names that do.
    """
    path = Path(what)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise InputError(f"{path}: no such policy file")
    known = names()
    if str(what) not in known:
        near = difflib.get_close_matches(str(what), known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise InputError(f"unknown policy {str(what)!r}; {hint}, or a file that ends in .yaml")
    return folder("gate") / f"{what}.yaml"


def names() -> list[str]:
    """Names of the policies that dtq ships, sorted."""
    return sorted(path.stem for path in folder("gate").glob("*.yaml"))
