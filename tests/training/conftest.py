"""Shared by the tests of training."""

import pytest


@pytest.fixture
def no_data_from_outside(monkeypatch, tmp_path_factory):
    """Defaults are looked up in an empty working directory and without $SPNET_DATA."""
    monkeypatch.delenv("SPNET_DATA", raising=False)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))
