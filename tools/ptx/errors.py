"""What the machine says when a program is wrong."""

from __future__ import annotations


class PtxError(Exception):
    """A program did what PTX does not allow, or what no schedule may depend on.

    `kind` names the rule: race, proxy, in flight, uninitialised, bounds, alignment, barrier, deadlock, divergence,
    descriptor, tensor map, instruction.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.located = False

    def at(self, where: str) -> PtxError:
        """The same error with the place of the instruction that found it; the first place stays."""
        if not self.located:
            self.args = (f"{self.args[0]}\n{where}",)
            self.located = True
        return self
