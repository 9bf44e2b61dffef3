"""`python -m bench hosts`: other libraries' losses beside their adapters."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from bench import hosts
from bench.__main__ import main
from bench.device import Device

pytest.importorskip("info_nce", reason="info-nce-pytorch is not installed")


def test_a_line_for_every_library_and_size(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "HOSTS", [host for host in hosts.HOSTS if host.package[0] == "info_nce"])
    assert main(["hosts", "--quick"]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.startswith("library")
    assert line.startswith("info-nce-pytorch") and "32 x 128" in line and line.count(" ms ") == 2 and line.endswith("x")
    assert line.count("MiB") == 2


def test_another_value_is_no_row(monkeypatch, capsys):
    mine = next(host for host in hosts.HOSTS if host.package[0] == "info_nce")
    scales = itertools.count(1.0)
    monkeypatch.setattr(hosts, "HOSTS", [replace(mine, make=lambda module: _scaled(next(scales)))])
    assert hosts.hosts(Device("cpu"), lambda *_: None, 0.0, quick=True) == 1
    assert "WRONG" in capsys.readouterr().out


def _scaled(factor: float):
    return lambda z1, z2: factor * (z1 * z2).sum()


def test_no_library_is_said(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "HOSTS", [])
    assert hosts.hosts(Device("cpu"), lambda *_: None, 0.0, quick=True) == 2
    assert "No library" in capsys.readouterr().out


@pytest.mark.parametrize("host", hosts.HOSTS, ids=lambda h: f"{h.package[1]} {h.loss}")
def test_losses_are_the_same(host):
    if not host.is_there:
        pytest.skip(f"{host.package[1]} is not installed")
    inputs = hosts.inputs_of(host, 16, torch.device("cpu"))
    values = [loss(inputs.z1, inputs.z2) for loss in host.losses().values()]
    torch.testing.assert_close(*values, rtol=hosts.TOLERANCE, atol=hosts.TOLERANCE)
