# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels without torch, on this machine and on emulated ones that lack instructions."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from dtq.data import folder
from dtq.kernels import cpu, gxx

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)


@pytest.fixture(scope="module", params=["-O2", "-O3"])
def driver(request, tmp_path_factory):
    """Compiled with the flags of the library, and once less eagerly than that."""
    work, sources = tmp_path_factory.mktemp("driver"), folder("cpu_ext")
    units = [(u.source, u.flags, u.name) for u in gxx.UNITS if u.flags != gxx.GLUE]
    units.append(("tests/driver.cpp", ("-ffp-contract=off",), "driver"))

    def translate(unit):
        source, flags, name = unit
        target = str(work / f"{name}.o")
        command = ["g++", "-std=c++20", *flags, request.param, "-c", str(sources / source)]
        subprocess.run([*command, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(translate, units))
    program = work / "driver"
    # nothing of the C++ library from a file that was compiled for instructions a CPU may lack
    subprocess.run(["g++", *objects, "-o", str(program)], check=True)
    return program


def said(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


def test_every_path_of_this_machine_is_right(driver):
    found = said(str(driver))
    assert set(found) == {"best", *cpu.ISAS}
    assert found["ref"] == "right"
    assert found[found["best"]] == "right"


@pytest.mark.parametrize(
    ("model", "best"), [("Nehalem", "ref"), ("SandyBridge", "ref"), ("Haswell", "avx2")]
)
def test_older_machines_run_what_they_have(driver, model, best):
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("no qemu-x86_64")
    found = said("qemu-x86_64", "-cpu", model, str(driver))
    assert found.pop("best") == best
    here = cpu.ISAS.index(best)
    assert [found[name] for name in cpu.ISAS[: here + 1]] == ["right"] * (here + 1)
    assert {found[name] for name in cpu.ISAS[here + 1 :]} == {"absent"}
