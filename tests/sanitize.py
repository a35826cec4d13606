"""Runs pytest with the native core of another build: python tests/sanitize.py CORE [pytest arguments]."""

import importlib.util
import sys

import pytest

spec = importlib.util.spec_from_file_location("spnet._core", sys.argv[1])
core = sys.modules["spnet._core"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
sys.exit(pytest.main(["--capture=sys", *sys.argv[2:]]))  # what a sanitizer writes is not captured
