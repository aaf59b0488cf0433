# SPDX-License-Identifier: Apache-2.0
"""Run the CPU kernels, AMX among them, on an emulated Sapphire Rapids: Bochs, a Linux, the driver.

    git clone https://github.com/bochs-emu/Bochs
    python scripts/amx.py Bochs /boot/vmlinuz-...

Needs g++, make, genisoimage and isolinux. The kernel is one of Linux 5.16 or later with a serial
console and no modules to start (Debian's cloud kernel is). BOCHS is built in place, with what a
program needs to use tiles under Linux and what its arithmetic lacks, see ``CHANGES``.
"""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "kernels"))
from test_cpu_driver import compiled

CPU = "BX_CPU_THIS_PTR "
FIRST_USE = "if (BX_CPU_THIS_PTR msr.ia32_xfd)"
# (file, text in it, text to add after it), for the snapshot of 2026-08-22, after release 3.0
CHANGES = [
    # XFD: Linux gives a program the tiles when it first uses them
    ("cpu.h", "  Bit64u ia32_xss;\n", "  Bit64u ia32_xfd, ia32_xfd_err;\n"),
    (
        "init.cc",
        f"  {CPU}msr.ia32_xss = 0;\n",
        f"  {CPU}msr.ia32_xfd = {CPU}msr.ia32_xfd_err = 0;\n",
    ),
    (
        "msr.cc",
        '"MSR_IA32_XSS", BX_ISA_XSAVES, ~Bit64u(get_ia32_xss_allow_mask()));\n',
        "".join(
            f'  msr_desc[{index}] = new MSR_Descriptor("{name}", BX_ISA_AMX, '
            "~Bit64u(BX_XCR0_XTILEDATA_MASK));\n"
            for index, name in (
                ("BX_MSR_IA32_XFD", "MSR_IA32_XFD"),
                ("BX_MSR_IA32_XFD_ERROR", "MSR_IA32_XFD_ERR"),
            )
        ),
    ),
    (
        "msr.cc",
        f"      val64 = {CPU}msr.ia32_xss;\n      break;\n",
        f"    case BX_MSR_IA32_XFD: val64 = {CPU}msr.ia32_xfd; break;\n"
        f"    case BX_MSR_IA32_XFD_ERROR: val64 = {CPU}msr.ia32_xfd_err; break;\n",
    ),
    (
        "msr.cc",
        f"      {CPU}msr.ia32_xss = val_64;\n      break;\n",
        f"    case BX_MSR_IA32_XFD: {CPU}msr.ia32_xfd = val_64; handleAvxModeChange(); break;\n"
        f"    case BX_MSR_IA32_XFD_ERROR: {CPU}msr.ia32_xfd_err = val_64; break;\n",
    ),
    (
        "proc_ctrl.cc",
        "#if BX_SUPPORT_AMX\n  if (! long64_mode() ||",
        f" {CPU}msr.ia32_xfd ||",
    ),
    (
        "proc_ctrl.cc",
        "(BX_XCR0_XTILECFG_MASK | BX_XCR0_XTILEDATA_MASK))\n    exception(BX_UD_EXCEPTION, 0);\n",
        f"  {FIRST_USE} {{\n    {CPU}msr.ia32_xfd_err |= {CPU}msr.ia32_xfd;\n"
        "    exception(BX_NM_EXCEPTION, 0);\n  }\n",
    ),
    (
        "cpuid.cc",
        "    if (is_cpu_extension_supported(BX_ISA_XSAVES))\n      leaf->eax |= (1<<3);\n",
        "    if (is_cpu_extension_supported(BX_ISA_AMX))\n      leaf->eax |= (1<<4);\n",
    ),
    ("crregs.cc", "BX_XCR0_XTILEDATA_BIT].attr   = BX_XSAVE_ALIGN64", " | BX_XSAVE_XFD_SUPPORT"),
]
# vcvtne2ps2bf16 takes its upper half from the lanes of the first operand, not from behind them
UPPER_HALF = ("convert_ne_fp32_to_bfloat16(op1.vmm32u(n", " - DWORD_ELEMENTS(len)")
# bytes that the manual calls signed (TDPBSSD and its kin) are extended by their sign
SIGNED = {"DPBDSS": "xy", "DPBDSU": "x", "DPBDUS": "y"}

OPTIONS = (
    "--enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex --enable-amx "
    "--enable-all-optimizations --with-nogui --disable-docbook CXXFLAGS=-O2 CFLAGS=-O2"
)
MACHINE = """\
config_interface: textconfig
display_library: nogui
megs: 512
cpu: model=sapphire_rapids, ips=50000000, reset_on_triple_fault=0, exclude_features="{without}"
romimage: file={bochs}/bios/BIOS-bochs-latest
vgaromimage: file={bochs}/bios/VGABIOS-lgpl/VGABIOS-lgpl-latest.bin
ata0-master: type=cdrom, path={work}/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={work}/serial
clock: sync=none
log: {work}/log
panic: action=fatal
"""
WITHOUT = "cet lass la57 pks pku smap umip"
# 580: short moves by `rep movsb`, which the kernel believes and the emulator's fast-string bit denies
MENU = """\
DEFAULT linux
PROMPT 0
LABEL linux
  KERNEL /vmlinuz
  INITRD /initrd
  APPEND console=ttyS0 nokaslr mitigations=off clearcpuid=580 lpj=1000000 tsc=reliable quiet
"""
INIT = """\
#include <stdio.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <unistd.h>
int main() {
  if (!fork()) execl("/driver", "driver", (char*)0);
  int status = 1;
  wait(&status);
  printf("status %d\\n", status);
  fflush(stdout);
  sleep(1);
  return reboot(RB_POWER_OFF);
}
"""


