"""The CUDA walk against the formula in csrc/plan.h: emulated on the host, and on a GPU where there is one."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spnet.native import core
from tests.test_walk_core import IDENTITY, PAD, POOLED, PROJECTION, VALID, Block, Network, chain, path_choices

DTYPES = {torch.float16: core.Dtype.float16, torch.bfloat16: core.Dtype.bfloat16}
SHARED_LIMIT = 227 << 10  # of a thread block on sm_90

NETWORKS = {
    "no-blocks": Network(1, (3, 2), 5, []),
    "one-pixel": chain(5, 5, 8, 24, size=(1, 1), kinds=(IDENTITY, PAD, PROJECTION)),
    "one-column": chain(5, 5, 8, size=(19, 1), kinds=(IDENTITY, PAD)),
    "one-row": chain(5, 5, 8, size=(1, 64), kinds=(IDENTITY, PROJECTION)),
    "odd-widths": chain(3, 5, 8, 24, 24, size=(5, 7), kinds=(PAD, PROJECTION, PAD, IDENTITY)),
    "odd-pads": chain(5, 12, 13, 31, 33, size=(9, 6), kinds=(PAD,), in_channels=2),
    "resnet-8": chain(16, 16, 32, 32, 64, size=(32, 32), kinds=(IDENTITY, PAD)),
    "projections": chain(16, 40, 24, 24, size=(20, 31), kinds=(PROJECTION, PROJECTION, IDENTITY)),
    "large": chain(7, 7, 9, size=(64, 31), kinds=(IDENTITY, PAD), in_channels=1),
    "bodies": chain(6, 6, 10, 10, size=(12, 11), kinds=(IDENTITY, PROJECTION, IDENTITY), mids=(1, 50, 17)),
    "many-inputs": chain(9, 9, size=(4, 3), in_channels=37),
    "many-classes": chain(9, 9, size=(4, 3), classes=300),
    "one-class": chain(9, 9, size=(4, 3), classes=1),
    "wide": chain(96, 96, 130, size=(3, 20), kinds=(IDENTITY, PROJECTION), in_channels=1),
    "wide-routers": Network(3, (6, 6), 16, [Block(16, 16, 16, router_width=w) for w in (1, 33, 600)]),
}


class Walk:
    """A network on one of the two devices. Called, it gives logits and decisions, written over NaN and garbage."""

    def __init__(self, network: Network, dtype: torch.dtype, device: str):
        ints, floats = network.tables()
        tables = (ints.data_ptr(), ints.numel(), floats.data_ptr(), floats.numel(), DTYPES[dtype])
        self.device, self.dtype, self.shape = device, dtype, (network.classes, len(network.blocks))
        self.plan = core.CudaPlan(*tables, 0) if device == "cuda" else core.EmulatedCudaPlan(*tables, SHARED_LIMIT)
        self.bank_conflicts = None

    def __call__(self, x: Tensor, paths: Tensor | None = None, threshold: float = 0.0, thread_blocks: int = 3):
        place = "cuda" if self.device == "cuda" else "cpu"
        x = x.to(place, self.dtype)
        paths = None if paths is None else paths.to(place).contiguous()
        logits = torch.full((len(x), self.shape[0]), torch.nan, device=place)
        decisions = torch.full((len(x), self.shape[1]), 7, dtype=torch.uint8, device=place)
        last = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else thread_blocks
        paths_address = 0 if paths is None else paths.data_ptr()
        self.bank_conflicts = self.plan.run(
            x.data_ptr(), len(x), *x.stride(), paths_address, threshold, logits.data_ptr(), decisions.data_ptr(), last
        )
        return logits.cpu(), decisions.cpu()


needs_build = pytest.mark.skipif(core.cuda_architectures is None, reason="built without CUDA kernels")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, needs_build])])
def device(request) -> str:
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=NETWORKS)
def network(request) -> Network:
    return NETWORKS[request.param]


class SumsInFloat32(TorchFunctionMode):
    """Halves are multiplied, added up in float32 and rounded: on CPUs some half convolutions of PyTorch give NaN."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (F.conv2d, F.linear):
            return func(*args, **(kwargs or {}))
        return func(*(a.float() for a in args), **(kwargs or {})).to(args[0].dtype)


