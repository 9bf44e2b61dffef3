"""PTX text to instructions: scopes, registers, labels, operands. Nothing here knows what an instruction does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import PtxError


class Reg(NamedTuple):
    """A register: its file (pred, b16, b32, b64) and its place there."""

    file: str
    index: int


class Imm(NamedTuple):
    """A number as written: an integer, or the bits of a float with their width."""

    value: int
    bits: int  # 0: an integer that takes the width of its use


class Symbol(NamedTuple):
    """A parameter, a variable, or the register of a thread's place (%tid.x)."""

    name: str


class Vector(NamedTuple):
    """{a, b, ...}"""

    items: tuple


class Address(NamedTuple):
    """[base + offset], and the coordinates of a tensor."""

    base: Reg | Symbol | Imm
    offset: int
    coordinates: tuple = ()


class Pair(NamedTuple):
    """d|p: a result and a predicate."""

    first: object
    second: object


class Not(NamedTuple):
    """!p"""

    register: Reg


@dataclass
class Instruction:
    """One instruction, with its place in the text and in the source that it was compiled from."""

    op: str
    operands: list
    guard: Reg | None
    negated: bool
    line: int
    source: str
    text: str
    scope: Scope
    index: int = 0
    target: int = -1  # of a branch
    reconverges: int = -1  # where the two ways of a branch meet; -1: nowhere

    def __post_init__(self):
        self.parts = self.op.split(".")

    def where(self) -> str:
        return f"  line {self.line}: {self.text}" + (f"\n  from {self.source}" if self.source else "")


@dataclass
class Variable:
    """A variable in shared or global memory."""

    name: str
    space: str
    align: int
    size: int  # 0: as much as the launch gives
    external: bool
    values: list[int] = field(default_factory=list)


class Parameter(NamedTuple):
    """A parameter of an entry: where its bytes are."""

    name: str
    offset: int
    size: int
    type: str


@dataclass
class Scope:
    """Names of a pair of braces."""

    outer: Scope | None
    registers: dict[str, Reg] = field(default_factory=dict)
    ranges: dict[str, str] = field(default_factory=dict)  # prefix -> file
    labels: dict[str, int] = field(default_factory=dict)

    def label(self, name: str) -> int | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.outer
        return None


@dataclass
class Entry:
    """A kernel."""

    name: str
    parameters: list[Parameter]
    threads: int  # .reqntid; 0: not said
    code: list[Instruction]
    sizes: dict[str, int]  # registers of each file
    shared: list[Variable]
    module: Module

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


@dataclass
class Module:
    """A file of PTX."""

    target: str
    entries: dict[str, Entry]
    variables: list[Variable]

    def entry(self, pattern: str = "") -> Entry:
        """The one entry whose name matches."""
        found = [e for name, e in self.entries.items() if re.search(pattern, name)]
        if len(found) != 1:
            raise KeyError(f"{len(found)} entries match {pattern!r}: {list(self.entries)}")
        return found[0]


WIDTH = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16}
WIDTH |= {t: 32 for t in ("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32")}
WIDTH |= {t: 64 for t in ("b64", "u64", "s64", "f64")}
FILE = {1: "pred", 8: "b16", 16: "b16", 32: "b32", 64: "b64"}
VARIABLE = re.compile(
    r"(?:\.visible\s+)?(?P<extern>\.extern\s+)?\.(?P<space>shared|global)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$]+)(?:\[(?P<count>\d*)\])?\s*(?:=\s*\{(?P<values>[^}]*)\})?\s*$"
)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", re.DOTALL)
LABEL = re.compile(r"([\w$]+)\s*:(?!:)")


def parse(text: str) -> Module:
    """A module from its text."""
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    target = re.search(r"\.target\s+(\w+)", text)
    module = Module(target.group(1) if target else "", {}, [])
    at = 0
    for match in ENTRY.finditer(text):
        _module_variables(text[at : match.start()], module)
        body = _Body(text, match.end(), files)
        threads = re.search(r"\.reqntid\s+(\d+)", match.group(3))
        entry = Entry(
            match.group(1), _parameters(match.group(2)), int(threads.group(1)) if threads else 0, body.code, body.sizes,
            body.variables, module,
        )  # fmt: skip
        module.entries[entry.name] = entry
        at = body.end
    return module


def _module_variables(text: str, module: Module) -> None:
    for statement in re.split(r"[;\n]\s*(?=\.)|;", text):
        variable = _variable(statement.strip())
        if variable:
            module.variables.append(variable)


def _variable(statement: str) -> Variable | None:
    found = VARIABLE.match(" ".join(statement.split()))
    if not found:
        return None
    size = WIDTH[found["type"]] // 8 * (int(found["count"] or 0) if found["count"] is not None else 1)
    values = [int(v, 0) for v in (found["values"] or "").split(",") if v.strip()]
    return Variable(found["name"], found["space"], int(found["align"] or 1), size, bool(found["extern"]), values)


