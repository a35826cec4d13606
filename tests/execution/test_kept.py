"""Kept plans follow their models: whatever lowering reads, an answer is never stale."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import spnet
from spnet.execution import kept
from spnet.execution.lowering import assemble, read, shape_of, tensors_of
from spnet.routing import routed_blocks
from tests.conftest import settle


def _write_data(model):
    model.features.stage1[0].body[0].weight.data.mul_(1.5)


def _write_one_element(model):
    model.features.stem[1].running_mean.data[0] += 3


def _replace_parameter(model):
    model.heads[-1].weight = nn.Parameter(torch.randn_like(model.heads[-1].weight))


def _replace_block(model):
    model.features.stage1[1] = settle(spnet.create_model("resnet20_cifar"), bias=2.0).features.stage1[1]


def _optimizer_step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()


def _train_and_back(model):
    model.train()(torch.randn(4, 1, 32, 32))
    model.eval()


def _transpose_data(model):
    conv = model.features.stage1[0].body[0]
    conv.weight.data = conv.weight.data.transpose(2, 3)  # the same bytes in the same place


def _swap_parameters(model):
    first, second = (model.features.stage1[i].body for i in (0, 1))
    first[0].weight, second[0].weight = second[0].weight, first[0].weight


def _change_eps(model):
    model.features.stage1[0].body[1].eps = 1.0


def _change_router_eps(model):
    for stage in model.stages:
        for block in stage:
            block.router.bn.eps = 10.0


class _Blurred(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1.0)


def _change_class(model):
    model.features.stem[1].__class__ = _Blurred


def _change_pad(model):
    model.features.stage2[0].shortcut.pad = (16, 0)


class _Undone(spnet.models.SPNet):
    def forward(self, x):
        super().forward(x)
        return x


@pytest.mark.parametrize(
    "change",
    [
        _write_data,
        _write_one_element,
        _replace_parameter,
        _replace_block,
        _optimizer_step,
        _train_and_back,
        _transpose_data,
        _swap_parameters,
        _change_eps,
        _change_router_eps,
        _change_pad,
        _change_class,
    ],
)
def test_the_plan_follows_the_model(network, change):
    x = torch.randn(3, 1, 32, 32)
    before = spnet.fast_forward(network, x, impl="walk")
    change(network)
    after = spnet.fast_forward(network, x, impl="walk")
    expected = spnet.fast_forward(network, x, impl="masked")
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.stem[1], "eps", np.float64(1.0)),
        lambda model: setattr(model.stem[1], "eps", 1.0),
        lambda model: setattr(model.stem[3], "padding", [0, 0]),
        lambda model: model.stem[3].padding.__setitem__(slice(2), [0, 0]),
    ],
)
def test_the_plan_follows_what_is_no_plain_number(change):
    """Sizes may be lists, which PyTorch's pooling keeps as they are, and numbers those of NumPy."""
    model = settle(spnet.models.SPNet([1], [8], num_classes=5, input_size=16, imagenet=True))
    model.features.stem[1].eps = np.float64(1e-5)
    model.features.stem[3] = nn.MaxPool2d([3, 3], [2, 2], [1, 1]).eval()
    x = torch.randn(3, 3, 16, 16)
    before = spnet.fast_forward(model, x, impl="walk")
    change(model.features)
    after = spnet.fast_forward(model, x, impl="walk")
    expected = spnet.fast_forward(model, x, impl="masked")
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_the_plan_follows_the_dtype(network):
    x = torch.randn(3, 1, 32, 32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert spnet.fast_forward(network.to(dtype), x.to(dtype), impl="walk").dtype == dtype


@pytest.mark.parametrize("in_place", [False, True])
def test_the_plan_follows_the_forward_of_a_class(network, in_place):
    class Head(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    def doubled(self, x):
        return F.linear(2 * x, self.weight, self.bias)

    network.heads[-1] = Head(64, 10).eval()
    x = torch.randn(3, 1, 32, 32)
    assert spnet.explain(network, x).impl == "walk"
    spnet.fast_forward(network, x)
    if in_place:
        Head.forward.__code__ = doubled.__code__
    else:
        Head.forward = doubled
    expected = spnet.fast_forward(network, x, impl="masked")
    torch.testing.assert_close(spnet.fast_forward(network, x), expected, rtol=1e-4, atol=1e-4)


def test_the_plan_follows_what_a_forward_calls(network):
    class Head(nn.Linear):
        which = "weight"
        names = {"other": "other"}

        def forward(self, x):
            return self.product(x, getattr(self, self.names.get(self.which, self.which)))

        def product(self, x, weight, *, name=None):
            return F.linear(x, getattr(self, name) if name else weight, self.bias)

    network.heads[-1] = Head(64, 10).eval()
    network.heads[-1].other = nn.Parameter(torch.randn(10, 64))
    x = torch.randn(3, 1, 32, 32)
    for change in (
        lambda: None,
        lambda: setattr(Head, "which", "other"),
        lambda: Head.names.update(other="weight"),
        lambda: setattr(Head, "names", {}),
        lambda: Head.product.__kwdefaults__.update(name="weight"),
        lambda: setattr(Head, "product", lambda self, x, weight: F.linear(x, weight, self.bias)),
    ):
        change()
        assert spnet.explain(network, x).impl == "walk"
        expected = spnet.fast_forward(network, x, impl="masked")
        torch.testing.assert_close(spnet.fast_forward(network, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["logits", "pool", "forward"])
def test_a_router_that_computes_another_thing(network, name):
    x = torch.randn(8, 1, 32, 32)
    spnet.fast_forward(network, x)
    router = network.features.stage1[1].router
    given = getattr(router, name)
    setattr(router, name, lambda x: -given(x))
    _, expected = spnet.fast_forward(network, x, impl="masked", return_paths=True)
    _, paths = spnet.fast_forward(network, x, return_paths=True)
    assert torch.equal(paths.decisions[:, 1], expected.decisions[:, 1])


def test_a_hook_turns_to_another_execution(network):
    x = torch.randn(3, 1, 32, 32)
    spnet.fast_forward(network, x)
    seen = []
    network.features.stem.register_forward_hook(lambda *args: seen.append(1))
    spnet.fast_forward(network, x)
    assert seen == [1]
    with pytest.raises(ValueError, match="impl: 'walk' does not fit this model: a forward hook"):
        spnet.fast_forward(network, x, impl="walk")


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_hook_on_all_modules_turns_to_another_execution(network, register):
    x = torch.randn(3, 1, 32, 32)
    spnet.fast_forward(network, x)
    seen, kept_tensors = [], []

    def keep(module, args, y=None):
        seen.append(module)
        kept_tensors.extend((t, t.clone()) for t in args if isinstance(module, spnet.RoutedBlock))

    handle = getattr(nn.modules.module, register)(keep)
    try:
        spnet.fast_forward(network, x)
        with pytest.raises(ValueError, match="impl: 'walk' does not fit this model: a forward hook on all modules"):
            spnet.fast_forward(network, x, impl="walk")
        with pytest.raises(spnet.LoweringError, match="a forward hook on all modules"):
            spnet.lower(network)
    finally:
        handle.remove()
    assert network.features.stem in seen
    assert len(kept_tensors) == 9
    assert all(torch.equal(held, was) for held, was in kept_tensors)
    assert spnet.explain(network, x).impl == "walk"


def test_an_unchanged_model_is_lowered_once(network, monkeypatch):
    calls = []
    monkeypatch.setattr(kept, "assemble", lambda *args: calls.append(1) or assemble(*args))
    network.helper = object()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            spnet.fast_forward(network, torch.zeros(1, 1, 32, 32))
            network.helper = object()  # nothing that lowering could read
            network.features.stem[1].num_batches_tracked += 1
    finally:
        torch.set_num_threads(before)
    assert calls == [1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.features.stage1[0].body[0], "padding", (0, 0)), "adds a body of .* to a shortcut"),
        (lambda m: setattr(m.features.stage2[0].body[0], "stride", (3, 3)), "adds a body of .* to a shortcut"),
        (
            lambda m: vars(m.features.stage1[0].body[3]).update(dilation=(2, 2), padding=(2, 2)),
            "body of block 0 .* not square, undilated",
        ),
        (lambda m: setattr(m.features.stem[0], "padding_mode", "circular"), "the stem calls pad"),
        (lambda m: m.features.stage1[0].router.dropout.train(), "training mode"),
        (lambda m: m.features.stage1[0].add_module("activation", nn.Tanh().eval()), "activation of block 0 calls tanh"),
        (lambda m: m.heads[0].register_forward_pre_hook(print), "a forward hook"),
        (lambda m: m.to("meta"), "on meta"),
        (lambda m: setattr(m, "__class__", _Undone), "returns another tensor than its last layer"),
    ],
)
def test_a_model_that_fits_no_more_is_refused(network, change, reason):
    x = torch.randn(3, 1, 32, 32)
    spnet.fast_forward(network, x, impl="walk")
    change(network)
    with pytest.raises(ValueError, match=reason):
        spnet.fast_forward(network, x, impl="walk")