def assert_close(network: Network, x: Tensor, paths: Tensor, logits: Tensor, dtype: torch.dtype):
    """At most twice the error of the masked network in the same dtype, and one rounding."""
    assert torch.isfinite(logits).all()
    if not logits.numel():
        return
    exact = network.reference(x, paths, torch.float64)[0]
    with SumsInFloat32():
        plain = network.reference(x, paths, dtype)[0]
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (logits - exact).abs().max() <= 2 * (plain - exact).abs().max() + rounding


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_forced_paths(network, dtype, device, batch):
    walk, x = Walk(network, dtype, device), network.input(batch).to(dtype)
    for paths in path_choices(network, batch):
        logits, decisions = walk(x, paths)
        assert torch.equal(decisions.bool(), paths)
        assert decisions.max() <= 1 if decisions.numel() else True
        assert_close(network, x, paths, logits, dtype)


def test_own_decisions(network, dtype, device):
    check_own_decisions(network, dtype, device)


@pytest.mark.parametrize("threshold", [-0.3, 0.3, float("nan")])
def test_thresholds(dtype, device, threshold):
    check_own_decisions(NETWORKS["odd-widths"], dtype, device, threshold)


def check_own_decisions(network: Network, dtype: torch.dtype, device: str, threshold: float = 0.0):
    x = network.input(7).to(dtype)
    logits, decisions = Walk(network, dtype, device)(x, threshold=threshold)
    assert decisions.max() <= 1 if decisions.numel() else True
    assert_close(network, x, decisions.bool(), logits, dtype)
    margins = network.reference(x, decisions.bool(), torch.float64)[1]
    clear = ~((margins - threshold).abs() <= 8 * torch.finfo(dtype).eps)
    assert torch.equal(decisions.bool()[clear], margins[clear] > threshold)


def test_routers_take_both_ways(device):
    """Or the test above would not test decisions."""
    network = NETWORKS["resnet-8"]
    _, decisions = Walk(network, torch.float16, device)(network.input(16))
    assert 0 < decisions.float().mean() < 1


def test_the_order_of_samples_changes_no_bit(network, dtype, device):
    """Whoever takes a sample, alone or after others, computes the same."""
    walk, x = Walk(network, dtype, device), network.input(5)
    logits, decisions = walk(x)
    for thread_blocks in (1, 2, 7):
        again = walk(x, thread_blocks=thread_blocks)
        assert torch.equal(again[0], logits)
        assert torch.equal(again[1], decisions)
    for i in range(5):
        one = walk(x[i : i + 1])
        assert torch.equal(one[0], logits[i : i + 1])
        assert torch.equal(one[1], decisions[i : i + 1])


def test_input_layouts(network, device):
    walk, x = Walk(network, torch.float16, device), network.input(4).half()
    expected = walk(x)
    wide = torch.full((8, x.shape[1] + 1, x.shape[2] + 2, 2 * x.shape[3]), torch.nan, dtype=x.dtype)
    sliced = wide[::2, 1:, 1:-1, ::2]
    sliced.copy_(x)
    for layout in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3), sliced):
        if device == "cuda":  # a copy to another device would make it dense
            layout = layout.cuda() if layout is not sliced else wide.cuda()[::2, 1:, 1:-1, ::2]
        got = walk(layout)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_sample_reaches_no_other(network, dtype, device, bad):
    """Not through halos, channels beyond a map's own or what a thread block leaves in its memory."""
    walk, x = Walk(network, dtype, device), network.input(3)
    for paths in (None, torch.ones(3, len(network.blocks), dtype=torch.bool)):
        expected = walk(x, paths)
        poisoned = x.clone()
        poisoned[1] = bad
        for thread_blocks in (1, 2):
            logits, decisions = walk(poisoned, paths, thread_blocks=thread_blocks)
            assert torch.equal(logits[::2], expected[0][::2])
            assert torch.equal(decisions[::2], expected[1][::2])


def test_nan_flows(network, dtype, device):
    """To the logits of its sample; a router that sees it skips."""
    walk, x = Walk(network, dtype, device), network.input(3)
    x[1, 0, -1, -1] = torch.nan
    logits, decisions = walk(x)
    if not any(b.stride == 2 for b in network.blocks):  # which may step over the pixel
        assert logits[1].isnan().all()
        assert not decisions[1].any()


