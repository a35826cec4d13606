"""Plans: what fits, what is said of what does not, and files that are whole or refused."""

import copy
import multiprocessing
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spnet
from spnet.execution.plan import _digest
from spnet.training.distributed import synchronise_batchnorm
from tests.conftest import VARIANTS, SqueezeExcitation, settle, vary


def _small(variants=(), **options):
    options = dict(num_classes=5, input_size=12, in_channels=2) | options
    return settle(vary(spnet.models.SPNet([2, 2], [6, 10], **options), variants))


def test_a_plan_answers_like_its_model(network):
    x = torch.randn(5, 1, 32, 32)
    plan = spnet.lower(network)
    assert plan.input_shape == (1, 32, 32)
    logits, paths = plan(x, return_paths=True)
    expected, masked = spnet.fast_forward(network, x, impl="masked", return_paths=True)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(paths.decisions, masked.decisions)
    assert torch.equal(paths.macs, masked.macs)
    assert paths.dense_macs == masked.dense_macs
    assert paths.blocks == masked.blocks
    assert torch.equal(plan(x), logits)


def test_a_plan_keeps_its_weights(network):
    x = torch.randn(2, 1, 32, 32)
    plan = spnet.lower(network)
    before = plan(x)
    with torch.no_grad():
        network.heads[-1].bias += 1
    assert torch.equal(plan(x), before)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 32, 32), r"x: expected torch.float32 \[B, 1, 32, 32\] on cpu, got torch.float32 \[2, 3,"),
        (torch.zeros(1, 32, 32), r"x: expected"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.float64), r"got torch.float64"),
        (torch.zeros(2, 1, 32, 32, device="meta"), r"on meta"),
        (torch.zeros(2, 1, 32, 32, requires_grad=True), r"x: requires grad"),
    ],
)
def test_bad_input(network, x, message):
    with pytest.raises(ValueError, match=message):
        spnet.lower(network)(x)


def test_bad_paths(network):
    with pytest.raises(ValueError, match=r"paths: expected torch.bool \[2, 9\]"):
        spnet.lower(network)(torch.zeros(2, 1, 32, 32), paths=torch.ones(2, 8, dtype=torch.bool))


def test_bad_options(network):
    plan, x = spnet.lower(network), torch.zeros(1, 1, 32, 32)
    with pytest.raises(ValueError, match="threshold: expected a number, got NaN"):
        plan(x, threshold=float("nan"))
    with pytest.raises(TypeError, match="threshold: expected a number, got NoneType"):
        plan(x, threshold=None)
    with pytest.raises(ValueError, match="impl: a plan runs by 'walk' or 'batch', got 'routed'"):
        plan(x, impl="routed")


def test_says_what_it_is(network):
    assert repr(spnet.lower(network)) == "Plan(float32 [B, 1, 32, 32] -> [B, 10], 9 blocks, by walk on cpu)"


def test_what_is_no_tensor(network):
    plan, x = spnet.lower(network), torch.zeros(1, 1, 32, 32)
    with pytest.raises(TypeError, match="x: expected a Tensor, got ndarray"):
        plan(x.numpy())
    with pytest.raises(TypeError, match="paths: expected a Tensor, got list"):
        plan(x, paths=[[True] * 9])
    with pytest.raises(TypeError, match="x: expected a Tensor, got tuple"):
        spnet.calibrate(network, [(x, torch.zeros(1))])
    with pytest.raises(ValueError, match="x: expected a dense Tensor, got one of torch.sparse_coo"):
        plan(x.to_sparse())


def test_what_is_no_module():
    for call in (spnet.lower, lambda model: spnet.calibrate(model, [])):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
            call("net.plan")


@pytest.mark.parametrize("shape", [(12, 12), (2, -1, 12), (2, 0, 12), (2.0, 12, 12), (2, 12, "a"), "2aa"])
def test_what_is_no_shape(shape):
    with pytest.raises(spnet.LoweringError, match=r"input_shape: expected \(C, H, W\), got "):
        spnet.lower(_small(), shape)


def test_where_no_plan_can_be(network, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="path: no plan at"):
        spnet.load_plan(tmp_path)
    spnet.lower(network).save(tmp_path / "plan")
    with pytest.raises(ValueError, match="device: expected the CPU or CUDA, got 'tpu'"):
        spnet.load_plan(tmp_path / "plan", "tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda: PyTorch finds no GPU"):
        spnet.load_plan(tmp_path / "plan", "cuda")


