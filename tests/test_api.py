"""``fast_forward`` and ``explain``: what they accept, what they refuse, and that answers are never stale."""

import copy
import math
import threading
from fractions import Fraction

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import spnet
from spnet.routing import routed_blocks
from tests.conftest import margins, settle


def test_returns_paths(network):
    x = torch.randn(5, 1, 32, 32)
    logits, paths = spnet.fast_forward(network, x, return_paths=True)
    assert logits.shape == (5, 10)
    assert paths.decisions.shape == (5, 9)
    assert paths.decisions.dtype == torch.bool
    assert paths.macs.dtype == torch.int64
    assert paths.blocks[0] == "features.stage1.0"
    assert 0 < paths.decisions.float().mean() < 1
    everything = torch.ones(5, 9, dtype=torch.bool)
    _, dense = spnet.fast_forward(network, x, paths=everything, return_paths=True)
    assert (dense.macs == dense.dense_macs).all()
    # Two samples whose paths differ in one block differ by that block's body.
    everything[0, 3] = False
    _, skipped = spnet.fast_forward(network, x, paths=everything, return_paths=True)
    block = spnet.analysis.macs.count_macs(network, (1, 32, 32)).blocks[3]
    assert (dense.macs - skipped.macs).tolist() == [block.body, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 32, 32), r"x: expected \[B, 1, 32, 32\], got \[1, 32, 32\]"),
        (torch.zeros(2, 3, 32, 32), r"x: expected \[B, 1, 32, 32\], got \[2, 3, 32, 32\]"),
        (torch.zeros(2, 1, 28, 28), r"x: expected \[B, 1, 32, 32\], got \[2, 1, 28, 28\]"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.float64), r"x: expected torch.float32 .* got torch.float64"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), r"x: expected torch.float32 .* got torch.uint8"),
        (torch.zeros(2, 1, 32, 32, device="meta"), r"x: expected device cpu .* got meta"),
        (torch.zeros(2, 1, 32, 32, requires_grad=True), "x: requires grad"),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "masked", "routed", "batch", "walk"])
def test_bad_input(network, x, message, impl):
    with pytest.raises(ValueError, match=message):
        spnet.fast_forward(network, x, impl=impl)


def test_input_that_is_no_tensor(network):
    with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
        spnet.fast_forward(network, [[1.0]])
    for function in (spnet.fast_forward, spnet.explain):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got NoneType"):
            function(None, torch.zeros(1, 3, 32, 32))


def test_input_on_another_device_than_the_model(network):
    with pytest.raises(ValueError, match=r"x: expected device meta .* got cpu"):
        spnet.fast_forward(network.to("meta"), torch.zeros(1, 1, 32, 32))


def test_on_the_meta_device(network):
    network, x = network.to("meta"), torch.zeros(2, 1, 32, 32, device="meta")
    assert network(x).shape == (2, 10)
    for function in (spnet.fast_forward, spnet.explain):
        with pytest.raises(ValueError, match=r"x: on the meta device, .* call model\(x\)"):
            function(network, x)


@pytest.mark.parametrize("impl", ["auto", "masked", "routed", "batch", "walk"])
def test_batch_of_none(network, impl):
    logits, paths = spnet.fast_forward(network, torch.zeros(0, 1, 32, 32), impl=impl, return_paths=True)
    assert logits.shape == (0, 10)
    assert paths.decisions.shape == (0, 9)
    assert paths.macs.shape == (0,)


