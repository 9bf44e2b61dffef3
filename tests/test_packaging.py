"""What an installation contains, with and without the tools for native code; builds run on a copy of the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import contrastive_ext
from contrastive_ext import native

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "contrastive_ext", "triton_kernels")

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler was found"
)


def copy_tree(target: Path, csrc: str = "int contrastive_ext_probe;\n") -> Path:
    """The files an installation is made from, with a csrc/ of one small file."""
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            target.mkdir(exist_ok=True)
            shutil.copy(source, target / name)
    (target / "csrc").mkdir()
    (target / "csrc" / "probe.cpp").write_text(csrc)
    return target


def run_python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The interpreter of this test, with the tools of its own environment (ninja) on PATH."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("CONTRASTIVE_EXT_NATIVE", "CXX", "CC", "PYTHONPATH")}
    inherited["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "")])
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )


def build_wheel(tree: Path, **environment: str) -> Path:
    done = run_python(
        *("-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", "wheels", "."),
        cwd=tree,
        **environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "wheels").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def torch_less(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that hides torch from an interpreter with it on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("torch_less")
    message = "No module named 'torch'"
    (folder / "torch.py").write_text(f"raise ModuleNotFoundError({message!r}, name='torch')\n")
    return folder


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory, torch_less: Path) -> zipfile.ZipFile:
    tree = copy_tree(tmp_path_factory.mktemp("pure") / "tree")
    return zipfile.ZipFile(build_wheel(tree, PYTHONPATH=str(torch_less)))


def test_without_torch_a_pure_python_wheel_is_built_that_says_what_is_missing(pure_wheel: zipfile.ZipFile) -> None:
    assert Path(str(pure_wheel.filename)).name.endswith("-py3-none-any.whl")
    note = pure_wheel.read("contrastive_ext/_native_not_built.txt").decode()
    assert "torch is missing" in note and "pip install --no-build-isolation ." in note


def test_wheel_holds_the_package_its_types_and_its_license_and_nothing_else(pure_wheel: zipfile.ZipFile) -> None:
    names = pure_wheel.namelist()
    assert {"contrastive_ext/py.typed", "contrastive_ext/triton_kernels/__init__.py"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0].removesuffix(".dist-info") for name in names} == {
        "contrastive_ext",
        f"contrastive_ext-{contrastive_ext.__version__}",
    }
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".so", ".pyc"))]


def test_wheel_holds_every_python_file_of_the_package(pure_wheel: zipfile.ZipFile) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "contrastive_ext").rglob("*.py")}
    assert expected <= set(pure_wheel.namelist())


def test_wheel_metadata_states_the_version_the_license_and_an_optional_triton(pure_wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in pure_wheel.namelist() if name.endswith("/METADATA"))
    metadata = Parser().parsestr(pure_wheel.read(name).decode())
    assert metadata["Version"] == contrastive_ext.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.10"]


def test_without_a_compiler_the_build_says_so_and_goes_on(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    done = run_python("setup.py", "-q", "build_ext", "--inplace", cwd=tree, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found (CXX=no-such-compiler)" in done.stderr


def test_a_missing_tool_is_an_error_where_native_code_is_demanded(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    done = run_python(
        *("setup.py", "-q", "build_ext", "--inplace"), cwd=tree, CXX="no-such-compiler", CONTRASTIVE_EXT_NATIVE="1"
    )
    assert done.returncode != 0
    assert "no C++ compiler was found" in done.stderr


@needs_compiler
def test_a_compile_error_fails_the_build_and_names_the_way_out(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree", csrc="#error deliberate\n")
    done = run_python("setup.py", "-q", "build_ext", "--inplace", cwd=tree)
    assert done.returncode != 0
    assert "#error deliberate" in done.stdout + done.stderr
    assert "CONTRASTIVE_EXT_NATIVE=0" in done.stderr.splitlines()[-1]


@needs_compiler
def test_with_torch_and_a_compiler_one_wheel_serves_every_python(tmp_path: Path) -> None:
    wheel = build_wheel(copy_tree(tmp_path / "tree"))
    assert "-cp310-abi3-" in wheel.name
    assert "contrastive_ext/_C.abi3.so" in zipfile.ZipFile(wheel).namelist()
    assert "contrastive_ext/_native_not_built.txt" not in zipfile.ZipFile(wheel).namelist()


def test_triton_kernels_are_found_from_any_folder(tmp_path: Path) -> None:
    done = run_python("-c", "import contrastive_ext.triton_kernels as k; print(k.__file__)", cwd=tmp_path)
    assert Path(done.stdout.strip()).name == "__init__.py", done.stderr


def test_a_library_that_is_absent_or_damaged_is_a_reason_and_not_an_error(tmp_path: Path) -> None:
    path, reason = native._load(tmp_path)
    assert path is None and reason is not None and "not built" in reason

    (tmp_path / "_native_not_built.txt").write_text("contrastive_ext: no compiler\n")
    assert native._load(tmp_path) == (None, "contrastive_ext: no compiler")

    damaged = tmp_path / "_C.abi3.so"
    damaged.write_bytes(b"not a library")
    path, reason = native._load(tmp_path)
    assert path == damaged and reason is not None and "failed to load" in reason
