# SPDX-License-Identifier: Apache-2.0
"""Static timing of CUDA machine code (SASS): what one warp issues in a given call, and when.

No GPU is needed. nvcc compiles a file for one architecture, cuobjdump disassembles it, and one warp is walked
along the path that a real call takes. It is an estimate: a scheduler runs other warps as well, and
memory latencies are assumed.

*Path.* :class:`Machine` executes the integer instructions of one thread with the parameters of
the call, so that most branches are known: tests of sizes, of pointers, of types, and loop bounds. What is
loaded from memory or computed in floating point is unknown. A branch whose condition is unknown
is not taken, except one around the call of a slow path: a division, a reciprocal or a root takes its
fast path.

*Time.* ptxas writes into each instruction for how many cycles the warp then pauses, which of six scoreboards it
sets, and for which ones it waits. An instruction that sets a scoreboard clears it after
:data:`LATENCIES`. Instructions that a false predicate cancels are issued as well.

How to use it (``tests/kernels/test_cuda_timing.py`` does)::

    kernel = find(kernels("gemm_int8.cu", "90a", folder), r"gemm_wgmma.*ELi256E.*Lb0E")
    params = bytes(arguments)                     # a ctypes.Structure: what the kernel gets
    walk = run(kernel, params, thread=128)        # one thread of the warp; block 0
    part = walk.between("WARPGROUP.DEPBAR", "EXIT")   # from the last match of the first to the last of
    part.instructions, part.cycles, part.count("F2F")  # the second, both regular expressions

``between`` with ``first=True`` starts at the first match. The cost of a step of a loop is the
difference of two walks with loops of different length, whatever the code looks like. Check with
``count`` that the walk is the path that was meant: the number of products, of stores. If a branch
that a parameter decides goes the wrong way, an instruction has no rule in ``_RULES`` yet.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import os
import re
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dtq.kernels.compile import nvcc

SOURCES = Path(__file__).parent.parent / "cuda_ext"
WITH_HOST_CODE = ("80", "89")
"""Architectures with one PTX, which are compiled together; the host code, the same for all, too."""

LEFT_OUT = {
    "gemm.cu": ("89", "90a", "100", "120f"),
    "gemm_int8.cu": ("89", "100"),
    "gemm_two_level.cu": ("120f",),
    "gemm_table.cu": ("89",),
    "gemm_fp4.cu": ("89",),
    "rows.cu": ("80", "120f"),
    "weights.cu": ("80", "100"),
}
"""Architectures that the tests do not compile a file for, if not ``DTQ_TEST_THOROUGH=1``.

The PTX of sm_89 is that of sm_80, and the PTX of sm_120f is that of sm_100 but for tables and FP4: a file is compiled for
one of the two, and each of the four gets some of the files. ``gemm.cu`` has no kernels.
"""
if "DTQ_TEST_THOROUGH" in os.environ:
    LEFT_OUT = {}

LATENCIES = {
    "LDG": 260,  # from L2; 30 from L1
    "LD": 260,
    "LDS": 30,
    "LDSM": 33,
    "MOVM": 30,
    "F2F": 24,
}
"""Cycles until an instruction clears the scoreboard of its result; these are assumed."""
OTHER_LATENCY = 24  # MUFU, I2F, S2R, LDC, SHFL
READ_LATENCY = 10  # until the registers that an instruction reads may be overwritten

_PARAMETERS = {"80": 0x160, "89": 0x160, "90a": 0x210, "100": 0x380, "120f": 0x380}
"""Where the parameters of a kernel start in constant bank 0."""
_MASK = 0xFFFFFFFF


def tool() -> str | None:
    """cuobjdump: nvcc's, or that of PyPI (nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm)."""
    packages = Path(sysconfig.get_paths()["purelib"])
    folders = [str(p.parent) for p in packages.glob("nvidia/cu*/bin/cuobjdump")]
    return shutil.which("cuobjdump") or shutil.which(
        "cuobjdump", path=":".join([*folders, "/none"])
    )


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # predicate, such as "!P0", or ""
    opcode: str  # with modifiers, such as "IMAD.WIDE.U32"
    operands: tuple[str, ...]
    stall: int  # cycles until the next instruction
    sets: int | None  # scoreboard that its result clears
    holds: int | None  # scoreboard that is cleared when its operands are read
    waits: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    registers: int
    text: str

    @functools.cached_property
    def code(self) -> Mapping[int, Instruction]:
        """The instructions, by address."""
        return {i.address: i for i in parse(self.text)}


