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
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    files = [str(Path(__file__).with_name(name)) for name in RUN_KERNELS]
    command = [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
