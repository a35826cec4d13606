"""``batch`` in one graph against ``masked`` by the contract of equality: by the operators' twins, and on a GPU."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import spnet
from spnet.execution import graph, kept, plan
from spnet.execution.device import OnCpu, check_cuda, check_device, on
from spnet.execution.graph import Graph, bucket
from spnet.routing import routed_blocks
from tests.conftest import assert_as_exact_as_masked, margins, settle, vary

FORMS = {
    "cifar": dict(stage_blocks=[2, 2], widths=[6, 10], input_size=12, in_channels=2),
    "projections": dict(
        stage_blocks=[1, 3], widths=[3, 17], input_size=9, in_channels=5, shortcut="projection", router_width=20
    ),
    "one convolution": dict(stage_blocks=[2, 1], widths=[4, 8], input_size=8, in_channels=1),
    "basic": dict(stage_blocks=[2, 1, 1], widths=[8, 8, 16], input_size=47, imagenet=True),
    "bottleneck": dict(stage_blocks=[2, 2], widths=[4, 8], input_size=31, imagenet=True, bottleneck=True),
    "deep stem, averages": dict(stage_blocks=[2, 2], widths=[4, 8], input_size=17, imagenet=True, bottleneck=True),
    "bottleneck, 5 channels": dict(
        stage_blocks=[2, 1], widths=[8, 16], input_size=33, in_channels=5, imagenet=True, bottleneck=True
    ),
    "preactivation": dict(stage_blocks=[2, 2], widths=[6, 10], input_size=12, in_channels=2, shortcut="projection"),
    "squeeze, preactivation": dict(stage_blocks=[2, 1], widths=[6, 10], input_size=10, in_channels=7),
    "groups, squeeze": dict(stage_blocks=[2, 2], widths=[40, 72], input_size=9, shortcut="projection"),
    "deep stem, averages, groups, squeeze, preactivation": dict(
        stage_blocks=[3, 2], widths=[4, 8], input_size=17, imagenet=True, bottleneck=True
    ),
    "stem of two groups": dict(stage_blocks=[2], widths=[6], input_size=8, in_channels=2),
    "stem of 1x1": dict(stage_blocks=[2], widths=[6], input_size=8, in_channels=2),
}
STEMS = {
    "stem of two groups": dict(kernel_size=3, padding=1, groups=2),
    "stem of 1x1": dict(kernel_size=1, stride=2),
}
RATES = [0.0, 0.5, 1.0]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where ``batch`` runs in one graph; float32 products are exact."""
    if request.param == "cpu":
        monkeypatch.setitem(plan._EXECUTIONS, "cpu", {"batch": plan._graph})
    else:
        monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    return torch.device(request.param)


def _network(form: str, device: torch.device) -> nn.Module:
    model = spnet.models.SPNet(num_classes=5, **FORMS[form])
    if form == "one convolution":
        for block in routed_blocks(model).values():
            block.body = block.body[:2]
    if form in STEMS:
        model.features.stem[0] = nn.Conv2d(model.in_channels, 6, **STEMS[form])
    vary(model, form.split(", "))
    return settle(model).to(device)


def _input(model: nn.Module, batch: int) -> torch.Tensor:
    x = torch.randn(batch, model.in_channels, model.input_size, model.input_size)
    return x.to(model.heads[-1].weight)


def _paths(model: nn.Module, batch: int, rate: float) -> torch.Tensor:
    return (torch.rand(batch, len(routed_blocks(model))) < rate).to(model.heads[-1].weight.device)


def _assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max().clamp(min=1e-6) if expected.numel() else 1
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= 1e-4 * scale).all()


