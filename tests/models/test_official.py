"""``load_official`` against a plain PyTorch twin of the published networks, with their flat names."""

import argparse
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from spnet.models.files import load_model, save_model
from spnet.models.official import load_official
from spnet.routing import routed_blocks
from tests.conftest import Bomb


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # Nets this small run faster on one thread, above all on a machine that is busy: 35 s -> 8 s.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    def __init__(self, cin, width, cout, stride, *, router, conv_router, skip, pad):
        super().__init__()
        # (in, out, kernel, stride) of each convolution of the body
        if cout == width:
            convs = [(cin, width, 3, stride), (width, width, 3, 1)]
        else:
            convs = [(cin, width, 1, 1), (width, width, 3, stride), (width, cout, 1, 1)]
        self.n = len(convs)
        for i, (a, b, k, s) in enumerate(convs, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, k, s, k // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        self.fc1 = nn.Conv2d(cin, router, 1) if conv_router else nn.Linear(cin, router)
        self.fc1bn = nn.BatchNorm1d(router)
        self.fc2 = nn.Conv2d(router, 2, 1) if conv_router else nn.Linear(router, 2)
        self.conv_router, self.skip = conv_router, skip
        self.pads = width // 4 if pad and (stride != 1 or cin != cout) else None
        projected = [nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout)]
        changes = self.pads is None and (stride != 1 or cin != cout)
        self.add_module(skip, nn.Sequential(*projected if changes else []))

    def decide(self, x):
        h = F.avg_pool2d(x, x.size(2))
        if self.conv_router:
            h = F.relu(self.fc1bn(self.fc1(h).flatten(1)))
            return self.fc2(h[:, :, None, None]).flatten(1)
        return self.fc2(F.relu(self.fc1bn(self.fc1(h.flatten(1)))))

    def forward(self, x):
        z = self.decide(x)
        h = x
        for i in range(1, self.n + 1):
            h = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(h))
            h = F.relu(h) if i < self.n else h
        if self.pads is None:
            kept = getattr(self, self.skip)(x)
        else:
            kept = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pads, self.pads))
        return F.relu(kept + h * z.argmax(1).view(-1, 1, 1, 1)), z


class Twin(nn.Module):
    """The published networks; heads: "all" (SP-Net) or "main" (ConvNet-AIG)."""

    def __init__(
        self,
        blocks,
        widths,
        *,
        imagenet=False,
        bottleneck=False,
        classes=5,
        channels=3,
        router=128,
        conv_router=False,
        skip="shortcut",
        pad=False,
        head="linear",
        heads="all",
    ):
        super().__init__()
        expansion = 4 if bottleneck else 1
        self.imagenet, self.head = imagenet, head
        self.conv1 = nn.Conv2d(channels, widths[0], 7, 2, 3, bias=False)
        if not imagenet:
            self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        cin, out, self.layers = widths[0], widths[-1] * expansion, []
        for s, (n, width) in enumerate(zip(blocks, widths, strict=True), 1):
            layer = nn.Sequential()
            for i in range(n):
                stride = 2 if s > 1 and i == 0 else 1
                kind = {"router": router, "conv_router": conv_router, "skip": skip, "pad": pad}
                layer.append(Block(cin, width, width * expansion, stride, **kind))
                cin = width * expansion
            self.add_module(f"layer{s}", layer)
            self.layers.append(f"layer{s}")
            if heads == "all" and s < len(blocks):
                self.add_module(f"fc{s}", nn.Linear(out if imagenet else cin, classes))
                if imagenet:
                    self.add_module(f"cc{s}", nn.Linear(cin, out))
        self.add_module(head, nn.Linear(cin, classes))

    def forward(self, x):
        """(main logits [B, classes], router logits [B, L, 2])."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
        logits = []
        for name in self.layers:
            for block in getattr(self, name):
                x, z = block(x)
                logits.append(z)
        x = F.avg_pool2d(x, x.size(2)).flatten(1)
        return getattr(self, self.head)(x), torch.stack(logits, 1)


def make(images, *args, **kwargs):
    """A twin with random weights, whose BatchNorm statistics fit the images so that its decisions differ."""
    torch.manual_seed(7)
    twin = Twin(*args, **kwargs)
    norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    with torch.no_grad():
        for m in norms:
            m.momentum = 1.0
            m.weight.uniform_(0.5, 1.5)
            m.bias.normal_(0, 0.3)
        twin(images)
        for m in norms:
            m.running_mean.add_(torch.randn_like(m.running_mean) * 0.1 * m.running_var.sqrt())
            m.running_var.mul_(torch.empty_like(m.running_var).uniform_(0.7, 1.4))
    return twin.eval()


def images(batch, channels, size):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x * torch.linspace(0.3, 2, batch).view(-1, 1, 1, 1) + torch.randn(batch, channels, 1, 1, generator=generator)


def assert_same(model, twin, x):
    """Main logits and decisions of the loaded network are the twin's, and both kinds of decision occur."""
    seen = []
    for block in routed_blocks(model).values():
        block.router.register_forward_hook(lambda m, i, z: seen.append(z))
    with torch.no_grad():
        y, (expected, z_expected) = model(x), twin(x)
    z = torch.stack(seen, 1)
    sure = (z_expected[..., 1] - z_expected[..., 0]).abs() > 1e-3  # [B, L]
    decisions = z_expected[..., 1] > z_expected[..., 0]
    assert 0 < decisions.sum() < decisions.numel()
    whole = sure.all(1)
    assert whole.sum() >= len(x) - 1
    assert torch.equal((z[..., 1] > z[..., 0])[whole], decisions[whole])
    torch.testing.assert_close(z[whole], z_expected[whole], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[whole], expected[whole], atol=1e-5, rtol=1e-5)