def test_infinity_stays_in_its_channel(dtype, device):
    """Channels beyond the last hold 0 * inf = NaN, which nothing may read."""
    for kind, cout in ((IDENTITY, 6), (PAD, 11), (PROJECTION, 11)):
        network = chain(6, cout, size=(4, 4), in_channels=1, kinds=(kind,))
        for w in network.weights:
            w.abs_()
        x = network.input(2).abs().to(dtype)
        x[0, 0, 0, 0] = torch.inf
        for paths in path_choices(network, 2):
            logits, _ = Walk(network, dtype, device)(x, paths)
            expected, _ = network.reference(x, paths)
            assert torch.equal(logits.isnan(), expected.isnan())
            assert torch.equal(logits.isinf(), expected.isinf())


@st.composite
def networks(draw):
    """Any sizes, with blocks that fit behind each other."""
    width = st.integers(1, 96)
    channels = stem = draw(width)
    blocks = []
    for _ in range(draw(st.integers(0, 4))):
        shortcut = draw(st.sampled_from((IDENTITY, PAD, PROJECTION)))
        cout = channels if shortcut == IDENTITY else draw(st.integers(channels, 96) if shortcut == PAD else width)
        stride = 1 if shortcut == IDENTITY else draw(st.integers(1, 2))
        pad_before = draw(st.integers(0, cout - channels)) if shortcut == PAD else 0
        blocks.append(Block(channels, draw(width), cout, stride, shortcut, pad_before, draw(st.integers(1, 300))))
        channels = cout
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    return Network(draw(st.integers(1, 20)), size, stem, blocks, draw(st.integers(1, 300)), draw(st.integers(0, 9)))


@settings(max_examples=10 if "SPNET_TEST_CORE" in os.environ else 40)  # a sanitizer takes its time
@given(network=networks(), dtype=st.sampled_from(list(DTYPES)), seed=st.integers(0, 9))
def test_any_network(network, dtype, seed):
    check_any_network(network, dtype, seed, "emulated")


@pytest.mark.gpu
@needs_build
@settings(max_examples=300)
@given(network=networks(), dtype=st.sampled_from(list(DTYPES)), seed=st.integers(0, 9))
def test_any_network_on_the_gpu(network, dtype, seed):
    check_any_network(network, dtype, seed, "cuda")


def check_any_network(network: Network, dtype: torch.dtype, seed: int, device: str):
    try:
        walk = Walk(network, dtype, device)
    except ValueError as e:
        assume("of shared memory" not in str(e))
        raise
    x = network.input(4).to(dtype)
    paths = torch.rand(4, len(network.blocks), generator=torch.Generator().manual_seed(seed)) < 0.6
    logits, decisions = walk(x, paths, thread_blocks=2)
    assert torch.equal(decisions.bool(), paths)
    assert_close(network, x, paths, logits, dtype)
    logits, decisions = walk(x, thread_blocks=1)
    assert_close(network, x, decisions.bool(), logits, dtype)


def test_many_python_threads(device):
    """On one plan and on several."""
    cases = []
    for name in ("odd-widths", "bodies", "projections"):
        network = NETWORKS[name]
        walk, x = Walk(network, torch.float16, device), network.input(6)
        cases.append((walk, x, walk(x)))

    def work(i: int) -> bool:
        walk, x, expected = cases[i % 3]
        n = (6, 1, 2)[i // 3 % 3]
        if device == "cuda":
            with torch.cuda.stream(torch.cuda.Stream()):
                logits, decisions = walk(x[:n])
        else:
            logits, decisions = walk(x[:n])
        return torch.equal(logits, expected[0][:n]) and torch.equal(decisions, expected[1][:n])

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(work, range(60)))


def cifar(n: int) -> Network:
    """ResNet-(6n + 2) on 32x32 inputs."""
    blocks = [Block(16, 16, 16)] * n + [Block(16, 32, 32, 2, PAD, 8)] + [Block(32, 32, 32)] * (n - 1)
    blocks += [Block(32, 64, 64, 2, PAD, 16)] + [Block(64, 64, 64)] * (n - 1)
    return Network(3, (32, 32), 16, [Block(**{**vars(b), "router_width": 128}) for b in blocks])


