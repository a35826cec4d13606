"""Model folders, and starting from static weights."""

import errno
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

import spnet
from spnet import load_model, save_model
from spnet.models.files import CONFIG, WEIGHTS, load_initial_weights, load_weights, write_whole
from tests.conftest import Bomb, states_equal


@pytest.fixture
def folder(tmp_path, network):
    save_model(network, tmp_path / "net")
    return tmp_path / "net"


# ---------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize(
    "options",
    [
        {"name": "resnet20_cifar", "num_classes": 7, "in_channels": 1},
        {"name": "resnet20_cifar", "routed": False},
        {"name": "resnet18", "num_classes": 3, "router_width": 16},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_round_trip(tmp_path, options):
    model = spnet.create_model(**options)
    model.data = {"class_names": ["a", "b"], "mean": [0.5], "std": [0.25]}
    save_model(model, tmp_path / "a" / "b")
    loaded = load_model(str(tmp_path / "a" / "b"))
    assert states_equal(loaded, model)
    assert (loaded.config, loaded.data) == (model.config, model.data)
    assert not any(m.training for m in loaded.modules())
    assert {p.name for p in (tmp_path / "a" / "b").iterdir()} == {WEIGHTS, CONFIG}


def test_round_trip_of_other_dtype_and_memory_format(tmp_path, network):
    low = network.bfloat16().to(memory_format=torch.channels_last)
    save_model(low, tmp_path)
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert states_equal(loaded.bfloat16(), low)


def test_data_round_trip(tmp_path, network):
    network.data = {"class_names": ["a"], "mean": [0.25], "std": [0.5]}
    save_model(network, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["data"] == load_model(tmp_path).data == network.data


def test_the_defaults_of_torch_do_not_matter(folder, network, other_defaults):
    assert states_equal(load_model(folder), network)


def test_compiled_model_is_saved_as_the_model_in_it(tmp_path, network):
    # A stand-in for the wrapper, without the seconds that importing the compiler takes.
    save_model(torch.nn.ModuleDict({"_orig_mod": network}), tmp_path)
    assert states_equal(load_model(tmp_path), network)


def test_files_have_the_usual_permissions(folder):
    umask = os.umask(0)
    os.umask(umask)
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o666 & ~umask}


def test_model_that_create_model_did_not_make(tmp_path):
    with pytest.raises(ValueError, match="model: expected one made by create_model"):
        save_model(spnet.SPNet([1, 1], [8, 8], num_classes=2), tmp_path / "x")
    with pytest.raises(ValueError, match="of another network keep the state_dict, or save the plan"):
        save_model(torch.nn.Linear(1, 1), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("during", ["fsync", "replace"])
def test_full_disk_leaves_the_model_before(monkeypatch, folder, network, during):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, during, full)
    with torch.no_grad():
        network.heads[-1].bias.add_(1)
    with pytest.raises(OSError, match=f"{WEIGHTS}: not written, what was there before stays .*No space left"):
        save_model(network, folder)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    load_model(folder)


def test_write_whole_over_the_leftover_of_a_kill(tmp_path):
    (tmp_path / ".x.partial").write_text("a longer text of before")
    write_whole(tmp_path / "x", b"now")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"now"


def test_several_writers_at_once(tmp_path):
    texts = [bytes([65 + i]) * (10_000 * (i + 1)) for i in range(4)]

    def write(text: bytes) -> None:
        for _ in range(25):
            write_whole(tmp_path / "x", text)
            assert (tmp_path / "x").read_bytes() in texts

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write, texts))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_folder_of_model_folders_is_told_apart(tmp_path, folder):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("best", "last"):
        (run / name).symlink_to(folder)
    with pytest.raises(FileNotFoundError, match=rf"no weights at {run}/\S+, but in {run}/best and {run}/last\Z"):
        load_model(run)


def test_missing(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no weights at .*nothing"):
        load_model(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no weights at .*nothing.safetensors"):
        load_weights(tmp_path / "nothing.safetensors")
    (folder / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=CONFIG):
        load_model(folder)


def test_load_weights_of_a_file_or_a_folder(folder, network):
    for path in (folder, folder / WEIGHTS, str(folder / WEIGHTS)):
        weights = load_weights(path)
        assert all(torch.equal(weights[name], t) for name, t in network.state_dict().items())


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, 5000, -100, -1])
def test_truncated_weights(folder, length):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:length])
    with pytest.raises(ValueError, match="model.safetensors is no complete safetensors file"):
        load_model(folder)


