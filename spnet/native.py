"""The compiled part of spnet, ``spnet._core``, and what is known about its build."""

import importlib.metadata

import torch

try:
    from spnet import _core as core
except ImportError as error:
    raise ImportError(
        f"spnet._core, the compiled part of spnet, cannot be loaded ({error}). "
        "Build it with `pip install -e .` in the folder that holds setup.py."
    ) from error

__all__ = ["build_info", "core"]


def build_info() -> dict:
    """What was built and what it runs on, for bug reports and to see why something is not available.

    Returns:
        dict with the keys

        - ``version`` (str): version of spnet that the native core was built from
        - ``compiler`` (str): C++ compiler and its version
        - ``cuda`` (list of str or None): GPU architectures that are compiled in, such as ``["sm_80", "sm_90"]``
        - ``cuda_status`` (str): the nvcc that compiled them, or why there are none
        - ``cpu_level`` (str): instruction-set level in use: ``v2``, ``avx2``, ``avx512``, ``amx``; ``generic`` off x86
        - ``threads`` (int): threads that native operations use, which is ``torch.get_num_threads()``
        - ``torch`` (str), ``triton`` (str or None): versions found
    """
    architectures = core.cuda_architectures
    return {
        "version": core.version,
        "compiler": core.compiler,
        "cuda": architectures.split() if architectures else None,
        "cuda_status": core.cuda_status,
        "cpu_level": core.cpu_level(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _installed_version("triton", "pytorch-triton"),
    }


def _installed_version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
