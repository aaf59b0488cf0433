# SPDX-License-Identifier: Apache-2.0
"""``dtq eval``: a candidate beside its float model, same seeds, same job."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtq import call
from dtq.calibrate import sets
from dtq.calibrate.engine import seed_of
from dtq.documents import numbers, read_json
from dtq.errors import InputError
from dtq.evaluate import baselines as others
from dtq.evaluate import drift, extractors, figures, pictures, video
from dtq.evaluate.distributions import Figure
from dtq.evaluate.extractors import Extractor
from dtq.evaluate.figures import Asked, Crowd
from dtq.evaluate.identity import fingerprint, hardware, recipe_of
from dtq.evaluate.metrics import EQUAL_DB
from dtq.evaluate.runfile import Run, Sample
from dtq.nn.linear import QuantLinear
from dtq.recipe import Calibration
from dtq.source import Source
from dtq.version import __version__

log = logging.getLogger("dtq")

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
        temporal: of videos, mean of each figure of ``video_values``.
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
    temporal: dict[str, float] = field(default_factory=dict)


@dataclass
class Evaluation:
    """The whole result.

    Attributes:
        pictures: rows of the contact sheet.
        run: for the gate.
        figures: of whole sets of pictures, and ``crowds``, what they were computed from.
        command: that made it, for the report.
    """

    candidate: str
    reference: str
    conditions: dict[str, Any]
    rows: list[Row]
    pictures: dict[str, Tensor] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    fid_real_float: float | None = None
    run: Run | None = None
    figures: list[Figure] = field(default_factory=list)
    crowds: dict[str, Crowd] = field(default_factory=dict)
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data, pictures left out."""
        return {
            **(self.run.to_json() if self.run else {}),
            "candidate": self.candidate,
            "reference": self.reference,
            "conditions": self.conditions,
            "fid_real_float": self.fid_real_float,
            "rows": [asdict(row) for row in self.rows],
            "figures": figures.to_json(self.figures),
        }


def evaluate(
    candidate: Source,
    reference: Source,
    how: Calibration,
    *,
    baselines: Sequence[str] = (),
    asked: Asked | None = None,
    say: Say = lambda line: None,
) -> Evaluation:
    """Compare a quantized pipeline with its float one.

    Args:
        candidate: the quantized pipeline.
        reference: the float one.
        how: requests, steps, guidance, seed and batch of both.
        baselines: rows of other libraries, names of ``baselines.BASELINES``.
        asked: figures beyond those that every run has.
        say: told what is being done.

    Raises:
        InputError: a bare transformer, models that do not belong together, or baselines of a
            candidate without a quantized layer.
    """
    if candidate.pipeline is None or reference.pipeline is None:
        raise InputError("eval needs pipelines on both sides; these are bare transformers")
    models, floats = candidate.models(), reference.models()
    kinds, known = ({n: type(m).__name__ for n, m in x.items()} for x in (models, floats))
    if kinds != known:
        raise InputError(
            f"{candidate.name} has {kinds}, {reference.name} {known}: not the same model"
        )
    names = {part: list(judged_layers(model)) for part, model in models.items()}
    asked = asked or Asked()
    asked.check()
    for name in baselines:
        others.find(name)
    if baselines and not any(names.values()):
        raise InputError(f"{candidate.name} has no quantized layer that others could quantize too")
    job = observe(reference, how, say)
    how = job.how
    truth = job.truth
    say("candidate, teacher-forced and free-running")
    seen = compare(job, candidate)
    row = row_of(candidate.name, drift.step_errors(truth, seen.outputs))
    row.bits = stored_bits(*models.values())
    ran = seen.ran
    compare_pictures(row, truth, ran)
    row.divergence = drift.free_running(truth, ran)
    for name in asked.pairs:
        _pair_values(name, job, seen, asked.where.get(name, ""))
    result = Evaluation(candidate.name, reference.name, seen.run.conditions, [row], run=seen.run)
    result.pictures = {"float": torch.cat(truth.pictures), candidate.name: torch.cat(ran.pictures)}
    if asked.distributions:
        found = figures.distributions(candidate, reference, how, asked, say)
        result.figures, result.crowds = found.figures, found.crowds
        seen.run.missing |= found.missing
        seen.run.conditions["fid_samples"] = asked.samples
        _fid_cells(row, result)
    for name in baselines:
        say(f"baseline {name}")
        result.rows.append(_baseline_row(name, floats, names, truth))
    return result


