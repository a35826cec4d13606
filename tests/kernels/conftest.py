"""Kernels run on the GPU where there is one, else in Triton's interpreter, which has to be on before triton is imported.

Without a GPU this folder is therefore collected by the process that ``test_in_interpreter.py`` starts.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore = ["test_compact.py", "test_conv.py", "test_pool_route.py", "test_stem.py"]


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")
