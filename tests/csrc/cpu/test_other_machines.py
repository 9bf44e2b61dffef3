"""The generic tile kernels on this machine and, where a cross compiler and an emulator are installed, on AArch64."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest

from native_code import CXX
from repository import ROOT

SOURCES = [ROOT / "tests/csrc/cpu/generic_tiles.cpp", ROOT / "csrc/cpu/tile_kernels_generic.cpp"]
AARCH64, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.parametrize("machine", ["here", "aarch64"])
def test_the_generic_kernels_are_right_on(machine, tmp_path):
    compiler, run = (CXX, []) if machine == "here" else (AARCH64, [EMULATOR])
    missing = [name for name in [*shlex.split(compiler)[:1], *run] if not shutil.which(name)]
    if not compiler or missing:
        pytest.skip(f"not installed: {', '.join(missing) or 'a C++ compiler'} (g++-aarch64-linux-gnu, qemu-user)")
    program = tmp_path / "tiles"
    flags = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-static", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*shlex.split(compiler), *flags, *map(str, SOURCES), "-o", str(program)], check=True)
    done = subprocess.run([*run, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("roundings") == 34
