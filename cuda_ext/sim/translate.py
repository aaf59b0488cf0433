# SPDX-License-Identifier: Apache-2.0
"""Translate the PTX of kernels to C++ for the emulator, so that a CPU executes asm statements.

    nvcc -ptx -arch=sm_90a cuda_ext/tests/golden.cu -o golden.ptx
    python cuda_ext/sim/translate.py golden.ptx > golden_90a.h

An instruction becomes a call of the function of ``ptx.h`` that has its opcode as its name, a branch
a ``goto``. Each kernel has one parameter, a ``Golden``. Nothing here knows what an instruction
does, but for ``wgmma``, whose registers have to be an array. What it cannot translate is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TYPES = {"pred": "bool", "b16": "uint16_t", "b32": "uint32_t", "f32": "uint32_t", "b64": "uint64_t"}
SPECIAL = {
    "%tid.x": "uint32_t(tid())", "%ntid.x": "uint32_t(block_threads())",
    "%ctaid.x": "uint32_t(block_x())", "%ctaid.y": "uint32_t(block_y())",
    "%ctaid.z": "uint32_t(block_z())", "%nctaid.x": "uint32_t(grid_x())",
    "%nctaid.y": "uint32_t(grid_y())", "%cluster_ctarank": "uint32_t(cluster_rank())",
}  # fmt: skip
KEYWORDS = {"and", "or", "xor", "not"}
"""First words of opcodes that are operators in C++: their functions have an underscore."""


@dataclass
class Kernel:
    """A kernel during its translation.

    Attributes:
        name: without namespace and parameters.
        symbols: what the PTX calls its parameter and shared memory, and what C++ does.
        declared: declarations of C++.
        lines: statements of C++.
        scopes: registers with names, in each open scope.
        statements: the text of each asm statement of the source.
        first: number of the first of them among those of all kernels.
    """

    name: str
    symbols: dict[str, str]
    declared: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    scopes: list[set[str]] = field(default_factory=lambda: [set()])
    statements: list[str] = field(default_factory=list)
    first: int = 0

    # ------------------------------------------------------------------------------- statements

    def translate(self, body: str) -> None:
        """Translate what is between the braces of the kernel."""
        place = 0
        while place < len(body):
            rest = body[place:]
            if found := re.match(r"\s+|//[^\n]*\n", rest):
                if "begin inline asm" in found.group():
                    text = rest[found.end() : rest.index("// end inline asm")]
                    self.lines.append(f"executed[{self.first + len(self.statements)}] = true;")
                    self.statements.append(" ".join(text.split()))
            elif found := re.match(r"\$?(\w+):", rest):
                self.lines.append(f"{found.group(1)}:;")
            elif found := re.match(r"[{}]", rest):
                self.lines.append(found.group())
                self.scopes.append(set()) if found.group() == "{" else self.scopes.pop()
            else:
                found = re.match(r"[^;]*;", rest)
                if found is None:
                    raise SyntaxError(f"{self.name}: {rest[:80]!r} has no end")
                self.statement(" ".join(found.group()[:-1].split()))
            place += found.end()

    def statement(self, text: str) -> None:
        """Translate a declaration or an instruction."""
        if text.startswith(".pragma"):
            return
        if text.startswith("."):
            self.declare(text)
            return
        guard = re.match(r"@(!?)(\S+) ", text)
        if guard:
            text = text[guard.end() :]
            self.lines.append(f"if ({guard.group(1)}{self.operand(guard.group(2))})")
        opcode, _, operands = text.partition(" ")
        if opcode in ("bra", "bra.uni"):
            self.lines.append(f"goto {operands.lstrip('$')};")
        elif opcode == "ret":
            self.lines.append("return;")
        elif opcode.startswith("wgmma.mma_async."):
            self.wgmma(opcode, operands)
        else:
            self.lines.append(f"{function(opcode)}({', '.join(self.flat(operands))});")

    def declare(self, text: str) -> None:
        """Translate ``.reg .b32 %r<9>`` or ``.reg .pred done``."""
        found = re.fullmatch(r"\.reg \.(\w+) (%?)(\w+)(<(\d+)>)?", text)
        if found is None:
            raise SyntaxError(f"{self.name}: {text}")
        kind = TYPES[re.sub("^[us]", "b", found.group(1))]
        if found.group(2):
            self.declared.append(f"{kind} {found.group(3)}[{found.group(5)}];")
        else:
            self.scopes[-1].add(found.group(3))
            self.lines.append(f"{kind} v_{found.group(3)};")

    def wgmma(self, opcode: str, operands: str) -> None:
        """Translate a wgmma: sums, A (registers or a descriptor), B, whether to add."""
        found = re.fullmatch(r"\{([^}]*)\}, (\{[^}]*\}|\S+), (\S+), (\S+)", operands)
        shape = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k32\.s32\.s8\.s8", opcode)
        if found is None or shape is None:
            raise SyntaxError(f"{self.name}: {opcode} {operands[:60]}")
        sums = [int(name.removeprefix("%r")) for name in found.group(1).split(", ")]
        columns = int(shape.group(1))
        if sums != list(range(sums[0], sums[0] + columns // 2)):
            raise SyntaxError(f"{self.name}: the sums of a wgmma are not consecutive registers")
        a, pointer, descriptor = self.flat(found.group(2)), "nullptr", "0"
        if len(a) == 4:
            pointer = f"a{len(self.declared)}"
            self.declared.append(f"uint32_t {pointer}[4];")
            self.lines += [f"{pointer}[{i}] = {value};" for i, value in enumerate(a)]
        else:
            descriptor = a[0]
        b, add = self.operand(found.group(3)), self.operand(found.group(4))
        self.lines.append(
            f"wgmma_mma_async<{columns}>(&r[{sums[0]}], {pointer}, {descriptor}, {b}, {add});"
        )

    # --------------------------------------------------------------------------------- operands

    def flat(self, operands: str) -> list[str]:
        """The operands of an instruction, with those of vectors and addresses in a row."""
        plain = re.sub(r"[{}\[\]]", " ", operands).replace("|", ",")
        return [self.operand(one.strip()) for one in plain.split(",") if one.strip()]

    def operand(self, text: str) -> str:
        """A register, a number, a symbol, or one of them plus a number."""
        if found := re.fullmatch(r"(.+?)\+(-?\d+)", text):
            return f"({self.operand(found.group(1))} + {found.group(2)})"
        if text in SPECIAL:
            return SPECIAL[text]
        if found := re.fullmatch(r"%([a-z]+)(\d+)", text):
            return f"{found.group(1)}[{found.group(2)}]"
        if found := re.fullmatch(r"0f([0-9A-F]{8})", text):
            return f"0x{found.group(1)}u"
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", text):
            return f"{text}{'ull' if abs(int(text, 0)) >= 2**31 else ''}"
        if any(text in scope for scope in self.scopes):
            return f"v_{text}"
        if text == "_":
            return "sink"
        if text in self.symbols:
            return self.symbols[text]
        raise SyntaxError(f"{self.name}: operand {text}")

    def code(self) -> str:
        """The kernel as a function of C++."""
        # registers start with any bits
        filled = [f"fill({d.split()[1].split('[')[0]});" for d in self.declared]
        body = "\n  ".join([*self.declared, *filled, *self.lines])
        return (
            f"inline void {self.name}(Golden parameter) {{\n  using namespace ptx;\n  {body}\n}}\n"
        )


def function(opcode: str) -> str:
    """The name of the function of an opcode."""
    words = re.split(r"\.|::", opcode)
    first = f"{words[0]}_" if words[0] in KEYWORDS else words[0]
    return "_".join([first, *words[1:]])


def kernels(ptx: str) -> Iterator[tuple[Kernel, str]]:
    """The kernels of a PTX file, not yet translated, and their bodies."""
    shared = re.findall(r"\.extern \.shared [^;]* (\w+)\[\];", ptx)
    for found in re.finditer(r"\.entry (\w+)\(\s*\.param [^)]* (\w+)\[\d+\]\s*\)[^{]*\{", ptx):
        plain = re.search(r"golden_[a-z0-9_]*?(?=E?NS|$)", found.group(1))
        if plain is None:
            raise SyntaxError(f"kernel {found.group(1)}")
        symbols = {found.group(2): "address(&parameter)"} | dict.fromkeys(shared, "0u")
        yield Kernel(plain.group(), symbols), ptx[found.end() : _end(ptx, found.end())]


def translate(ptx: str) -> str:
    """The kernels of a PTX file as a C++ header."""
    statements: list[str] = []
    code = []
    for kernel, body in kernels(ptx):
        kernel.first = len(statements)
        kernel.translate(body)
        statements += kernel.statements
        code.append(kernel.code())
    texts = "\n".join(f'  R"ptx({text})ptx",' for text in statements)
    return (
        f"// By translate.py.\ninline bool executed[{len(statements) + 1}];\n"
        f"inline const char* const kStatements[] = {{\n{texts}\n  nullptr}};\n" + "\n".join(code)
    )


def _end(ptx: str, place: int) -> int:
    depth = 1
    while depth:
        depth += {"{": 1, "}": -1}.get(ptx[place], 0)
        place += 1
    return place - 1


if __name__ == "__main__":
    print(translate(Path(sys.argv[1]).read_text()))