def _assert_answers(model: nn.Module, x: torch.Tensor, **options) -> None:
    """fast_forward by ``batch`` agrees with ``masked``."""
    expected, masked = spnet.fast_forward(model, x, impl="masked", return_paths=True, **options)
    got, taken = spnet.fast_forward(model, x, impl="batch", return_paths=True, **options)
    same = (masked.decisions == taken.decisions).all(1)
    _assert_close(got[same], expected[same])
    assert torch.equal(taken.macs[same], masked.macs[same])
    if "paths" in options:
        assert same.all()
    elif not options.get("threshold"):
        assert same[(margins(model, x) > 1e-3).all(1)].all()


@pytest.mark.parametrize("form", FORMS)
def test_forced_paths(device, form):
    model = _network(form, device)
    for batch in (1, 2, 5, 6):
        x = _input(model, batch)
        before = x.clone()
        for rate in RATES:
            _assert_answers(model, x, paths=_paths(model, batch, rate))
        assert torch.equal(x, before)


@pytest.mark.parametrize("form", FORMS)
def test_own_decisions(device, form):
    model = _network(form, device)
    for batch in (1, 5):
        x = _input(model, batch)
        for threshold in (0.0, -0.5, 0.5, torch.inf, -torch.inf):  # one graph, other thresholds
            _assert_answers(model, x, threshold=threshold)
    again = [spnet.fast_forward(model, x, impl="batch") for _ in range(2)]
    assert torch.equal(*again)
    _, paths = spnet.fast_forward(model, _input(model, 7), impl="batch", threshold=-torch.inf, return_paths=True)
    assert paths.decisions.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_halves(device, form, dtype):
    model = _network(form, device).to(dtype)
    x = _input(model, 5)
    for rate in RATES:
        paths = _paths(model, 5, rate)
        got = spnet.fast_forward(model, x, impl="batch", paths=paths)
        assert got.dtype == dtype
        assert_as_exact_as_masked(got, model, x, paths)
    logits, paths = spnet.fast_forward(model, x, impl="batch", return_paths=True)
    assert torch.equal(logits, spnet.fast_forward(model, x, impl="batch", paths=paths.decisions))


def _dense(model: nn.Module, dense: list[bool]) -> None:
    plan = kept.plan_of(model)
    plan.choose(torch.ones(len(dense)), dense)
    assert plan.choices == tuple("dense" if d else "routed" for d in dense)


@pytest.mark.parametrize("form", FORMS)
def test_choices_do_not_change_answers(device, form):
    model = _network(form, device)
    x = _input(model, 5)
    blocks = len(routed_blocks(model))
    for dense in ([True] * blocks, [i % 2 == 0 for i in range(blocks)], [i % 2 == 1 for i in range(blocks)]):
        spnet.fast_forward(model, x, impl="batch")  # what was captured before is not used again
        _dense(model, dense)
        _assert_answers(model, x)
        for rate in RATES:
            _assert_answers(model, x, paths=_paths(model, 5, rate))


def test_buckets():
    sizes = sorted({bucket(n) for n in range(1, 1025)})
    assert sizes[:9] == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert sizes[-1] == 1024
    assert len(sizes) == 20
    for n in range(1, 1025):
        assert bucket(n) == min(size for size in sizes if size >= n)


@pytest.mark.parametrize("largest", [1, 4, 5])
def test_batches_above_the_limit(device, monkeypatch, largest):
    monkeypatch.setattr(graph, "LARGEST", largest)
    model = _network("cifar", device)
    x = _input(model, 11)
    _assert_answers(model, x)
    _assert_answers(model, x, paths=_paths(model, 11, 0.5))
    assert {key[0] for key in _graphs(model)} <= {1, 2, 3, 4, largest}
    trials = kept.plan_of(model).execution("batch").trials(x, _paths(model, len(x), 0.5))
    assert {len(run(dense)) for run in trials for dense in (False, True)} == {min(len(x), largest)}


def test_an_empty_batch(device):
    model = _network("basic", device)
    x = _input(model, 0)
    _assert_answers(model, x)
    _assert_answers(model, x, paths=_paths(model, 0, 0.5))
    assert not _graphs(model)


