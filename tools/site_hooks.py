"""Hooks of the site (mkdocs.yml): the reference out of the imported package, and the form of external links.

Docstrings have the house form, "name  what it is" with what follows indented: they become tables. What several losses
take (`LossOptions`) stands in the docstring of `fused_row_loss` alone; here every loss shows it.
"""

from __future__ import annotations

import html
import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mkdocs.structure.files import File

import contrastive_ext as ce
from contrastive_ext import theory

BENCHMARK = Path(__file__).parents[1] / "bench" / "results" / "cpu-amd-epyc.png"
log = logging.getLogger("mkdocs.hooks.contrastive_ext")
GROUPS: dict[str, Callable[[str], bool]] = {
    "Losses": lambda name: name.startswith("fused_"),
    "Modules": lambda name: name.endswith(("Loss", "LossModule")) and name != "RowLoss",
    "What a call is given": lambda name: name in ("AllRanks", "Columns", "Guide", "NegativeQueue"),
    "In a training": lambda name: name in (
        "GradientCache", "LogitScale", "estimate_alpha", "linear_alpha", "momentum_mixup", "momentum_update",
        "mu_schedule",
    ),
    "Records of return_stats": lambda name: name.endswith("Stats"),
    "A loss of your own": lambda name: True,
    "Diagnostics": lambda name: name in (
        "Explanation", "MemoryEstimate", "Trial", "autotune", "available_backends", "estimate_memory", "explain",
    ),
}  # fmt: skip
# two spaces end a name; `return_stats` is as long as its column
ENTRY = re.compile(r"(?:([A-Za-z]\w*(?:(?:, | )[A-Za-z]\w*)*)  +|(return_stats) )(\S.*)")
NAMES_ALONE = re.compile(r"\w+(?:, \w+)*")
FORMULA = re.compile(r"e\^|\bs_a|\blog sum|^L(_i)? = |^cache = |^value = |^    ")