def _replace_body(model):
    model.features.stage1[0].body[2] = nn.GELU().eval()


def _dilate_body(model):
    model.features.stage1[0].body[3] = nn.Conv2d(6, 6, 3, padding=2, dilation=2).eval()


def _replace_shortcut(model):
    model.features.stage2[0].shortcut = nn.Sequential(nn.Conv2d(6, 10, 3, 2, 1), nn.BatchNorm2d(10)).eval()


def _replace_stem(model):
    model.features.stem.append(nn.AvgPool2d(2).eval())


def _replace_pool(model):
    model.features.stem.append(nn.MaxPool2d(2, ceil_mode=True).eval())


def _replace_activation(model):
    model.features.stage1[0].activation = nn.Tanh().eval()


def _replace_router(model):
    model.features.stage1[1].router = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)).eval()


def _replace_part(model):
    model.features.stage1[0].router.bn = nn.Identity().eval()


def _replace_forward(model):
    conv = model.features.stage1[0].body[0]
    conv.forward = lambda x: 2 * type(conv).forward(conv, x)


def _append_module(model):
    model.features.append(nn.ReLU().eval())


class _Doubled(spnet.RoutedSequential):
    def forward(self, x):
        return 2 * super().forward(x)


class _DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _share_block(model):
    model.features.stage1[1] = model.features.stage1[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_replace_body, "the body of block 0 calls gelu, which no plan computes"),
        (_dilate_body, "the body of block 0 has a convolution that is not square, undilated"),
        (_replace_shortcut, "the shortcut of block 2 is not a 1x1 convolution"),
        (lambda m: m.features.stage1[0].body.append(nn.ReLU().eval()), "the body of block 0 ends with a ReLU"),
        (lambda m: m.features.stage1[0].body.insert(0, nn.ReLU().eval()), "the body of block 0 is not a chain"),
        (_replace_stem, "the stem calls avg_pool2d, but not over all pixels of each channel"),
        (lambda m: m.features.stem.append(nn.ReLU().eval()), "the stem is not a chain of convolutions with"),
        (_replace_pool, "a max-pooling that is not square, undilated and rounded down"),
        (_replace_activation, "the activation of block 0 calls tanh"),
        (
            lambda m: m.features.stage1[0].add_module("activation", nn.Identity().eval()),
            "block 1: relu, as what the block is given comes from no ReLU: expected 0, got 1",
        ),
        (_replace_router, "block 1 is no RoutedBlock with a spnet.Router"),
        (_replace_part, "the router of block 0 does not consist of"),
        (lambda m: setattr(m.features.stage1[1].router, "fc1", _DoubledLinear(6, 128).eval()), "the router of block 1"),
        (lambda m: setattr(m.features.stage1[1].router, "fc2", nn.Linear(128, 3).eval()), "the router of block 1"),
        (lambda m: setattr(m.features.stage1[1].router.fc2, "bias", None), "the router of block 1 has no bias"),
        (lambda m: setattr(m.features.stage1[1].router.bn, "running_var", None), "BatchNorm has no running statistics"),
        (_replace_forward, "the forward of a Conv2d has been replaced"),
        (_append_module, "what follows the blocks is not a chain of convolutions"),
        (lambda m: setattr(m.features, "stem", nn.Conv2d(2, 6, 3, padding=1).eval()), "block 0: relu, as what"),
        (lambda m: setattr(m.features, "stem", nn.Sequential().eval()), r"does not run on an image \[2, 12, 12\]: "),
        (lambda m: setattr(m.features, "stage1", _Doubled(*m.features.stage1).eval()), "the head calls r?mul"),
        (
            lambda m: m.features.stage1.insert(1, nn.MaxPool2d(3, 1, 1).eval()),
            "what comes before block 1 is not a chain of convolutions",
        ),
        (lambda m: m.features.stage2.append(m.features.stage2[1]), "a block stands in two places"),
        (
            lambda m: m.heads.append(nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 5)).eval()),
            "the network does not end with the average over all pixels and a linear layer",
        ),
        (lambda m: m.heads.append(_DoubledLinear(10, 5).eval()), "the head calls r?mul"),
        (_share_block, "a block stands in two places"),
        (nn.Module.train, "training mode"),
        (nn.Module.double, "torch.float64 on cpu is neither"),
        (lambda m: m.to("meta"), "on meta"),
        (lambda m: m.heads[0].register_forward_hook(print), "a forward hook"),
    ],
)
def test_what_does_not_fit_is_said(change, reason):
    model = _small()
    change(model)
    with pytest.raises(spnet.LoweringError, match=reason):
        spnet.lower(model)