def test_foreign_weights(tmp_path, folder):
    mark = tmp_path / "executed"
    foreign = [b"not weights at all", pickle.dumps(Bomb(mark)), bytes(1000), b"\xff" * 1000]
    torch.save({"state_dict": Bomb(mark)}, tmp_path / "bomb.pt")
    foreign.append((tmp_path / "bomb.pt").read_bytes())
    for data in foreign:
        (folder / WEIGHTS).write_bytes(data)
        with pytest.raises(ValueError, match="model.safetensors is no complete safetensors file"):
            load_model(folder)
    assert not mark.exists()


def test_weights_of_another_network(tmp_path, folder):
    save_model(spnet.create_model("resnet32_cifar", in_channels=1), tmp_path / "other")
    (folder / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match="folder: .* does not describe its weights"):
        load_model(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"model": null}',
        '{"model": {}}',
        '{"model": {"name": "resnet7"}}',
        '{"model": {"name": "resnet20_cifar", "colour": 3}}',
        '{"model": {"name": "resnet20_cifar", "in_channels": 1, "num_classes": -4}}',
        '{"model": {"name": "resnet20_cifar", "in_channels": 3}}',
        '{"model": {"name": "resnet20_cifar", "in_channels": 1, "input_size": 0}}',
        '{"model": {"name": "resnet20_cifar", "in_channels": 1, "input_size": 32.5}}',
        '{"model": {"name": "resnet20_cifar", "in_channels": 1}, "data": 3}',
        '{"model": {"name": "resnet20_cifar", "in_channels": 1}, "data": {"mean": 0.5, "std": [0.5]}}',
        '{"model": {"name": "resnet20_cifar", "in_channels": 1}, "data": {"class_names": ["a"]}}',
    ],
)
def test_damaged_description(folder, text):
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match="folder: .* does not describe its weights"):
        load_model(folder)


@pytest.mark.parametrize(
    "data",
    [
        {"mean": torch.tensor([0.5]), "std": [0.5]},
        {"mean": [0.5]},
        {"mean": [0.5], "std": [0.5], "class_names": [3]},
        [0.5],
    ],
)
def test_data_of_another_form(tmp_path, network, data):
    network.data = data
    with pytest.raises(ValueError, match="data: expected lists of numbers 'mean' and 'std', .*, got "):
        save_model(network, tmp_path / "net")
    network.data = {"mean": [0.5], "std": [0.5], "of": torch.tensor(3)}
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        save_model(network, tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("name", ["num_classes", "in_channels", "input_size"])
@pytest.mark.parametrize("value", [0, 2.5, None])
def test_impossible_sizes(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected a whole number of at least 1, got {value}"):
        spnet.create_model("resnet20_cifar", **{name: value})


def test_description_of_a_network_of_others(folder):
    (folder / CONFIG).write_text('{"architectures": ["ResNet"]}')
    with pytest.raises(ValueError, match=r"does not describe its weights \(no 'model' in config\.json\)"):
        load_model(folder)


def test_description_that_is_no_text(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="folder: .* does not describe its weights"):
        load_model(folder)


# --------------------------------------------------------------------------------------------- static weights


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet18"])
@pytest.mark.parametrize("routed", [False, True])
def test_static_weights(tmp_path, name, routed):
    source = spnet.create_model(name, num_classes=5, routed=routed)
    save_model(source, tmp_path)
    target = spnet.create_model(name, num_classes=5)
    before = {k: t.clone() for k, t in target.state_dict().items()}
    load_initial_weights(target, tmp_path / WEIGHTS if routed else tmp_path)
    for key, t in target.state_dict().items():
        kept = ".router." in key and not routed
        assert torch.equal(t, before[key] if kept else source.state_dict()[key])


def test_static_weights_of_another_network(tmp_path):
    target = spnet.create_model("resnet20_cifar", in_channels=1)
    before = {k: t.clone() for k, t in target.state_dict().items()}
    for i, other in enumerate(
        (
            spnet.create_model("resnet32_cifar", in_channels=1, routed=False),
            spnet.create_model("resnet20_cifar", in_channels=3, routed=False),
            spnet.create_model("resnet20_cifar", in_channels=1, num_classes=7, routed=False),
        )
    ):
        save_model(other, tmp_path / str(i))
        with pytest.raises(ValueError, match=r"holds another network: \d+ keys differ, such as '"):
            load_initial_weights(target, tmp_path / str(i))
    routers = spnet.create_model("resnet20_cifar", in_channels=1).state_dict()
    lost = next(name for name in routers if ".router." in name)
    del routers[lost]
    save_file(routers, tmp_path / "routers")
    with pytest.raises(ValueError, match=f"holds another network: 1 keys differ, such as '{lost}'"):
        load_initial_weights(target, tmp_path / "routers")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_initial_weights(target, tmp_path / "nothing")
    (tmp_path / "0" / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(ValueError, match="no complete safetensors file"):
        load_initial_weights(target, tmp_path / "0")
    assert all(torch.equal(t, before[k]) for k, t in target.state_dict().items())
