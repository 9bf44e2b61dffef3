"""How the tests stand together: what test files share stands on top, and no folder of tests hides a package."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from repository import ROOT

TESTS = ROOT / "tests"


def test_test_files_import_nothing_from_one_another_and_nothing_private():
    helpers = {path.stem for path in TESTS.glob("*.py")}
    wrong = []
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules, names = [node.module or ""], [alias.name for alias in node.names]
                if node.module in helpers and any(name.startswith("_") for name in names):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: a private name of {node.module}")
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno}: {m}" for m in modules if m.startswith("test_")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("first", ["tests", "."], ids=["tests first", "root first"])
def test_no_folder_of_tests_hides_a_package(first):
    """A script in tests/ has that folder first in sys.path; a folder without __init__.py gives way to a package."""
    assert not list(TESTS.rglob("__init__.py"))
    packages = sorted(path.name for path in TESTS.iterdir() if (ROOT / path.name / "__init__.py").is_file())
    assert "bench" in packages
    program = f"import sys; sys.path[:0] = {[str(ROOT / first), str(ROOT)]}\n" + "".join(
        f"import {name}; print({name}.__file__)\n" for name in packages if name != "triton_kernels"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=TESTS, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(ROOT / name / "__init__.py") for name in packages if name != "triton_kernels"]