@pytest.mark.parametrize("few", [1, 7, kept._FEW])
def test_every_tensor_is_watched(monkeypatch, few):
    """One bit of one element of each, whatever its name, that inference reads; nothing of those for training."""
    monkeypatch.setattr(kept, "_FEW", few)
    model = settle(spnet.models.SPNet([1, 2], [6, 10], num_classes=5, input_size=32, imagenet=True))
    watch = kept._Watch(model, kept._Attributes(model), tensors_of(read(model, shape_of(model))))
    state = model.state_dict()
    for_training = [t for name, t in state.items() if name.startswith(("align.", "heads.0."))]
    assert len(for_training) == 4
    for t in for_training:
        t.data.add_(1)
    tensors = [
        t for name, t in state.items() if not name.startswith(("align.", "heads.0.")) and "num_batches" not in name
    ]
    for t in tensors:
        bits = t.data.view(torch.int32).flatten()
        for place in {0, len(bits) // 2, len(bits) - 1}:
            assert watch.unchanged(model)
            bits[place] ^= 1 << 7
            assert not watch.unchanged(model)
            bits[place] ^= 1 << 7
    assert watch.unchanged(model)


def _watch_all(model):
    tensors = {id(t) for t in (*model.parameters(), *model.buffers())}
    return kept._Watch(model, kept._Attributes(model), tensors)


def _paths(network, *executed):
    paths = torch.zeros(2, len(routed_blocks(network)), dtype=torch.bool)
    paths[0, list(executed)] = True  # the other sample skips everything
    return paths


@pytest.mark.parametrize(("impl", "tables"), [("walk", True), ("batch", True), ("walk", False)])
def test_a_body_is_compared_where_it_was_executed(network, monkeypatch, impl, tables):
    if not tables:  # of DLPack, as with an older PyTorch
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    calls = []
    monkeypatch.setattr(kept, "assemble", lambda *args: calls.append(1) or assemble(*args))
    x = torch.randn(2, 1, 32, 32)

    def follows(*executed):
        paths = _paths(network, *executed)
        got = spnet.fast_forward(network, x, impl=impl, paths=paths)
        expected = spnet.fast_forward(network, x, impl="masked", paths=paths)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        return len(calls)

    assert follows(0, 1, 3) == 1
    blocks = list(routed_blocks(network).values())
    blocks[1].body[0].weight.data.mul_(2)
    assert follows() == follows(0, 2) == follows(5) == 1  # nobody asked
    assert follows(0, 1) == 2
    blocks[2].body[4].running_mean.data.add_(1)
    blocks[-1].body[1].bias.data.add_(1)
    assert follows(1) == 2
    assert follows(2) == 3
    blocks[3].body[3].weight.data = 2 * blocks[3].body[3].weight.data  # elsewhere in memory: what was there is gone
    assert follows(1) == 3
    assert follows(3) == 4
    blocks[-1].router.fc2.bias.data[0] += 1  # of no effect where paths are forced, but it might be
    assert follows() == 5


@pytest.mark.parametrize("tables", [True, False])
def test_decisions_in_every_form(network, monkeypatch, tables):
    if not tables:
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    watch = _watch_all(network)
    paths = _paths(network, 0, 1, 3)
    read_none, read_all = torch.zeros_like(paths), torch.ones_like(paths)
    weight = list(routed_blocks(network).values())[2].body[0].weight
    weight.data = 2 * weight.data
    for others in (paths, paths.T.contiguous().T, paths.repeat(1, 2)[:, : paths.shape[1]], paths[:0], read_none):
        assert watch.unchanged(network, others)
    paths[1, 2] = True
    for some in (paths, paths.T.contiguous().T, read_all, None):
        assert not watch.unchanged(network, some)
    for unknown in (read_none.to("meta"), read_none.float()):
        assert not watch.unchanged(network, unknown)
    network.heads[-1].bias.data[0] += 1
    assert not watch.unchanged(network, read_none)


@pytest.mark.parametrize("share", ["parameter", "storage", "module"])
def test_what_two_places_share_belongs_to_both(network, share):
    first, second = (block.body for block in list(routed_blocks(network).values())[:2])
    if share == "parameter":
        second[0].weight = first[0].weight
    elif share == "storage":
        both = torch.randn(2, *first[0].weight.shape)
        first[0].weight.data, second[0].weight.data = both
    else:
        second[0] = first[0]
    x = torch.randn(2, 1, 32, 32)
    for executed in (0, 1):
        paths = _paths(network, executed)
        before = spnet.fast_forward(network, x, paths=paths)
        (first if executed == 0 else second)[0].weight.data.mul_(2)
        after = spnet.fast_forward(network, x, paths=paths)
        assert not torch.equal(before[0], after[0])
        assert torch.equal(after, spnet.lower(network)(x, paths=paths))


def test_children_of_an_empty_sequential(network):
    """The shortcut of many an identity block."""
    block, x = network.features.stage1[1], torch.randn(2, 1, 32, 32)
    block.shortcut = nn.Sequential().eval()
    spnet.fast_forward(network, x)
    block.shortcut.append(nn.Conv2d(16, 16, 1).eval())
    expected = spnet.fast_forward(network, x, impl="masked")
    torch.testing.assert_close(spnet.fast_forward(network, x), expected, rtol=1e-4, atol=1e-4)


def test_memory_is_held_until_it_is_compared(network):
    """It is read without Python's lock, while another thread may replace the weight."""
    x, weight = torch.randn(2, 1, 32, 32), network.heads[-1].weight
    spnet.fast_forward(network, x, impl="walk")
    memory = StorageWeakRef(weight.untyped_storage())
    weight.data = weight.data.clone()
    assert not memory.expired()
    spnet.fast_forward(network, x, impl="walk")
    assert memory.expired()


def test_memory_that_moves(network):
    """Under the very same tensors and storages."""
    x = torch.randn(2, 1, 32, 32)
    expected = spnet.fast_forward(network, x, impl="walk")
    network.share_memory()
    assert torch.equal(spnet.fast_forward(network, x, impl="walk"), expected)


def test_without_the_tables_of_dlpack(network, monkeypatch):
    """As with a PyTorch that has none."""
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    watch = _watch_all(network)
    assert watch.unchanged(network)
    _transpose_data(network)
    assert not watch.unchanged(network)


def test_versions_of_tensors_that_are_elsewhere(network, monkeypatch):
    # There is no memory to look at.
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    monkeypatch.setattr(kept, "_moved", lambda tensors: lambda: False)
    network.to("meta")
    watch = _watch_all(network)
    assert watch.unchanged(network)
    with torch.no_grad():
        network.heads[-1].weight.add_(1)
    assert not watch.unchanged(network)
    watch = _watch_all(network)
    norm = network.features.stem[1]
    norm.train()(torch.empty(2, norm.num_features, 4, 4, device="meta"))  # writes its statistics uncounted
    norm.eval()
    assert not watch.unchanged(network)
    with torch.inference_mode():
        uncounted = settle(spnet.create_model("resnet20_cifar")).to("meta")
    with pytest.raises(ValueError, match="made in inference mode"):
        _watch_all(uncounted)


@pytest.mark.parametrize("tie", [lambda m: m.forward, lambda m: {"model": m}, lambda m: (1, m.forward)])
def test_a_kept_plan_does_not_keep_its_model(network, tie):
    spnet.fast_forward(network, torch.zeros(1, 1, 32, 32))
    model = settle(spnet.create_model("resnet20_cifar", in_channels=1))
    model.helper = tie(model)
    spnet.fast_forward(model, torch.zeros(1, 1, 32, 32))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    "tie",
    [
        lambda m: setattr(m.features.stem[1], "helper", m.forward),
        lambda m: setattr(m.features.stem[1], "owner", [m]),
        lambda m: setattr(m.features.stem[1], "look", lambda: m),
        lambda m: m.features.stem[1].register_forward_hook(lambda module, inputs, y: (m, y)[1]),
    ],
)
def test_a_part_that_leads_back_to_the_model_does_not_keep_it(tie):
    model = settle(spnet.create_model("resnet20_cifar", in_channels=1))
    tie(model)
    x = torch.randn(2, 1, 32, 32)
    for _ in range(2):
        torch.testing.assert_close(spnet.fast_forward(model, x), spnet.fast_forward(model, x, impl="masked"))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