def compiled(source: str, arch: str, folder: Path) -> tuple[Path, str]:
    """A file of ``cuda_ext``, compiled with the flags of the library; once for each folder.

    Args:
        source: its name.
        arch: the architecture, as nvcc names it.
        folder: where to keep the result; processes may share it.

    Returns:
        the object file, and what the compilers printed.

    Raises:
        AssertionError: it does not compile, or with warnings, or is of :data:`LEFT_OUT`.
    """
    assert arch not in LEFT_OUT.get(source, ()), f"{source} is not compiled for sm_{arch}"
    together = tuple(a for a in WITH_HOST_CODE if a not in LEFT_OUT.get(source, ()))
    archs, part = (together, "-c") if arch in together else ((arch,), "-cubin")
    target = folder / f"{source}.{archs[0]}.o"
    log = target.with_suffix(".log")
    flags = [f for f in nvcc.device_flags(archs, ptx=False) if not f.startswith("-Xcompiler")]
    checks = ["-Xptxas=-v", "-Werror=all-warnings"]
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            command = ["nvcc", *flags, *checks, part, str(SOURCES / source), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            output = done.stdout + done.stderr
            assert done.returncode == 0, output[-3000:]
            log.write_text(output)
    return target, log.read_text()


def disassembled(path: Path, arch: str) -> str:
    """The SASS of an object file for an architecture, kept next to it; needs :func:`tool`."""
    kept = path.with_suffix(f".{arch}.sass")
    if kept.exists():
        return kept.read_text()
    program = tool()
    assert program is not None, "needs cuobjdump"
    of_several = [f"-arch=sm_{arch}"] if arch in WITH_HOST_CODE else []
    command = [program, "-sass", *of_several, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    written = kept.with_suffix(f".{os.getpid()}")
    written.write_text(done.stdout)
    written.rename(kept)  # another process sees all of it, or nothing
    return done.stdout


def kernels(source: str, arch: str, folder: Path) -> list[Kernel]:
    """The kernels of a file of ``cuda_ext``; for the arguments see :func:`compiled`."""
    target, output = compiled(source, arch, folder)
    line = rf"entry function '(\w+)' for 'sm_{arch.rstrip('af')}[af]?'.*?Used (\d+) registers"
    used = re.findall(line, output, re.DOTALL)
    registers = {name: int(count) for name, count in used}
    parts = [part.split("\n", 1) for part in disassembled(target, arch).split("Function : ")[1:]]
    return [Kernel(name.strip(), arch, registers[name.strip()], text) for name, text in parts]


# of a multiprocessor, shared memory in KB
_SHARED = {"80": 164, "89": 100, "90a": 228, "100": 228, "120f": 100}
_THREADS = {"80": 2048, "89": 1536, "90a": 2048, "100": 2048, "120f": 1536}


def blocks(kernel: Kernel, threads: int, shared: int) -> int:
    """How many blocks fit on a multiprocessor: by registers, threads, and bytes of shared memory."""
    of_warp = -(-kernel.registers * 32 // 256) * 256
    warps = threads // 32
    by_shared = _SHARED[kernel.arch] * 1024 // (shared + 1024)  # 1 KB of each block is the system's
    return min(65536 // of_warp // warps, _THREADS[kernel.arch] // threads, by_shared)


def find(kernels: list[Kernel], pattern: str) -> Kernel:
    """The only kernel whose mangled name matches."""
    found = [k for k in kernels if re.search(pattern, k.name)]
    assert len(found) == 1, f"{pattern}: {[k.name for k in found]} of {[k.name for k in kernels]}"
    return found[0]


_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\*")
_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")


def parse(text: str) -> Iterator[Instruction]:
    """The instructions of one function as cuobjdump prints them, two lines each."""
    lines = text.splitlines()
    for line, after in itertools.pairwise(lines):
        found, word = _LINE.search(line), _WORD.match(after)
        if not found or not word:
            continue
        address, guard, opcode, rest = found.groups()
        control = int(word[1], 16) >> 41
        sets, holds, waits = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        operands = [re.sub(r"\.reuse|\s", "", o) for o in rest.split(",")] if rest else []
        yield Instruction(
            int(address, 16),
            guard or "",
            opcode,
            tuple(operands),
            control & 15,
            None if sets == 7 else sets,
            None if holds == 7 else holds,
            tuple(i for i in range(6) if waits >> i & 1),
        )


# ------------------------------------------------------------------------------ the path

Value = int | None
"""A register of 32 bits or a predicate; None is unknown."""

Rule = Callable[["Machine", Instruction], list[Value]]
"""The results of an instruction, in the order of `_results`; what is missing is unknown."""


def _signed(v: int) -> int:
    return v - (1 << 32) if v >> 31 & 1 else v


def _as_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits & _MASK))[0])


def _bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


class Machine:
    """Integer registers and predicates of one thread."""

    def __init__(
        self,
        arch: str,
        params: bytes,
        *,
        thread: int = 0,
        block: int = 0,
        threads: int = 0,
        grid: int = 1,
        align: int = 8,
    ) -> None:
        self.values: dict[str, Value] = {"RZ": 0, "URZ": 0, "PT": 1, "UPT": 1}
        self.constants = {0: threads, 4: 1, 8: 1, 12: grid, 16: 1, 20: 1}
        base = -(-_PARAMETERS[arch] // align) * align
        for i in range(0, len(params) // 4 * 4, 4):
            self.constants[base + i] = int.from_bytes(params[i : i + 4], "little")
        self.special = {"SR_TID.X": thread, "SR_LANEID": thread % 32, "SR_CTAID.X": block}

    def get(self, operand: str, high: bool = False) -> Value:
        """A source operand; with ``high`` the upper half of a pair of registers."""
        if operand.startswith("!"):
            value = self.get(operand[1:])
            return None if value is None else 1 - value
        if operand.startswith("-") and not operand.startswith("-0x"):
            value = self.get(operand[1:])
            return None if value is None else -value & _MASK
        if operand.startswith("~"):
            value = self.get(operand[1:])
            return None if value is None else ~value & _MASK
        if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", operand):
            return int(operand, 0) & _MASK
        if not _REGISTER.fullmatch(operand.removesuffix(".64")):
            return self.constant(operand, high)
        name = operand.removesuffix(".64")
        return self.values.get(_next(name) if high else name, 0)  # not written yet: any value

    def constant(self, operand: str, high: bool) -> Value:
        bank = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operand)
        return self.constants.get(int(bank[1], 16) + 4 * high) if bank else None

    def set(self, name: str, value: Value) -> None:
        if name not in ("RZ", "URZ", "PT", "UPT"):
            self.values[name] = None if value is None else value & _MASK

    def execute(self, i: Instruction) -> None:
        """Computes the results of an instruction, or makes them unknown."""
        results = _results(i)
        sure = self.get(i.guard) if i.guard else 1
        if sure == 0:
            return
        if sure is None:
            for name in results:
                self.set(name, None)
            return
        rule = _rule(i.opcode)
        values = rule(self, i) if rule else []
        for k, name in enumerate(results):
            self.set(name, values[k] if k < len(values) else None)


def _next(name: str) -> str:
    if name in ("RZ", "URZ"):
        return name
    kind = name.rstrip("0123456789")
    return f"{kind}{int(name[len(kind) :]) + 1}"


_STORES = ("ST", "RED", "BRA", "EXIT", "BAR", "BSYNC", "NOP", "MEMBAR", "UTMA", "BSSY")
_WIDE = re.compile(r"IMAD\.WIDE|\.64(\.|$)|CS2R")
_REGISTER = re.compile(r"U?[RP]\d+|U?RZ|U?PT")


def _results(i: Instruction) -> list[str]:
    """The registers and predicates that an instruction writes: a register (both of a pair), predicates."""
    if i.name.startswith(_STORES) or not i.operands:
        return []
    first = i.operands[0]
    if i.name == "R2P":
        return _predicates(int(i.operands[-1], 0))
    if not _REGISTER.fullmatch(first):
        return []
    if first.lstrip("U").startswith("P"):  # comparisons; LOP3 with a predicate
        return [first, *[o for o in i.operands[1:2] if _REGISTER.fullmatch(o)]]
    names = [first]
    if _WIDE.search(i.opcode) and not i.opcode.startswith("SHF"):
        names.append(_next(first))
    vector = re.search(r"\.(128|64)(\.|$)", i.opcode)
    if vector and i.name.startswith("LD"):
        while len(names) < int(vector[1]) // 32:
            names.append(_next(names[-1]))
    if i.name in ("IGMMA", "IMMA", "HMMA"):
        return []
    for o in i.operands[1:3]:
        if re.fullmatch(r"U?P\d|U?PT", o) and i.name in _CARRIES:
            names.append(o)
        else:
            break
    return names


def _predicates(mask: int) -> list[str]:
    return [f"P{k}" for k in range(7) if mask >> k & 1]


_CARRIES = ("IADD3", "UIADD3", "LEA", "ULEA", "IMAD")


def _rule(opcode: str) -> Rule | None:
    name = opcode.split(".")[0]
    if opcode.startswith(("IMAD.WIDE", "UIMAD.WIDE")):
        return _wide
    if opcode.startswith(("IMAD.HI", "UIMAD.HI")):
        return _high
    for names, rule in _RULES.items():
        if name in names.split():
            return rule
    return None


def _sources(m: Machine, i: Instruction, skip: int) -> list[Value]:
    return [m.get(o) for o in i.operands[skip:]]


def _move(m: Machine, i: Instruction) -> list[Value]:
    pair = ".64" in i.opcode
    return [m.get(i.operands[1]), *([m.get(i.operands[1], high=True)] if pair else [])]


def _zero(m: Machine, i: Instruction) -> list[Value]:
    return [0, 0] if i.operands[1] == "SRZ" else []


def _special(m: Machine, i: Instruction) -> list[Value]:
    return [m.special.get(i.operands[1], 0)]


def _split(i: Instruction) -> tuple[int, int]:
    """(how many results, index of the first source): predicates after the first result are carries."""
    count = 1
    while count < len(i.operands) and re.fullmatch(r"U?P\d|U?PT", i.operands[count]):
        count += 1
    return count, count


def _imad(m: Machine, i: Instruction) -> list[Value]:
    _, at = _split(i)
    a, b, c = _sources(m, i, at)[:3]
    carry: Value = m.get(i.operands[at + 3]) if ".X" in i.opcode else 0
    if a == 0 or b == 0:
        product: Value = 0
    else:
        product = None if a is None or b is None else a * b
    if product is None or c is None or carry is None:
        return []
    return [product + c + carry]


def _wide(m: Machine, i: Instruction) -> list[Value]:
    _, at = _split(i)
    a, b, c = _sources(m, i, at)[:3]
    high = m.get(i.operands[at + 2], high=True)
    if a is None or b is None or c is None or high is None:
        return []
    if ".U32" not in i.opcode:
        a, b = _signed(a), _signed(b)
    total = (a * b + (high << 32 | c)) & (1 << 64) - 1
    return [total, total >> 32]


def _high(m: Machine, i: Instruction) -> list[Value]:
    _, at = _split(i)
    a, b = _sources(m, i, at)[:2]
    high = m.get(i.operands[at + 2])
    pair = m.get(i.operands[at + 2], high=True)
    if a is None or b is None or high is None:
        return []
    if ".U32" not in i.opcode:
        a, b = _signed(a), _signed(b)
    if i.operands[at + 2] in ("RZ", "URZ"):
        return [a * b >> 32]
    return [] if pair is None else [(a * b + (pair << 32 | high)) >> 32]


def _add(m: Machine, i: Instruction) -> list[Value]:
    count, at = _split(i)
    values = _sources(m, i, at)
    terms, carries = values[:3], values[3:] if ".X" in i.opcode else []
    if any(v is None for v in [*terms, *carries]):
        return []
    total = sum(v for v in [*terms, *carries] if v is not None)
    return [total, *[int(total >> 32 > k) for k in range(count - 1)]]


def _lut(table: int, a: int, b: int, c: int) -> int:
    result = 0
    for k in range(8):
        if table >> k & 1:
            result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return result


def _lop3(m: Machine, i: Instruction) -> list[Value]:
    predicate = re.fullmatch(r"U?P\d|U?PT", i.operands[0]) is not None
    at = 2 if predicate else 1
    a, b, c, table = _sources(m, i, at)[:4]
    if table == 0xC0 and 0 in (a, b):
        result: Value = 0
    elif a is None or b is None or c is None or table is None:
        return []
    else:
        result = _lut(table, a, b, c) & _MASK
    return [int(result != 0), result] if predicate else [result]


def _plop3(m: Machine, i: Instruction) -> list[Value]:
    a, b, c, table, other = _sources(m, i, 2)[:5]
    if table is None or other is None:
        return []
    choices = [
        (_lut(table, x, y, z) & 1, _lut(other, x, y, z) & 1)
        for x in ([a] if a is not None else [0, 1])
        for y in ([b] if b is not None else [0, 1])
        for z in ([c] if c is not None else [0, 1])
    ]
    return [choices[0][k] if len({choice[k] for choice in choices}) == 1 else None for k in (0, 1)]


def _shift(m: Machine, i: Instruction) -> list[Value]:
    low, by, high = _sources(m, i, 1)[:3]
    if by is None:
        return []
    wide, signed = "64" in i.opcode, "S32" in i.opcode or "S64" in i.opcode
    by = min(by, 63) if wide else min(by, 32)
    if ".HI" not in i.opcode and ".L" in i.opcode:
        return [] if low is None else [low << by]
    if ".HI" not in i.opcode and not wide and low is not None:
        return [(_signed(low) if signed else low) >> by]
    if ".HI" in i.opcode and i.operands[1] in ("RZ", "URZ") and ".R" in i.opcode and not wide:
        return [] if high is None else [(_signed(high) if signed else high) >> by]
    if low is None or high is None:
        return []
    both = (_signed(high) if signed else high) << 32 | low
    if ".L" in i.opcode:
        return [both << by >> 32]
    return [both >> by >> (32 if ".HI" in i.opcode and wide else 0)]


def _lea(m: Machine, i: Instruction) -> list[Value]:
    count, at = _split(i)
    values = _sources(m, i, at)
    if ".SX32" in i.opcode:  # the upper half is the sign
        a, b, by, *rest = values
        carry: Value = rest[0] if rest else 0
        if a is None or b is None or by is None or carry is None:
            return []
        total = b + (_signed(a) << by >> 32 & _MASK) + carry
        return [total, int(total >> 32 > 0)]
    if ".HI" in i.opcode:
        a, b, c, by = values[:4]
        carry = values[4] if ".X" in i.opcode else 0
        if a is None or b is None or c is None or by is None or carry is None:
            return []
        total = b + ((c << 32 | a) << by >> 32 & _MASK) + carry
        return [total, int(total >> 32 > 0)]
    a, b, by = values[:3]
    if a is None or b is None or by is None:
        return []
    total = ((a << by) & _MASK) + b
    return [total, *[int(total >> 32 > 0)] * (count - 1)]


_COMPARE = {
    "GE": lambda a, b: a >= b,
    "GT": lambda a, b: a > b,
    "LE": lambda a, b: a <= b,
    "LT": lambda a, b: a < b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _compare(m: Machine, i: Instruction) -> list[Value]:
    parts = i.opcode.split(".")
    relation, a, b, other = parts[1], *_sources(m, i, 2)[:3]
    result: Value = None
    if a is not None and b is not None:
        if "U32" not in parts:
            a, b = _signed(a), _signed(b)
        result = int(_COMPARE[relation](a, b))
        if "EX" in parts:  # the upper halves; the last operand is the result of the lower ones
            lower = m.get(i.operands[5])
            if a == b:
                result = lower
            else:
                result = int(relation == "NE" or (relation != "EQ" and _COMPARE[relation](a, b)))
    answers: list[Value] = []
    for value in (result, None if result is None else 1 - result):
        if "AND" in parts:
            answers.append(0 if 0 in (value, other) else None if None in (value, other) else 1)
        else:
            answers.append(1 if 1 in (value, other) else None if None in (value, other) else 0)
    return answers


def _select(m: Machine, i: Instruction) -> list[Value]:
    a, b, condition = _sources(m, i, 1)[:3]
    return [] if condition is None else [a if condition else b]


def _minmax(m: Machine, i: Instruction) -> list[Value]:
    a, b, condition = _sources(m, i, 1)[:3]
    if a is None or b is None or condition is None:
        return []
    order = sorted((a, b), key=None if ".U32" in i.opcode else _signed)
    return [order[0] if condition else order[1]]


def _add_minmax(m: Machine, i: Instruction) -> list[Value]:
    a, b, c, condition = _sources(m, i, 1)[:4]
    if a is None or b is None or c is None or condition is None:
        return []
    order = sorted((a + b & _MASK, c), key=None if ".U32" in i.opcode else _signed)
    return [order[0] if condition else order[1]]


def _abs(m: Machine, i: Instruction) -> list[Value]:
    a = m.get(i.operands[1])
    return [] if a is None else [abs(_signed(a))]


def _prmt(m: Machine, i: Instruction) -> list[Value]:
    a, selector, b = _sources(m, i, 1)[:3]
    if a is None or selector is None or b is None:
        return []
    both = b << 32 | a
    return [sum((both >> 8 * (selector >> 4 * k & 7) & 255) << 8 * k for k in range(4))]


def _to_float(m: Machine, i: Instruction) -> list[Value]:
    a = m.get(i.operands[1])
    if a is None:
        return []
    value = a if ".U32" in i.opcode or i.opcode.endswith(".RP") else _signed(a)
    bits = _bits(float(value))
    if ".RP" in i.opcode and _as_float(bits) < value:
        bits += 1
    return [bits]


def _to_int(m: Machine, i: Instruction) -> list[Value]:
    a = m.get(i.operands[1])
    return [] if a is None or a >> 23 & 255 == 255 else [int(_as_float(a))]


def _reciprocal(m: Machine, i: Instruction) -> list[Value]:
    a = m.get(i.operands[1]) if ".RCP" in i.opcode else None
    return [_bits(1 / _as_float(a))] if a and _as_float(a) else []


def _elect(m: Machine, i: Instruction) -> list[Value]:
    return [int(m.special["SR_LANEID"] == 0)] if i.operands[0].startswith("P") else []


def _to_predicates(m: Machine, i: Instruction) -> list[Value]:
    value = m.get(i.operands[1])
    names = _predicates(int(i.operands[-1], 0))
    return [] if value is None else [value >> int(name[1:]) & 1 for name in names]


def _from_predicates(m: Machine, i: Instruction) -> list[Value]:
    other, mask = _sources(m, i, 2)[:2]
    values = {name: m.get(name) for name in _predicates(mask or 0)}
    if other is None or mask is None or None in values.values():
        return []
    return [(other & ~mask) | sum((v or 0) << int(name[1:]) for name, v in values.items())]


def _barrier(m: Machine, i: Instruction) -> list[Value]:
    return [1]  # a barrier in shared memory: what the warp waits for is there


def _shuffle(m: Machine, i: Instruction) -> list[Value]:
    own = m.get(i.operands[3]) == m.special["SR_LANEID"] and ".IDX" in i.opcode
    return [1, m.get(i.operands[2]) if own else None]


def _division_check(m: Machine, i: Instruction) -> list[Value]:
    return [0]  # the quotient needs no slow path


_RULES = {
    "MOV UMOV LDC ULDC LDCU R2UR": _move,
    "CS2R": _zero,
    "S2R S2UR": _special,
    "IMAD UIMAD": _imad,
    "IADD3 UIADD3 VIADD IADD": _add,
    "LOP3 ULOP3": _lop3,
    "PLOP3 UPLOP3": _plop3,
    "SHF USHF": _shift,
    "LEA ULEA": _lea,
    "ISETP UISETP": _compare,
    "SEL USEL": _select,
    "IMNMX VIMNMX UIMNMX": _minmax,
    "VIADDMNMX": _add_minmax,
    "IABS": _abs,
    "PRMT UPRMT": _prmt,
    "I2F I2FP": _to_float,
    "F2I": _to_int,
    "MUFU": _reciprocal,
    "ELECT": _elect,
    "R2P": _to_predicates,
    "P2R": _from_predicates,
    "SYNCS": _barrier,
    "SHFL": _shuffle,
    "FCHK": _division_check,
}


# ------------------------------------------------------------------------------ the time


@dataclass
class Walk:
    """Instructions in the order of issue, with the cycle of each."""

    issued: list[tuple[Instruction, int]] = field(default_factory=list)

    @property
    def instructions(self) -> int:
        return len(self.issued)

    @property
    def cycles(self) -> int:
        return self.issued[-1][1] - self.issued[0][1] if self.issued else 0

    def count(self, pattern: str) -> int:
        return sum(1 for i, _ in self.issued if re.match(pattern, i.opcode))

    def starts(self, pattern: str) -> list[int]:
        """Where an instruction matches."""
        return [k for k, (i, _) in enumerate(self.issued) if re.search(pattern, str(i))]

    def part(self, start: int, end: int) -> Walk:
        return Walk(self.issued[start:end])

    def between(self, start: str, end: str, first: bool = False) -> Walk:
        """From the last instruction that matches ``start`` to the last that matches ``end``."""
        starts, ends = self.starts(start), self.starts(end)
        assert starts, f"{start} is not on the path"
        assert ends, f"{end} is not on the path"
        return self.part(starts[0 if first else -1], ends[-1] + 1)


def run(
    kernel: Kernel,
    params: bytes,
    *,
    latencies: Mapping[str, int] | None = None,
    limit: int = 100_000,
    **launch: int,
) -> Walk:
    """Walks one warp.

    Args:
        kernel: what it executes.
        params: the parameters of the kernel.
        latencies: replaces some of :data:`LATENCIES`.
        limit: of the number of instructions.
        launch: ``thread`` of a ``block`` of ``threads``, the number of blocks in the ``grid``, and how the
            parameters are aligned (``align``).
    """
    machine = Machine(kernel.arch, params, **launch)
    known = {**LATENCIES, **(latencies or {})}
    order = sorted(kernel.code)
    after = dict(itertools.pairwise(order))
    pending: dict[int, list[int]] = {k: [] for k in range(6)}
    walk, address, now = Walk(), 0, 0
    while len(walk.issued) < limit:
        i = kernel.code[address]
        now = max([now, *[t for k in i.waits for t in pending[k]]])
        if i.name == "DEPBAR" and i.operands and i.operands[0].startswith("SB"):
            times = sorted(pending[int(i.operands[0][2:])])
            rest = int(i.operands[1], 0)
            now = max([now, *times[: len(times) - rest]])
        walk.issued.append((i, now))
        for board, latency in ((i.sets, known.get(i.name, OTHER_LATENCY)), (i.holds, READ_LATENCY)):
            if board is not None:
                pending[board] = [t for t in pending[board] if t > now] + [now + latency]
        machine.execute(i)
        now += max(i.stall, 1)
        target = _jump(machine, i)
        if target is None and _skips_a_call(machine, kernel, i, after):
            target = int(i.operands[-1], 16)
        if target == _END:
            return walk
        address = after[address] if target is None else target
    raise AssertionError(f"{kernel.name}: no end after {limit} instructions")


_END = -1


def _skips_a_call(
    machine: Machine, kernel: Kernel, i: Instruction, after: Mapping[int, int]
) -> bool:
    """Whether a branch with an unknown condition leads around a call, which is that of a slow path."""
    if i.name != "BRA" or not i.guard or machine.get(i.guard) is not None:
        return False
    address, end = after[i.address], int(i.operands[-1], 16)
    for _ in range(3):
        if address >= end:
            break
        if kernel.code[address].name == "CALL":
            return True
        address = after[address]
    return False


def _jump(machine: Machine, i: Instruction) -> int | None:
    """Where control goes, if not to the next instruction."""
    conditions = [i.guard or "PT"]
    if i.name == "BRA" and len(i.operands) > 1:
        conditions += i.operands[:-1]
    if i.name not in ("BRA", "EXIT", "CALL", "RET", "JMP", "BRX", "WARPSYNC"):
        return None
    if "DIV" in i.opcode or i.name == "WARPSYNC" or not all(machine.get(c) for c in conditions):
        return None
    if i.name == "EXIT":
        return _END
    if i.name == "RET":
        back = machine.get(i.operands[0].removesuffix("0x0"))
        assert back is not None, "a return to an unknown place"
        return back
    return int(re.findall(r"0x[0-9a-f]+", i.operands[-1])[-1], 16)