def _graphs(model: nn.Module) -> dict:
    return kept.plan_of(model).execution("batch")._graphs


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_padding_skips_and_reaches_nobody(device, form, dense):
    model = _network(form, device)
    _dense(model, [dense] * len(routed_blocks(model)))
    run = kept.plan_of(model).execution("batch").run
    x = _input(model, 6)
    for paths in (None, _paths(model, 6, 1.0)):
        logits, decisions = run(x, paths, -torch.inf)
        assert decisions.all()
        fewer, _ = run(x[:5], None if paths is None else paths[:5], -torch.inf)
        # The graph is the same, and so is the work on every sample.
        assert torch.equal(fewer, logits[:5])
    assert len(_graphs(model)) == 2
    # One may be on its way while another is captured.
    buffers = [buffer.data_ptr() for captured in _graphs(model).values() for buffer in captured.buffers]
    assert len(set(buffers)) == len(buffers)
    for captured in _graphs(model).values():
        assert captured._decisions[:5].all()
        assert not captured._decisions[5].any()
        assert captured._logits[5].isnan().all()
        assert not captured._logits[:5].isnan().any()


def test_what_is_not_finite_stays_in_its_sample(device):
    model = _network("bottleneck", device)
    x = _input(model, 5)
    clean, paths = spnet.fast_forward(model, x, impl="batch", return_paths=True)
    x[1], x[3, 0, 16, 16] = torch.nan, torch.inf
    got, taken = spnet.fast_forward(model, x, impl="batch", return_paths=True)
    expected, masked = spnet.fast_forward(model, x, impl="masked", return_paths=True)
    assert torch.equal(got[::2], clean[::2])
    assert torch.equal(taken.decisions[::2], paths.decisions[::2])
    assert torch.equal(taken.decisions[1::2], masked.decisions[1::2])
    assert torch.equal(got.isnan(), expected.isnan())
    assert got[1].isnan().all()


def test_input_layouts(device):
    model = _network("bottleneck", device)
    x, paths = _input(model, 3), _paths(model, 1, 0.5).expand(3, -1)
    expected = spnet.fast_forward(model, x, impl="batch", paths=paths)
    wide = x.new_full((6, 4, 33, 62), torch.nan)
    sliced = wide[::2, 1:, 1:-1, ::2]
    sliced.copy_(x)
    for layout in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3), sliced):
        assert torch.equal(spnet.fast_forward(model, layout, impl="batch", paths=paths), expected)


def test_results_are_the_callers(device):
    model = _network("cifar", device)
    plan = spnet.lower(model)
    x = _input(model, 4)
    logits, paths = plan(x, return_paths=True, impl="batch")
    kept_logits, kept_decisions = logits.clone(), paths.decisions.clone()
    plan(_input(model, 4), return_paths=True, impl="batch")
    assert torch.equal(logits, kept_logits)
    assert torch.equal(paths.decisions, kept_decisions)


def test_in_and_out_of_inference_mode(device):
    model = _network("cifar", device)
    with torch.inference_mode():
        inside = spnet.fast_forward(model, _input(model, 3).mul_(0), impl="batch")
    assert torch.equal(spnet.fast_forward(model, _input(model, 3).mul_(0), impl="batch"), inside)


def test_a_changed_model_is_lowered_anew(device):
    model = _network("basic", device)
    x = _input(model, 3)
    before = spnet.fast_forward(model, x, impl="batch")
    with torch.no_grad():
        model.features.stage1[0].body[0].weight.mul_(-1)
        model.heads[-1].bias.add_(1)
    assert not torch.equal(spnet.fast_forward(model, x, impl="batch"), before)
    _assert_answers(model, x)


@pytest.fixture
def captures(monkeypatch):
    """Batch sizes of the graphs captured on the CPU, as they come."""
    sizes = []
    original = graph._Captured.__init__

    def count(self, layers, batch, *args):
        sizes.append(batch)
        original(self, layers, batch, *args)

    monkeypatch.setattr(graph._Captured, "__init__", count)
    return sizes


