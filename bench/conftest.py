"""What every result file says about the machine that it was measured on, and lines for the end of a run."""

import shutil
import subprocess

import pytest
import torch

import spnet

_LINES = pytest.StashKey[list[str]]()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="benchmarks: every cell, not only the quick ones")
    parser.addoption(
        "--rivals", type=lambda names: tuple(names.split(",")), help="benchmarks: only these, comma-separated"
    )


def pytest_configure(config):
    config.stash[_LINES] = []


@pytest.fixture
def report(request):
    """report(line): shown at the end of the run, also where output is captured."""
    return request.config.stash[_LINES].append


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[_LINES]:
        terminalreporter.section("measured")
        for line in config.stash[_LINES]:
            terminalreporter.write_line(line)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(spnet.build_info())
    if torch.cuda.is_available():
        machine_info |= {
            "device": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda_version": torch.version.cuda,
        }


def _driver() -> str | None:
    """The version of the GPU's driver, where its own program is there to tell."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0].strip() or None
