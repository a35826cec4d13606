"""Kernels run on the GPU where there is one, else in Triton's interpreter, to be chosen before triton is imported.

Without a GPU the files that run them are therefore collected by the process that ``test_in_interpreter.py`` starts.
"""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUN_KERNELS = ["test_compact.py", "test_conv.py", "test_max_pool.py", "test_pool_route.py"]
RUN_KERNELS += ["test_scale.py", "test_stem.py"]
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore = RUN_KERNELS


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True, scope="session")
def _bfloat16_products():
    """The interpreter keeps bfloat16 as integers and would multiply those in tl.dot (triton 3.9)."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widen(operand):
        if operand.dtype.scalar != tl.bfloat16 or operand.data.dtype != np.uint16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    original = InterpreterBuilder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            InterpreterBuilder, "create_dot", lambda self, a, b, *args: original(self, widen(a), widen(b), *args)
        )
        yield