def test_least_recently_used_graphs_are_dropped(device, captures):
    model = _network("one convolution", device)
    run = spnet.lower(model).execution("batch").run
    for batch in (1, 2, 3, 4, 5, 8, 12, 16):
        run(_input(model, batch), None, 0.0)
    first = weakref.ref(next(iter(run.__self__._graphs.values())))
    run(_input(model, 1), None, 0.0)
    assert first() is not None
    second = weakref.ref(next(iter(run.__self__._graphs.values())))
    run(_input(model, 17), None, 0.0)
    gc.collect()
    assert first() is not None
    assert second() is None
    assert [key[0] for key in run.__self__._graphs] == [3, 4, 6, 8, 12, 16, 1, 24]
    assert captures == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    run(_input(model, 6), None, 0.5)
    assert len(captures) == 9
    run(_input(model, 2), None, 0.0)
    assert len(captures) == 10


def test_several_threads_on_one_plan(device):
    model = _network("cifar", device)
    plan, inputs = spnet.lower(model), [_input(model, n) for n in (1, 4, 5, 6)]
    expected = [plan(x, return_paths=True, impl="batch") for x in inputs]

    def work(i: int) -> bool:
        logits, paths = plan(inputs[i % 4], return_paths=True, impl="batch")
        same = torch.equal(logits, expected[i % 4][0])
        return same and torch.equal(paths.decisions, expected[i % 4][1].decisions)

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(work, range(100)))


def test_no_memory_for_a_graph(monkeypatch, captures):
    model = _network("cifar", torch.device("cpu"))
    run = Graph(spnet.lower(model).network, spnet.lower(model).weights, torch.float32).run
    x = _input(model, 8)
    expected = run(x[:4], None, 0.0)
    free = OnCpu.capture

    def capture(self, function, beside=None):
        if captures[-1] == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return free(self, function, beside)

    monkeypatch.setattr(OnCpu, "capture", capture)
    with pytest.raises(torch.OutOfMemoryError, match="a batch of 8; a smaller one needs less, impl='routed' too: CUDA"):
        run(x, None, 0.0)
    assert captures == [4, 8, 8]  # what others held was given up first
    assert all(map(torch.equal, run(x[:4], None, 0.0), expected))
    monkeypatch.setattr(OnCpu, "capture", free)
    assert torch.equal(run(x, None, 0.0)[1][:4], expected[1])


def test_memory_of_other_graphs_is_given_up(monkeypatch, captures):
    model = _network("cifar", torch.device("cpu"))
    execution = Graph(spnet.lower(model).network, spnet.lower(model).weights, torch.float32)
    free = OnCpu.capture

    def capture(self, function, beside=None):
        if beside is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return free(self, function, beside)

    monkeypatch.setattr(OnCpu, "capture", capture)
    for batch in (4, 8):
        execution.run(_input(model, batch), None, 0.0)
        assert [key[0] for key in execution._graphs] == [batch]


def _pad_later(block: spnet.RoutedBlock) -> None:
    block.body[0], block.body[3] = nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3, padding=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.body.__setitem__(0, nn.Conv2d(6, 6, 5, 1, 2)), r"block 0: body: expected 1x1 and 3x3 .* kernel=5"),
        (_pad_later, "block 0: body: expected 1x1 and 3x3 .* padding=0"),
    ],
)
def test_convolutions_that_do_not_fit(change, message):
    model = _network("cifar", torch.device("cpu"))
    change(model.features.stage1[0])
    lowered = spnet.lower(model.eval())
    with pytest.raises(ValueError, match=message):
        Graph(lowered.network, lowered.weights, torch.float32)


def test_weights_beyond_the_range_of_the_dtype():
    lowered = spnet.lower(_network("cifar", torch.device("cpu")))
    weights = lowered.weights.clone()
    weights[0] = 1e5
    with pytest.raises(ValueError, match="a weight of 100000 is beyond the range of torch.float16"):
        Graph(lowered.network, weights, torch.float16)
    Graph(lowered.network, weights, torch.bfloat16)
    weights[0] = torch.inf  # is what the model has
    Graph(lowered.network, weights, torch.float16)