def on_files(files: Any, config: Any) -> Any:
    """What no file of docs/ holds: the reference, and the benchmark's picture."""
    files.append(File.generated(config, "reference.md", content=reference()))
    files.append(File.generated(config, "pictures/overview.png", abs_src_path=str(BENCHMARK)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A warning, which is an error here, about an external link that cannot be one."""
    for link in re.findall(r"\]\((https?:[^)\s]*)\)|<(https?:[^>\s]*)>", markdown):
        target = "".join(link)
        parts = urlsplit(target)
        if parts.scheme != "https" or "." not in parts.netloc or re.search(r"[^\x21-\x7e]|[{}|\\^`]", target):
            log.warning("%s: the link %s is no https address of a host", page.file.src_uri, target)
    return markdown


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Nothing is loaded from another host, the theme's stand-in for a Worker neither."""
    output = output.replace(
        "https://unpkg.com/iframe-worker/shim", "../" * page.url.count("/") + "assets/file_worker.js"
    )
    for loaded in re.findall(
        r"<(?:script|img|iframe)[^>]* src=\"?(https?:[^\" >]*)|<link[^>]*stylesheet[^>]*(https?:[^\" >]*)", output
    ):
        log.warning("%s: loads %s", page.file.src_uri, "".join(loaded))
    return output


def reference() -> str:
    """Every public name, in groups."""
    left = [name for name in ce.__all__ if name not in ("__version__", "theory")]
    text = [
        "# Reference\n\nMade from the docstrings of the installed package. B pairs, D features; nats, cosines, "
        "log-sum-exps as in [the mathematics](math.md).\n"
    ]
    found: dict[str, list[str]] = {}
    order = [group for group in GROUPS if group != "A loss of your own"] + ["A loss of your own"]
    for group in order:
        found[group] = [name for name in left if GROUPS[group](name)]
        left = [name for name in left if name not in found[group]]
    for group in GROUPS:
        text.append(f"\n## {group}\n")
        text += [section(name, getattr(ce, name)) for name in found[group]]
    text.append("\n## contrastive_ext.theory\n")
    text += [section(f"theory.{name}", getattr(theory, name)) for name in theory.__all__]
    return "\n".join(text)


def section(name: str, thing: Any) -> str:
    """Heading, signature, docstring."""
    shared = documented(ce.fused_row_loss) if name.startswith("fused_") and name != "fused_row_loss" else {}
    parts = [f"### {name} {{ data-toc-label='{name}' }}\n", signature(name, thing), rendered(thing, shared)]
    for method, function in vars(thing).items() if inspect.isclass(thing) else ():
        if inspect.isfunction(inspect.unwrap(function)) and method[0] != "_" and inspect.getdoc(function):
            parts += [f"**{name}.{method}**\n", signature(method, function), rendered(function, {})]
    return "\n".join(parts)


def signature(name: str, thing: Any) -> str:
    """The call, a line for every argument where they are many."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    shown = [_parameter(p) for p in found.parameters.values() if p.name != "self"]
    keyword_only = [p.kind is p.KEYWORD_ONLY for p in found.parameters.values() if p.name != "self"]
    if True in keyword_only and not any(p.kind is p.VAR_POSITIONAL for p in found.parameters.values()):
        shown.insert(keyword_only.index(True), "*")
    one_line = f"{name.split('.')[-1]}({', '.join(shown)})"
    if len(one_line) > 80:
        one_line = f"{name.split('.')[-1]}(\n" + "".join(f"    {part},\n" for part in shown) + ")"
    return f"```py\n{one_line}\n```\n"


def _parameter(p: inspect.Parameter) -> str:
    """name: type = default."""
    stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    kind = (
        "" if p.annotation is p.empty else f": {p.annotation if isinstance(p.annotation, str) else _name(p.annotation)}"
    )
    default = "" if p.default is p.empty else f" = {p.default!r}" if kind else f"={p.default!r}"
    return f"{stars}{p.name}{kind}{default}"


def _name(annotation: Any) -> str:
    return getattr(annotation, "__name__", str(annotation)).replace("typing.", "")


def documented(thing: Any) -> dict[str, str]:
    """Entries of a docstring by their names."""
    return {
        name: text
        for block in blocks(inspect.getdoc(thing) or "")
        if isinstance(block, dict)
        for name, text in block.items()
    }


def blocks(doc: str) -> list[str | dict[str, str]]:
    """Paragraphs and runs of entries, in order."""
    found: list[str | dict[str, str]] = []
    for paragraph in doc.split("\n\n"):
        entries: dict[str, str] | None = None
        name = ""
        for line in paragraph.splitlines():
            match = ENTRY.match(line)
            if match or (entries is not None and NAMES_ALONE.fullmatch(line)):
                entries = {} if entries is None else entries
                name, text = (match[1] or match[2], match[3]) if match else (line, "")
                entries[name] = text
            elif entries is not None and line.startswith(" "):
                entries[name] = f"{entries[name]} {line.strip()}".strip()
            else:
                if entries:
                    found.append(entries)
                entries = None
                if found and isinstance(found[-1], str) and line is not paragraph.splitlines()[0]:
                    found[-1] += f"\n{line}"
                else:
                    found.append(line)
        if entries:
            found.append(entries)
    return found


def rendered(thing: Any, shared: dict[str, str]) -> str:
    """Markdown of a docstring; `shared` are entries of keywords that its signature has and its text has not."""
    parts = []
    own = documented(thing)
    taken = {name for names in own for name in names.split(", ")}
    accepted = set(inspect.signature(thing).parameters) if shared else set()
    more = {n: text for n, text in shared.items() if set(n.split(", ")) & accepted and not set(n.split(", ")) & taken}
    for block in blocks(inspect.getdoc(thing) or ""):
        if isinstance(block, dict):
            block = {name: text for name, text in block.items() if not (name == "options" and more)}
            lines = [f"| {_names(name)} | {_cell(text)} |" for name, text in block.items()]
            parts.append("| | |\n|---|---|\n" + "\n".join(lines) + "\n")
        elif FORMULA.search(block):
            parts.append("```text\n" + inspect.cleandoc(block) + "\n```\n")
        else:
            parts.append(_text(block) + "\n")
    if more:
        lines = [f"| {_names(name)} | {_cell(text)} |" for name, text in more.items()]
        parts.append("Shared by the losses over pairs:\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _names(names: str) -> str:
    return (
        names
        if names in ("Returns", "Raises", "Memory", "Paper", "Cost")
        else ", ".join(f"`{n}`" for n in names.split(", "))
    )


def _cell(text: str) -> str:
    return _text(" ".join(text.split())).replace("|", "\\|")


def _text(text: str) -> str:
    """Markdown that shows the text as it is, but for what stands in backticks and for papers, which are links."""
    pieces = re.split(r"(`[^`]*`)", text)
    shown = [p if p.startswith("`") else re.sub(r"([*_\[\]])", r"\\\1", html.escape(p, quote=False)) for p in pieces]
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", "".join(shown))
