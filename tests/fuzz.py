# SPDX-License-Identifier: Apache-2.0
"""Damage files in thousands of ways: each one loads, or dtq says no with its own error.

    python tests/fuzz.py --count 20000 --seed 0

A case is one good file or folder, damaged by a seeded mutation: flipped, cut, spliced or repeated
bytes; JSON and YAML with keys removed, repeated, swapped, or values of other types and sizes;
safetensors headers edited so that the file is still well-formed. What dtq then does must end in
success or a ``DtqError``, within SECONDS and GIGABYTES. Anything else is printed with its seed, and
``--only SEED`` runs that case again.

Plain ``from_pretrained`` (target ``load``) reads the files before dtq is asked. There an error of
diffusers is accepted when dtq's own way in refuses the same folder with dtq's error; and of
``config.json`` only ``quantization_config`` is damaged, because diffusers builds the model from the
rest before dtq is asked: dtq's commands check that first (targets ``open`` and ``plan``).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import tiny
import torch
import yaml
from builders import collected
from diffusers import DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dtq
from dtq.calibrate import store
from dtq.checkpoint import reader, writer
from dtq.errors import LIBRARY_ERRORS, DtqError
from dtq.evaluate import run_file
from dtq.evaluate.gate import baseline_file, render
from dtq.evaluate.gate.decision import decide
from dtq.evaluate.gate.policy import Limit, Policy
from dtq.evaluate.paired_run import compare, observe
from dtq.evaluate.report.quantization_report import quantization_report
from dtq.io.package_data import yaml_names
from dtq.io.safe_parse import parse_json
from dtq.pipelines import loading
from dtq.pipelines.settings import SamplingSettings
from dtq.recipe import Recipe, find

SECONDS = 20
"""For one case: a slow, shared machine included; a good folder takes a twentieth of one."""
GIGABYTES = 4
"""Address space beyond what the process had before the first case."""

WEIGHTS = "diffusion_pytorch_model.safetensors"

POLICY = Policy(
    primary=(Limit("error", 1.05), Limit("error", 1.1, parts=3)),
    secondary=(Limit("psnr", 1.0),),
    looks=(8,),
    resamples=400,
)
"""Of the gate: what a run of 8 prompts allows."""

EXTREMES: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
    0.0, -0.0, 0.5, 1e-320, 1e38, 1e39, 1e308, -1e308, float("nan"), float("inf"), -float("inf"),
    True, False, None, "", "x", "../../x", "/etc/passwd", "a" * 5000, "\u0000", "\ud800", "é", "int8-row",
    [], [[]], {}, {"": {}}, [None], [0, 0], [1e400], "auto", "NaN", "1e9", "transformer", "re:(a+)+$",
)  # fmt: skip
"""Values that go where others were."""


# bytes


def flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        # headers and numbers are at the start: damage is there as often as anywhere
        end = len(out) if rng.random() < 0.5 else min(len(out), 4096)
        if end:
            out[rng.randrange(end)] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, 7, 8, 9, rng.randrange(len(data) + 1), max(0, len(data) - 1)))]


def splice(data: bytes, rng: random.Random) -> bytes:
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return rng.choice(
        (
            data[:a] + data[b:],
            data[:b] + data[a:b] + data[b:],
            data[:a] + data[b:c] + data[a:b] + data[c:],
        )
    )


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    made = rng.choice((b"\x00" * 64, b"[" * 3000, b'{"a":' * 1500, b"9" * 5000, b"\xff\xfe", b"&a *a ",
                       b"!!python/object:os.system ", rng.randbytes(16)))  # fmt: skip
    return data[:at] + made + data[at:]


def length(data: bytes, rng: random.Random) -> bytes:
    """The first eight bytes of a safetensors file say how long its header is."""
    size = rng.choice(
        (0, 1, len(data), len(data) - 8, 2**31, 2**32, 2**63, 2**64 - 1, rng.randrange(2**20))
    )
    return size.to_bytes(8, "little", signed=False) + data[8:]


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip, flip, flip, cut, splice, insert)


# structure


def paths(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is, in nested lists and mappings."""
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in items:
        yield (*at, key)
        yield from paths(value, (*at, key))