CIFAR = ([2, 2, 2], [8, 16, 32])
IMAGENET = ([1, 2, 1, 1], [8, 12, 16, 24])
NETWORKS = {
    "SP-Net CIFAR": (*CIFAR, {"pad": True}),
    "SP-Net CIFAR, one channel": (*CIFAR, {"pad": True, "channels": 1, "classes": 3}),
    "SP-Net CIFAR, called fc and downsample": (*CIFAR, {"pad": True, "head": "fc", "skip": "downsample"}),
    "ConvNet-AIG CIFAR": (*CIFAR, {"router": 16, "conv_router": True, "heads": "main"}),
    "CIFAR, linear router of 16": (*CIFAR, {"router": 16, "skip": "downsample"}),
    "CIFAR, uneven stages": ([1, 3, 2], [8, 16, 32], {"pad": True}),
    "SP-Net ImageNet": (*IMAGENET, {"imagenet": True, "bottleneck": True, "head": "fc", "skip": "downsample"}),
    "ConvNet-AIG ImageNet": (
        *IMAGENET,
        {"imagenet": True, "bottleneck": True, "router": 16, "conv_router": True, "heads": "main"},
    ),
    "ImageNet basic": (*IMAGENET, {"imagenet": True, "head": "fc"}),
    "ImageNet basic, option A": ([1, 1, 1, 1], [8, 16, 32, 64], {"imagenet": True, "pad": True, "heads": "main"}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_same_logits_and_decisions(name):
    blocks, widths, options = NETWORKS[name]
    x = images(8, options.get("channels", 3), 64 if options.get("imagenet") else 16)
    twin = make(x, blocks, widths, **options)
    model = load_official(twin.state_dict())
    assert not model.training
    assert model.input_size == (224 if options.get("imagenet") else 32)
    assert (model.num_classes, model.in_channels) == (options.get("classes", 5), options.get("channels", 3))
    assert_same(model, twin, x)
    for s in range(len(blocks) - 1):  # training-only layers, where the file has them
        if options.get("heads") != "main":
            assert torch.equal(model.heads[s].weight, getattr(twin, f"fc{s + 1}").weight)
            if options.get("imagenet"):
                assert torch.equal(model.align[s].bias, getattr(twin, f"cc{s + 1}").bias)


@pytest.fixture(scope="module")
def x():
    return images(6, 3, 16)


@pytest.fixture(scope="module")
def twin(x):
    return make(x, [1, 1, 1], [8, 16, 32], pad=True)


@pytest.fixture
def state(twin):
    return OrderedDict(twin.state_dict())


def wrapped(state):
    return {
        "epoch": 3,
        "state_dict": {"module." + k: t for k, t in state.items()},
        "best_prec1": torch.tensor(93.0),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }


@pytest.mark.parametrize(
    "variant",
    [
        wrapped,
        lambda s: {"module." + k: t for k, t in s.items()},
        lambda s: {"module.module." + k: t for k, t in s.items()},
        lambda s: {"_orig_mod." + k: t for k, t in s.items()},
        lambda s: {"module._orig_mod." + k: t for k, t in s.items()},
        lambda s: {"state_dict": s},
        lambda s: {k: t for k, t in s.items() if not k.endswith("num_batches_tracked")},
        lambda s: {k: nn.Parameter(t, requires_grad=t.is_floating_point()) for k, t in s.items()},
        lambda s: {k: t.double() if t.is_floating_point() else t for k, t in s.items()},
    ],
    ids=[
        "wrapped",
        "module",
        "module twice",
        "compiled",
        "module of compiled",
        "wrapper only",
        "no counters",
        "parameters",
        "float64",
    ],
)
def test_variants_of_the_state_dict(variant, state, twin, x):
    model = load_official(variant(state))
    assert all(t.dtype == torch.float32 for t in model.parameters())
    assert_same(model, twin, x)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_file(tmp_path, zipped, state, twin, x):
    torch.save(wrapped(state), tmp_path / "checkpoint.pth.tar", _use_new_zipfile_serialization=zipped)
    assert_same(load_official(tmp_path / "checkpoint.pth.tar"), twin, x)
    assert_same(load_official(str(tmp_path / "checkpoint.pth.tar")), twin, x)


def test_safetensors_file(tmp_path, state, twin, x):
    save_file(state, tmp_path / "weights.safetensors")
    assert_same(load_official(tmp_path / "weights.safetensors"), twin, x)


def test_does_not_share_or_change_the_given_tensors(state):
    before = {k: t.clone() for k, t in state.items()}
    model = load_official(state)
    with torch.no_grad():
        for t in model.state_dict().values():
            t.zero_()
    assert all(torch.equal(t, before[k]) for k, t in state.items())


def test_missing_stage_heads_stay_fresh(state, twin, x):
    for k in ("fc1.weight", "fc1.bias"):
        del state[k]
    model = load_official(state)
    assert model.heads[0].weight.abs().sum() > 0
    assert torch.equal(model.heads[1].weight, twin.fc2.weight)
    assert_same(model, twin, x)


def test_the_defaults_of_torch_do_not_matter(state, twin, x, other_defaults):
    assert_same(load_official(state), twin, x)


def outline(**options):
    """State dict of a twin of published size without the memory: every tensor is one zero, expanded."""
    with torch.device("meta"):
        state = Twin(**options).state_dict()
    return {k: torch.zeros((), dtype=t.dtype).expand(t.shape) for k, t in state.items()}


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (
            {"blocks": [18, 18, 18], "widths": [16, 32, 64], "pad": True, "classes": 100},
            {"name": "resnet110_cifar", "num_classes": 100, "in_channels": 3, "router_width": 128, "shortcut": "pad"},
        ),
        (
            {"blocks": [3] * 3, "widths": [16, 32, 64], "router": 16, "conv_router": True, "channels": 1},
            {
                "name": "resnet20_cifar",
                "num_classes": 5,
                "in_channels": 1,
                "router_width": 16,
                "shortcut": "projection",
            },
        ),
        (
            {"blocks": [2] * 4, "widths": [64, 128, 256, 512], "imagenet": True},
            {"name": "resnet18", "num_classes": 5, "in_channels": 3, "router_width": 128, "shortcut": "projection"},
        ),
        (
            {"blocks": [3, 4, 6, 3], "widths": [64, 128, 256, 512], "imagenet": True, "bottleneck": True, "classes": 9},
            {"name": "resnet50", "num_classes": 9, "in_channels": 3, "router_width": 128, "shortcut": "projection"},
        ),
        ({"blocks": [6, 6, 6], "widths": [16, 32, 64], "pad": True}, None),  # resnet38
        ({"blocks": [3, 3, 3], "widths": [8, 16, 32], "pad": True}, None),  # narrow resnet20
        ({"blocks": [2, 3, 4], "widths": [16, 32, 64], "pad": True}, None),  # as deep as resnet20
    ],
)
def test_config(options, config):
    assert load_official(outline(**options)).config == config


