"""What an installation contains, with and without the tools for native code; builds run on a copy of the tree."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import contrastive_ext
from contrastive_ext.backends import native
from repository import ROOT

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
    assert "torch is missing" in note and "pip install --no-build-isolation --no-cache-dir ." in note


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


OURS = {"version": contrastive_ext.__version__, "cpu_isa": "generic"}


def register(namespace: str, info: dict[str, str] | None, operators: dict[str, str]) -> torch.library.Library:
    """What a library does when it is loaded."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for name, schema in operators.items():
        library.define(f"{name}{schema}")
    if info is not None:
        library.define("native_build_info() -> str")
        library.impl("native_build_info", lambda: json.dumps(info), "CompositeExplicitAutograd")
    return library


@pytest.mark.parametrize(
    "info, operators, says",
    [
        (OURS, {}, None),
        (OURS | {"cuda_archs": "9.0a"}, native.CUDA_OPERATORS, None),
        (None, {}, "none of our operators"),
        ({"cpu_isa": "generic"}, {}, "of version unknown"),
        ({"version": "0.0.9"}, {}, "of version 0.0.9"),
        (OURS, {"top_columns_cpu": ""}, "no operator top_columns_cpu"),
        (OURS, {"top_columns_cpu": "(Tensor scorers) -> Tensor"}, "top_columns_cpu takes other arguments"),
        (OURS | {"cuda_archs": "9.0a"}, {}, "no operator row_stats_forward_cuda"),
    ],
    ids=["ours", "ours with CUDA", "foreign", "without version", "older", "lacks one", "other arguments", "lacks CUDA"],
)
def test_a_library_of_other_sources_is_told_apart(request, info, operators, says) -> None:
    namespace = "contrastive_ext_" + request.node.callspec.id.replace(" ", "_")
    registered = {name: schema for name, schema in (native.OPERATORS | operators).items() if schema}
    library = register(namespace, info, registered)
    differs = native._what_differs(namespace)
    assert differs is None if says is None else says in str(differs)
    library._destroy()


