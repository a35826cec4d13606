"""What setup.py gives to those who build from an archive."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("setuptools")


def test_a_source_archive_holds_what_is_built_and_no_part_of_the_tests(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "egg_info", f"--egg-base={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    held = set((tmp_path / "spnet.egg-info" / "SOURCES.txt").read_text().splitlines())
    built = [*ROOT.glob("csrc/**/*.*"), *ROOT.glob("kernels/**/*.*"), *ROOT.glob("spnet/assets/**/*.*")]
    built = {str(file.relative_to(ROOT)) for file in built if "__pycache__" not in file.parts}
    assert built | {"CMakeLists.txt", "spnet/cli.py", "kernels/tiles/sm_90.json"} <= held
    assert not any(file.startswith("tests/") for file in held)
