"""Triton's own launcher over a driver that writes launches down, tests/csrc/cuda/driver.c: a GPU that is not there."""

from __future__ import annotations

import ctypes
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]

sys.path.insert(0, str(ROOT / "tools"))
_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.([bfus]\d+)( \.ptr)?[^,\[\n]*(?:\[(\d+)\])?")


class Launch(NamedTuple):
    """Name of the kernel; grid, block, bytes of shared memory; the numbers and the addresses that it was given."""

    kernel: str
    shape: tuple[int, ...]
    numbers: tuple[int, ...]
    addresses: tuple[int, ...]


class Recorder:
    """That driver, in place for the rest of the process."""

    def __init__(self, folder: Path):
        import launch_gate
        import triton
        from triton.backends.nvidia import driver
        from triton.compiler.compiler import CompiledKernel

        library, source = folder / "libcuda.so.1", ROOT / "tests" / "csrc" / "cuda" / "driver.c"
        include = Path(driver.__file__).parent / "include"
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", f"-I{include}", str(source)]
        subprocess.run([*command, "-Wl,-soname,libcuda.so.1", "-o", str(library)], check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.library.take.restype = ctypes.c_size_t
        self.kernels: dict[int, tuple[str, list[tuple[int, bool]]]] = {}
        sizes: dict[int, ctypes.Array] = {}
        load = CompiledKernel._init_handles

        def load_and_note(kernel):
            if kernel.module is not None:
                return
            load(kernel)
            entry = kernel.asm["ptx"].split(".entry", 1)[1].split("{", 1)[0]
            parameters = [(int(t[1:]) // 8 * int(n or 1), bool(is_ptr)) for t, is_ptr, n in _PARAMETER.findall(entry)]
            self.kernels[kernel.function] = kernel.name, parameters
            sizes[kernel.function] = (ctypes.c_int * len(parameters))(*(size for size, _ in parameters))

        class Launcher(driver.CudaLauncher):
            def __call__(launcher, x, y, z, stream, function, *rest):
                self.library.expect(len(sizes[function]), sizes[function])
                super().__call__(x, y, z, stream, function, *rest)

        launch_gate.pretend(90)
        CompiledKernel._init_handles = load_and_note
        active: Any = triton.runtime.driver.active
        active.utils, active.launcher_cls = driver.CudaUtils(), Launcher

    def take(self) -> list[Launch]:
        """The launches since it was last asked."""
        bytes_of = ctypes.c_void_p()
        size = self.library.take(ctypes.byref(bytes_of))
        data, at, found = ctypes.string_at(bytes_of, size), 0, []
        while at < size:
            function, *shape = struct.unpack_from("<8Q", data, at)
            at += 64
            name, parameters = self.kernels[function]
            numbers, addresses = [], []
            for n, is_address in parameters:
                value = data[at : at + n]
                words = struct.unpack(f"<{n // 8}Q", value) if n % 8 == 0 else (int.from_bytes(value, "little"),)
                at += n
                addresses += words[:1] if is_address or n == 128 else ()
                numbers += words[1:] if is_address or n == 128 else words
            found.append(Launch(name, tuple(shape), tuple(numbers), tuple(addresses)))
        return found


def main() -> None:
    """Eight calls of each kind: launches forward and backward, and how many kinds of call are replayed by then."""
    recorder = Recorder(Path(sys.argv[1]))
    import torch

    import contrastive_ext as ce
    from contrastive_ext.backends.triton import replay

    def rows(n: int, features: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(n, features, dtype=dtype, requires_grad=True)

    half, scale = torch.float16, torch.tensor(10.0, requires_grad=True)
    views, towers, ragged = ([rows(n, 128, half) for n in sizes] for sizes in ((300, 300), (260, 300), (301, 301)))
    wide = [rows(70, 200, torch.float32) for _ in "12"]
    small = [rows(96, 64, torch.bfloat16) for _ in "12"]
    queue, ids = torch.randn(500, 128).to(half), torch.arange(300) // 2
    turns = [views, ragged]
    calls = {
        "descriptors, a learned scale": lambda: ce.fused_infonce_loss(*views, logit_scale=scale, backend="triton"),
        "two exponents, symmetric": lambda: ce.fused_hard_negative_loss(*small, layout="symmetric", backend="triton"),
        "pointers, float32": lambda: ce.fused_debiased_loss(*wide, 0.5, 0.05, backend="triton"),
        "more columns": lambda: ce.fused_infonce_loss(*towers, layout="one_way", backend="triton"),
        "two sizes in turn": lambda: ce.fused_infonce_loss(*turns[0], backend="triton"),
        "a queue and ids": lambda: ce.fused_infonce_loss(*views, ids=ids, queue=queue, backend="triton"),
    }
    for name, call in calls.items():
        replay.forget()
        steps = []
        for _ in range(8):
            loss = call()
            forward = recorder.take()
            loss.backward()
            steps.append((forward, recorder.take()))
            turns.reverse()
        print(json.dumps({"name": name, "steps": steps, "replayed": replay.recordings()}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    main()
