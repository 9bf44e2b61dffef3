"""Reads disassembled kernels (cuobjdump -sass): how many instructions their loops with products take."""

from __future__ import annotations

import re

MASKS_FROM = 60  # instructions that a branch must skip to count as the block of masks


def loops(sass: str) -> list[int]:
    """Instructions of every loop with tensor-core products (WGMMA), in order of their ends.

    What a branch forwards skips, the masks, is left out; so is a "loop" by a branch from behind the kernel's end.
    """
    code = _instructions(sass)
    place = {at: i for i, (at, _) in enumerate(code)}
    targets = [(i, place.get(int(to, 16), i)) for i, (_, text) in enumerate(code) for to in _branch_target(text)]
    found = []
    for end, start in targets:
        inner = [text for _, text in code[start:end]]
        if start < end and any("HGMMA" in text for text in inner) and not any("EXIT" in text for text in inner):
            inside = [(i, to) for i, to in targets if start <= i < to <= end and to - i > MASKS_FROM]
            skipped, last = 0, start
            for i, to in inside:
                if i >= last:
                    skipped, last = skipped + to - i - 1, to
            found.append(end - start + 1 - skipped)
    return found


def registers_named(sass: str) -> int:
    """Registers of a thread that instructions name; what setmaxnreg hands over, ptxas does not report."""
    return 1 + max((int(r) for r in re.findall(r"\bR(\d+)\b", sass)), default=-1)


def registers_of_producer(sass: str) -> int:
    """Registers named by what runs from where a warp gives its registers up; 0 where none does."""
    code = _instructions(sass)
    place = {at: i for i, (at, _) in enumerate(code)}
    todo = [i for i, (_, text) in enumerate(code) if "USETMAXREG.DEALLOC" in text]
    seen: set[int] = set()
    while todo:
        i = todo.pop()
        while i < len(code) and i not in seen:
            seen.add(i)
            text = code[i][1]
            todo += [place[int(to, 16)] for to in _branch_target(text)]
            if text.startswith(("EXIT", "BRA ")):
                break
            i += 1
    return registers_named(" ".join(code[i][1] for i in seen))


def _instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text)"""
    return [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass)]


def _branch_target(text: str) -> list[str]:
    return re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", text)
