"""The kernels without a GPU: the files that run them, in a process whose triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .conftest import INTERPRETED, RUN_KERNELS


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the other files run in this process")
def test_kernels():
    files = [Path(__file__).with_name(file) for file in RUN_KERNELS]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