def other_batches(how: Calibration) -> Calibration:
    """The same job one by one: what then differs is the noise of the float model.

    Halved batches would not do: products of many rows are often bit-identical, those of few are
    not.
    """
    return replace(how, batch=1 if min(how.batch, how.samples) > 1 else 2)


@dataclass
class Job:
    """What the float model did, once for any number of candidates.

    Attributes:
        truth: what candidates are compared with.
        again: the same in other batches, for the noise floor.
    """

    reference: Source
    how: Calibration
    requests: sets.Requests
    truth: drift.Trajectory
    again: drift.Trajectory


@dataclass
class Seen:
    """What one candidate did: teacher-forced ``outputs``, its own run, the values of the gate."""

    outputs: list[Tensor]
    ran: drift.Trajectory
    run: Run


def observe(reference: Source, how: Calibration, say: Say = lambda line: None) -> Job:
    """Run the float pipeline twice."""
    how = call.of(reference.pipeline).fill(how)
    # nested: more samples later are these and others
    requests = sets.load(how.set, reference.pipeline, how.samples, nested=True)
    say("float pipeline")
    models = reference.models()
    truth = drift.record(reference.pipeline, models, requests, how)
    for name, count in calls_of(truth, models).items():
        if not count:
            log.warning(
                "%s: %s is not called in this job, so it is not judged; another number of --steps "
                "may reach it",
                reference.name,
                name,
            )
    if len({made.shape[1:] for made in truth.pictures}) > 1:
        raise InputError(
            "pictures of several sizes cannot be compared; ask for one: --arg height=512 "
            "--arg width=512"
        )
    say("float pipeline again, other batches, for the noise floor")
    again = drift.record(reference.pipeline, models, requests, other_batches(how))
    return Job(reference, how, requests, truth, again)


def calls_of(trajectory: drift.Trajectory, models: Mapping[str, nn.Module]) -> dict[str, int]:
    """How often each transformer was called."""
    counted = Counter(call.model for call in trajectory.calls)
    return {name: counted[name] for name in models}


def compare(job: Job, candidate: Source) -> Seen:
    """Run a candidate on the float model's inputs and on its own, from the same seeds.

    Args:
        job: what the float model did.
        candidate: the quantized pipeline.
    """
    how, models = job.how, candidate.models()
    outputs = drift.replayed(job.truth, models)
    ran = drift.record(candidate.pipeline, models, job.requests, how)
    run = Run(
        candidate.name,
        job.reference.name,
        _conditions(how, job.requests) | _job(how, job.reference, candidate, job.truth),
        {
            "checkpoint": fingerprint(*models.values()),
            "reference": fingerprint(*job.reference.models().values()),
            "recipe": recipe_of(*models.values()),
        },
        _samples(how, job.requests, job.reference.pipeline),
        _values(job.truth, job.truth, outputs, ran),
        _values(job.truth, job.again, outputs, ran),
        _failures(job.truth, ran),
    )
    if ran.pictures[0].ndim == 5:
        _video_values(run, job, ran)
    return Seen(outputs, ran, run)


def row_of(name: str, steps: list[float]) -> Row:
    return Row(name, sum(steps) / max(1, len(steps)), steps)


def _baseline_row(
    name: str,
    models: Mapping[str, nn.Module],
    names: Mapping[str, Sequence[str]],
    truth: drift.Trajectory,
) -> Row:
    baseline = others.find(name)
    changed = {part: copy.deepcopy(model) for part, model in models.items()}
    bits, weights = 0.0, 0
    for part, layers in names.items():
        if layers:
            baseline.apply(changed[part], layers)
        for layer in layers:
            count: int = models[part].get_submodule(layer).weight.numel()  # type: ignore[union-attr, operator, assignment]
            bits += baseline.bits(changed[part].get_submodule(layer)) * count
            weights += count
    row = row_of(name, drift.teacher_forced(truth, changed))
    row.bits = bits / weights
    return row


def compare_pictures(row: Row, truth: drift.Trajectory, ran: drift.Trajectory) -> None:
    want, got = torch.cat(truth.pictures), torch.cat(ran.pictures)
    if want.ndim == 3:  # sound has no such measures
        return
    if want.ndim == 5 and want.shape[1] > 1:
        row.temporal = {k: float(v.mean()) for k, v in video_values(got, want).items()}
    if want.ndim == 5:  # video: frames are pictures
        want, got = want.flatten(0, 1), got.flatten(0, 1)
    values = pictures.psnr(got, want)
    row.psnr, row.psnr_worst = float(values.median()), float(values.min())
    row.ssim = float(pictures.ssim(got, want).mean())