def restructure(data: Any, rng: random.Random) -> Any:
    """One to three edits: remove, replace, rename, move, repeat, nest, scale."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(paths(data))
        if not places:
            return rng.choice(EXTREMES)
        path = rng.choice(places)
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        key, value = path[-1], parent[path[-1]]
        edit = rng.randrange(8)
        if edit == 0:
            del parent[key]
        elif edit in (1, 2):
            parent[key] = rng.choice(EXTREMES)
        elif edit == 3 and isinstance(parent, dict):
            parent[rng.choice(("", "x", f"{key}x", "../" + str(key), "weights"))] = parent.pop(key)
        elif edit == 4:
            other = data
            for step in rng.choice(places):
                if not isinstance(other, dict | list) or step not in (
                    other if isinstance(other, dict) else range(len(other))
                ):
                    break
                other = other[step]
            parent[key] = json.loads(json.dumps(other))
        elif edit == 5:
            parent[key] = [value] * rng.choice((1, 2, 100))
        elif edit == 6:
            for _ in range(rng.choice((1, 50, 200))):
                value = {"x": value}
            parent[key] = value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            parent[key] = value * rng.choice((-1, 2, 1000, 10**9))
        else:
            parent[key] = rng.choice(EXTREMES)
    return data


def json_file(file: Path, rng: random.Random, inside: str = "") -> None:
    if inside:
        data = json.loads(file.read_text())
        data[inside] = restructure(data[inside], rng)
        file.write_text(json.dumps(data), encoding="utf-8", errors="replace")
        return
    if rng.random() < 0.3:
        file.write_bytes(rng.choice(BYTES)(file.read_bytes(), rng))
        return
    data = restructure(json.loads(file.read_text()), rng)
    file.write_text(json.dumps(data), encoding="utf-8", errors="replace")


def yaml_file(file: Path, rng: random.Random) -> None:
    if rng.random() < 0.4:
        file.write_bytes(rng.choice(BYTES)(file.read_bytes(), rng))
        return
    data = restructure(yaml.safe_load(file.read_text()), rng)
    file.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8", errors="replace")


def tensor_file(file: Path, rng: random.Random) -> None:
    """Damaged bytes, an edited header, or a well-formed file with other tensors."""
    kind = rng.random()
    if kind < 0.45:
        file.write_bytes(rng.choice((*BYTES, length))(file.read_bytes(), rng))
        return
    if kind < 0.75:
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = restructure(json.loads(data[8 : 8 + size]), rng)
        text = json.dumps(header).encode("utf-8", "replace")
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        return
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(sorted(tensors))
        tensor = tensors[key]
        edit = rng.randrange(6)
        if edit == 0:
            del tensors[key]
        elif edit == 1:
            tensors[f"{key}{rng.choice(('x', '.weight', '|x', ''))}"] = tensor.clone()
        elif edit == 2:
            shape = rng.choice(((0,), (1,), (3, 5), (2, 0, 4), ()))
            tensors[key] = torch.zeros(shape, dtype=tensor.dtype)
        elif edit == 3:
            other = rng.choice((torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool))
            tensors[key] = torch.ones(tensor.shape, dtype=other)
        elif edit == 4 and tensor.is_floating_point():
            tensors[key] = tensor * rng.choice((float("nan"), float("inf"), 1e38, 0.0, -1.0))
        else:
            tensors[key] = torch.full_like(tensor, rng.choice((0, 1, 100)))
    if metadata and rng.random() < 0.3:
        metadata[rng.choice(sorted(metadata))] = (
            str(rng.choice(EXTREMES))[:100].encode("utf-8", "replace").decode()
        )
    file.unlink()  # the writer would write into a mapped file
    save_file(tensors, file, metadata)


MUTATE = {".json": json_file, ".yaml": yaml_file, ".safetensors": tensor_file}


# what is damaged, and what then reads it


class Seeds:
    """Good files, made once."""

    def __init__(self, folder: Path) -> None:
        few = {"calibration": {"samples": 2, "batch_size": 2, "steps": 2, "num_timestep_bins": 4}}
        self.folder = folder
        tiny.pipeline(blocks=1).save_pretrained(folder / "float")
        opened = loading.load_transformer(folder / "float")
        recipe = Recipe.load("w4a8", **few)
        needs = frozenset({"channels", "hessian", "sample"})
        seen = collected(opened, recipe, needs, progress=False)
        store.save(seen, folder / "statistics.safetensors")
        pipe = dtq.quantize(folder / "float", "w4a8", progress=False, sanity_check=False,
                            transform_candidates=[], solver="rtn", activations="int8-static-timestep", **few)  # fmt: skip
        writer.write(pipe, folder / "quantized")
        report = pipe.transformer.hf_quantizer.report.to_json()
        (folder / "quantized" / "dtq_report.json").write_text(json.dumps(report))
        pipe.transformer.save_pretrained(folder / "shards", max_shard_size="200kB")
        for name in yaml_names("recipes"):
            shutil.copy(find(name), folder / f"{name}.yaml")
        gate = folder / "gate"
        gate.mkdir()
        policy = POLICY.to_dict()
        del policy["name"]
        (gate / "policy.yaml").write_text(yaml.safe_dump(policy))
        job = observe(opened, SamplingSettings(samples=8, steps=3, batch_size=4))
        made = compare(job, loading.load_transformer(folder / "quantized")).run
        (gate / "run.json").write_text(run_file.text(made.to_json()))
        for reason in ("first", "second"):
            baseline_file.accept(made, gate / "base.json", reason, POLICY)


class Target:
    """A copy of a good file or folder, one file of it to damage, and who reads it."""

    def __init__(self, what: str, files: tuple[str, ...], read: Callable[[Path], object]) -> None:
        self.what, self.files, self.read = what, files, read


def load_model(folder: Path) -> None:
    DiTTransformer2DModel.from_pretrained(folder)


def load_statistics(path: Path) -> None:
    dict(store.load(path).inputs)


def gated(folder: Path) -> None:
    """All that ``dtq gate`` does with a run, a baseline and a policy."""
    policy = Policy.load(folder / "policy.yaml")
    baseline_file.history(folder / "base.json")
    run, base = (run_file.read(folder / name) for name in ("run.json", "base.json"))
    verdict = decide(run, base, policy)
    run_file.text(verdict.to_json()).encode()
    render.markdown(verdict, run).encode()
    ElementTree.fromstring(render.junit(verdict))
    baseline_file.accept(run, folder / "base.json", "again", policy)


MODEL = ("config.json", WEIGHTS, WEIGHTS)
TARGETS: dict[str, Target] = {
    "verify": Target("quantized", tuple(f"transformer/{f}" for f in MODEL), reader.verify),
    "open": Target(
        "quantized",
        ("model_index.json", "scheduler/scheduler_config.json", "vae/config.json", f"vae/{WEIGHTS}",
         "transformer/config.json", "transformer/config.json"),
        lambda path: loading.load_transformers(str(path)),
    ),
    "plan": Target(
        "float", ("model_index.json", "transformer/config.json", f"transformer/{WEIGHTS}"),
        lambda path: loading.meta_models(str(path)),
    ),
    "load": Target(
        "quantized/transformer", ("config.json#quantization_config", WEIGHTS), load_model
    ),
    "shards": Target("shards", (f"{WEIGHTS}.index.json", "config.json"), reader.verify),
    "statistics": Target("statistics.safetensors", ("",), load_statistics),
    "recipe": Target("*.yaml", ("",), Recipe.load),
    "report": Target("quantized/dtq_report.json", ("",), lambda path: quantization_report(path.parent)),
    "gate": Target("gate", ("run.json", "base.json", "policy.yaml"), gated),
    "json": Target("quantized/dtq_report.json", ("",), lambda path: parse_json(path.read_text(errors="replace"), "x")),
}  # fmt: skip
"""Name to target; a command that reads a new kind of file adds a row."""

SHARE = {"verify": 4, "open": 1, "plan": 2, "load": 3, "shards": 2, "statistics": 4, "recipe": 6,
         "report": 3, "gate": 6, "json": 1}  # fmt: skip
"""How often each comes up: those that read most of the format more often."""


def run_case(seed: int, seeds: Path, work: Path) -> tuple[str, str]:
    """Damage and read; returns the target and what came of it, or raises what must not."""
    rng = random.Random(seed)
    name = rng.choices(list(SHARE), list(SHARE.values()))[0]
    target = TARGETS[name]
    good = rng.choice(sorted(seeds.glob(target.what)))
    place = work / good.name
    if good.is_dir():
        shutil.copytree(good, place)
    else:
        shutil.copy(good, place)
    chosen, _, inside = rng.choice(target.files).partition("#")
    file = place / chosen if chosen else place
    for _ in range(rng.choice((1, 1, 1, 2))):
        try:
            MUTATE[file.suffix](file, rng, *([inside] if inside else []))
        except (*LIBRARY_ERRORS, yaml.YAMLError):
            break  # damaged so that the second mutation cannot read it; the first stays
    try:
        target.read(place)
    except DtqError as error:
        if not str(error).strip() or len(str(error)) > 20_000:
            raise AssertionError(f"a message of {len(str(error))} characters") from error
        return name, "refused"
    except LIBRARY_ERRORS as error:
        if name != "load" or from_dtq(error):
            raise
        try:
            loading.load_transformers(str(place))
        except DtqError:
            return name, "refused by diffusers"
        raise
    return name, "loaded"


def from_dtq(error: BaseException) -> bool:
    """Whether the error was raised in a file of dtq."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(last).is_relative_to(Path(dtq.__file__).parent)