def _parameters(text: str) -> list[Parameter]:
    found, offset = [], 0
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, count = re.search(r"([\w$]+)(?:\[(\d+)\])?$", part).groups()  # type: ignore[union-attr]
        kind = next(w for w in re.findall(r"\.(\w+)", part) if w in WIDTH)
        size = WIDTH[kind] // 8
        align = re.search(r"\.align\s+(\d+)", part) if count else None
        step = int(align.group(1)) if align else size
        size *= int(count or 1)
        offset = -(-offset // step) * step
        found.append(Parameter(name, offset, size, kind))
        offset += size
    return found


def number(text: str) -> Imm | None:
    """An immediate operand."""
    text = text.strip()
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Imm(int(text[2:], 16), 32)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Imm(int(text[2:], 16), 64)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Imm(int(text.rstrip("U"), 0), 0)
    return None


class _Body:
    """The instructions of one pair of braces."""

    def __init__(self, text: str, start: int, files: dict[str, str]):
        self.text, self.files = text, files
        self.code: list[Instruction] = []
        self.sizes = {"pred": 0, "b16": 0, "b32": 0, "b64": 0}
        self.variables: list[Variable] = []
        self.source = ""
        self.line, self.counted = text.count("\n", 0, start) + 1, start
        self.scope = Scope(None)
        self.end = self._read(start)
        for i, instruction in enumerate(self.code):
            instruction.index = i
            if instruction.parts[0] == "bra":
                name = instruction.operands[0].name
                target = instruction.scope.label(name)
                if target is None:
                    raise PtxError("instruction", f"no label {name}").at(instruction.where())
                instruction.target = target

    def _line_of(self, at: int) -> int:
        self.line += self.text.count("\n", self.counted, at)
        self.counted = at
        return self.line

    def _read(self, at: int) -> int:
        text, depth = self.text, 1
        while True:
            while text[at].isspace() or text[at] == ";":
                at += 1
            if text[at] == "{":
                depth, at, self.scope = depth + 1, at + 1, Scope(self.scope)
            elif text[at] == "}":
                depth, at = depth - 1, at + 1
                if depth == 0:
                    return at
                assert self.scope.outer is not None
                self.scope = self.scope.outer
            elif label := LABEL.match(text, at):
                self.scope.labels[label.group(1)] = len(self.code)
                at = label.end()
            elif text.startswith((".loc", ".file"), at):
                end = text.index("\n", at)
                self._location(text[at:end])
                at = end
            else:
                end = text.index(";", at)
                self._statement(text[at:end].strip(), self._line_of(at))
                at = end + 1

    def _location(self, directive: str) -> None:
        words = directive.split()
        if words[0] == ".loc":
            self.source = f"{self.files.get(words[1], '?')}:{words[2]}"

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith("."):
            variable = _variable(text)
            if variable:
                self.variables.append(variable)
        else:
            self._instruction(text, line)

    def _registers(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        file = FILE[WIDTH[kind[1:]]]
        for name in names.split(","):
            name = name.strip()
            if "<" in name:
                self.scope.ranges[name[: name.index("<")]] = file
            else:
                self.scope.registers[name] = self._new(file)

    def _new(self, file: str) -> Reg:
        self.sizes[file] += 1
        return Reg(file, self.sizes[file] - 1)

    def _register(self, name: str) -> Reg | None:
        scope: Scope | None = self.scope
        prefix = name.rstrip("0123456789")
        while scope is not None:
            if name in scope.registers:
                return scope.registers[name]
            if prefix in scope.ranges and prefix != name:
                scope.registers[name] = self._new(scope.ranges[prefix])
                return scope.registers[name]
            scope = scope.outer
        return None

    def _instruction(self, text: str, line: int) -> None:
        guard, negated, rest = None, False, text
        if text.startswith("@"):
            name, rest = text[1:].split(None, 1)
            negated, name = name.startswith("!"), name.lstrip("!")
            guard = self._register(name)
        op, _, operands = " ".join(rest.split()).partition(" ")
        parsed = [self._operand(o) for o in split(operands)]
        shown = " ".join(text.split())
        if len(shown) > 160:
            shown = re.sub(r"\{[^}]{40,}\}", "{...}", shown)
        self.code.append(Instruction(op, parsed, guard, negated, line, self.source, shown, self.scope))

    def _operand(self, text: str):
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self._operand(o) for o in split(text[1:-1])))
        if text.startswith("["):
            inner = split(text[1:-1])
            coordinates = self._operand(inner[1]).items if len(inner) > 1 else ()
            base, offset = _base_and_offset(inner[0])
            return Address(self._operand(base), offset, coordinates)
        if text.startswith("!"):
            return Not(self._register(text[1:]))  # type: ignore[arg-type]
        if "|" in text:
            return Pair(*(self._operand(o) for o in text.split("|")))
        if text == "_":
            return None
        return number(text) or self._register(text) or Symbol(text)


def _base_and_offset(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(.+?)\s*\+\s*(-?\w+)", text.strip())
    return (found.group(1), int(found.group(2), 0)) if found else (text.strip(), 0)


def split(text: str) -> list[str]:
    """At the commas outside of brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in [*parts, text[start:]] if p.strip()]
