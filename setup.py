"""Builds the native core ``spnet._core`` with CMake and ninja; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Hands each extension to CMake. SPNET_CUDA=0 in the environment leaves the CUDA files out."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "CMAKE_MAKE_PROGRAM": _tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "SPNET_CUDA": os.environ.get("SPNET_CUDA", "1"),
            "SPNET_MODULE_NAME": target.name,
            "SPNET_VERSION": self.distribution.get_version(),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        # Not by the cache of an earlier build, which names its own compiler and tools, perhaps in a folder moved since.
        subprocess.check_call([_tool("cmake"), "--fresh", "-S", ROOT, "-B", build_dir, "-G", "Ninja", *defines])
        subprocess.check_call([_tool("cmake"), "--build", build_dir])


def _tool(name):
    """A build tool on PATH or, in a virtual environment that is not activated, beside Python."""
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent)]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise SystemExit(f"spnet: {name} not found; `pip install {name}`, or build with pip's build isolation")
    return found


setup(
    license="Apache-2.0",
    packages=[*find_packages(include=["spnet", "spnet.*"]), "spnet.kernels"],
    package_dir={"spnet.kernels": "kernels"},
    ext_modules=[
        Extension(
            "spnet._core",
            sources=[],
            depends=["CMakeLists.txt", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*.*")))],
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