def judged_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The layers that also quantize their input, by name; where there are none, all quantized."""
    every = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    return {n: m for n, m in every.items() if m.acts != "none"} or every


def stored_bits(*models: nn.Module) -> float | None:
    """Stored bits per weight of :func:`judged_layers`; None where there are none."""
    layers = [layer for model in models for layer in judged_layers(model).values()]
    if not layers:
        return None
    stored = sum(spec.nbytes for m in layers for spec in m.specs().values())
    return 8 * stored / sum(m.in_features * m.out_features for m in layers)


def extractor_for(pipeline: Any) -> Extractor:
    """The bundled feature extractor, for pipelines whose pictures it knows.

    Raises:
        InputError: a pipeline of other pictures.
    """
    if not figures.bundled(pipeline):
        raise InputError("domain FID is for models of the bundled emoji; leave --fid out")
    return extractors.load("emoji")


def _fid_cells(row: Row, result: Evaluation) -> None:
    """FID where the table of models shows it."""
    for each in result.figures:
        if each.metric == "fid" and each.against == "float model's pictures":
            row.fid_float = each.value
        if each.metric == "fid" and each.against == "training pictures":
            assert each.change is not None
            row.fid_real, result.fid_real_float = each.value, each.value - each.change


def _pair_values(metric: str, job: Job, seen: Seen, where: str) -> None:
    """A perceptual figure of every sample into the run, or why it is not there."""
    ids = [sample.id for sample in seen.run.samples]
    prompts = [sample.prompt for sample in seen.run.samples]
    got, want, again = (_stills(torch.cat(t.pictures)) for t in (seen.ran, job.truth, job.again))
    try:
        first, second = figures.pair(metric, got, want, again, prompts, where)
    except InputError as error:
        seen.run.missing[metric] = str(error)
        return
    seen.run.values[metric] = dict(zip(ids, first, strict=True))
    seen.run.rerun[metric] = dict(zip(ids, second, strict=True))


def _stills(shown: Tensor) -> Tensor:
    """Pictures, or the middle frame of each video."""
    return shown if shown.ndim == 4 else shown[:, shown.shape[1] // 2]


def _video_values(run: Run, job: Job, ran: drift.Trajectory) -> None:
    """Figures of frames over time; runs of one frame have none."""
    got, want, again = (torch.cat(t.pictures) for t in (ran, job.truth, job.again))
    if got.shape[1] < 2:
        return
    for table, right in ((run.values, want), (run.rerun, again)):
        for metric, values in video_values(got, right).items():
            ids = (sample.id for sample in run.samples)
            table[metric] = dict(zip(ids, values.tolist(), strict=True))


def video_values(got: Tensor, want: Tensor) -> dict[str, Tensor]:
    """Every figure of videos (B, F, 3, H, W) against the float model's, each (B,)."""
    energy = video.frame_energy(got) / video.frame_energy(want).clamp(min=1e-12)
    energy = energy.clamp(min=1e-12)
    return {
        "flicker": video.flicker_excess(got, want),
        "flickering": video.temporal_flickering(got),
        # motion that is lost is as bad as motion that is new
        "frame-energy": torch.maximum(energy, 1 / energy),
        "temporal-psnr": video.temporal_psnr(got, want).clamp(max=EQUAL_DB),
        "temporal-ssim": video.temporal_ssim(got, want),
    }


