"""``SPNet.from_pretrained`` through huggingface_hub itself, from its cache and with the network off."""

import pytest
import torch

import spnet

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no connection."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_cached_repository(cache, network):
    commit, repository = "0123456789abcdef0123456789abcdef01234567", cache / "models--owner--name"
    network.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for revision in (None, "main", commit):
        model = spnet.SPNet.from_pretrained("owner/name", revision=revision)
        x = torch.randn(2, 1, 32, 32)
        assert torch.equal(model(x), network(x))


def test_repository_that_cannot_be_reached(cache):
    with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
        spnet.SPNet.from_pretrained("owner/name")


def test_the_card_is_one_that_the_hub_accepts(tmp_path, network):
    network.data = {"class_names": [str(i) for i in range(10)], "mean": [0.5], "std": [0.5]}
    network.save_pretrained(tmp_path)
    data = huggingface_hub.ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "spnet"
    assert data.pipeline_tag == "image-classification"
