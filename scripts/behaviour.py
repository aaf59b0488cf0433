#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Record what dtq computes, compare it later: did a change of the code change a number?

    python scripts/behaviour.py record before.json
    python scripts/behaviour.py compare before.json
    python scripts/behaviour.py compare before.json --only 'w4a8|gate'

The cases are checkpoints of many recipes, statistics, pictures, eval and gate, a tiny model of
every family, and runs that two processes shared or that were killed. dtq is run as users run it, by
its command line and by ``dtq.quantize``, never by its modules, so files may move. Options, keys and
formats may get other names, too: the tables below hold the old and the new one, and a record holds
the new one. A number of a report that is found under another name is listed as renamed, no more.

It takes about 12 minutes of one core. The bytes depend on the instructions of the CPU and on the
versions of libraries: compare on the machine that recorded. ``--package`` is the checkout to run,
with ``dtq/``, ``gate/`` and ``tests/``; by default the one that this script is in.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

OPTIONS = {"--no-sentinel": "--no-sanity-check", "--fid": "--num-images", "--keep": "--exclude"}
"""Command line options; the second name is used where ``--help`` does not know the first."""
RECIPE_KEYS = {
    "steps.modes": "step_policy.precisions",
    "refine.blocks.steps": "finetune.blocks.steps",
    "refine.vq4dit.steps": "finetune.vq4dit.steps",
    "calibration.batch": "calibration.batch_size",
}
"""Of ``--set``; the second name is used where ``dtq recipe show`` does not print the first."""
MODELS = {"demo-hard": "demo-outliers"}
"""Bundled models; the second name is used where dtq does not list the first."""
WORDS = {
    "weights": "weight_format", "acts": "activation_format", "block": "hadamard_block_size",
    "turns": "num_rotations", "permute": "permutation", "pre_quant_order": "pre_quant_perm",
}  # fmt: skip
"""Keys of the entries of ``layers`` in ``config.json``, and parts of layers."""
FORMAT_NAMES = {"int8-step": "int8-static-timestep"}
"""Formats with another name."""
DEMO, VIDEO_DEMO = Path("dtq/demo/pipeline"), Path("dtq/demo/video")
BASELINE = Path("gate/demo-w4a8.json")
"""In the checkout; ``zoo.json`` is anywhere in ``tests``."""
VERDICTS = ("pass", "regression", "inconclusive", "invalid")
REPORTED = ("report", "eval", "gate")
"""First words of the entries that may have another name."""

QUICK = ("--samples", "4", "--steps", "4")
PARTS = ("--samples", "8", "--steps", "2", "--set", "calibration.batch=2")
FEW = ("--keep", r"re:transformer_blocks\.[2-7]\.")
VIDEO = ("--samples", "2", "--steps", "2")

CHECKPOINTS: dict[str, tuple[str, ...]] = {
    "w4a8": ("demo", *QUICK),
    "w8a8": ("demo", *QUICK, *FEW),
    "w4a16": ("demo", *QUICK),
    "w4a4": ("demo", *QUICK, *FEW),
    "w3a8": ("demo", *QUICK, *FEW),
    "rtn-w4a8": ("demo", *QUICK, "--no-sentinel"),
    "viditq": ("demo", *QUICK),
    "viditq-mp": ("demo", *QUICK, *FEW),
    "lrq-dit": ("demo", *QUICK),
    "hq-dit": ("demo", *QUICK, *FEW),
    "nvfp4": ("demo", *QUICK, *FEW),
    "mxfp4": ("demo", *QUICK, *FEW, "--set", "transform=hadamard"),
    "svdquant": ("demo", *QUICK, *FEW),
    "ditas": ("demo", *QUICK, *FEW),
    "q-dit": ("demo", *QUICK, *FEW),
    "ptq4dit": ("demo", *QUICK),
    "vq4dit": ("demo", *QUICK, *FEW, "--set", "refine.vq4dit.steps=4"),
    "terdit": ("demo", *QUICK, *FEW, "--set", "refine.blocks.steps=4"),
    "w4a8 budget": ("demo", *QUICK, *FEW, "--budget", "4.8"),
    "w4a8 size": ("demo", *QUICK, *FEW, "--set", "allocate.budget=1MB", "--seed", "5"),
    "w4a8 step-policy": ("demo", *QUICK, *FEW, "--set", "steps.modes=[native, a16]"),
    "w4a8 modulation": ("demo", *QUICK, *FEW, "--set", "modulation=w4a16", "--dtype", "bf16"),
    "w4a8 outliers": ("demo-hard", *QUICK, *FEW),
    "w8a8 video": ("demo-video", *VIDEO, *FEW, "--set", "transform=smooth"),
    "lrq-dit video": ("demo-video", *VIDEO),
}
"""Recipe, and a word where it is there twice; the model and options of ``dtq quantize``."""
FAMILY_RECIPES = ("w4a8", "w4a16", "nvfp4", "viditq", "svdquant", "ptq4dit", "lrq-dit", "w8a8")


