"""Build of contrastive_ext: a pure-Python package, plus one native library where the tools for it are present.

The library (`contrastive_ext/_C.abi3.so`) is compiled from csrc/ against the LibTorch stable ABI, so one build serves
every torch >= 2.10 and every CPython >= 3.10 but the free-threaded ones, which need their own.
contrastive_ext/backends/native.py loads it by `torch.ops.load_library`.

What is missing (torch in the build environment, a C++ compiler) is said in one line and yields a working pure-Python
package; a compile ERROR with the tools present fails the build. Read from the environment, at build time only:

    CONTRASTIVE_EXT_NATIVE   0: never build native code; 1: a missing tool is an error; unset: as above
    CONTRASTIVE_EXT_CUDA     0: no CUDA; 1: CUDA although the torch of the build has none; unset: CUDA if torch has it
    CONTRASTIVE_EXT_STRIP    0: keep the symbols of the library (10.7 MB instead of 2)
    CXX, MAX_JOBS            the compiler, the number of parallel compile jobs
    CUDA_HOME                toolkit whose nvcc compiles csrc/cuda/*.cu (otherwise nvcc from PATH); no GPU is needed
    TORCH_CUDA_ARCH_LIST     for example "9.0a;10.0a+PTX"; default 9.0a
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SWITCH = os.environ.get("CONTRASTIVE_EXT_NATIVE", "auto")
CUDA_SWITCH = os.environ.get("CONTRASTIVE_EXT_CUDA", "auto")
HOW_TO = (  # contrastive_ext/backends/native.py says the same
    "with torch>=2.10 and a C++ compiler installed, run in the source folder: "
    'pip install "setuptools>=77" && pip install --no-build-isolation --no-cache-dir .'
)
OLDEST_SETUPTOOLS = 77  # older ones stumble over the license expression of pyproject.toml
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"contrastive_ext: setuptools {setuptools.__version__} cannot read pyproject.toml; "
        f'first run: pip install "setuptools>={OLDEST_SETUPTOOLS}"'
    )
# A free-threaded CPython knows no limited API: there the library carries that Python's own tag.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
STABLE_ABI = "0x020a000000000000"  # torch 2.10, the oldest torch the library may be loaded by
DEFAULT_CUDA_ARCHS = "9.0a"
OLDEST_CUDA = 12


def sources(*suffixes: str) -> list[str]:
    """Files under csrc/ with one of the suffixes, relative to this folder as setuptools wants them."""
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in suffixes)


def find_cxx() -> str | None:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((c for c in candidates if shutil.which(shlex.split(c)[0])), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def why_not_cuda(nvcc: str | None) -> str | None:
    """The reason why csrc/cuda is not compiled here, or None."""
    import torch

    if CUDA_SWITCH == "0":
        return "CONTRASTIVE_EXT_CUDA=0 was set"
    if CUDA_SWITCH != "1" and torch.version.cuda is None:
        return f"torch {torch.__version__} of the build has no CUDA (CONTRASTIVE_EXT_CUDA=1 compiles it all the same)"
    if nvcc is None:
        return "nvcc was not found (CUDA_HOME, PATH)"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.", version)
    if release and int(release.group(1)) < OLDEST_CUDA:
        return f"{nvcc} is of CUDA {release.group(1)} and sm_90a needs {OLDEST_CUDA}"
    return None


def why_not_native() -> str | None:
    """The reason why native code cannot be built here, or None."""
    if SWITCH == "0":
        return "CONTRASTIVE_EXT_NATIVE=0 was set"
    if not sources(".cpp"):
        return "csrc/ holds no sources"
    if sys.platform == "win32" or platform.python_implementation() != "CPython":
        return f"{platform.python_implementation()} on {sys.platform} is not supported"
    if find_cxx() is None:
        return "no C++ compiler was found" + (f" (CXX={os.environ['CXX']})" if os.environ.get("CXX") else "")
    try:
        import torch
    except ModuleNotFoundError as error:
        return f"torch is missing in the build environment ({error}), where pip's build isolation hides it"
    except (ImportError, OSError) as error:
        return f"the torch in the build environment cannot be imported ({error})"
    if torch.__version__ < "2.10":  # TorchVersion compares release numbers, not strings
        return f"the torch in the build environment is {torch.__version__}"
    return None


def not_built_line(reason: str) -> str:
    return f"contrastive_ext: native kernels were not built because {reason}; for them: {HOW_TO}"


class BuildPurePython(build_py):
    """build_py that says why there is no native library, also in the package: pip hides what a build prints."""

    def run(self) -> None:
        super().run()
        if REASON and not getattr(self, "editable_mode", False):
            print(not_built_line(REASON), file=sys.stderr)
            note = Path(self.build_lib) / "contrastive_ext" / "_native_not_built.txt"
            note.write_text(not_built_line(REASON) + "\n", encoding="utf-8")


class BuildNothing(build_ext):
    """build_ext, asked for where native code cannot be built."""

    def run(self) -> None:
        print(not_built_line(str(REASON)), file=sys.stderr)


def cuda_gencode(arch_list: str) -> list[str]:
    flags = []
    for arch in arch_list.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if match is None:
            raise CompileError(f'TORCH_CUDA_ARCH_LIST must hold entries like "9.0a" or "10.0+PTX"; got "{arch}".')
        number = "".join(match.group(1, 2, 3))
        targets = [f"sm_{number}"] + ([f"compute_{number}"] if match.group(4) else [])
        flags += [f"-gencode=arch=compute_{number},code={target}" for target in targets]
    return flags


def add_cuda_objects(extension: Extension, nvcc: str, folder: Path) -> None:
    """Compile csrc/cuda with nvcc and link the objects; torch's CUDAExtension refuses where torch is a CPU build."""
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS
    extension.define_macros.append(("CONTRASTIVE_EXT_CUDA_ARCHS", f'"{arch_list}"'))
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", *cuda_gencode(arch_list)]
    flags += [f"-D{name}={value}" for name, value in extension.define_macros]
    for flag in extension.extra_compile_args:
        if flag.startswith("-isystem"):
            flags += ["-isystem", flag.removeprefix("-isystem")]  # nvcc wants them apart
    newest_source = max((ROOT / name).stat().st_mtime for name in [*extension.depends, "setup.py"])
    folder = folder / re.sub(r"\W+", "_", arch_list)
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str) -> str:
        target = folder / (Path(source).name + ".o")
        if not target.exists() or target.stat().st_mtime <= newest_source:
            command = [nvcc, *flags, "-c", source, "-o", str(target)]
            print(shlex.join(command), flush=True)
            if subprocess.run(command, cwd=ROOT, check=False).returncode:
                raise CompileError(f"nvcc did not compile {source}")
        return str(target)

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        extension.extra_objects += pool.map(compile_one, sources(".cu"))

    # nvcc may be a wrapper script far from its toolkit; its dry run names the toolkit's folder
    dry_run = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, flags=re.MULTILINE)
    toolkit = Path(top.group(1) if top else Path(nvcc).resolve().parents[1])
    extension.library_dirs += [str(p) for p in (toolkit / "lib64", toolkit / "lib") if p.is_dir()]
    extension.libraries += ["cudart_static", "rt", "pthread", "dl"]


