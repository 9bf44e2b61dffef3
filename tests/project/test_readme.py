"""The README as a visitor and a package index see it: short, every figure from its results file, no relative link."""

from __future__ import annotations

import re

import contrastive_ext as ce
from repository import ROOT, load_tool

README = (ROOT / "README.md").read_text(encoding="utf-8")
URLS = re.findall(r"\]\(([^)\s]+)\)", README)


def test_it_is_short():
    assert len(README.splitlines()) <= 120
    assert README.count("```python") == 1 and README.count("![") == 1


def test_its_measurements_are_those_of_the_results_files():
    tool = load_tool("readme_table")
    shown = README.split(tool.MARKS[0])[1].split(tool.MARKS[1])[0]
    assert shown == tool.table()
    assert "0.3 ms" in README  # of the CUDA graph
    queue = next(line for line in shown.splitlines() if "MoCo" in line)
    assert queue.endswith("| 0.75 |")  # where it is slower it says so


def test_every_link_is_absolute_and_of_one_home():
    assert URLS and all(url.startswith("https://") for url in URLS)
    home = "contrastive-ext/contrastive_ext"
    ours = [url for url in URLS if "contrastive" in url and "arxiv" not in url]
    hosts = ("https://contrastive-ext.github.io/contrastive_ext", f"https://github.com/{home}/blob/main/")
    assert all(url.startswith((*hosts, f"https://raw.githubusercontent.com/{home}/main/")) for url in ours)
    for url in ours:
        for marker in ("/blob/main/", "/contrastive_ext/main/"):
            if marker in url:
                assert (ROOT / url.split(marker)[1]).is_file(), url
        if url.startswith(hosts[0]) and url.endswith(".html"):
            assert (ROOT / "docs" / url.removeprefix(hosts[0] + "/").replace(".html", ".md")).is_file(), url


def test_it_names_every_loss():
    for name in ce.__all__:
        if name.startswith("fused_"):
            assert f"`{name}`" in README


def test_the_home_is_the_same_everywhere():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    urls = dict(re.findall(r'^(\w+) = "(https://[^"]+)"$', text, re.MULTILINE))
    for file in ("mkdocs.yml", "CITATION.cff", "README.md"):
        assert urls["Repository"] in (ROOT / file).read_text(encoding="utf-8"), file
    assert urls["Documentation"] in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
