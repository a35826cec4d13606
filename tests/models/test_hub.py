"""The conventions of the Hugging Face Hub, without a connection to it."""

import builtins
import copy
import importlib.util
import re
import sys
import types

import pytest
import torch
from safetensors import safe_open

import spnet
from spnet.analysis.macs import count_macs
from spnet.models.files import CONFIG, WEIGHTS
from spnet.models.hub import CARD, model_card

DATA = {"class_names": [f"a|{i}" for i in range(10)], "mean": [0.25], "std": [0.5]}


def _without_hub(monkeypatch):
    """As where huggingface_hub is not installed; a request for it fails the test."""
    found, imported = importlib.util.find_spec, builtins.__import__

    def refuse(name, *args, **kwargs):
        assert not name.startswith("huggingface_hub")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr("spnet.models.hub.find_spec", lambda n: None if n == "huggingface_hub" else found(n))
    monkeypatch.setattr(builtins, "__import__", refuse)


def test_round_trip_of_a_folder(tmp_path, network, monkeypatch):
    _without_hub(monkeypatch)
    network.data = DATA
    network.save_pretrained(tmp_path / "net")
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == sorted([WEIGHTS, CONFIG, CARD])
    with safe_open(tmp_path / "net" / WEIGHTS, framework="pt") as f:
        assert f.metadata() == {"format": "pt"}
    for folder in (tmp_path / "net", str(tmp_path / "net")):
        again = spnet.SPNet.from_pretrained(folder)
        assert not again.training
        assert (again.config, again.data) == (network.config, DATA)
        x = torch.randn(3, 1, 32, 32)
        assert torch.equal(again(x), network(x))


def test_a_folder_before_a_repository_of_the_same_name(tmp_path, network, monkeypatch):
    _without_hub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    network.save_pretrained("owner/name")
    assert spnet.SPNet.from_pretrained("owner/name").config == network.config


def test_repository(tmp_path, network, monkeypatch):
    network.save_pretrained(tmp_path)
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        return str(tmp_path)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    hub.__spec__ = importlib.util.spec_from_loader("huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    model = spnet.SPNet.from_pretrained("owner/name", revision="v1")
    assert asked == [("owner/name", "v1", [WEIGHTS, CONFIG])]
    assert all(map(torch.equal, model.state_dict().values(), network.state_dict().values()))


def test_repository_without_huggingface_hub(monkeypatch):
    _without_hub(monkeypatch)
    with pytest.raises(ImportError, match="owner/name is no folder here, .* pip install huggingface_hub"):
        spnet.SPNet.from_pretrained("owner/name")


@pytest.mark.parametrize("name", ["missing", "/missing/net", "./missing", "../missing", "~/net", "a/b/c", "owner/"])
def test_neither_folder_nor_repository(monkeypatch, name):
    _without_hub(monkeypatch)
    with pytest.raises(FileNotFoundError, match="is neither a folder nor of the form 'owner/name'"):
        spnet.SPNet.from_pretrained(name)


def test_model_that_create_model_did_not_make(tmp_path):
    model = spnet.SPNet([1], [8], num_classes=2)
    with pytest.raises(ValueError, match="expected one made by create_model"):
        model.save_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match="expected one made by create_model"):
        model_card(model)
    with pytest.raises(ValueError, match="expected one made by create_model"):
        model_card(torch.nn.Linear(1, 1))
    assert not (tmp_path / "net").exists()


def test_names_of_classes_are_no_markup(network):
    network.data = {**DATA, "class_names": ["__background__", "<unk>", "a|b", "`c`", "[d](e)", "f\\"]}
    assert r"\_\_background\_\_, \<unk>, a\|b, \`c\`, \[d](e), f\\ |" in model_card(network)


def test_card_tells_what_the_network_is(network):
    network.data = DATA
    card = model_card(network)
    macs = count_macs(network, (1, 32, 32))
    skipped = macs.dense - sum(b.body for b in macs.blocks)
    assert card.startswith("---\nlibrary_name: spnet\n")
    assert "# resnet20_cifar\n" in card
    assert "9 blocks in 3 stages (3, 3, 3), each with a router" in card
    assert "spnet.create_model('resnet20_cifar', in_channels=1)" in card
    assert "| input | [B, 1, 32, 32], float32 |" in card
    assert "mean 0.25 and std 0.5 |" in card
    assert "| classes | 10: a\\|0, a\\|1, " in card
    assert f"{macs.dense / 1e6:.4g} MMACs ({2 * macs.dense / 1e6:.4g} MFLOPs" in card
    assert f"executed, {skipped / 1e6:.4g} MMACs with none |" in card


def test_card_of_a_network_of_another_dtype(tmp_path, network):
    """It is read in float32, so that is what the input must be."""
    network.bfloat16().save_pretrained(tmp_path)
    assert "| input | [B, 1, 32, 32], float32 |" in (tmp_path / CARD).read_text()
    assert spnet.fast_forward(spnet.SPNet.from_pretrained(tmp_path), torch.zeros(1, 1, 32, 32)).shape == (1, 10)


def test_card_of_a_compiled_network(network):
    wrapper = torch.nn.ModuleDict({"_orig_mod": network})  # without the seconds that importing the compiler takes
    assert model_card(wrapper) == model_card(network)


def test_card_with_what_was_measured(network, tmp_path):
    network.data = DATA
    statistics = spnet.paths(network, (torch.randn(8, 1, 32, 32), torch.arange(8)))
    network.save_pretrained(tmp_path, statistics)
    card = (tmp_path / CARD).read_text()
    assert card == model_card(network, statistics)
    assert f"8 samples, accuracy {statistics.accuracy:.2%}" in card
    assert str(statistics) in card
    assert "## Limits" in card
    assert "No accuracy is stated" not in card


def test_card_of_a_model_in_training_leaves_it_alone(network):
    network.train()
    before = copy.deepcopy(network.state_dict())
    assert "MMACs" in model_card(network)
    assert network.training
    assert all(map(torch.equal, before.values(), network.state_dict().values()))


def test_card_of_a_static_network_without_data():
    model = spnet.create_model("resnet20_cifar", routed=False, num_classes=30)
    card = model_card(model)
    assert "without routers" in card
    assert "not recorded" in card
    assert "| classes | 30 |" in card
    model.data = {"class_names": [f"kind {i}" for i in range(30)], "mean": [0.5] * 3, "std": [0.5] * 3}
    assert "| classes | 30: names in `config.json` |" in model_card(model)
    del model.data["class_names"]
    assert "| classes | 30 |" in model_card(model)


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("data", [None, DATA])
def test_the_code_of_the_card_runs(tmp_path, monkeypatch, routed, data):
    model = spnet.create_model("resnet20_cifar", in_channels=1, routed=routed)
    model.data = data
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("net")
    code = re.search(r"```python\n(.*)```", (tmp_path / "net" / CARD).read_text(), re.DOTALL)[1]
    code = code.replace("this folder, or owner/name", "net").replace("x = ...", "x = images[:, None] / 255")
    names = {"images": torch.zeros(2, 28, 28, dtype=torch.uint8) if data else torch.zeros(2, 32, 32)}
    exec(code, names)
    assert names["logits"].shape == (2, 10)