def test_round_trip_through_a_model_folder(tmp_path, x):
    twin = make(x, [3, 3, 3], [16, 32, 64], router=16, conv_router=True, heads="main")
    save_model(load_official(twin.state_dict()), tmp_path / "model")
    assert_same(load_model(tmp_path / "model"), twin, x)


# Every bad input: nothing but ValueError or FileNotFoundError, and the culprits named.


def refuse(state, *told):
    with pytest.raises(ValueError, match="SP-Net or ConvNet-AIG") as e:
        load_official(state)
    for part in told:
        assert part in str(e.value)
    return str(e.value)


def test_unplaced_keys_are_all_named(state):
    state["layer1.0.conv4.weight"] = torch.zeros(3)
    state["layer3.5.bn1.bias"] = torch.zeros(3)
    state["layer2.0.conv1.bias"] = torch.zeros(16)
    state["extra"] = torch.zeros(1)
    state["note"] = "not a tensor"
    told = refuse(state)
    names = "extra, layer1.0.conv4.weight, layer2.0.conv1.bias, layer3.5.bn1.bias, note"
    assert told.endswith(f"could not place: {names}")


def test_keys_are_named_as_in_the_file(state):
    state = {"module." + k: t for k, t in state.items()}
    del state["module.layer1.0.bn2.running_var"]
    state["module.extra"] = torch.zeros(1)
    refuse({"state_dict": state}, "could not place: module.extra", "missing: module.layer1.0.bn2.running_var")