@pytest.mark.parametrize("impl", ["masked", "routed", "batch", "walk"])
def test_threshold(network, impl):
    x = torch.randn(8, 1, 32, 32)

    def decisions(threshold, **options):
        _, paths = spnet.fast_forward(network, x, impl=impl, threshold=threshold, return_paths=True, **options)
        return paths.decisions

    # Shifting the execute logit by hand is what a threshold means.
    shifted = copy.deepcopy(network)
    for block in routed_blocks(shifted).values():
        block.router.fc2.bias.data[1] -= 10
    assert (margins(shifted, x) > 1e-3).all()
    _, expected = spnet.fast_forward(shifted, x, impl="masked", return_paths=True)
    assert torch.equal(decisions(10.0), expected.decisions)
    assert not torch.equal(decisions(10.0), decisions(0.0))
    assert decisions(-math.inf).all()
    assert not decisions(math.inf).any()
    for large in (1e39, 10**400):
        assert not decisions(large).any()
        assert decisions(-large).all()
    for ten in (Fraction(10), torch.tensor([10.0]), numpy.float32(10)):
        assert torch.equal(decisions(ten), expected.decisions)
    forced = torch.rand(8, 9) < 0.5
    assert torch.equal(decisions(math.inf, paths=forced), forced)
    with pytest.raises(ValueError, match="threshold: expected a number, got NaN"):
        decisions(math.nan)
    for other, name in ((None, "NoneType"), ("0.5", "str")):
        with pytest.raises(TypeError, match=f"^threshold: expected a number, got {name}$"):
            decisions(other)


@pytest.mark.parametrize("impl", ["routed", "batch", "walk"])
def test_any_memory_layout(network, impl):
    x = torch.randn(6, 1, 32, 32)
    expected = spnet.fast_forward(network, x, impl="masked")
    backing = torch.full((6, 2, 32, 64), float("nan"))
    backing[:, :1, :, ::2] = x
    layouts = [
        x.contiguous(memory_format=torch.channels_last),
        backing[:, :1, :, ::2],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.flip(0).flip(0)[torch.arange(6)],
        torch.complex(x, -x).conj().imag,  # a view that negates what it reads
    ]
    for layout in layouts:
        torch.testing.assert_close(spnet.fast_forward(network, layout, impl=impl), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["routed", "batch", "walk"])
def test_the_defaults_of_torch_do_not_matter(network, impl, tmp_path):
    x = torch.randn(6, 1, 32, 32)
    expected = spnet.fast_forward(network, x, impl="masked")
    lowered = spnet.lower(network)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # where it makes a tensor, nothing is computed
            results = [spnet.fast_forward(network, x, impl=impl), lowered(x), spnet.calibrate(network, [x])(x)]
            rates = spnet.paths(network, x).class_rates
            lowered.save(tmp_path / "plan")
            results.append(spnet.load_plan(tmp_path / "plan")(x))
    finally:
        torch.set_default_dtype(torch.float32)
    for logits in results:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert rates.device.type == "cpu"


