"""Every Python block of the site and of the README runs, a page from top to bottom; the site builds where it can."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import contrastive_ext as ce
from repository import ROOT, load_tool
from site_code import blocks, pages, scope

# a block that imports one of these needs it; the examples' extra brings lightning and transformers
HOSTS = ("lightning", "transformers", "accelerate")


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # of hosts
@pytest.mark.parametrize("page", [p for p in pages() if blocks(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = scope()
    for i, code in enumerate(blocks(page)):
        missing = [host for host in HOSTS if f"from {host} import" in code or f"import {host} as" in code]
        missing += ["accelerate"] if "import Trainer, TrainingArguments" in code else []  # which transformers asks for
        if any(importlib.util.find_spec(host) is None for host in missing):
            continue  # its own import error is all that it could show
        exec(compile(code, f"{page.name}, block {i + 1}", "exec"), names)
        if isinstance(names.get("loss"), torch.Tensor):
            assert names["loss"].isfinite(), f"block {i + 1}"


def test_every_page_is_in_the_navigation_and_every_loss_has_one():
    shown = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert shown == {path for path in there if not path.startswith("compiled/")} | {"reference.md"}
    losses = {name.removeprefix("fused_").removesuffix("_loss") for name in ce.__all__ if name.startswith("fused_")}
    assert {path.stem for path in (ROOT / "docs" / "losses").glob("*.md")} == (losses - {"row"}) | {"own", "index"}


def test_a_loss_page_says_when_it_helps_and_when_it_fails():
    for path in (ROOT / "docs" / "losses").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        if path.stem in ("own", "index"):
            continue
        for part in ("What the kernel does", "**Arguments.**", "**When it helps.**", "**When it fails.**", "**Paper"):
            assert part in text, (path.name, part)
        assert f"pictures/{path.stem}.png" in text and "https://arxiv.org/abs/" in text


def test_pictures_are_those_of_the_script(tmp_path):
    """Names, not bytes: fonts differ between machines."""
    drawn = (ROOT / "tools" / "pictures.py").read_text(encoding="utf-8")
    names = set(re.findall(r'out / "(\w+\.png)"', drawn))
    there = {path.name for path in (ROOT / "docs" / "pictures").glob("*.png")}
    assert {name for name in there if not name.startswith("study-")} == names


def test_the_reference_shows_every_keyword_of_every_loss():
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (make docs)")
    page = load_tool("site_hooks").reference()
    for name in ce.__all__:
        if name in ("__version__", "theory"):
            continue
        assert f"### {name} " in page
        section = page.split(f"### {name} ")[1].split("\n### ")[0]
        if name.startswith("fused_"):
            import inspect

            for keyword in inspect.signature(getattr(ce, name)).parameters:
                assert re.search(rf"^\| [^|]*`{keyword}`", section, re.MULTILINE), (name, keyword)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed (make docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "reference.html").exists()
