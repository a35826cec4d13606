"""A plugin: ``SPNET_TEST_CORE=path python -m pytest -p tests.sanitize`` runs the native core of another build."""

import importlib.util
import os
import sys

spec = importlib.util.spec_from_file_location("spnet._core", os.environ["SPNET_TEST_CORE"])
core = sys.modules["spnet._core"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