@pytest.mark.parametrize("impl", ["routed", "batch", "walk"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_input_has_the_outcome_of_masked(network, value, impl):
    x = torch.randn(5, 1, 32, 32)
    x[1] = value
    x[3, 0, 4, 5] = value
    a, paths_a = spnet.fast_forward(network, x, impl="masked", return_paths=True)
    b, paths_b = spnet.fast_forward(network, x, impl=impl, return_paths=True)
    assert torch.equal(paths_a.decisions, paths_b.decisions)
    assert not a[1].isfinite().all()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_training_mode_is_refused(network):
    with pytest.raises(ValueError, match="but it is in training mode; call model.eval"):
        spnet.fast_forward(network.train(), torch.zeros(1, 1, 32, 32))
    network.eval().features.stem[1].train()
    with pytest.raises(ValueError, match=r"features\.stem\.1"):
        spnet.fast_forward(network, torch.zeros(1, 1, 32, 32))


def test_model_without_routed_blocks_is_refused():
    static = spnet.create_model("resnet20_cifar", routed=False).eval()
    with pytest.raises(ValueError, match="expected RoutedBlocks, but SPNet contains none"):
        spnet.fast_forward(static, torch.zeros(1, 3, 32, 32))


def test_an_exported_model_is_refused(network):
    """Its modules say that they train, and refuse ``eval()``."""
    x = torch.zeros(1, 1, 32, 32)
    exported = torch.export.export(network, (x,)).module()
    with pytest.raises(ValueError, match="expected RoutedBlocks, but GraphModule contains none"):
        spnet.fast_forward(exported, x)


@pytest.mark.parametrize(
    "paths",
    [
        torch.ones(2, 8, dtype=torch.bool),
        torch.ones(3, 9, dtype=torch.bool),
        torch.ones(2, 9),
        torch.ones(9, dtype=torch.bool),
        torch.ones(2, 9, dtype=torch.bool).to_sparse(),
        [[True] * 9] * 2,
    ],
)
def test_bad_paths(network, paths):
    with pytest.raises(ValueError, match=r"paths: expected torch.bool \[2, 9\], got (?!torch.bool \[2, 9\]$)"):
        spnet.fast_forward(network, torch.zeros(2, 1, 32, 32), paths=paths)


def test_a_block_inside_the_body_of_another_has_no_path(network):
    stage, x = network.features.stage1, torch.randn(9, 1, 32, 32) * torch.arange(9)[:, None, None, None]
    stage[0].body = spnet.RoutedSequential(stage[0].body, stage[1]).eval()
    del stage[1]
    expected = spnet.fast_forward(network, x, impl="masked")
    torch.testing.assert_close(spnet.fast_forward(network, x, impl="routed"), expected)
    for options in (dict(return_paths=True), dict(paths=torch.ones(9, 9, dtype=torch.bool))):
        for impl in ("masked", "routed"):
            with pytest.raises(ValueError, match=r"'features.stage1.0.body.1' stands inside another"):
                spnet.fast_forward(network, x, impl=impl, **options)


def test_blocks_on_another_batch_have_no_path():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = spnet.RoutedBlock(nn.Linear(8, 8), spnet.Router(8, 16))

        def forward(self, x):
            return self.block(x.flatten(0, 1)).view_as(x).sum(1)

    model, x = settle(Patches()), torch.randn(5, 4, 8)
    for impl in ("masked", "routed"):
        torch.testing.assert_close(spnet.fast_forward(model, x, impl=impl), model(x))
        with pytest.raises(ValueError, match="RoutedBlock number 0 got a batch of 20, the model of 5"):
            spnet.fast_forward(model, x, impl=impl, return_paths=True)


def _line(body, channels=8, **options):
    blocks = (spnet.RoutedBlock(body(), spnet.Router(channels, 16), activation=nn.ReLU(), **options) for _ in range(3))
    return spnet.RoutedSequential(*blocks).eval()


def test_a_body_that_mixes_samples():
    model = _line(lambda: nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8, track_running_stats=False)))
    x = torch.randn(4, 8, 6, 6)
    for call in (spnet.fast_forward, spnet.explain):
        with pytest.raises(ValueError, match=r"'2.body.1' normalises a sample by the others"):
            call(model, x)
    assert torch.equal(spnet.fast_forward(model, x, impl="masked"), model(x))


def test_a_shortcut_that_is_expanded():
    """A sample that skips would have another shape than one that executes."""
    model = _line(lambda: nn.Conv2d(8, 8, 3, 1, 1), shortcut=nn.AdaptiveAvgPool2d(1))
    paths = torch.tensor([[True, False, False], [False, True, False]])
    for impl in ("masked", "routed"):
        with pytest.raises(ValueError, match=r"body: expected \[[12], 8, 1, 1\] \(the shortcut's shape\), got"):
            spnet.fast_forward(model, torch.randn(2, 8, 6, 6), impl=impl, paths=paths)


def test_complex_networks():
    class Real(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = spnet.Router(4, 16)

        def forward(self, x):
            return self.router(x.abs())

    def block(activation):
        return spnet.RoutedBlock(nn.Linear(4, 4, dtype=torch.complex64), Real(), activation=activation)

    model, x = settle(spnet.RoutedSequential(block(None), block(nn.Tanh()))), torch.randn(5, 4, dtype=torch.complex64)
    for paths in (torch.rand(5, 2) < 0.5, None):
        expected, masked = spnet.fast_forward(model, x, impl="masked", paths=paths, return_paths=True)
        got, routed = spnet.fast_forward(model, x, paths=paths, return_paths=True)
        assert torch.equal(masked.decisions, routed.decisions)
        torch.testing.assert_close(got, expected)


def test_inputs_of_integers():
    line = _line(lambda: nn.Linear(8, 8))
    model = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(0, 1), line).eval()
    tokens = torch.randint(10, (3, 4))
    torch.testing.assert_close(spnet.fast_forward(model, tokens), spnet.fast_forward(model, tokens, impl="masked"))


