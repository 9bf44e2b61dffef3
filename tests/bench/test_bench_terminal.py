"""The benchmark as a person meets it: in terminals of 80 and 120 columns, mistyped, interrupted, and on the site."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time

import pytest

from bench import cases, report, run
from bench.__main__ import main
from bench.results import Results
from repository import ROOT

RESULTS = ROOT / "bench" / "results" / "cpu-amd-epyc.json"
CAPTURE = ROOT / "tests" / "captures" / "bench_terminal.txt"
CONTROL = re.compile(r"\x1b\[[0-9;]*[mK]")
# what a line of a method shows at any width: milliseconds, MiB, times eager, times chunked
NUMBERS = re.compile(r"  cpu +[\d,.]+ ms +[\d,]+ MiB +[\d.]+x eager +[\d.]+x chunked")


def in_terminal(columns: int, arguments: list[str], stop_at: str = "") -> str:
    """What `python -m bench` writes on a terminal of that width, status last; Ctrl-C once `stop_at` shows."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def take_terminal() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in what a shell began in the background, and inherited
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, env=environ | {"OMP_NUM_THREADS": "1"},
        stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(theirs)
    text, waiting = b"", bool(stop_at)
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # the other end is closed
            more = b""
        if not more:
            break
        text += more
        if waiting and stop_at in text.decode(errors="replace"):
            time.sleep(0.5)
            os.write(ours, b"\x03")
            waiting = False
    os.close(ours)
    return f"{text.decode()}status {process.wait(60)}\n"


def on_screen(text: str) -> str:
    """What stays visible: no colours, of a line that was rewritten the last state."""
    lines = CONTROL.sub("", text.replace("\r\n", "\n")).split("\n")
    return "\n".join(line.rpartition("\r")[2].rstrip() for line in lines)


def masked(text: str) -> str:
    """Every number a # at its right end, so that another measurement looks the same where cells are right-aligned."""
    return re.sub(r"\d[\d,.]*(?<=\d)", lambda number: "#".rjust(len(number.group())), text)


def test_the_table_at_80_and_120_columns_is_the_captured_one(tmp_path):
    """UPDATE_CAPTURES=1 writes the file anew: look at the difference."""
    (tmp_path / "r.json").write_text(RESULTS.read_text())
    seen = []
    for columns in (80, 120):
        text = on_screen(in_terminal(columns, ["show", str(tmp_path / "r.json")])).replace(f"{tmp_path}/", "")
        lines = text.splitlines()
        assert max(map(len, lines)) <= columns
        ours = [line for line in lines if line.startswith("  cpu  ")]
        assert len(ours) >= len(cases.cpu_cases()) and all(NUMBERS.match(line) for line in ours)
        assert all((len(line) > 80) == (columns == 120) for line in ours)
        seen.append(f"{f' {columns} columns ':-^{columns}}\n{masked(text)}")
    if "UPDATE_CAPTURES" in os.environ:
        CAPTURE.write_text("\n".join(seen))
    # where matplotlib is missing no picture is among the files
    wanted = [line for line in CAPTURE.read_text().splitlines() if "r.png" not in line]
    assert [
        line for line in "\n".join(seen).splitlines() if "picture is left out" not in line and "r.png" not in line
    ] == wanted


@pytest.mark.parametrize("columns", [80, 120])
def test_a_run_shows_progress_that_fits_and_tells_what_comes_next(columns, tmp_path):
    raw = in_terminal(columns, ["--quick", "--only", "infonce two_view 256", "--out", str(tmp_path)])
    text = on_screen(raw)
    states = CONTROL.sub("", raw).replace("\r\n", "\n").replace("\r", "\n").splitlines()
    assert sum(line.startswith("[0/1, 0:") for line in states) > 5
    assert all(len(line) <= columns or str(tmp_path) in line for line in states)
    assert "1 cases and 0 short trainings" in text or "1 case" in text
    assert any(NUMBERS.match(line) for line in text.splitlines())
    for promised in ("results of ours are right", ".json", ".md", "ARGS=--long", "show FILE", "status 0"):
        assert promised in text, promised


def test_ctrl_c_ends_with_what_is_known_and_one_line(tmp_path):
    """Whoever presses it may be slow: the cases that are left take longer than a process waits for a turn."""
    arguments = ["--quick", "--only", "two_view", "--out", str(tmp_path)]
    text = on_screen(in_terminal(80, arguments, stop_at="[1/7, "))
    assert "Traceback" not in text and "KeyboardInterrupt" not in text
    stopped, status = text.splitlines()[-2:]
    done = int(re.fullmatch(r"Stopped after (\d) of 7 cases\.", stopped)[1])
    assert done >= 1 and status == f"status {run.STOPPED}"
    (path,) = tmp_path.glob("*.json")
    results = Results.read(path)
    assert len({(row.loss, row.N) for row in results.rows}) == done and len(results.left_out) == 7 - done
    assert "infonce two_view 256x128" in text and "cpu" in text


@pytest.mark.parametrize("command", [[], ["smoke"], ["proof", "--device", "cpu"], ["speed", "--device", "cpu"]])
def test_a_case_that_does_not_exist_is_an_error_that_lists_the_cases(command, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--only", "nosuchcase"] + ([] if "smoke" in command else ["--out", str(tmp_path)]))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "nosuchcase" in said and "infonce two_view" in said
    assert not list(tmp_path.iterdir())


def test_a_pattern_that_is_none_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "("])
    assert "regular expression" in capsys.readouterr().err


def test_what_is_no_results_file_is_a_sentence(tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"a": 1}')
    assert main(["show", str(tmp_path / "other.json")]) == 2
    assert main(["show", str(tmp_path / "missing.json")]) == 2
    assert "no results file" in capsys.readouterr().out


def test_results_go_where_git_does_not_look(monkeypatch):
    seen = []
    monkeypatch.setattr("bench.__main__.run", lambda device, cases, jobs, path, *rest: seen.append(path) or 0)
    assert main(["--quick"]) == 0
    ignored = subprocess.run(["git", "check-ignore", "-q", str(seen[0])], cwd=ROOT, check=False)
    if (ROOT / ".git").exists():
        assert ignored.returncode == 0


def test_the_site_shows_the_committed_run_of_the_default_table():
    results = Results.read(RESULTS)
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    block = re.search(r"<!-- cpu table -->\n(.*)<!-- end of cpu table -->", page, re.S)
    assert block and block.group(1) == report.markdown(results)
    assert RESULTS.relative_to(ROOT).as_posix() in page
    assert f"load average {results.environment['load_average']:.0f}" in " ".join(page.split())
    assert [rows[0].case_name for rows in results.cases()] == [case.name for case in cases.cpu_cases()]
    assert not results.left_out and results.is_green and results.digits
    assert RESULTS.with_suffix(".png").is_file()


def test_the_site_quotes_the_long_run():
    path = RESULTS.with_stem("cpu-amd-epyc-long")
    page = " ".join((ROOT / "docs" / "benchmarks.md").read_text().split())
    rows = {row.backend: row for row in Results.read(path).rows if row.N == 16384 and row.layout == "two_view"}
    for name in ("cpu", "eager"):
        row = rows[name]
        assert f"{report.milliseconds(row.total_quartiles_ms[1])} ms and {row.peak_extra_mib:,.0f} MiB" in page
    assert path.relative_to(ROOT).as_posix() in page
