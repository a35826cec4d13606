"""The kernels without a GPU: the files that run them, in a process whose triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .conftest import INTERPRETED, RUN_KERNELS


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the other files run in this process")
@pytest.mark.parametrize("file", RUN_KERNELS)
def test_kernels(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name(file)), "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