def test_data_parallel(network):
    x = torch.randn(3, 1, 32, 32)
    wrapped = nn.DataParallel(network)
    for model in (wrapped, nn.DataParallel(torch.compile(network, backend="eager"))):
        assert torch.equal(spnet.fast_forward(model, x), spnet.fast_forward(network, x))
        assert spnet.explain(model, x).impl == "walk"


def test_unknown_impl_names_the_near_match(network):
    with pytest.raises(ValueError, match="impl: unknown 'route'; did you mean 'routed'"):
        spnet.fast_forward(network, torch.zeros(1, 1, 32, 32), impl="route")


def test_the_input_is_left_alone(network):
    x = torch.randn(4, 1, 32, 32)
    before = x.clone()
    spnet.fast_forward(network, x)
    assert torch.equal(x, before)


def test_the_answer_follows_the_weights(network):
    x = torch.randn(4, 1, 32, 32)
    spnet.fast_forward(network, x)
    with torch.no_grad():
        network.heads[-1].bias += 1
        network.features.stage2[1].router.fc2.bias[1] += 100
    assert torch.allclose(spnet.fast_forward(network, x), spnet.fast_forward(network, x, impl="masked"), atol=1e-5)
    network.features.stage1[1] = network.features.stage1[2]
    for call in (lambda *args: spnet.fast_forward(*args, impl="routed"), spnet.fast_forward, spnet.explain):
        with pytest.raises(ValueError, match="RoutedBlock number 1 ran twice in one forward, so it has no one path"):
            call(network, x)
    network.features.stage1[1] = settle(spnet.create_model("resnet20_cifar")).features.stage1[0]
    a, pa = spnet.fast_forward(network, x, return_paths=True)
    b, pb = spnet.fast_forward(network, x, impl="masked", return_paths=True)
    assert torch.equal(pa.decisions, pb.decisions)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    network.load_state_dict(settle(spnet.create_model("resnet20_cifar", in_channels=1), bias=3.0).state_dict())
    torch.testing.assert_close(
        spnet.fast_forward(network, x), spnet.fast_forward(network, x, impl="masked"), rtol=1e-4, atol=1e-5
    )


def test_two_threads_at_once(network):
    inputs = [torch.randn(n, 1, 32, 32) for n in (3, 8)]
    expected = [spnet.fast_forward(network, x, return_paths=True) for x in inputs]
    failures = []

    def work(i: int):
        for _ in range(10):
            logits, paths = spnet.fast_forward(network, inputs[i], return_paths=True)
            if not (torch.equal(logits, expected[i][0]) and torch.equal(paths.decisions, expected[i][1].decisions)):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1, 0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_a_compiled_model_is_unwrapped(network):
    x = torch.randn(2, 1, 32, 32)
    compiled = torch.compile(network, backend="eager")
    assert torch.equal(spnet.fast_forward(compiled, x), spnet.fast_forward(network, x))


def test_a_model_compiled_in_place_is_run_as_it_is(network):
    x, paths = torch.randn(3, 1, 32, 32), torch.zeros(3, 9, dtype=torch.bool)
    expected = spnet.fast_forward(network, x, impl="masked", paths=paths)
    network.compile(backend="eager")
    network(x)
    for impl in ("masked", "routed"):
        logits, taken = spnet.fast_forward(network, x, impl=impl, paths=paths, return_paths=True)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(taken.decisions, paths)


@pytest.mark.parametrize("impl", ["masked", "routed", "batch", "walk"])
def test_in_a_compiled_function(network, impl):
    x, forced = torch.randn(3, 1, 32, 32), torch.rand(3, 9) < 0.5
    plan = spnet.lower(network)
    expected = plan(x)

    @torch.compile(backend="eager")
    def forward(x, paths):
        logits, taken = spnet.fast_forward(network, x + 0, impl=impl, paths=paths, return_paths=True)
        return logits * 1, taken.decisions, plan(x) * 1

    for paths in (None, forced):
        network.heads[-1].bias.data += 1  # the answer follows the weights
        logits, taken = spnet.fast_forward(network, x, impl=impl, paths=paths, return_paths=True)
        for got, wanted in zip(forward(x, paths), (logits, taken.decisions, expected), strict=True):
            torch.testing.assert_close(got, wanted)