class Failed(Exception):
    """A command that did not end as it should."""


class Session:
    """The dtq that is looked at, a temporary folder, and what was made there.

    Args:
        package: the checkout.
        folder: empty.
    """

    def __init__(self, package: Path, folder: Path) -> None:
        self.package, self.folder = package, folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith("DTQ_")}
        kept.pop("GITHUB_STEP_SUMMARY", None)
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        own = {"PYTHONPATH": str(package), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        self.environment = {**kept, **offline, **threads, **own}

    def start(self, arguments: list[str]) -> subprocess.Popen[str]:
        """Python with these arguments, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def python(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> tuple[int, str]:
        """Exit code and output of Python with these arguments."""
        process = self.start(list(arguments))
        try:
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if process.returncode not in codes:
            tail = "\n".join(output.splitlines()[-12:])
            raise Failed(f"exit code {process.returncode}: {' '.join(arguments)}\n{tail}")
        return process.returncode, output

    def dtq(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> tuple[int, str]:
        """Exit code and output of a command."""
        return self.python("-m", "dtq", *self.spelled(arguments), codes=codes)

    def child(self, name: str, *arguments: str | Path) -> None:
        """One of the functions of this script that use dtq as a library."""
        self.python("-P", str(Path(__file__).resolve()), "child", name, *map(str, arguments))

    @functools.cache  # noqa: B019  (the session lives as long as the program)
    def says(self, *arguments: str) -> str:
        """What dtq answers to a question."""
        return self.dtq(*arguments, codes=(0, 1, 2))[1]

    def spelled(self, arguments: tuple[str, ...]) -> list[str]:
        """The arguments with the names that this dtq has."""
        words = []
        for word in arguments:
            key, equals, value = word.partition("=")
            if word in OPTIONS and word not in self.says(arguments[0], "--help"):
                word = OPTIONS[word]
            elif word in MODELS and word not in self.says("plan", "no-such-model"):
                word = MODELS[word]
            elif equals and key in RECIPE_KEYS and not self.has_key(key):
                word = f"{RECIPE_KEYS[key]}={value}"
            words.append(word)
        return words

    def has_key(self, key: str) -> bool:
        """Whether recipes have a key; the knobs of a method are not looked for."""
        found = yaml.safe_load(self.says("recipe", "show", "w4a8"))
        for word in key.split("."):
            if not isinstance(found, dict):
                return True
            if word not in found:
                return False
            found = found[word]
        return True

    def checkpoint(self, name: str) -> Path:
        """The folder of a checkpoint, which is made unless it is there."""
        out = self.folder / "checkpoints" / name.replace(" ", "-")
        if not out.exists():
            model, *options = CHECKPOINTS[name]
            self.dtq("quantize", model, "--recipe", name.split()[0], *options, "-o", str(out))
        return out

    def compared(self, name: str, *options: str) -> Path:
        """The folder of ``dtq eval`` of a checkpoint."""
        out = self.folder / "runs" / sha(" ".join((name, *options)))
        if not out.exists():
            candidate = str(self.checkpoint(name).relative_to(self.folder))  # it is in the report
            self.dtq("eval", candidate, "--reference", "demo", *options, "-o", str(out))
        return out


# Digests. An entry is a name and a text. Texts that differ are split at "; ", and only the parts
# that differ are shown.


def sha(data: bytes | str) -> str:
    """The first half of a SHA-256."""
    data = data.encode() if isinstance(data, str) else data
    return hashlib.sha256(data).hexdigest()[:32]


def canonical(value: Any, key: str = "") -> Any:
    """JSON with the new names."""
    if isinstance(value, dict):
        return {WORDS.get(k, k): canonical(v, WORDS.get(k, k)) for k, v in value.items()}
    if isinstance(value, str) and key in ("weight_format", "activation_format"):
        return FORMAT_NAMES.get(value, value)
    return value


def leaves(value: Any) -> Iterator[Any]:
    """Everything in JSON that has no parts."""
    below = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list):
        for each in below:
            yield from leaves(each)
    else:
        yield value


def tensors(path: Path) -> dict[str, str]:
    """Name -> dtype, shape and digest of every tensor in a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, spec in json.loads(data[8:start]).items():
        if name not in ("__metadata__", "dtq_checksums"):
            low, high = spec["data_offsets"]
            shape = "x".join(map(str, spec["shape"]))
            found[name] = f"{spec['dtype']} {shape} {sha(data[start + low : start + high])}"
    return found


def metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__", {})


def numbers(value: Any, label: str, depth: int = 3) -> dict[str, str]:
    """Digests of the floats and verdicts in a report: by key, and by name in lists."""
    if depth and isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        parts, depth = {v.get("name", i): v for i, v in enumerate(value)}, 1
    elif depth and isinstance(value, dict):
        parts = value
    else:
        found = sorted(repr(v) for v in leaves(value) if isinstance(v, float) or v in VERDICTS)
        return {label: f"{len(found)} values {sha(' '.join(found))}"} if found else {}
    below = [numbers(v, f"{label} {key}", depth - 1) for key, v in parts.items()]
    return {name: text for each in below for name, text in each.items()}


def checkpoint_entries(folder: Path) -> dict[str, str]:
    """Every quantized layer of a folder, with its entry in ``config.json``, and everything else."""
    found: dict[str, str] = {}
    quantized = []
    for path in sorted(folder.rglob("config.json")):
        config = json.loads(path.read_text())
        plan = config.pop("quantization_config", None)
        if plan is None:
            continue
        quantized.append(path.parent)
        weights: dict[str, str] = {}
        for file in sorted(path.parent.glob("*.safetensors")):
            weights |= tensors(file)
        where = path.parent.name if path.parent != folder else "model"
        for layer, entry in plan.pop("layers").items():
            texts = [f"{k}={v}" for k, v in canonical(entry).items()]
            for name in [n for n in weights if n.rpartition(".")[0] == layer]:
                part = name.rpartition(".")[2]
                texts.append(f"{WORDS.get(part, part)} {weights.pop(name)}")
            found[f"{where} {layer}"] = "; ".join(sorted(texts))
        found[f"{where} other tensors"] = f"{len(weights)} {sha(repr(sorted(weights.items())))}"
        plan.pop("format_version")
        found[f"{where} config"] = json.dumps(canonical(plan), sort_keys=True)
        found[f"{where} model config"] = sha(json.dumps(config, sort_keys=True))
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"):
        if path.name == "dtq_report.json":
            found |= numbers(json.loads(path.read_text()), "report")
        elif path.name.startswith("dtq_call"):
            values = sorted(map(str, leaves(json.loads(path.read_text()))))
            found["file dtq_call"] = ", ".join(values)
        elif path.parent not in quantized:
            found[f"file {path.relative_to(folder)}"] = sha(path.read_bytes())
    return found


def picture_entries(folder: Path) -> dict[str, str]:
    """Pixels of pictures in a folder."""
    from PIL import Image

    found = {}
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as image:
            pixels = sha(image.convert("RGBA").tobytes())
            found[f"picture {path.relative_to(folder)}"] = f"{image.size} {pixels}"
    return found


def file_digests(folder: Path) -> dict[str, str]:
    """Every file of a folder, bytes as they are."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): sha(p.read_bytes()) for p in files}


# Cases


def statistics(session: Session) -> dict[str, str]:
    """``dtq calibrate``: tensors by their contents, since their names may change."""
    out = session.folder / "statistics.safetensors"
    session.dtq("calibrate", "demo", *PARTS, "-o", str(out))
    found: dict[str, str] = {}
    for text in sorted(tensors(out).values()):
        kind, _, digest = text.rpartition(" ")
        found[f"tensors {kind}"] = sha(found.get(f"tensors {kind}", "") + digest)
    edges = [json.loads(v) for k, v in metadata(out).items() if "edges" in k]
    return found | {"timestep edges": repr(edges)}


def from_statistics(session: Session) -> dict[str, str]:
    """``dtq quantize --stats``."""
    path, out = session.folder / "statistics.safetensors", session.folder / "from-statistics"
    if not path.exists():
        statistics(session)
    session.dtq("quantize", "demo", *PARTS, *FEW, "--stats", str(path), "-o", str(out))
    return checkpoint_entries(out)


def library(session: Session) -> dict[str, str]:
    """Pictures of the plain pipeline of diffusers, quantizing while loading, compiling."""
    names = ["w4a8", "w8a8", "w4a16", "hq-dit", "lrq-dit", "w4a8 step-policy"]
    out = session.folder / "library.json"
    session.child("library", out, session.package / DEMO, *map(session.checkpoint, names))
    return json.loads(out.read_text())


def sampled(session: Session) -> dict[str, str]:
    """``dtq sample`` of a float and of a quantized model, and of a video."""
    found = {}
    for title, model, options in (
        ("float", "demo", ("-p", "cat-face", "-p", "face-smiling", "--steps", "4")),
        ("w4a8", str(session.checkpoint("w4a8")), ("-n", "3", "--steps", "4", "--batch", "2")),
        ("video", str(session.checkpoint("lrq-dit video")), ("-n", "1", "--steps", "2")),
    ):
        out = session.folder / "pictures" / title
        session.dtq("sample", model, *options, "--seed", "7", "-o", str(out))
        found |= {f"{title} {k}": v for k, v in picture_entries(out).items()}
    return found


def evaluated(session: Session) -> dict[str, str]:
    """``dtq eval``, with metrics of image sets."""
    found = {}
    for name in ("w4a8", "rtn-w4a8"):
        more = ("--fid", "8", "--metric", "fid,kid,precision,recall")
        run = session.compared(name, "--samples", "4", "--steps", "4", *more)
        found |= numbers(json.loads((run / "eval.json").read_text()), f"eval {name}")
    return found


def gated(session: Session) -> dict[str, str]:
    """``dtq gate``: against the shipped baseline, against itself, and of another job."""
    shipped = str(session.package / BASELINE)
    long = session.compared("w4a8", "--samples", "32", "--steps", "8")
    short = session.compared("rtn-w4a8", "--samples", "4", "--steps", "4")
    mine = session.folder / "accepted.json"
    mine.unlink(missing_ok=True)
    accept = ("--baseline", str(mine), "--reason", "a test", "--who", "nobody")
    session.dtq("gate", "accept", str(long), *accept)
    found = {}
    for title, run, baseline, policy in (
        ("shipped", long, shipped, "bundled"),
        ("itself", long, str(mine), "default"),
        ("other", short, shipped, "bundled"),
    ):
        out = session.folder / f"gate-{title}.json"
        options = ("--baseline", baseline, "--policy", policy, "--out", str(out))
        code, _ = session.dtq("gate", str(run), *options, codes=(0, 1, 2, 3))
        found[f"exit code {title}"] = str(code)
        found |= numbers(json.loads(out.read_text()), f"gate {title}")
    return found


def processes(session: Session) -> dict[str, str]:
    """Two processes, and a run that is killed twice: the bytes of one process."""
    session.folder.joinpath("processes").mkdir(exist_ok=True)
    made = {name: session.folder / "processes" / name for name in ("one", "two", "killed")}
    job = ("quantize", "demo", *PARTS, *FEW, "--set", "solver.gptq.damp=0.02")
    session.dtq(*job, "-o", str(made["one"]))
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    session.python(*several, "-m", "dtq", *session.spelled((*job, "-o", str(made["two"]))))
    last = ["-m", "dtq", *session.spelled((*job, "-o", str(made["killed"])))]
    for count in (5, 16):
        kill(session.start(last), session.folder / "processes", made["killed"], count)
    session.python(*last)
    want = file_digests(made["one"])
    for name in ("two", "killed"):
        found = file_digests(made[name])
        if wrong := [k for k in sorted(want.keys() | found) if want.get(k) != found.get(k)]:
            raise Failed(f"{name}: other bytes than one process in {', '.join(wrong)}")
    return checkpoint_entries(made["one"])


def kill(process: subprocess.Popen[str], folder: Path, output: Path, count: int) -> None:
    """End a run by SIGKILL when so many files lie in a hidden folder beside its output."""
    hidden = f".{output.name}.*/**/*.safetensors"
    while process.poll() is None and len(list(folder.glob(hidden))) < count:
        time.sleep(0.02)
    if process.poll() is not None:
        raise Failed(f"ended before it was killed\n{process.communicate()[0][-1000:]}")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def two_transformers(session: Session) -> dict[str, str]:
    """A video pipeline with a transformer for noisy and one for clean steps."""
    float_model, out = session.folder / "wan", session.folder / "wan-w4a8"
    session.child("two_transformers", float_model, session.package / VIDEO_DEMO)
    size = [f"--arg={key}" for key in ("height=16", "width=16", "num_frames=5")]
    recipe = ("--recipe", "w4a8", "--samples", "2", "--steps", "4")
    session.dtq("quantize", str(float_model), *recipe, *size, "-o", str(out))
    return checkpoint_entries(out)


def families(session: Session) -> dict[str, str]:
    """A tiny random model of every class: its checkpoint, and what it makes of one input."""
    out = session.folder / "families"
    (zoo,) = (session.package / "tests").rglob("zoo.json")
    session.child("families", out, zoo)
    found: dict[str, str] = json.loads((out / "outputs.json").read_text())
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        found |= {f"{folder.name} {k}": v for k, v in checkpoint_entries(folder).items()}
    return found


def quantized(name: str) -> Callable[[Session], dict[str, str]]:
    """A case of one checkpoint."""
    return lambda session: checkpoint_entries(session.checkpoint(name))


CASES: dict[str, Callable[[Session], dict[str, str]]] = {
    **{f"quantize {name}": quantized(name) for name in CHECKPOINTS},
    "calibrate": statistics,
    "quantize from statistics": from_statistics,
    "library": library,
    "sample": sampled,
    "eval": evaluated,
    "gate": gated,
    "processes": processes,
    "two transformers": two_transformers,
    "families": families,
}


# Children: with dtq as a library


def child_library(out: str, demo: str, *checkpoints: str) -> None:
    """Two pictures of every pipeline; one that was quantized while loading; a compiled one."""
    import diffusers
    import torch

    import dtq

    found = {}
    recipe = dtq.DTQConfig(recipe="w4a16")
    transformer = Path(demo) / "transformer"
    model = diffusers.DiTTransformer2DModel.from_pretrained(transformer, quantization_config=recipe)
    loaded = diffusers.DiffusionPipeline.from_pretrained(demo, transformer=model)
    pipelines = {"while loading": loaded}
    for folder in (demo, *checkpoints):
        pipelines[Path(folder).name] = diffusers.DiffusionPipeline.from_pretrained(folder)
    for name, pipeline in pipelines.items():
        pipeline.set_progress_bar_config(disable=True)
        rng = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
        images = pipeline([13, 31], generator=rng, num_inference_steps=4, output_type="np").images
        found[f"pixels {name}"] = f"{images.shape} {sha(images.tobytes())}"
    rng = torch.Generator().manual_seed(0)
    given = {"hidden_states": torch.randn(2, 4, 8, 8, generator=rng)}
    given |= {"timestep": torch.tensor([700, 20]), "class_labels": torch.tensor([5, 60])}
    compiled = pipelines["w4a8"].transformer
    compiled.transformer_blocks[0].compile(backend="dtq")
    with torch.no_grad():
        found["compiled w4a8"] = outputs(compiled(**given))
    Path(out).write_text(json.dumps(found))


def child_two_transformers(out: str, video: str) -> None:
    """A tiny Wan 2.2 with the text encoder of the bundled video model."""
    import diffusers
    import torch

    torch.manual_seed(0)
    latte = diffusers.DiffusionPipeline.from_pretrained(video)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    models = [
        diffusers.WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4,
            text_dim=latte.text_encoder.config.d_model, freq_dim=64, ffn_dim=256, num_layers=2,
        )
        for _ in range(2)
    ]  # fmt: skip
    diffusers.WanPipeline(
        tokenizer=latte.tokenizer, text_encoder=latte.text_encoder, vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=models[0], transformer_2=models[1], boundary_ratio=0.8,
    ).save_pretrained(out)  # fmt: skip


def child_families(out: str, zoo: str) -> None:
    """Quantize a model of every class in the file, save it, and run it."""
    import diffusers
    import torch

    import dtq

    found = {}
    for name, spec in json.loads(Path(zoo).read_text()).items():
        recipe = FAMILY_RECIPES[int(sha(name), 16) % len(FAMILY_RECIPES)]
        torch.manual_seed(0)
        kind = getattr(diffusers, name, None)
        if kind is None:
            continue
        model = kind(**built(spec["init"], torch.Generator().manual_seed(0))).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("pad_token"):  # diffusers does not initialize it
                    parameter.zero_()
                if parameter.is_floating_point() and not parameter.any():
                    parameter.normal_(std=0.02)
        calls = [built(spec["inputs"], torch.Generator().manual_seed(seed)) for seed in (0, 1, 2)]
        dtq.quantize(model, recipe, inputs=calls[:2], progress=False)
        model.save_pretrained(Path(out) / name)
        with torch.no_grad():
            found[f"{name} output"] = f"{recipe} {outputs(model(**calls[2]))}"
    (Path(out) / "outputs.json").write_text(json.dumps(found))


def built(value: Any, rng: Any) -> Any:
    """A value of the zoo: ``{"__t__": shape, "dtype": ...}`` is a tensor, random unless it says."""
    import torch

    if isinstance(value, list):
        return [built(each, rng) for each in value]
    if not isinstance(value, dict):
        return value
    if "__t__" in value:
        shape, dtype = value["__t__"], getattr(torch, value["dtype"])
        if "val" in value:
            return torch.tensor(value["val"], dtype=dtype).reshape(shape)
        if "fill" in value:
            return torch.full(shape, value["fill"], dtype=dtype)
        return torch.randn(shape, generator=rng).to(dtype)
    if "__items__" in value:
        return {key: built(each, rng) for key, each in value["__items__"]}
    if "__tuple__" in value:
        return tuple(built(each, rng) for each in value["__tuple__"])
    if "__call__" in value:
        module, function = value["__call__"].split(":")
        return getattr(importlib.import_module(module), function)(*value["args"])
    return {key: built(each, rng) for key, each in value.items()}


def outputs(value: Any) -> str:
    """Digest of the tensors in what a model returned."""
    import torch

    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {sha(data)}"
    below = value.values() if isinstance(value, dict) else value
    return ", ".join(outputs(each) for each in below if each is not None)


def child_environment(out: str) -> None:
    """What the bytes depend on, and where dtq is."""
    import diffusers
    import torch

    import dtq

    cpu = torch.backends.cpu.get_cpu_capability()
    found = {"torch": torch.__version__, "diffusers": diffusers.__version__, "cpu": cpu}
    found |= {"python": sys.version.split()[0]}
    Path(out).write_text(json.dumps({"package": str(Path(dtq.__file__).parent.parent), **found}))


# The program


def environment(session: Session) -> dict[str, str]:
    """What the bytes depend on.

    Raises:
        SystemExit: another dtq than that of the checkout would run.
    """
    out = session.folder / "environment.json"
    session.child("environment", out)
    found: dict[str, str] = json.loads(out.read_text())
    if (package := Path(found.pop("package"))) != session.package:
        raise SystemExit(f"dtq would come from {package}, not from {session.package}")
    return found


def run(session: Session, names: list[str]) -> dict[str, dict[str, str]]:
    """The entries of some cases; a case that fails has one, ``failed``."""
    found = {}
    for name in names:
        started = time.monotonic()
        try:
            found[name] = CASES[name](session)
        except Failed as error:
            found[name] = {"failed": str(error)}
        result = "failed" if "failed" in found[name] else f"{len(found[name])} entries"
        print(f"{name}: {result}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def differences(before: dict[str, str], after: dict[str, str]) -> tuple[list[str], list[str]]:
    """Lines that say what differs, and lines on numbers that are found under another name."""
    gone = {name: before[name] for name in before.keys() - after.keys()}
    new = {name: after[name] for name in after.keys() - before.keys()}
    lines, renamed = [], []
    for name in sorted(gone):
        same = [k for k in new if new[k] == gone[name]]
        if name.split()[0] in REPORTED and same:
            renamed.append(f"{name} is now {same[0]}")
            del gone[name], new[same[0]]
    lines += [f"gone: {name}" for name in sorted(gone)]
    lines += [f"new: {name}" for name in sorted(new)]
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            old, now = before[name].split("; "), after[name].split("; ")
            lines.append(name)
            lines += [f"  - {part}" for part in old if part not in now]
            lines += [f"  + {part}" for part in now if part not in old]
    return lines, renamed


def compare(recorded: dict[str, Any], session: Session, names: list[str], most: int) -> bool:
    """Run the cases and print what differs from the record; return whether nothing does."""
    for key, value in environment(session).items():
        if recorded["environment"].get(key) != value:
            print(f"warning: {key} was {recorded['environment'].get(key)}, is {value}")
    good = True
    for name in names:
        before = recorded["cases"].get(name, {})
        after = run(session, [name])[name]
        lines, renamed = differences(before, after)
        if "failed" in after:
            lines = [f"failed: {after['failed']}"]
        good = good and not lines
        for title, each in (("DIFFERS", lines), ("renamed", renamed)):
            if each:
                print(f"{title}: {name}", *each[:most], sep="\n  ")
                print(*[f"  and {len(each) - most} lines more"] * (len(each) > most), sep="\n")
    print(f"{len(names)} cases: {'the same' if good else 'DIFFERENT'}")
    return good


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        globals()[f"child_{sys.argv[2]}"](*sys.argv[3:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path, help="JSON, written or read")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases that a regex finds")
    parser.add_argument("--package", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--folder", type=Path, help="empty; what is made stays there")
    parser.add_argument("--most", type=int, default=40, help="lines that are shown for a case")
    options = parser.parse_args()
    names = [name for name in CASES if re.search(options.only, name)]
    if not names:
        parser.error(f"--only {options.only}: no such case; there are {', '.join(CASES)}")
    with tempfile.TemporaryDirectory(prefix="dtq-behaviour-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"{folder} is not empty")
        session = Session(options.package.resolve(), folder)
        if options.action == "compare":
            recorded = json.loads(options.file.read_text())
            sys.exit(not compare(recorded, session, names, options.most))
        found: dict[str, Any] = {"environment": environment(session), "cases": {}}
        if options.only and options.file.exists():
            found["cases"] = json.loads(options.file.read_text())["cases"]
        found["cases"] |= run(session, names)
        options.file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        failed = [name for name, entries in found["cases"].items() if "failed" in entries]
        sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