def test_devices_that_do_not_fit(monkeypatch):
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(ValueError, match=f"{dtype} on cuda:0 is neither"):
            check_device(torch.device("cuda", 0), dtype)
    check_device(torch.device("cuda", 0), torch.float16)
    with pytest.raises(ValueError, match="torch.float32 on mps is neither"):
        check_device(torch.device("mps"), torch.float32)
    for capability in ((7, 5), (6, 1), (3, 7)):
        with pytest.raises(ValueError, match=f"8.0 or higher, got {capability[0]}.{capability[1]}"):
            check_cuda(capability, True)
    with pytest.raises(ValueError, match="needs Triton"):
        check_cuda((9, 0), False)
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 1)):
        check_cuda(capability, True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ValueError, match="this is PyTorch for ROCm"):
        check_device(torch.device("cuda", 0), torch.float16)


def test_a_gpu_that_does_not_fit_is_refused_at_lowering(monkeypatch):
    lowered = spnet.lower(_network("cifar", torch.device("cpu")))
    weights = SimpleNamespace(device=torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {1: (7, 5)}[device.index])
    with pytest.raises(ValueError, match="needs compute capability 8.0 or higher, got 7.5"):
        plan._graph(lowered.network, weights, torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs Triton, which is not installed"):
        plan._graph(lowered.network, weights, torch.float16)


class _Stream:
    """Stands for a stream, or for a buffer that streams use: notes what it waits for and who uses it."""

    def __init__(self):
        self.waits_for, self.users = [], []

    def wait_event(self, event):
        self.waits_for.append(event.behind)

    def wait_stream(self, stream):
        self.waits_for.append(stream)

    def record_stream(self, stream):
        self.users.append(stream)


class _Event:
    def record(self, stream):
        self.behind = stream


@pytest.fixture
def cuda(monkeypatch):
    """``OnCuda`` as far as it goes without a GPU: where it is, and the current stream, which tests set."""
    state = SimpleNamespace(current=_Stream())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state.current)
    state.on = on(torch.device("cuda", 0))
    return state


def test_runs_from_several_streams_wait_for_each_other(cuda):
    """Or one would write into the buffers of a graph that still runs on another stream."""
    one, two, buffer, weight, made_on = _Stream(), _Stream(), _Stream(), _Stream(), cuda.current
    for stream in (one, one, two, two, one, made_on):
        cuda.current = stream
        with cuda.on.in_order([buffer], [weight]):
            assert buffer.users[-1] is stream
            assert (weight.users[-1] is stream) == (stream is not made_on)
    assert two.waits_for == [one]
    assert one.waits_for == [two]


def test_a_run_that_fails_is_waited_for_too(cuda):
    one, two = _Stream(), _Stream()
    cuda.current = one
    with pytest.raises(torch.OutOfMemoryError), cuda.on.in_order([], []):
        raise torch.OutOfMemoryError("CUDA out of memory")
    cuda.current = two
    with cuda.on.in_order([], []):
        assert two.waits_for == [one]


def test_a_capture_without_memory_leaves_nothing_running(cuda):
    """What was launched before still reads and writes tensors that the caller's stream gives back."""

    def function():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        cuda.on.capture(function)
    assert cuda.on._side.waits_for == [cuda.current]
    assert cuda.current.waits_for == [cuda.on._side]


gpu = pytest.mark.gpu
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)], indirect=True)


@on_gpu
def test_nothing_waits(device):
    model = _network("basic", device)
    x, paths = _input(model, 5), _paths(model, 5, 0.5)
    calls = [
        lambda: spnet.fast_forward(model, x, impl="batch", return_paths=True),
        lambda: spnet.fast_forward(model, x, impl="batch", threshold=0.5),
        lambda: spnet.fast_forward(model, x, impl="batch", paths=paths, return_paths=True),
    ]
    expected = [call() for call in calls]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [call() for call in calls]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got[0][0], expected[0][0])
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[2][1].macs, expected[2][1].macs)


