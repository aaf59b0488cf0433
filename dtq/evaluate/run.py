# SPDX-License-Identifier: Apache-2.0
"""``dtq eval``: a candidate beside its float model, same seeds, same job."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dtq import demo
from dtq.calibrate import sets
from dtq.calibrate.engine import run_pipeline
from dtq.demo.classifier import EmojiClassifier
from dtq.errors import InputError
from dtq.evaluate import baselines as others
from dtq.evaluate import drift, fid, pictures
from dtq.nn.linear import QuantLinear
from dtq.recipe import Calibration
from dtq.source import Source, read_json

Say = Callable[[str], None]


@dataclass
class Row:
    """One model's figures.

    Attributes:
        error: teacher-forced relative squared error, mean over steps: the primary metric.
        error_steps: the same per step, noisiest first.
        divergence: free-running relative squared distance of latents per step.
        bits: stored bits per weight of the quantized attention and feed-forward linears.
        psnr: dB against the float model's picture of the same seed, median.
        psnr_worst: dB of the worst picture.
        ssim: mean.
        fid_float: domain FID against the float model's pictures.
        fid_real: domain FID against the training pictures, where known.
    """

    name: str
    error: float
    error_steps: list[float]
    divergence: list[float] = field(default_factory=list)
    bits: float | None = None
    psnr: float | None = None
    psnr_worst: float | None = None
    ssim: float | None = None
    fid_float: float | None = None
    fid_real: float | None = None


@dataclass
class Evaluation:
    """The whole result; ``pictures`` are the rows of the contact sheet."""

    candidate: str
    reference: str
    conditions: dict[str, Any]
    rows: list[Row]
    pictures: dict[str, Tensor] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    fid_real_float: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, pictures left out."""
        return {
            "candidate": self.candidate,
            "reference": self.reference,
            "conditions": self.conditions,
            "fid_real_float": self.fid_real_float,
            "rows": [asdict(row) for row in self.rows],
        }


def evaluate(
    candidate: Source,
    reference: Source,
    how: Calibration,
    *,
    baselines: Sequence[str] = (),
    fid_samples: int = 0,
    say: Say = lambda line: None,
) -> Evaluation:
    """Compare a quantized pipeline with its float one.

    Args:
        candidate: the quantized pipeline.
        reference: the float one.
        how: requests, steps, guidance, seed and batch of both.
        baselines: rows of other libraries, names of ``baselines.BASELINES``.
        fid_samples: pictures for domain FID, 0 for none; needs a model whose pictures the bundled
            classifier knows.
        say: told what is being done.

    Raises:
        InputError: a bare transformer, or models that do not belong together.
    """
    if candidate.pipeline is None or reference.pipeline is None:
        raise InputError("eval needs pipelines on both sides; these are bare transformers")
    if type(candidate.model) is not type(reference.model):
        raise InputError(
            f"{candidate.name} has a {type(candidate.model).__name__}, {reference.name} a "
            f"{type(reference.model).__name__}: not the same model"
        )
    for name in baselines:
        others.find(name)
    requests = sets.load(how.set, reference.pipeline, how.samples)
    say("float pipeline")
    truth = drift.record(reference.pipeline, reference.model, requests, how)
    extractor = extractor_for(reference.pipeline) if fid_samples else None
    # FID asks for every label evenly, whatever the contact sheet shows
    more = Calibration(
        **{**asdict(how), "set": "auto", "samples": fid_samples, "seed": how.seed + 1}
    )
    float_features = None
    if extractor is not None:
        say(f"float pipeline, {fid_samples} pictures for FID")
        float_features = _features(reference.pipeline, more, extractor)
    say("candidate, teacher-forced and free-running")
    row = row_of(candidate.name, drift.teacher_forced(truth, candidate.model))
    row.bits = stored_bits(candidate.model)
    ran = drift.record(candidate.pipeline, candidate.model, requests, how)
    compare_pictures(row, truth, ran)
    row.divergence = drift.free_running(truth, ran)
    result = Evaluation(
        candidate.name, reference.name, _conditions(how, requests, fid_samples), [row]
    )
    result.pictures = {"float": torch.cat(truth.pictures), candidate.name: torch.cat(ran.pictures)}
    if extractor is not None and float_features is not None:
        say(f"candidate, {fid_samples} pictures for FID")
        features = _features(candidate.pipeline, more, extractor)
        row.fid_float = fid.frechet(features, float_features)
        real = extractor.real
        if real is not None:
            row.fid_real = fid.frechet_moments(*fid.moments(features), *real)
            result.fid_real_float = fid.frechet_moments(*fid.moments(float_features), *real)
    names = [
        n
        for n, m in candidate.model.named_modules()
        if isinstance(m, QuantLinear) and m.acts != "none"
    ]
    for name in baselines:
        say(f"baseline {name}")
        result.rows.append(_baseline_row(name, reference.model, names, truth))
    return result