def test_a_new_head_says_the_number_of_classes():
    model, x = _small(), torch.randn(4, 2, 12, 12)
    for head in (nn.Linear(10, 3), nn.Linear(10, 3, bias=False)):
        model.heads[-1] = head.eval()
        torch.testing.assert_close(spnet.lower(model)(x), model(x), rtol=0, atol=1e-4)


def test_synchronised_batchnorm_is_lowered():
    model = _small()
    x = torch.randn(4, 2, 12, 12)
    expected = spnet.lower(model)(x)
    synchronise_batchnorm(model)
    assert torch.equal(spnet.lower(model)(x), expected)


@pytest.mark.parametrize("missing", [("weight", "bias"), ("bias",)])
def test_batchnorm_without_weights_is_lowered(missing):
    model = settle(_small(), spread=0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for name in missing:
                setattr(module, name, None)
    x = torch.randn(4, 2, 12, 12)
    expected, paths = spnet.fast_forward(model, x, impl="masked", return_paths=True)
    for impl in ("walk", "batch"):
        logits, taken = spnet.fast_forward(model, x, impl=impl, return_paths=True)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        assert torch.equal(taken.decisions, paths.decisions)


def test_networks_that_do_not_fit():
    with pytest.raises(spnet.LoweringError, match="Sequential does not say its input_shape"):
        spnet.lower(nn.Sequential(nn.Linear(3, 4)).eval())
    with pytest.raises(spnet.LoweringError, match="Flatten has no weights"):
        spnet.lower(nn.Flatten().eval(), (3, 8, 8))
    with pytest.raises(spnet.LoweringError, match="Sequential contains no RoutedBlock"):
        spnet.lower(nn.Sequential(nn.Linear(3, 4)).eval(), (3, 8, 8))
    with pytest.raises(spnet.LoweringError, match="SPNet contains no RoutedBlock"):
        spnet.lower(spnet.create_model("resnet20_cifar", routed=False).eval())

    class Other(spnet.SPNet):
        def forward(self, x):
            return -super().forward(x)

    with pytest.raises(spnet.LoweringError, match="the head calls neg, which no plan computes"):
        spnet.lower(Other([1], [4], num_classes=2).eval())


def _five_by_five():
    model = _small()
    model.features.stage1[0].body[0] = nn.Conv2d(6, 6, 5, padding=2, bias=False)
    return model


def _squeezed_stem():
    model = _small()
    model.features.stem.append(SqueezeExcitation(6))
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: _small(input_size=1025), "in_height: expected 1 to 1024, got 1025"),
        (lambda: _small(in_channels=513), "in_channels: expected 1 to 512, got 513"),
        (lambda: _small(in_channels=5, imagenet=True), "in_channels: expected 1 to 4, got 5"),
        (_five_by_five, "block 0: convolution 0: kernel: expected 1 or 3, all that walk computes, got 5"),
        (_squeezed_stem, "stem: convolution 0: squeeze: expected 0, all that walk computes outside of bodies, got 3"),
    ],
)
def test_networks_that_walk_does_not_run(model, reason):
    model = model().eval()
    plan = spnet.lower(model)
    assert plan.impl == "batch"
    assert plan.reason.startswith(reason)
    with pytest.raises(spnet.LoweringError, match=reason):
        plan(torch.zeros(1, *plan.input_shape), impl="walk")
    with pytest.raises(ValueError, match=f"impl: 'walk' does not fit this model: {reason}"):
        spnet.fast_forward(model, torch.zeros(1, *plan.input_shape), impl="walk")