def test_shared_memory_of_a_cifar_network():
    """It fits the 163 KiB of sm_80, and what ldmatrix reads with stride 1 lies in different banks."""
    ints, floats = cifar(18).tables()
    tables = (ints.data_ptr(), ints.numel(), floats.data_ptr(), floats.numel())
    assert core.EmulatedCudaPlan(*tables, core.Dtype.float16, 163 << 10).shared_bytes <= 163 << 10
    strided = cifar(2)
    walk = Walk(strided, torch.float16, "emulated")
    paths = torch.tensor([[i not in (2, 4) for i in range(6)]])
    walk(strided.input(1), paths)
    assert walk.bank_conflicts == 0
    walk(strided.input(1), ~paths)
    assert walk.bank_conflicts > 0


# --- What is refused ------------------------------------------------------------------------------------------


def emulated(network: Network, dtype=core.Dtype.float16, shared_limit: int = SHARED_LIMIT):
    ints, floats = network.tables()
    return core.EmulatedCudaPlan(ints.data_ptr(), ints.numel(), floats.data_ptr(), floats.numel(), dtype, shared_limit)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Network(3, (65, 8), 4, []), "in_height: expected 1 to 64, got 65"),
        (Network(3, (8, 8), 4, [], pool=(3, 2, 1)), "pool_kernel: expected 0, got 3"),
        (Network(3, (8, 8), 4, [], stem_kernel=7, stem_stride=2), "stem: convolution 0: kernel: expected 3, got 7"),
        (Network(3, (8, 8), 4, [], stem_stride=2), "stem: convolution 0: stride: expected 1, got 2"),
        (
            Network(3, (8, 8), 4, [Block(4, 2, 4, kernels=(1, 3, 1))]),
            "block 0: n_convolutions: expected 2, got 3",
        ),
        (
            Network(3, (8, 8), 4, [Block(4, 2, 4, kernels=(1, 3))]),
            "block 0: convolution 0: kernel: expected 3, got 1",
        ),
        (
            Network(3, (8, 8), 4, [Block(4, 2, 4, 2, PROJECTION, strided=1)]),
            "block 0: convolution 1: stride: expected 1, got 2",
        ),
        (Network(3, (8, 8), 4, [], deeper=((4, 3, 1, 1, 1),)), "stem: n_convolutions: expected 1, got 2"),
        (Network(2, (8, 8), 4, [], stem_groups=2), "stem: convolution 0: groups: expected 1, got 2"),
        (Network(3, (8, 8), 4, [Block(4, 2, 4, groups=(1, 2))]), "block 0: convolution 1: groups: expected 1, got 2"),
        (Network(3, (8, 8), 4, [Block(4, 2, 4, 2, POOLED)]), "block 0: shortcut: expected 0 to 2, got 3"),
        (
            Network(3, (8, 8), 4, [Block(4, 2, 4, squeezes=(0, 2))]),
            "block 0: convolution 1: squeeze: expected 0, got 2",
        ),
        (Network(3, (8, 8), 4, [], stem_relu=0), "stem: convolution 0: relu: expected 1, got 0"),
        (Network(3, (8, 8), 4, [], after=((4, 1, 1, 4, 1),)), "after: n_convolutions: expected 0, got 1"),
        (Network(3, (8, 8), 4, [Block(4, 2, 4, relu=0)]), "block 0: relu: expected 1, got 0"),
        (Network(3, (8, 8), 4, [Block(4, 2, 4, relus=(0,))]), "block 0: convolution 0: relu: expected 1, got 0"),
        (Network(3, (8, 8), 4, [Block(4, 2, 4, norm=True)]), "block 0: n_convolutions: expected 2, got 3"),
        (
            Network(3, (8, 8), 4, [Block(4, 2, 4, before=((4, 1, 1, 4, 1),))]),
            "block 0: n_convolutions of before: expected 0, got 1",
        ),
    ],
)
def test_refuses_what_the_cpu_alone_walks(network, message):
    ints, floats = network.tables()
    with pytest.raises(ValueError, match=f"^plan: {message}"):
        core.EmulatedCudaPlan(
            ints.data_ptr(), ints.numel(), floats.data_ptr(), floats.numel(), core.Dtype.float16, 163 << 10
        )


def test_refuses_what_shared_memory_cannot_hold():
    needed = emulated(VALID).shared_bytes
    emulated(VALID, shared_limit=needed)
    with pytest.raises(
        ValueError, match=r"^plan: (stem|block \d): needs \d+ bytes of shared memory, a thread block has"
    ):
        emulated(VALID, shared_limit=needed - 1)
    with pytest.raises(ValueError, match="^plan: stem: needs .* has 232448$"):
        emulated(Network(3, (64, 64), 16, []))
    with pytest.raises(ValueError, match="^plan: block 1: needs .* has 232448$"):
        emulated(Network(3, (16, 16), 16, [Block(16, 16, 16), Block(16, 400, 16)]))