def test_two_main_heads(state):
    state["fc.weight"], state["fc.bias"] = state["linear.weight"], state["linear.bias"]
    refuse(state, "could not place: linear.bias, linear.weight")


def test_two_kinds_of_names_for_shortcuts(x):
    state = make(x, [1, 1, 1], [8, 16, 32]).state_dict()
    state["layer2.0.downsample.0.weight"] = state.pop("layer2.0.shortcut.0.weight")
    refuse(state, "layer3.0.shortcut.0.weight", "missing: layer2.0.downsample.1.bias")


@pytest.mark.parametrize(
    "key",
    [
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv1.weight",
        "layer2.0.fc1.weight",
        "layer1.0.fc1.weight",
        "layer3.0.fc1bn.running_var",
        "layer2.0.fc2.bias",
        "linear.weight",
        "linear.bias",
        "fc1.bias",  # half a stage head is a defect, a whole one may be absent
    ],
)
def test_missing_key(key, state):
    del state[key]
    assert refuse(state).endswith(f"missing: {key}")


def test_missing_stem_of_an_imagenet_network():
    state = make(images(4, 3, 64), *IMAGENET, imagenet=True).state_dict()
    del state["conv1.weight"]
    assert refuse(state).endswith("missing: conv1.weight")


def test_missing_main_head(state):
    del state["linear.weight"], state["linear.bias"]
    refuse(state, "missing: linear.bias, linear.weight")


def test_missing_block(x):
    state = make(x, *CIFAR, pad=True).state_dict()
    refuse({k: t for k, t in state.items() if not k.startswith("layer2.0.")}, "layer2.1.conv1.weight", "layer3.0.")


def test_missing_projections_of_bottlenecks(x):
    state = make(images(4, 3, 64), [1, 1, 1, 1], [8, 8, 8, 8], imagenet=True, bottleneck=True).state_dict()
    state = {k: t for k, t in state.items() if ".shortcut." not in k}
    refuse(state, "missing: layer1.0.shortcut.0.weight, layer1.0.shortcut.1.bias", "layer4.0.shortcut.1.weight")


