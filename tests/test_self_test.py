"""``python -m batchops`` and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import batchops
from batchops import _self_test


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "batchops", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_self_test_passes_and_names_every_check():
    done = run_module()
    assert done.returncode == 0, done.stdout + done.stderr
    config, checks = done.stdout.split("\n\nself-test against torch in float64\n")
    assert config.startswith(f"batchops        {batchops.__version__}\n")
    lines = checks.splitlines()
    names = [name for name, _ in _self_test.checks("cpu")]
    assert [line[6:28].rstrip() for line in lines if line.startswith("cpu")] == names
    assert all(" ok " in line for line in lines)


def test_the_configuration_alone():
    done = run_module("--config")
    assert done.returncode == 0
    assert done.stdout.rstrip() == batchops.show_config()


@pytest.mark.parametrize(
    ("area", "name", "broken", "words"),
    [
        ("functional", "batch_norm", lambda y: y * 1.001, "output is off by"),
        ("functional", "group_norm", lambda y: y * float("nan"), "output is off by nan"),
        ("data", "collate", lambda batch: {**batch, "x": batch["x"] + 1}, "x differs"),
    ],
)
def test_a_wrong_result_is_found(monkeypatch, capsys, area, name, broken, words):
    module = getattr(_self_test, area)
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: broken(right(*args, **kwargs)))
    assert not _self_test.run()
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert failed
    assert all(line[6:].startswith(name) and words in line for line in failed)


def test_a_wrong_step_is_found(monkeypatch, capsys):
    step = _self_test.optim.LARS.step

    def wrong(self):
        step(self)
        with torch.no_grad():
            self.param_groups[0]["params"][0][0, 0] += 1e-3 if self.defaults["fused"] else 0

    monkeypatch.setattr(_self_test.optim.LARS, "step", wrong)
    assert not _self_test.run()
    assert "LARS                   FAILED  Failure: parameter 0 is off by" in (
        capsys.readouterr().out
    )


def test_importing_costs_little_on_top_of_torch():
    program = """
import time, torch, torch.utils.data, numpy
begin = time.process_time()
import batchops
print(time.process_time() - begin)
"""
    seconds = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True).stdout)
        for _ in range(5)
    ]
    assert min(seconds) < 0.15, seconds