def test_refuses_other_dtypes_and_weights_beyond_them():
    for dtype in (core.Dtype.float32, core.Dtype.float64):
        with pytest.raises(ValueError, match="^plan: dtype: expected float16 or bfloat16"):
            emulated(VALID, dtype)
    network = Network(3, (9, 8), 4, [Block(4, 6, 4)])
    network.weights[4][0, 0, 0, 0] = 1e5
    emulated(network, core.Dtype.bfloat16)
    with pytest.raises(ValueError, match="^plan: block 0: a weight of 100000.* is beyond the range of float16$"):
        emulated(network)
    network.weights[4][0, 0, 0, 0] = torch.inf
    emulated(network)


def test_run_refuses():
    plan, x = emulated(VALID), VALID.input(2).half()
    out = torch.empty(2, 10), torch.empty(2, 3, dtype=torch.uint8)
    valid = {"x": x.data_ptr(), "batch": 2}
    valid |= dict(zip(("stride_n", "stride_c", "stride_h", "stride_w"), x.stride(), strict=True))
    valid |= {"paths": 0, "threshold": 0.0, "thread_blocks": 1}
    valid |= {"logits": out[0].data_ptr(), "decisions": out[1].data_ptr()}
    plan.run(**valid)
    for name, value in (("batch", -1), ("thread_blocks", 0), ("x", 0), ("logits", 0), ("decisions", 0)):
        with pytest.raises(ValueError, match=f"^walk: {name}: "):
            plan.run(**{**valid, name: value})


# --- On a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_build
def test_graphs_and_streams_run_side_by_side():
    """A launch resets its own queue, and shares it with none that may run at the same time."""
    network = cifar(3)
    walk, x = Walk(network, torch.float16, "cuda"), network.input(1000).cuda().half()
    expected = walk(x)
    logits = torch.empty(2, 1000, network.classes, device="cuda")
    decisions = torch.empty(2, 1000, len(network.blocks), device="cuda", dtype=torch.uint8)

    def launch(i: int):
        stream = torch.cuda.current_stream().cuda_stream
        walk.plan.run(x.data_ptr(), 1000, *x.stride(), 0, 0.0, logits[i].data_ptr(), decisions[i].data_ptr(), stream)

    streams, graphs = [torch.cuda.Stream() for _ in range(2)], []
    for i in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[i], stream=streams[0]):
            launch(i)
    for _ in range(3):
        logits.fill_(torch.nan)
        torch.cuda.synchronize()
        for i in range(2):
            with torch.cuda.stream(streams[i]):
                graphs[i].replay()
        with torch.cuda.stream(streams[0]):
            again = walk(x)
        torch.cuda.synchronize()
        assert torch.equal(again[0], expected[0])
        for i in range(2):
            assert torch.equal(logits[i].cpu(), expected[0])
            assert torch.equal(decisions[i].cpu(), expected[1])


# --- What the compiler made of it -----------------------------------------------------------------------------

CUOBJDUMP = shutil.which("cuobjdump") or Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def cuobjdump(*arguments) -> str:
    return subprocess.run([CUOBJDUMP, *arguments, core.__file__], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(core.cuda_architectures is None or not Path(CUOBJDUMP).exists(), reason="needs CUDA kernels")
def test_kernels_compute_in_registers_on_tensor_cores():
    resources = re.findall(
        r"Function (\S*walk_kernel\S*):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump("-res-usage")
    )
    architectures = core.cuda_architectures.split()
    assert len(resources) == 2 * len(architectures)
    for name, registers, stack, local in resources:
        assert int(registers) <= 255, name
        assert (stack, local) == ("0", "0"), name
    for architecture in architectures:
        code = cuobjdump("-sass", "-arch", architecture)
        walks = [f for f in re.split(r"Function : ", code)[1:] if "walk_kernel" in f.split("\n")[0]]
        assert len(walks) == 2
        for instructions in walks:
            for name in ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "LDGDEPBAR", "DEPBAR"):
                assert name in instructions
            for name in ("LDL", "STL"):
                assert not re.search(rf"\b{name}\b", instructions)