@needs_compiler
def test_a_foreign_library_makes_cpu_unavailable_and_auto_says_how_to_mend_it(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    library = tree / "contrastive_ext" / "_C.abi3.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tree / "csrc" / "probe.cpp"], check=True)
    program = (
        "import contrastive_ext as ce, torch, warnings\n"
        "print(ce.available_backends())\n"
        "print(ce.explain(torch.ones(2, 3)))\n"
        "warnings.simplefilter('always')\n"
        "z = torch.randn(4, 3, requires_grad=True)\n"
        "for _ in range(2): ce.fused_infonce_loss(z, z.flip(0)).backward()\n"
    )
    done = run_python("-c", program, cwd=tree)
    assert done.returncode == 0, done.stderr
    backends, chosen, *_ = done.stdout.splitlines()
    assert "'cpu'" not in backends and chosen.endswith("takes 'torch':")
    assert "_C.abi3.so was not built from these sources (it registers none of our operators)" in done.stdout
    assert done.stderr.count("UserWarning") == 1 and "backend 'torch' computes" in done.stderr
    assert "pip install --no-build-isolation --no-cache-dir ." in done.stderr


def test_the_library_of_this_checkout_is_of_these_sources() -> None:
    """A stale one would skip the tests of the `cpu` backend instead of failing them."""
    if not list(Path(native.__file__).parent.glob("_C*.so")):
        pytest.skip("native kernels are not built")
    assert native.why_missing() is None
    assert native.build_info()["version"] == contrastive_ext.__version__


@pytest.fixture
def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", lambda: (None, f"native kernels are not built; {native.HOW_TO_BUILD}"))


@needs_compiler
@pytest.mark.usefixtures("_no_library")
def test_auto_says_once_that_the_fast_backend_could_be_had() -> None:
    z = torch.randn(6, 4)
    with pytest.warns(
        UserWarning, match=r"'torch' computes.*setuptools>=77.*--no-build-isolation --no-cache-dir"
    ) as said:
        contrastive_ext.fused_infonce_loss(z, z.flip(0))
        contrastive_ext.fused_bayesian_loss(z, z.flip(0))
    assert len(said) == 1


@pytest.mark.usefixtures("_no_library")
def test_auto_is_silent_where_the_fast_backend_cannot_be_had_or_torch_was_asked_for(monkeypatch) -> None:
    z = torch.randn(6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contrastive_ext.fused_infonce_loss(z, z.flip(0), backend="torch")
        with monkeypatch.context() as without_compiler:
            without_compiler.setattr(shutil, "which", lambda name: None)
            contrastive_ext.fused_infonce_loss(z, z.flip(0))
        monkeypatch.setattr(
            native, "_loaded", lambda: (None, "because CONTRASTIVE_EXT_NATIVE=0 was set; for them: ...")
        )
        contrastive_ext.fused_infonce_loss(z, z.flip(0))


def test_setup_the_package_and_the_readme_name_the_same_command() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    (how_to,) = re.findall(r"^HOW_TO = \(.*?\n(.*?)^\)", setup, re.MULTILINE | re.DOTALL)
    assert ast.literal_eval(f"({how_to})") == native.HOW_TO_BUILD
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(command in readme for command in re.findall(r"pip install [^&]*[^& ]", native.HOW_TO_BUILD))


def site_with(folder: Path, code: str) -> dict[str, str]:
    """An environment whose interpreters first run `code`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


@needs_compiler
def test_a_free_threaded_python_gets_a_library_of_its_own(tmp_path: Path) -> None:
    """It has no limited API; setuptools refuses to build for one there."""
    as_if = site_with(
        tmp_path / "site",
        "import sysconfig\n"
        "known = sysconfig.get_config_var\n"
        "sysconfig.get_config_var = lambda name: 1 if name == 'Py_GIL_DISABLED' else known(name)\n",
    )
    wheel = build_wheel(copy_tree(tmp_path / "tree"), **as_if)
    assert "abi3" not in wheel.name and "none-any" not in wheel.name
    (library,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("contrastive_ext/_C"))
    assert "abi3" not in library


def test_a_setuptools_too_old_for_the_metadata_is_a_sentence(tmp_path: Path) -> None:
    as_if = site_with(tmp_path / "site", "import setuptools\nsetuptools.__version__ = '65.5.0'\n")
    done = run_python("setup.py", "-q", "egg_info", cwd=copy_tree(tmp_path / "tree"), **as_if)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.endswith('setuptools 65.5.0 cannot read pyproject.toml; first run: pip install "setuptools>=77"')


def built_library(tree: Path, **environment: str) -> bytes:
    with zipfile.ZipFile(build_wheel(tree, **environment)) as wheel:
        return wheel.read("contrastive_ext/_C.abi3.so")


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for an ELF section")
def test_the_library_carries_no_symbols_unless_they_are_asked_for(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    assert b".symtab" not in built_library(tree)
    shutil.rmtree(tree / "build")
    shutil.rmtree(tree / "wheels")
    assert b".symtab" in built_library(tree, CONTRASTIVE_EXT_STRIP="0")


@needs_compiler
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA, with which CUDA code is compiled")
@pytest.mark.parametrize("switch", ["", "0", "1"])
def test_cuda_code_is_compiled_with_a_cuda_torch_or_on_demand(switch: str, tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    (tree / "csrc" / "probe.cu").write_text("")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvcc").write_text("#!/bin/sh\n[ $1 = --version ] && echo 'release 13.0,' || { echo called; exit 1; }\n")
    (tools / "nvcc").chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    asked = {"CONTRASTIVE_EXT_CUDA": switch} if switch else {}
    done = run_python("setup.py", "-q", "build_ext", "--inplace", cwd=tree, PATH=path, **asked)
    if switch == "1":
        assert done.returncode != 0 and "nvcc did not compile csrc/probe.cu" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "called" not in done.stdout + done.stderr
        assert ("CONTRASTIVE_EXT_CUDA=0 was set" if switch else "has no CUDA") in done.stderr


def test_the_index_shows_where_the_project_lives(pure_wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in pure_wheel.namelist() if name.endswith("/METADATA"))
    metadata = Parser().parsestr(pure_wheel.read(name).decode())
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert set(urls) == {"Documentation", "Repository", "Changelog", "Issues"}
    classifiers = metadata.get_all("Classifier")
    assert "Programming Language :: Python :: 3.10" in classifiers and "Typing :: Typed" in classifiers
    assert "](docs/" not in metadata.get_payload() and "](bench/" not in metadata.get_payload()


def test_the_sources_of_a_release_are_complete(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("which files belong to it is known in a checkout only")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    tree = tmp_path / "tree"
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    done = run_python("setup.py", "-q", "sdist", cwd=tree, CONTRASTIVE_EXT_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        held = {name.partition("/")[2] for name in sources.getnames()}
    there = {name for name in tracked if name and (ROOT / name).is_file()}
    assert there - held == {".gitignore"}


def test_an_installed_package_passes_the_smoke_of_all_losses(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tools" / "smoke.py", tmp_path)
    done = run_python("smoke.py", "--backend", "torch", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {name for name in contrastive_ext.__all__ if name.startswith("fused_")} - {"fused_row_loss"}
    assert all(name in (tmp_path / "smoke.py").read_text() for name in names)


def test_citation_and_changelog_are_of_this_version() -> None:
    version = contrastive_ext.__version__
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_issue_templates_ask_for_the_doctor() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        assert "python -m contrastive_ext doctor --json" in path.read_text(encoding="utf-8"), path.name