@pytest.mark.parametrize(
    "options", [{"shortcut": "projection"}, {"bottleneck": True, "imagenet": True}, {"variants": VARIANTS}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_and_loaded(tmp_path, dtype, options):
    model = _small(**options).to(dtype)
    x = torch.randn(3, 2, 12, 12).to(dtype)
    plan = spnet.lower(model)
    plan.save(tmp_path / "plan.safetensors")
    loaded = spnet.load_plan(tmp_path / "plan.safetensors")
    assert loaded.impl == plan.impl
    for impl in {"batch", plan.impl}:
        a, paths_a = plan(x, return_paths=True, impl=impl)
        b, paths_b = loaded(x, return_paths=True, impl=impl)
        assert a.dtype == dtype
        assert torch.equal(a, b)
        assert torch.equal(paths_a.macs, paths_b.macs)
        assert paths_a.blocks == paths_b.blocks


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies(copied, dtype):
    plan, x = spnet.lower(_small().to(dtype)), torch.randn(3, 2, 12, 12).to(dtype)
    plan.choose(torch.tensor([1, 0.5, 0.5, 1]), [True, False, False, True])
    plan.execution("batch")
    other = copied(plan)
    assert (repr(other), other.choices, other.rates.tolist()) == (repr(plan), plan.choices, plan.rates.tolist())
    plan.choose(torch.zeros(4), [False] * 4)
    for impl in ("walk", "batch"):
        assert torch.equal(other(x, impl=impl), plan(x, impl=impl))
    assert other.choices == ("dense", "routed", "routed", "dense")
    assert other.execution("batch").dense == (True, False, False, True)


def test_sent_to_another_process():
    plan, x = spnet.lower(_small()), torch.randn(3, 2, 12, 12)
    expected, paths = plan(x, return_paths=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        logits, taken = pool.apply(plan, (x,), {"return_paths": True})
    assert torch.equal(logits, expected)
    assert torch.equal(taken.decisions, paths.decisions)


def test_a_pickle_of_another_version_is_refused(monkeypatch):
    pickled = pickle.dumps(spnet.lower(_small()))
    monkeypatch.setattr("spnet.execution.plan.FORMAT_VERSION", 5)
    with pytest.raises(ValueError, match="pickle has plan version 4, expected 5"):
        pickle.loads(pickled)


@pytest.mark.parametrize("options", [{}, {"bottleneck": True, "imagenet": True}, {"variants": VARIANTS}])
def test_damaged_files_are_refused(tmp_path, options):
    path = tmp_path / "plan.safetensors"
    spnet.lower(_small(**options)).save(path)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="no complete plan"):
            spnet.load_plan(path)
    path.write_bytes(b"\x1b" + bytes(7) + b'{"__metadata__": null     }')
    with pytest.raises(ValueError, match="plan version none, expected 4"):
        spnet.load_plan(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    meta = {"spnet-plan": "4", "dtype": "float32", "blocks": "a\nb\nc\nd"}

    def refused(message: str, tensors=tensors, **changed):
        described = meta | changed
        save_file(tensors, path, described | {"sha256": _digest(tensors, described)})
        with pytest.raises(ValueError, match=message):
            spnet.load_plan(path)

    refused("plan version 3, expected 4", **{"spnet-plan": "3"})
    refused("is no plan", dtype="float64")
    refused("rates, dense: expected", {**tensors, "rates": torch.zeros(1)})
    refused("is no plan", blocks="a")
    refused("is no plan", {**tensors, "more": torch.zeros(1)})
    refused("is no plan", {**tensors, "weights": tensors["weights"].double()})
    refused("float", {**tensors, "weights": tensors["weights"][:-1].clone()})
    for position in range(len(tensors["table"])):
        for value in (-1, 2**40):
            table = tensors["table"].clone()
            table[position] = value
            refused(".", {**tensors, "table": table})
    refused(".", {**tensors, "table": tensors["table"][:5].clone()})
    with pytest.raises(FileNotFoundError):
        spnet.load_plan(tmp_path / "absent")


def test_a_plan_holds_no_reference_to_its_model(network):
    import gc
    import weakref

    spnet.fast_forward(network, torch.zeros(1, 1, 32, 32))
    twin = copy.deepcopy(network)
    spnet.fast_forward(twin, torch.zeros(1, 1, 32, 32))
    alive = weakref.ref(twin)
    del twin
    gc.collect()
    assert alive() is None


def test_weights_of_another_dtype(network):
    plan = spnet.lower(network)
    for dtype in (torch.float16, torch.float64, torch.int8):
        with pytest.raises(ValueError, match=rf"weights: expected \d+ of torch.float32, .* got \d+ of {dtype}"):
            spnet.Plan(plan.network.table(), plan.weights.to(dtype), plan.macs)
