"""What runs on a GPU machine, rehearsed: the script step by step, the proof, and what takes its results over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

from bench import cases, losses, tune
from bench.__main__ import main
from bench.case import Case
from bench.device import Device
from bench.proof import prove
from bench.speed import speed
from repository import ROOT, load_tool

CPU = Device("cpu")
gpu_results = load_tool("gpu_results")


def _release(package: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, version(package).split(".")[:2]))
    except PackageNotFoundError:
        return (0, 0)


# Triton 3.6's interpreter and numpy 2.4 do not go together
INTERPRETER_FAILS = _release("triton") < (3, 7) and _release("numpy") >= (2, 4)
CASE = cases.tiny(next(case for case in cases.proof_cases() if case.learned))
FILES = {"facts.json", "kernels.json", "logs.tar.gz", "proof.jsonl", "speed.json", "summary.txt", "tests.xml"}


@pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux machines")
def test_every_step_is_rehearsed_without_a_gpu(tmp_path):
    """Same steps, same files, few cases, within its own deadline."""
    environment = os.environ | {
        "PYTHON": sys.executable, "DEVICE": "cpu", "OUT": str(tmp_path), "JOBS": "2"
    }  # fmt: skip
    steps = ["facts", "import", "ladder", "tiles", "proof", "speed", "smoke", "tests"]
    if INTERPRETER_FAILS:
        steps.remove("tiles")
    command = ["bash", str(ROOT / "tools" / "gpu.sh"), *steps]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ended = dict(line.split(maxsplit=1) for line in (tmp_path / "summary.txt").read_text().splitlines()[1:])
    assert list(ended) == steps
    assert all(result.startswith("ok") for result in ended.values()), ended
    brought = {path.name for path in tmp_path.iterdir() if not path.name.startswith("tiles-")}
    assert brought == FILES
    assert len(list(tmp_path.iterdir())) <= 8
    assert gpu_results.main([str(tmp_path), "--root", str(tmp_path)]) == 1  # a rehearsal proves nothing


@pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux machines")
def test_steps_that_are_measured_are_not_run_again(tmp_path):
    known = tmp_path / "measured.txt"
    known.write_text("import\nladder\ntiles\nproof\nspeed\nsmoke\ntests\n")
    environment = os.environ | {
        "PYTHON": sys.executable, "DEVICE": "cpu", "OUT": str(tmp_path / "out"), "MEASURED": str(known)
    }  # fmt: skip
    done = subprocess.run(["bash", str(ROOT / "tools" / "gpu.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ended = (tmp_path / "out" / "summary.txt").read_text().splitlines()[1:]
    assert [line.split()[1] for line in ended] == ["skipped:"] * 7 + ["ok,"]
    assert ended[-1].startswith("facts")


def test_results_are_of_the_code_until_it_changes(tmp_path):
    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    results, kernels = tmp_path / "bench" / "results", tmp_path / "triton_kernels"
    for folder in (results, kernels):
        folder.mkdir(parents=True)
    (kernels / "sweep.py").write_text("1")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "kernels")
    assert gpu_results.measured(tmp_path) == []
    commit = git("rev-parse", "HEAD")
    (results / "nvidia-x.json").write_text(json.dumps({"commit": commit, "cuda": "13.0"}))
    (results / "nvidia-x-proof.jsonl").write_text("")
    (results / "cpu.json").write_text(json.dumps({"commit": commit, "cuda": None}))
    (results / "list.json").write_text("[]")
    assert gpu_results.measured(tmp_path) == ["speed", "proof"]
    git("add", "-A")
    git("commit", "-qm", "results")
    assert gpu_results.measured(tmp_path) == ["speed", "proof"]
    (kernels / "sweep.py").write_text("2")
    assert gpu_results.measured(tmp_path) == []


def test_proof_is_a_line_for_every_case_and_backend(tmp_path, monkeypatch):
    assert prove(CPU, tmp_path / "proof.jsonl", [CASE]) == 0
    lines = [json.loads(line) for line in (tmp_path / "proof.jsonl").read_text().splitlines()]
    assert {line["backend"] for line in lines} >= {"torch"}
    for line in lines:
        assert line["case"] == CASE.name and line["proven"] and line["repeats"]
        assert 0 <= line["temperature_gradient"] <= line["ratio"] <= 1


def test_proof_shows_what_is_wrong_and_what_does_not_run(tmp_path, monkeypatch):
    from bench import proof
    from bench.methods import Method

    def wrong(case, inputs):
        return 1.1 * losses.fused(case, inputs, "torch", "none")

    def broken(case, inputs):
        raise RuntimeError("no such kernel")

    calls: list[int] = []

    def unsteady(case, inputs):
        calls.append(0)
        return losses.fused(case, inputs, "torch", "none") * (1 + 1e-7 * len(calls))

    methods = [
        Method(f.__name__, f, lambda case, inputs, f=f: f(case, inputs).mean(), is_ours=True)
        for f in (wrong, broken, unsteady)
    ]
    monkeypatch.setattr(proof, "backends_for", lambda case, device: methods)
    case = cases.tiny(Case("fused_infonce_loss", "two_view", 64, 64, 32, "float32"))
    assert prove(CPU, tmp_path / "proof.jsonl", [case]) == 3
    verdicts = {line["backend"]: line for line in map(json.loads, (tmp_path / "proof.jsonl").read_text().splitlines())}
    assert verdicts["wrong"]["ratio"] > 1
    assert "no such kernel" in verdicts["broken"]["verdict"]
    assert not verdicts["unsteady"]["repeats"]


def test_speed_stops_at_its_limit_and_says_what_it_left_out(tmp_path):
    two = [cases.tiny(case) for case in cases.speed_cases()[:2]]
    assert speed(CPU, tmp_path, 0.0, two) == 0
    results = json.loads((tmp_path / "speed.json").read_text())
    assert results["left_out"] == [two[1].name]
    assert set(json.loads((tmp_path / "kernels.json").read_text())) == {two[0].name}


def test_shards_share_the_cases(capsys):
    names = []
    for shard in ("0/2", "1/2"):
        assert main(["smoke", "--device", "cpu", "--only", "infonce symmetric", "--shard", shard]) == 0
        names += [line[4:] for line in capsys.readouterr().out.splitlines() if line.startswith("ok")]
    assert len(names) == len(set(names)) == sum("infonce symmetric" in case.name for case in cases.smoke_cases())


def test_fastest_tiles_are_preferred(tmp_path, monkeypatch):
    configs = pytest.importorskip("contrastive_ext.triton_kernels.configs", reason="Triton is not installed.")
    monkeypatch.setattr(configs, "preferred", {})
    line = configs.Line("backward", "16-bit", 128, 90)
    slow, fast, failed = (configs.tile("64x64", 4, stages) for stages in (2, 3, 4))
    trials = [
        {"line": line} | tile._asdict() | {"forward_ms": 1.0, "backward_ms": ms}
        for tile, ms in ((slow, 2.0), (fast, 1.0))
    ]
    trials.append({"line": line} | failed._asdict() | {"why_not": "out of shared memory"})
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"trials": trials}))
    tune.prefer(path)
    assert configs.preferred == {line: fast}


@pytest.fixture
def brought(tmp_path):
    """A made-up folder of results, and a checkout to take them over to."""
    folder, root = tmp_path / "out", tmp_path / "root"
    (root / "bench" / "results").mkdir(parents=True)
    verified = "contrastive_ext/backends/verified.py"
    (root / verified).parent.mkdir(parents=True)
    (root / verified).write_text((ROOT / verified).read_text())
    (root / "docs").mkdir()
    (root / "docs" / "benchmarks.md").write_text(
        f"before\n{gpu_results.MARKS[0]}\nold\n{gpu_results.MARKS[1]}\nafter\n"
    )
    folder.mkdir()
    row = {
        "loss": "fused_infonce_loss", "backend": "triton", "layout": "two_view", "N": 64, "M": 64, "D": 8,
        "dtype": "bfloat16", "temperature": 0.1, "forward_ms": 1.0, "backward_ms": 2.0, "graph_ms": 0.5,
        "peak_extra_mib": 3.0, "status": "ok",
    }  # fmt: skip
    made_up = {
        "device": "NVIDIA Made-Up", "driver": "1", "cuda": "13.0", "torch": "2", "triton": "3", "commit": "abc",
        "architecture": "sm_91", "rows": [row, row | {"backend": "eager", "forward_ms": 10.0}],
    }  # fmt: skip
    proofs = [
        {"case": "a", "backend": "triton", "dtype": "bfloat16", "proven": True},
        {"case": "a", "backend": "triton", "dtype": "float32", "proven": True},
        {"case": "a", "backend": "triton", "dtype": "tf32", "proven": False},
        {"case": "a", "backend": "cuda", "dtype": "float16", "proven": True},
        {"case": "a", "backend": "triton", "dtype": "fp16x3", "proven": True},
    ]
    (folder / "speed.json").write_text(json.dumps(made_up))
    (folder / "proof.jsonl").write_text("".join(json.dumps(line) + "\n" for line in proofs))
    kernels = {
        "infonce two_view 64x8 bfloat16 t=0.1": {"triton": {"row_stats_forward_kernel": [1, 40.0], "x": [1, 60.0]}}
    }
    (folder / "kernels.json").write_text(json.dumps(kernels))
    return folder, root


def test_results_are_taken_over(brought):
    folder, root = brought
    assert gpu_results.main([str(folder), "--root", str(root)]) == 0
    verified = (root / "contrastive_ext" / "backends" / "verified.py").read_text()
    assert '("triton", "sm_91", torch.bfloat16): "nvidia-made-up-proof.jsonl"' in verified
    assert '("triton", "sm_90", torch.bfloat16)' in verified  # what other devices have shown stays
    assert '"sm_91", torch.float32' not in verified  # TF32 is not proven
    assert '("triton", "sm_91", "fp16x3"): ' in verified
    again = gpu_results.with_entries(verified, {})
    assert again == verified
    assert '("cuda"' not in verified  # not complete
    compile(verified, "verified.py", "exec")
    page = (root / "docs" / "benchmarks.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    assert "| 0.040 + 0.060 | 3.00 (graph 0.500) | 12.00 | 3 | 3 |" in page
    assert {path.name for path in (root / "bench" / "results").iterdir()} == {
        "nvidia-made-up.json", "nvidia-made-up-proof.jsonl", "nvidia-made-up-kernels.json",
    }  # fmt: skip


@pytest.mark.parametrize("fault", [{"driver": None}, {"commit": "abc-dirty"}, {"commit": None}])
def test_results_of_no_gpu_or_no_commit_are_refused(brought, fault, capsys):
    folder, root = brought
    speed = json.loads((folder / "speed.json").read_text()) | fault
    (folder / "speed.json").write_text(json.dumps(speed))
    assert gpu_results.main([str(folder), "--root", str(root)]) == 1
    assert "refused" in capsys.readouterr().out
    assert not list((root / "bench" / "results").iterdir())
