"""`make setup`, what a newcomer sees first: a line per step, what tools print only where they fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from repository import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed.")

# a Python that makes environments of stand-ins: pip and python print a compiler's noise and fail where they are told to
STAND_IN = """#!/bin/sh
mkdir -p "$3/bin"
cat > "$3/bin/pip" <<'STUB'
#!/bin/sh
echo "noise $0 $@"
case "$@" in *"$FAIL_AT"*) [ -z "$FAIL_AT" ] || exit 1;; esac
STUB
cp "$3/bin/pip" "$3/bin/python"
echo 'echo "contrastive_ext: CPU kernels only."' >> "$3/bin/python"
chmod +x "$3/bin/pip" "$3/bin/python"
"""


def setup(tmp_path: Path, fail_at: str = "", *arguments: str) -> subprocess.CompletedProcess[str]:
    python = tmp_path / "python3"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    settings = {"FAIL_AT": fail_at, "MAKEFLAGS": "", "MAKELEVEL": ""}
    return subprocess.run(
        ["make", "--no-print-directory", "setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}", *arguments],
        cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_one_line_per_step_and_what_it_takes_beforehand(tmp_path):
    done = setup(tmp_path)
    lines = [line.replace(str(tmp_path / "venv"), ".venv") for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert "noise" not in done.stdout + done.stderr
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("  ")] == ["1/4", "2/4", "3/4", "4/4"]
    first_step = next(i for i, line in enumerate(lines) if line.startswith("  1/4"))
    before = " ".join(lines[:first_step])
    assert "minutes" in before and "GB" in before and "TORCH=" in before
    assert lines[-1] == "contrastive_ext: CPU kernels only."  # what the build has to say is not swallowed


def test_another_torch_is_named_and_installed(tmp_path):
    done = setup(tmp_path, "", "TORCH=torch==2.12.1")
    assert "2/4 torch==2.12.1" in done.stdout and done.returncode == 0
    assert (tmp_path / "venv" / ".installed").read_text().strip() == "torch==2.12.1"


@pytest.mark.parametrize("what", ["wheel torch==", ".[dev]", "build_ext"])
def test_a_step_that_fails_shows_what_its_tool_said_and_stops(tmp_path, what):
    done = setup(tmp_path, what)
    assert done.returncode != 0
    noise = [line for line in done.stdout.splitlines() if line.startswith("noise")]
    assert len(noise) == 1 and what in noise[0]