@on_gpu
def test_several_streams_on_one_plan(device):
    model = _network("bottleneck", device)
    plan, inputs = spnet.lower(model), [_input(model, n) for n in (5, 6, 5, 6)]
    expected = [plan(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got = [[] for _ in inputs]
    for _ in range(50):
        for x, stream, results in zip(inputs, streams, got, strict=True):
            with torch.cuda.stream(stream):
                results.append(plan(x))
    torch.cuda.synchronize()
    for results, logits in zip(got, expected, strict=True):
        assert all(torch.equal(result, logits) for result in results)


@on_gpu
def test_memory(device):
    """A plan and its graph take at most 15 % more than the dense model at its peak, and give it back."""

    def reserved() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    x = torch.randn(32, 3, 224, 224, device=device, dtype=torch.float16)
    model = settle(spnet.create_model("resnet50")).to(device, torch.float16)
    spnet.lower(model)(x)  # libraries take their memory once, and the kernels are compiled
    everything = torch.ones(len(x), 16, dtype=torch.bool, device=device)
    gc.collect()
    weights = sum(t.nbytes for t in model.state_dict().values())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    spnet.fast_forward(model, x, impl="masked", paths=everything)
    dense = torch.cuda.max_memory_allocated() - before + weights
    before = reserved()
    plan = spnet.lower(model)
    plan(x)
    plan(x, paths=everything)
    taken = reserved() - before
    assert taken <= 1.15 * dense
    del plan
    assert reserved() - before <= 0.1 * taken


@on_gpu
def test_calibrate_on_a_gpu(device):
    model = _network("bottleneck", device)
    found = spnet.calibrate(model, [_input(model, 8), _input(model, 5)])
    assert found.rates.shape == (4,)
    _assert_answers(model, _input(model, 8))


@on_gpu
def test_a_plan_moves_between_devices(device, tmp_path):
    model = _network("basic", device)
    x = _input(model, 3)
    plan = spnet.lower(model)
    assert plan.device == x.device
    plan.save(tmp_path / "plan")
    expected = plan(x)
    assert torch.equal(spnet.load_plan(tmp_path / "plan", device="cuda")(x), expected)
    _assert_close(spnet.load_plan(tmp_path / "plan")(x.cpu()), expected.cpu())
    with pytest.raises(ValueError, match=r"x: expected torch.float32 .* on cuda:0, got .* on cpu"):
        plan(x.cpu())


@gpu
def test_taken_where_walk_does_not_fit():
    model = _network("basic", torch.device("cuda"))
    x = _input(model, 2)
    assert spnet.explain(model, x).impl == "batch"
    assert torch.equal(spnet.fast_forward(model, x), spnet.fast_forward(model, x, impl="batch"))
    with pytest.raises(ValueError, match="impl: 'walk' does not fit this model: walk on CUDA multiplies float16"):
        spnet.fast_forward(model, x, impl="walk")


@gpu
def test_tf32_is_multiplied_where_cudnn_may(monkeypatch):
    model = _network("bottleneck", torch.device("cuda"))
    x, paths = _input(model, 5), _paths(model, 5, 0.5)
    truth = spnet.fast_forward(copy.deepcopy(model).double(), x.double(), impl="masked", paths=paths)
    errors = {}
    for precision in ("tf32", "ieee"):
        monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", precision)
        masked, got = (spnet.fast_forward(model, x, impl=impl, paths=paths) for impl in ("masked", "batch"))
        errors[precision] = (got - truth).abs().max()
        rounding = 2.0**-10 if precision == "tf32" else 1e-5
        assert errors[precision] <= 2 * (masked - truth).abs().max() + rounding * truth.abs().max()
    assert errors["ieee"] < errors["tf32"]
