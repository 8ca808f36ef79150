"""Device choice, and what is said when torch's build and the machine do not fit."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from blip2 import devices


@pytest.fixture
def machine(monkeypatch):
    """Pretend another machine: what nvidia-smi prints, and which build of torch is installed."""

    def pretend(smi: str | None, version: str, cuda: str | None) -> None:
        def run(*args, **kwargs):
            if smi is None:
                raise FileNotFoundError("nvidia-smi")
            return SimpleNamespace(stdout=smi)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        devices.device_advice.cache_clear()

    yield pretend
    devices.device_advice.cache_clear()


@pytest.mark.parametrize(
    ("smi", "version", "cuda", "words"),
    [
        (
            "NVIDIA H100 80GB HBM3, 580.65.06\n",
            "2.13.0+cpu",
            None,
            ["CPU build", "torch==2.13.0+cu130", "whl/cu130"],
        ),
        ("Tesla T4, 535.104.05\n", "2.13.0+cpu", None, ["Tesla T4", "torch==2.13.0+cu126", "whl/cu126"]),
        ("NVIDIA A100, 580.1\nNVIDIA A100, 580.1\n", "2.8.0+cpu", None, ["torch==2.8.0+cu126"]),
        ("Tesla T4, 535.104.05\n", "2.13.0+cu130", "13.0", ["too old", "torch==2.13.0+cu126"]),
        (None, "2.13.0", "13.0", ["no NVIDIA GPU", "torch==2.13.0+cpu", "whl/cpu"]),
    ],
)
def test_advice_names_the_command(machine, smi, version, cuda, words):
    machine(smi, version, cuda)
    advice = devices.device_advice()
    assert [word for word in words if word not in advice] == []
    assert advice.count("pip install") == 1 and "\n" not in advice


@pytest.mark.parametrize(
    ("smi", "version", "cuda"),
    [
        (None, "2.13.0+cpu", None),
        ("NVIDIA H100, 580.65.06\n", "2.13.0+cu130", "13.0"),
        ("No devices were found\n", "2.13.0+cpu", None),
    ],
)
def test_no_advice_where_no_package_would_help(machine, smi, version, cuda):
    machine(smi, version, cuda)
    assert devices.device_advice() is None


def test_choice(machine, monkeypatch):
    machine("Tesla T4, 535.104.05\n", "2.13.0+cpu", None)
    assert devices.choose_device() == torch.device("cpu")
    with pytest.raises(ValueError, match=r"'cuda' is not on this machine; choose auto, cpu.*Tesla T4.*cu126"):
        devices.choose_device("cuda")
    with pytest.raises(ValueError, match="unknown device 'gpu'; choose auto, cpu"):
        devices.choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.choose_device("auto") == torch.device("cuda")
    assert devices.choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2' is not on this machine"):
        devices.choose_device("cuda:2")