def change(cpu: Path) -> None:
    """Patch the sources, unless they are patched."""
    if FIRST_USE in (cpu / "proc_ctrl.cc").read_text("latin-1"):
        return
    for name, anchor, added in [*CHANGES, ("avx/avx512_bf16.cc", *UPPER_HALF)]:
        swap(cpu / name, anchor, anchor + added)
    source = cpu / "avx" / "amx.cc"
    text = source.read_text("latin-1")
    for name, operands in SIGNED.items():
        (function,) = re.findall(rf"Bit32u {name}\(.*?\n}}\n", text, re.DOTALL)
        signed = function
        for x in operands:
            signed = signed.replace(f"Bit32s({x}byte[", f"Bit32s((Bit8s) {x}byte[")
        swap(source, function, signed)


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text("latin-1")
    if text.count(old) != 1:
        raise click.ClickException(f"{path} is not the snapshot that CHANGES is for: no {old!r}")
    path.write_text(text.replace(old, new), "latin-1")


def archive(files: dict[str, bytes]) -> bytes:
    """An initial RAM file system (cpio, newc format) with the given programs and a console."""
    packed = b""
    entries = [(name, 0o100755, data, 0) for name, data in files.items()]
    entries = [("dev", 0o40755, b"", 0), ("dev/console", 0o20600, b"", 5), *entries]
    for number, (name, mode, data, major) in enumerate([*entries, ("TRAILER!!!", 0, b"", 0)]):
        fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, major, major // 5, len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        packed += head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
    return gzip.compress(packed, 1)


@click.command(help=__doc__)
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("kernel", type=click.Path(exists=True, path_type=Path))
@click.option("--isolinux", default="/usr/lib/ISOLINUX/isolinux.bin", show_default=True)
@click.option("--modules", default="/usr/lib/syslinux/modules/bios", show_default=True)
def main(source: Path, kernel: Path, isolinux: str, modules: str) -> None:
    bochs = source.resolve() / "bochs"
    if not (bochs / "bochs").exists():
        change(bochs / "cpu")
        subprocess.run(["./configure", *OPTIONS.split()], cwd=bochs, check=True)
        subprocess.run(["make", f"-j{os.cpu_count()}"], cwd=bochs, check=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        disk = work / "disk"
        (disk / "isolinux").mkdir(parents=True)
        (work / "init.c").write_text(INIT)
        subprocess.run(["gcc", "-static", "init.c", "-o", "init"], cwd=work, check=True)
        driver = compiled("g++", "-O3", "x86", work, static=True)
        programs = {"init": (work / "init").read_bytes(), "driver": driver.read_bytes()}
        (disk / "initrd").write_bytes(archive(programs))
        (disk / "vmlinuz").write_bytes(kernel.read_bytes())
        for path in (Path(isolinux), Path(modules) / "ldlinux.c32"):
            (disk / "isolinux" / path.name).write_bytes(path.read_bytes())
        (disk / "isolinux" / "isolinux.cfg").write_text(MENU)
        boot = "-b isolinux/isolinux.bin -c isolinux/catalog -no-emul-boot -boot-load-size 4"
        command = ["genisoimage", "-quiet", *boot.split(), "-boot-info-table", "-R"]
        subprocess.run([*command, "-o", str(work / "boot.iso"), str(disk)], check=True)
        machine = MACHINE.format(bochs=bochs, work=work, without=WITHOUT)
        (work / "machine").write_text(machine)
        print(output := run(bochs, work))
    expected = ("bfloat16 present", "amx right", "status 0")
    sys.exit(0 if all(line in output for line in expected) else 1)


def run(bochs: Path, work: Path) -> str:
    """Run the machine until it ends; returns what it wrote to its serial line."""
    serial = work / "serial"
    with subprocess.Popen(
        [bochs / "bochs", "-q", "-f", work / "machine"], stdout=subprocess.DEVNULL
    ) as emulator:
        started = time.monotonic()
        while emulator.poll() is None and time.monotonic() - started < 1200:
            time.sleep(1)
            output = serial.read_text("latin-1") if serial.exists() else ""
            if re.search(r"^status \d+|panic|triple fault", output, re.MULTILINE):
                break
        emulator.kill()
    return serial.read_text("latin-1") if serial.exists() else "no output"


if __name__ == "__main__":
    main()