class Hung(BaseException):
    """Not an Exception: nobody may swallow it."""


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(first: int, count: int, say: Callable[[str], None] = print) -> tuple[Counter, list[str]]:
    """Cases ``first`` and on; returns outcomes by target, and a line per failure."""
    outcomes: Counter[tuple[str, str]] = Counter()
    failures = []
    with tempfile.TemporaryDirectory(prefix="dtq-fuzz-") as folder:
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        Seeds(seeds)
        started = time.monotonic()
        for seed in range(first, first + count):
            work = Path(folder) / "work"
            work.mkdir()
            try:
                with alarm(SECONDS), limit(GIGABYTES):
                    outcomes[run_case(seed, seeds, work)] += 1
            except Hung:
                failures.append(f"seed {seed}: no end after {SECONDS} s")
            except Exception as error:  # noqa: BLE001  (whatever it is, it is what we look for)
                where = traceback.extract_tb(error.__traceback__)[-1]
                message = " ".join(str(error).split())[:200]
                failures.append(
                    f"seed {seed}: {type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"
                )
            if failures and failures[-1].startswith(f"seed {seed}:"):
                say(failures[-1])
            shutil.rmtree(work)
            if (seed - first + 1) % 1000 == 0:
                pace = (seed - first + 1) / (time.monotonic() - started)
                say(f"{seed - first + 1} cases, {len(failures)} failures, {pace:.0f} a second")
    return outcomes, failures


@contextmanager
def limit(gigabytes: int) -> Iterator[None]:
    """An allocation beyond this fails instead of taking the machine with it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + gigabytes * 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first case; the next has the next"
    )
    parser.add_argument("--only", type=int, help="run this one, with its traceback")
    options = parser.parse_args()
    from diffusers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    if options.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "seeds").mkdir()
            (Path(folder) / "work").mkdir()
            Seeds(Path(folder) / "seeds")
            print(run_case(options.only, Path(folder) / "seeds", Path(folder) / "work"))
        return
    outcomes, failures = run(options.seed, options.count, lambda line: print(line, flush=True))
    for name in TARGETS:
        found = {what: n for (target, what), n in sorted(outcomes.items()) if target == name}
        print(
            f"{name:12} {sum(found.values()):6}  " + ", ".join(f"{n} {w}" for w, n in found.items())
        )
    print(f"{sum(outcomes.values()) + len(failures)} cases, {len(failures)} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