def _conditions(how: Calibration, requests: sets.Requests) -> dict[str, Any]:
    return {
        "set": how.set,
        "samples": len(requests.entries),
        "steps": how.steps or "pipeline default",
        "guidance": how.guidance or "pipeline default",
        "seed": how.seed,
        "torch": torch.__version__,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def _job(
    how: Calibration, reference: Source, candidate: Source, truth: drift.Trajectory
) -> dict[str, Any]:
    """What a comparison with another run has to know."""
    scheduler = getattr(reference.pipeline, "scheduler", None)
    calls = calls_of(truth, reference.models())
    return ({"calls": calls} if len(calls) > 1 else {}) | {
        "steps": truth.steps(),
        "sampler": type(scheduler).__name__,
        "arguments": how.arguments | ({"images": how.images} if how.images else {}),
        "batch": how.batch,
        "dtype": str(reference.dtype).removeprefix("torch."),
        "dtq": __version__,
        "hardware": hardware(candidate.model),
    }


def _samples(how: Calibration, requests: sets.Requests, pipeline: Any) -> list[Sample]:
    names = {number: name for name, number in (getattr(pipeline, "labels", None) or {}).items()}
    return [
        Sample(f"{i:04d}", str(names.get(entry, entry)), seed_of(how.seed, i))
        for i, entry in enumerate(requests.entries)
    ]


def _values(
    truth: drift.Trajectory,
    want: drift.Trajectory,
    outputs: Sequence[Tensor],
    ran: drift.Trajectory,
) -> dict[str, dict[str, Any]]:
    """Every metric of every sample against a run of the float model.

    Args:
        truth: whose inputs ``outputs`` are replies to.
        want: the run to compare with.
        outputs: of the candidate, teacher-forced.
        ran: the candidate's own run.
    """
    floats = want.by_sample([call.output for call in want.calls])
    error = drift.sample_errors(truth.by_sample(outputs), floats)
    apart = drift.sample_errors(
        ran.by_sample([call.latents for call in ran.calls]),
        want.by_sample([call.latents for call in want.calls]),
    )
    shown, right = torch.cat(ran.pictures), torch.cat(want.pictures)
    # both runs enter the first step with the same noise
    columns: dict[str, Sequence[Any]] = {
        "error": error,
        "divergence": [steps[1:] or steps for steps in apart],
    }
    if right.ndim > 3:  # a sound has no such measures
        likeness = pictures.psnr(shown, right).clamp(max=EQUAL_DB)
        frames = len(right) if right.ndim == 4 else right.shape[0] * right.shape[1]
        flat = (x.reshape(frames, *x.shape[-3:]) for x in (shown, right))
        same = pictures.ssim(*flat).reshape(len(right), -1).mean(1)
        columns |= {"psnr": likeness.tolist(), "ssim": same.tolist()}
    return {
        metric: {f"{i:04d}": value for i, value in enumerate(column)}
        for metric, column in columns.items()
    }


def _failures(truth: drift.Trajectory, ran: drift.Trajectory) -> dict[str, str]:
    """Samples that are no picture, by id."""
    found = {}
    for i, (right, shown) in enumerate(
        zip(torch.cat(truth.pictures), torch.cat(ran.pictures), strict=True)
    ):
        for who, picture in (("the float model", right), ("the candidate", shown)):
            if why := pictures.flaw(picture):
                found[f"{i:04d}"] = f"{who} made {why}"
    return found


def write_pictures(result: Evaluation, folder: Path) -> None:
    """``pictures/<float | candidate>/<sample>.png``; of videos animated ones."""
    for side, every in zip(("float", "candidate"), result.pictures.values(), strict=True):
        (folder / "pictures" / side).mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(every):
            if picture.ndim > 2:
                (folder / "pictures" / side / f"{i:04d}.png").write_bytes(pictures.file(picture))


def quantization_report(path: Path | None) -> dict[str, Any]:
    """What ``dtq quantize`` wrote beside the checkpoint; empty when it is not there.

    Raises:
        InputError: the file is there and is not what dtq writes; names the key.
    """
    file = path / "dtq_report.json" if path is not None else None
    if file is None or not file.is_file():
        return {}
    data = read_json(file)
    several = "layers" not in data and all(isinstance(part, dict) for part in data.values())
    if not data or not several:
        _check_report(data, str(file))
        return data
    found: dict[str, Any] = {key: [] for key in _REPORT}
    for name, part in data.items():  # a report of each transformer
        _check_report(part, f"{file}: {name}")
        for key, rows in found.items():
            rows += [{**row, "name": f"{name}.{row['name']}"} for row in part[key]]
    return found


def _check_report(data: dict[str, Any], where: str) -> None:
    for key, kinds in _REPORT.items():
        rows = data.get(key)
        if not isinstance(rows, list):
            raise InputError(f"{where}: {key!r} must be a list; delete the file to go without")
        for i, row in enumerate(rows):
            for name, fits in kinds.items():
                if not isinstance(row, dict) or name not in row or not fits(row[name]):
                    raise InputError(
                        f"{where}: {key}[{i}]: {name!r} is missing or not what dtq writes; delete "
                        f"the file to go without"
                    )


def _text(value: object) -> bool:
    return isinstance(value, str)


_REPORT: dict[str, dict[str, Callable[[Any], bool]]] = {
    "layers": {
        **dict.fromkeys(("name", "role", "weights", "transform"), _text),
        "promoted": lambda value: isinstance(value, bool),
        "bits": lambda value: numbers([value]),
        "error": lambda value: value is None or numbers([value]),
    },
    "sites": {"name": _text, "peaks": numbers, "peaks_after": numbers},
}
"""What the page reads of the report, and what each must be."""