@pytest.mark.parametrize(
    ("key", "tensor", "told"),
    [
        ("layer2.0.conv2.weight", torch.zeros(16, 16, 5, 5), "expected float [16, 16, 3, 3], got float [16, 16, 5, 5]"),
        ("conv1.weight", torch.zeros(8, 3, 5, 5), "expected float [8, 3, 3, 3], got float [8, 3, 5, 5]"),
        ("conv1.weight", torch.zeros(8), "expected float [8, 3, 3, 3], got float [8]"),
        ("conv1.weight", torch.zeros(0, 0, 3, 3), "expected float [8, 3, 3, 3], got float [0, 0, 3, 3]"),
        ("linear.weight", torch.tensor(1.0), "expected float [5, 32], got float []"),
        ("layer1.0.fc1.weight", torch.zeros(128, 8, 3, 3), "expected float [128, 8], got float [128, 8, 3, 3]"),
        ("fc1.weight", torch.zeros(5, 32), "expected float [5, 8], got float [5, 32]"),
        ("linear.bias", torch.zeros(5, dtype=torch.int8), "expected float [5], got torch.int8 [5]"),
    ],
)
def test_other_shape_or_type(key, tensor, told, state):
    state[key] = tensor
    refuse(state, f"{key} ({told})")


def test_static_network_lacks_routers(state):
    static = {k: t for k, t in state.items() if ".fc" not in k}
    refuse(static, "missing: layer1.0.fc1.bias, layer1.0.fc1.weight, layer1.0.fc1bn.bias", "layer3.0.fc2.weight")


@pytest.mark.parametrize("foreign", [{}, {"state_dict": {}}, {"epoch": 3}, {3: torch.zeros(2)}, {"state_dict": 1}])
def test_foreign_dict(foreign):
    told = refuse(foreign, "missing: bn1.bias")
    assert ("could not place" in told) == (foreign not in ({}, {"state_dict": {}}))


def test_no_file(tmp_path):
    for name in ("nothing.pth", "nothing.safetensors"):
        with pytest.raises(FileNotFoundError, match=name):
            load_official(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.99])
def test_truncated_file(tmp_path, share, zipped, state):
    path = tmp_path / "truncated.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"truncated\.pth is truncated or no file of tensors"):
        load_official(path)


def test_truncated_safetensors_file(tmp_path, state):
    path = tmp_path / "truncated.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"truncated\.safetensors"):
        load_official(path)


@pytest.mark.parametrize("content", [b"hello world", b"\x89PNG\r\n\x1a\n", b"\x00" * 64, b"PK\x03\x04"])
def test_foreign_file(tmp_path, content):
    path = tmp_path / "foreign.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"foreign\.pth"):
        load_official(path)


def test_file_of_one_tensor(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match=r"tensor\.pth: expected a state dict, got a Tensor"):
        load_official(tmp_path / "tensor.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["zip", "before 1.6", "pickle 2", "pickle 5", "named safetensors"])
def test_code_in_a_file_is_not_run(tmp_path, how, state):
    marker, path = tmp_path / "marker", tmp_path / "malicious.pth"
    content = {"state_dict": state, "extra": Bomb(marker)}
    if how == "named safetensors":
        path = path.with_suffix(".safetensors")
        torch.save(content, path)
    elif how.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(how[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match="malicious"):
        load_official(path)
    assert not marker.exists()


@pytest.mark.parametrize("other", [np.float64(93.1), argparse.Namespace(lr=0.1)], ids=["numpy", "Namespace"])
def test_objects_beside_the_tensors_get_a_recipe(tmp_path, monkeypatch, other, state, twin, x):
    path = tmp_path / "old.pth"
    torch.save({**wrapped(state), "best_prec1": other}, path)
    with pytest.raises(ValueError, match=r"old\.pth holds Python objects beside its tensors") as e:
        load_official(path)
    recipe = str(e.value)[str(e.value).index("torch.save(") :]
    monkeypatch.chdir(tmp_path)
    exec(recipe)
    assert_same(load_official("weights.pth"), twin, x)


def test_other_argument():
    with pytest.raises(TypeError):
        load_official(nn.Linear(1, 1))
