# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels without torch, on this machine and on emulated ones that lack instructions."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dtq.io.package_data import folder
from dtq.kernels.compile import cpu, gcc
from dtq.kernels.compile.compiler import Unit

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)


FLAGS = {"avxvnni": "avx_vnni", "vnni": "avx512_vnni", "amx": "amx_int8"}
"""Paths that no emulated machine has, and the flag of a processor that has them."""


def never_called(unit):
    """Whether a path is there only to be linked: optimizing it would take most of the time."""
    return unit.name in FLAGS and FLAGS[unit.name] not in Path("/proc/cpuinfo").read_text()


def compiled(compiler, level, machine, work, *, static=False):
    """The driver with the flags of the library, for an architecture."""
    sources = folder("cpu_ext")
    units = [u for u in gcc.UNITS if not u.torch and u.machine in ("", machine)]
    units.append(Unit("tests/driver.cpp", ("-std=c++20", "-ffp-contract=off")))

    def compile_unit(unit):
        target = str(work / unit.object)
        optimize = "-O0" if never_called(unit) else level
        command = [compiler, *unit.flags, optimize, "-c", str(sources / unit.source)]
        subprocess.run([*command, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, units))
    program = work / "driver"
    options = ["-static"] if static else []
    subprocess.run([compiler, *options, *objects, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module", params=["-O1", "-O3"])
def driver(request, tmp_path_factory):
    """Compiled as the library is, and once with less optimization."""
    return compiled("g++", request.param, "x86", tmp_path_factory.mktemp("driver"))


def results(*command):
    """What the driver prints: the best path, and the state of each."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


def test_every_path_of_this_machine_is_right(driver):
    states = results(str(driver))
    assert set(states) == {"best", "bfloat16", *cpu.ISAS}
    assert states["ref"] == "right"
    assert states[states["best"]] == "right"


@pytest.mark.parametrize(
    ("model", "best"), [("Nehalem", "ref"), ("SandyBridge", "ref"), ("Haswell", "avx2")]
)
def test_older_machines_run_what_they_have(driver, model, best):
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("no qemu-x86_64")
    states = results("qemu-x86_64", "-cpu", model, str(driver), "60")
    assert states.pop("best") == best
    here = cpu.ISAS.index(best)
    assert [states[name] for name in cpu.ISAS[: here + 1]] == ["right"] * (here + 1)
    assert {states[name] for name in cpu.ISAS[here + 1 :]} == {"absent"}


ARM = "aarch64-linux-gnu-g++"


@pytest.mark.skipif(
    not (shutil.which(ARM) and shutil.which("qemu-aarch64")), reason=f"needs {ARM} and qemu-aarch64"
)
def test_arm_runs_what_it_has(tmp_path):
    program = str(compiled(ARM, "-O3", "arm", tmp_path, static=True))
    states = results("qemu-aarch64", "-cpu", "max", program, "60")
    assert (states["best"], states["neon"], states["ref"]) == ("neon", "right", "right")
    states = results("qemu-aarch64", "-cpu", "cortex-a53", program, "60")  # without dot products
    assert (states["best"], states["neon"], states["ref"]) == ("ref", "absent", "right")