def link_flags() -> list[str]:
    """Without symbols the library is a fifth of its size; what torch looks up stays."""
    if os.environ.get("CONTRASTIVE_EXT_STRIP") == "0":
        return []
    return ["-Wl,-x"] if sys.platform == "darwin" else ["-Wl,-s"]


def native_build() -> tuple[list[Extension], type[build_ext]]:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    version_file = (ROOT / "contrastive_ext/_version.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"', version_file, flags=re.MULTILINE)
    extension = CppExtension(
        "contrastive_ext._C",
        sources(".cpp"),
        depends=sources(".h", ".cpp", ".cuh", ".cu"),
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), ("CONTRASTIVE_EXT_VERSION", f'"{version}"')],
        extra_compile_args=["-std=c++17", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden"],
        extra_link_args=link_flags(),
        py_limited_api=LIMITED_API,
    )
    # torch's headers as system headers: our warnings only
    extension.extra_compile_args += [f"-isystem{path}" for path in extension.include_dirs]
    extension.include_dirs = []

    class BuildNative(BuildExtension):
        def build_extensions(self) -> None:
            try:
                if sources(".cu"):
                    nvcc = find_nvcc()
                    missing = why_not_cuda(nvcc)
                    if nvcc and missing is None:
                        add_cuda_objects(extension, nvcc, Path(self.build_temp).resolve() / "cuda")
                    else:
                        print(f"contrastive_ext: {missing}: CPU kernels only.", file=sys.stderr)
                super().build_extensions()
            except Exception as error:  # whatever the compiler, ninja or torch raised: the build must not go on
                reason = f"compiling csrc/ failed: {error}"
                raise CompileError(
                    f"{reason}\nCONTRASTIVE_EXT_NATIVE=0 builds the package without native code."
                ) from error

    cxx = find_cxx()
    os.environ["CXX"] = cxx  # torch and setuptools take the same compiler,
    os.environ.setdefault("CC", cxx)  # also where the interpreter was built with another one
    return [extension], BuildNative


REASON = why_not_native()
if REASON and SWITCH == "1":
    raise SystemExit(f"CONTRASTIVE_EXT_NATIVE=1 asks for native code: {not_built_line(REASON)}")
extensions, build_ext_command = ([], BuildNothing) if REASON else native_build()

TRITON = "contrastive_ext.triton_kernels"  # the bare name belongs to another distribution
setup(
    packages=[
        *find_packages(include=["contrastive_ext", "contrastive_ext.*"]),
        TRITON,
        *(f"{TRITON}.{name}" for name in find_packages("triton_kernels")),
    ],
    package_dir={TRITON: "triton_kernels"},
    package_data={"contrastive_ext": ["py.typed"]},
    include_package_data=False,
    ext_modules=extensions,
    cmdclass={"build_py": BuildPurePython, "build_ext": build_ext_command},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions and LIMITED_API else {},
    zip_safe=False,
)