class _Module(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.of = forward

    def forward(self, x):
        return self.of(x)


def _with_fakes(forward, x):
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    return forward(fake)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("of", ["masked", "routed", "walk", "plan"])
@pytest.mark.parametrize(
    "record",
    [
        torch.jit.trace,
        lambda forward, x: torch.export.export(_Module(forward), (x,), strict=False),
        lambda forward, x: make_fx(forward)(x),
        lambda forward, x: torch.vmap(forward)(x[None]),
        lambda forward, x: torch.func.jvp(forward, (x,), (x,)),
        _with_fakes,
    ],
)
def test_calls_that_are_traced_or_transformed_are_refused(network, record, of):
    """What is recorded would be the decisions, or even the memory, of this call."""
    x, plan = torch.randn(2, 1, 32, 32), spnet.lower(network)

    def forward(x):
        return plan(x) if of == "plan" else spnet.fast_forward(network, x, impl=of)

    with pytest.raises(ValueError, match="x: fast_forward and plans cannot be traced or transformed; export model"):
        record(forward, x)


@pytest.mark.parametrize("mode", [FlopCounterMode(display=False), torch.device("cpu"), torch.inference_mode()])
def test_calls_that_are_watched_are_not_refused(network, mode):
    x, plan = torch.randn(2, 1, 32, 32), spnet.lower(network)
    expected = plan(x)
    with mode:
        torch.testing.assert_close(plan(x), expected)
        torch.testing.assert_close(spnet.fast_forward(network, x), expected)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_parts_that_hide_blocks_are_refused(network, in_place):
    stage = network.features.stage2
    if in_place:
        stage.compile(backend="eager")
    else:
        network.features.stage2 = torch.compile(stage, backend="eager")
    with pytest.raises(ValueError, match="model: 'features.stage2' is compiled, which hides its RoutedBlocks"):
        spnet.fast_forward(network, torch.zeros(1, 1, 32, 32), impl="routed")
    if in_place:  # a plan calls no module
        x = torch.randn(3, 1, 32, 32)
        expected = network(x)
        for part in (network.features.stem, network.features.stage1[1].body, network):
            part.compile(backend="eager")
        assert spnet.lower(network).impl == "walk"
        torch.testing.assert_close(spnet.fast_forward(network, x, impl="walk"), expected, rtol=1e-4, atol=1e-5)


def test_compiled_bodies(network):
    x = torch.randn(3, 1, 32, 32)
    expected = spnet.fast_forward(network, x, impl="masked")
    for block in routed_blocks(network).values():
        block.body = torch.compile(block.body, backend="eager", dynamic=True)
    torch.testing.assert_close(spnet.fast_forward(network, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("place", ["features.stem", "features.stage1.1.body", "features.stage1.1.router", "heads.2"])
@pytest.mark.parametrize("how", ["script", "trace", "freeze"])
def test_parts_of_torchscript(network, place, how):
    part, maps = network.get_submodule(place), torch.randn(2, 1 if "stem" in place else 16, 32, 32)
    if how == "trace" or "router" in place:
        scripted = torch.jit.trace(part, torch.randn(2, 64) if "heads" in place else maps)
    else:
        scripted = torch.jit.script(part)
    x = torch.randn(3, 1, 32, 32)
    expected, masked = spnet.fast_forward(network, x, impl="masked", return_paths=True)
    network.set_submodule(place, torch.jit.freeze(scripted) if how == "freeze" else scripted)
    logits, paths = spnet.fast_forward(network, x, return_paths=True)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(paths.decisions, masked.decisions)
    assert torch.equal(paths.macs, masked.macs)
    reason = f"'{place}' is of TorchScript, which hides what it computes"
    assert spnet.explain(network, x).reason.endswith(reason)
    with pytest.raises(ValueError, match=f"impl: 'walk' does not fit this model: {reason}"):
        spnet.fast_forward(network, x, impl="walk")
    with pytest.raises(spnet.LoweringError, match=reason):
        spnet.lower(network)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_blocks_of_torchscript_are_refused(network):
    whole = torch.jit.trace(network, torch.zeros(1, 1, 32, 32))
    network.features.stage1 = torch.jit.trace(network.features.stage1, torch.zeros(1, 16, 32, 32))
    for model in (network, whole):
        for call in (spnet.fast_forward, spnet.explain):
            with pytest.raises(ValueError, match="model: 'features.stage1.0' is of TorchScript, which hides that"):
                call(model, torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize("impl", ["batch", "walk"])
def test_plans_compute_in_the_models_dtype_under_autocast(network, impl):
    x = torch.randn(3, 1, 32, 32)
    expected, paths = spnet.fast_forward(network, x, impl=impl, return_paths=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits, taken = spnet.fast_forward(network, x, impl=impl, return_paths=True)
    assert torch.equal(logits, expected)
    assert torch.equal(taken.decisions, paths.decisions)


def test_explain_names_the_choice_and_the_cost_of_each_skip(network):
    x = torch.zeros(1, 1, 32, 32)
    text = str(spnet.explain(network, x))
    assert text.startswith("impl = walk")
    assert "features.stage1.0  a branch not taken" in text
    assert "features.stage2.0  shortcut PadShortcut computed for every sample" in text
    network.features.stem.register_forward_hook(lambda *a: None)
    text = str(spnet.explain(network, x))
    assert text.startswith("impl = routed")
    assert "walk and batch do not fit: a forward hook" in text
    assert "features.stage1.0  copied: a forward hook" in text
    with pytest.raises(ValueError, match=r"expected \[B, 1, 32, 32\]"):
        spnet.explain(network, torch.zeros(1, 3, 32, 32))


def test_explain_names_the_batch_execution():
    model = settle(spnet.models.SPNet([1, 1], [8, 8], num_classes=2, in_channels=5, imagenet=True, input_size=8))
    text = str(spnet.explain(model, torch.zeros(1, 5, 8, 8)))
    assert text.startswith("impl = batch")
    assert "walk does not fit: in_channels: expected 1 to 4, got 5" in text
    assert "features.stage2.0  shortcut" in text


def test_explain_says_that_a_block_outside_a_line_is_copied():
    block = spnet.RoutedBlock(nn.Conv2d(4, 4, 1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    text = str(spnet.explain(nn.Sequential(block).eval(), torch.zeros(1, 4, 4, 4)))
    assert "walk and batch do not fit: Sequential does not return logits" in text
    assert "not a child of a RoutedSequential" in text
    assert "not a spnet.Router" in text


def test_explain_says_what_routed_does_with_those_that_skip():
    """Who made a block's input, and whether that has passed the block's activation, is known when it runs."""

    def block(activation=None, body=None):
        return spnet.RoutedBlock(body or nn.Linear(8, 8), spnet.Router(8), activation=activation)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            line = nn.Linear(8, 8), nn.ReLU(), block(nn.ReLU()), block(nn.Tanh()), block(nn.ReLU()), block()
            self.line = spnet.RoutedSequential(*line)
            self.head = spnet.RoutedSequential(block(nn.ReLU(), spnet.RoutedSequential(block())))
            self.idle = block()

        def forward(self, x):
            return self.head(self.line(x))

    model, x = settle(Network(), bias=-100.0), torch.randn(3, 8)
    copied = "copied: no layer of PyTorch or spnet in a RoutedSequential made its input, so others may hold it"
    for _ in range(2):  # nor does it matter who skips
        assert spnet.explain(model, x).blocks == {
            "line.2": "untouched",
            "line.3": "activation Tanh computed for every sample",
            "line.4": "activation ReLU computed for every sample",
            "line.5": "untouched",
            "head.0": f"{copied}; activation ReLU computed for every sample",
            "head.0.body.0": copied,
            "idle": "the model's forward does not run it",
        }


def test_explain_says_that_a_masked_of_a_users_own_is_computed():
    class Own(spnet.RoutedBlock):
        def masked(self, x, **options):
            return super().masked(x, **options)

    model = settle(spnet.RoutedSequential(Own(nn.Linear(4, 4), spnet.Router(4))))
    text = str(spnet.explain(model, torch.zeros(1, 4)))
    assert "0  computed with all others, as the masked of a Own does" in text


def test_build_info():
    info = spnet.build_info()
    assert info["torch"] == torch.__version__
    assert info["version"] == spnet.__version__