def row_of(name: str, steps: list[float]) -> Row:
    return Row(name, sum(steps) / max(1, len(steps)), steps)


def _baseline_row(name: str, model: nn.Module, names: list[str], truth: drift.Trajectory) -> Row:
    baseline = others.find(name)
    changed = copy.deepcopy(model)
    baseline.apply(changed, names)
    row = row_of(name, drift.teacher_forced(truth, changed))
    weights = {n: model.get_submodule(n).weight.numel() for n in names}  # type: ignore[union-attr, operator]
    bits = sum(baseline.bits(changed.get_submodule(n)) * k for n, k in weights.items())
    row.bits = bits / sum(weights.values())
    return row


def compare_pictures(row: Row, truth: drift.Trajectory, ran: drift.Trajectory) -> None:
    if len({made.shape[1:] for made in truth.pictures}) > 1:
        raise InputError(
            "pictures of several sizes cannot be compared; ask for one: --arg height=512 "
            "--arg width=512"
        )
    want, got = torch.cat(truth.pictures), torch.cat(ran.pictures)
    if want.ndim == 3:  # sound has no such measures
        return
    if want.ndim == 5:  # video: frames are pictures
        want, got = want.flatten(0, 1), got.flatten(0, 1)
    values = pictures.psnr(got, want)
    row.psnr, row.psnr_worst = float(values.median()), float(values.min())
    row.ssim = float(pictures.ssim(got, want).mean())


def stored_bits(model: nn.Module) -> float | None:
    """Stored bits per weight of the layers that also quantize their input, else of all."""
    every = [m for m in model.modules() if isinstance(m, QuantLinear)]
    layers = [m for m in every if m.acts != "none"] or every
    if not layers:
        return None
    stored = sum(spec.nbytes for m in layers for spec in m.specs().values())
    return 8 * stored / sum(m.in_features * m.out_features for m in layers)


class Extractor:
    """The bundled classifier and what it says of the training pictures."""

    def __init__(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        self.real = None
        if "real.mean" in tensors:
            self.real = (tensors.pop("real.mean").double(), tensors.pop("real.cov").double())
        self.model = EmojiClassifier(tensors["head.weight"].shape[0])
        self.model.load_state_dict({k: v.float() for k, v in tensors.items()})
        self.model.eval()


def extractor_for(pipeline: Any) -> Extractor:
    """The bundled feature extractor, for pipelines whose pictures it knows.

    Raises:
        InputError: a pipeline of other pictures.
    """
    known = read_json(demo.folder() / "model_index.json")["id2label"]
    if getattr(pipeline, "labels", None) != {name: int(number) for number, name in known.items()}:
        raise InputError("domain FID is for models of the bundled emoji; leave --fid out")
    return Extractor(demo.folder() / "classifier")


@torch.no_grad()
def _features(pipeline: Any, how: Calibration, extractor: Extractor) -> Tensor:
    requests = sets.load(how.set, pipeline, how.samples)
    found = []
    for result in run_pipeline(pipeline, requests, how):
        images = torch.as_tensor(result.images).float().cpu().clamp(0, 1)
        found.append(extractor.model.features(images))
    return torch.cat(found)


def _conditions(how: Calibration, requests: sets.Requests, fid_samples: int) -> dict[str, Any]:
    return {
        "set": how.set,
        "samples": len(requests.entries),
        "steps": how.steps or "pipeline default",
        "guidance": how.guidance or "pipeline default",
        "seed": how.seed,
        "fid_samples": fid_samples,
        "torch": torch.__version__,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def quantization_report(path: Path | None) -> dict[str, Any]:
    """What ``dtq quantize`` wrote beside the checkpoint; empty when it is not there."""
    file = path / "dtq_report.json" if path is not None else None
    if file is None or not file.is_file():
        return {}
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


__all__ = ["Evaluation", "Row", "evaluate", "quantization_report"]
