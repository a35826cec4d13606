"""The native operators against plain PyTorch: copies, gathers and sums compare to the last bit."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spnet.kernels
from spnet.execution import ops, reference
from spnet.execution.device import why_not_native
from spnet.native import build_info, core

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHAPES = (
    (0,),
    (1,),
    (7,),
    (5, 3),
    (4, 0),
    (0, 3, 2),
    (3, 2, 5),
    (1, 3, 5, 7),
    (9, 16, 1, 1),
    (4, 3, 5, 7),
    (2, 3, 2, 3, 4),
    (5, 64, 33, 20),  # rows that several threads share
    (30_001, 9),  # many small rows for each thread
)


@pytest.fixture(params=core.cpu_levels())
def level(request):
    """Runs a test at each instruction-set level of this machine."""
    before = core.cpu_level()
    core.set_cpu_level(request.param)
    yield request.param
    core.set_cpu_level(before)


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch):
    """Two threads for the native core alone: PyTorch's would only slow down the references."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(SAME_SIZE_INTEGER[x.itemsize])


def random_bits(shape, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Every kind of number: normal, subnormal, zero, infinite and NaN."""
    size = torch.empty((), dtype=dtype).itemsize
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).squeeze(-1).reshape(shape)


def selection(batch: int, kind: str) -> torch.Tensor:
    decisions = {"all": torch.ones, "none": torch.zeros}.get(kind)
    if decisions is not None:
        return decisions(batch, dtype=torch.bool)
    return torch.rand(batch, generator=torch.Generator().manual_seed(batch)) < 0.5


def layouts(x: torch.Tensor):
    """The same values in several memory layouts; all but the last keep every sample in one chunk."""
    yield "contiguous", x
    if x.ndim == 4:
        yield "channels-last", x.to(memory_format=torch.channels_last)
    if x.ndim == 5:
        yield "channels-last", x.to(memory_format=torch.channels_last_3d)
    if x.ndim >= 3:
        yield "transposed", x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    yield "strided", wide[..., ::2]


def assert_same_numbers(actual: torch.Tensor, expected: torch.Tensor):
    """Equal bits, except that any NaN equals any other: PyTorch's own differ between its vector and scalar loops."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(bits(actual.nan_to_num(0.0)), bits(expected.nan_to_num(0.0)))


# --- compact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["all", "none", "half"])
@pytest.mark.parametrize("batch", [0, 1, 31, 128, 65_537])
def test_compact(batch, kind):
    decisions = selection(batch, kind)
    assert torch.equal(ops.compact(decisions), reference.compact(decisions))


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_compact_of_any_mask(values, step):
    decisions = torch.tensor(values, dtype=torch.bool)[::step]
    assert ops.compact(decisions).tolist() == [i for i, chosen in enumerate(decisions.tolist()) if chosen]


def test_compact_rejects():
    with pytest.raises(TypeError, match=r"decisions: expected torch.bool, got torch.float32"):
        ops.compact(torch.ones(3))
    with pytest.raises(ValueError, match=r"decisions: expected \[B\], got \[3, 1\]"):
        ops.compact(torch.ones(3, 1, dtype=torch.bool))


# --- gather_rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["all", "none", "half"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_rows(shape, kind):
    index = ops.compact(selection(shape[0], kind))
    for name, x in layouts(random_bits(shape, torch.float32)):
        rows = ops.gather_rows(x, index)
        assert torch.equal(bits(rows), bits(reference.gather_rows(x, index))), name
        dense = x.contiguous() if name == "strided" else x
        if len(index) > 1 and x.numel():
            assert rows.stride() == dense.stride(), name
        assert ops._same_layout(rows, dense), name


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.complex64], ids=str)
def test_gather_rows_of_any_dtype(dtype):
    x = torch.randint(0, 2, (11, 3, 5)).to(dtype)
    index = torch.tensor([10, 0, 0, 7])  # any order, repeats allowed
    assert torch.equal(ops.gather_rows(x, index), x[index])
    assert torch.equal(ops.gather_rows(x, index.repeat(2)[::2]), x[index.repeat(2)[::2]])


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_gather_rows_of_any_shape(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    index = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=9)), dtype=torch.int64)
    order = [0, *data.draw(st.permutations(range(1, len(shape))))]
    x = torch.randn(shape).permute(order)
    assert torch.equal(ops.gather_rows(x, index), x[index])


# --- scatter_add_rows_ -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["all", "none", "half"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scatter_add_rows(shape, kind, dtype):
    index = ops.compact(selection(shape[0], kind))
    src = random_bits((len(index), *shape[1:]), dtype, seed=1)
    relu = len(shape) % 2 == 0
    for name, x in layouts(random_bits(shape, dtype)):
        expected = x.clone()
        reference.scatter_add_rows_(expected, index, src, relu)
        for _, source in layouts(src) if src.numel() < 1000 else [(name, src)]:
            actual = x.clone()
            ops.scatter_add_rows_(actual, index, source, relu)
            assert_same_numbers(actual, expected)
        if name == "strided":
            actual = x.repeat_interleave(2, dim=-1)
            ops.scatter_add_rows_(actual[..., ::2], index, src, relu)
            assert_same_numbers(actual[..., ::2], expected)
            assert torch.equal(bits(actual[..., 1::2]), bits(x))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_added_like_in_pytorch(level, dtype, relu):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for seed in range(8):
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        x, src = every.clone()[None], every[order][None]
        index = torch.zeros(1, dtype=torch.int64)
        expected = x + src
        ops.scatter_add_rows_(x, index, src, relu)
        assert_same_numbers(x, expected.relu() if relu else expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 15, 16, 17, 33, 100])
def test_ends_of_rows(level, length, dtype):
    x, src = random_bits((3, length), dtype), random_bits((2, length), dtype, seed=1)
    index = torch.tensor([2, 0])
    expected = x.clone()
    reference.scatter_add_rows_(expected, index, src, True)
    ops.scatter_add_rows_(x, index, src, True)
    assert_same_numbers(x, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_that_are_not_listed_stay_as_they_are(dtype):
    x = random_bits((64, 16, 40, 33), dtype)
    x[1::2] = float("nan")
    bits(x)[1::2] += 1  # a NaN that no arithmetic makes
    before = bits(x).clone()
    index = torch.arange(0, 64, 2)
    ops.scatter_add_rows_(x, index, torch.ones(32, 16, 40, 33, dtype=dtype), True)
    assert torch.equal(bits(x)[1::2], before[1::2])
    assert not torch.equal(bits(x)[::2], before[::2])


def test_relu_keeps_nan_and_negative_zero():
    x = torch.tensor([[float("nan"), -0.0, -1.0, 2.0]])
    ops.scatter_add_rows_(x, torch.tensor([0]), torch.tensor([[0.0, -0.0, 0.5, 0.5]]), relu=True)
    assert x[0, 0].isnan()
    assert torch.signbit(x[0, 1])
    assert x[0, 1:].tolist() == [0.0, 0.0, 2.5]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 1, 4], r"index: expected values in \[0, 4\), got 4 at position 2"),
        ([-1, 1, 2], r"index: expected values in \[0, 4\), got -1 at position 0"),
        ([0, 2**40, 9], r"got 1099511627776 at position 1"),
    ],
)
def test_index_out_of_range(index, message):
    x = torch.randn(4, 3)
    before = x.clone()
    index = torch.tensor(index)
    with pytest.raises(IndexError, match=message):
        ops.gather_rows(x, index)
    with pytest.raises(IndexError, match=message):
        ops.scatter_add_rows_(x, index, torch.ones(3, 3))
    assert torch.equal(x, before)
    with pytest.raises(IndexError):
        ops.gather_rows(x[:0], torch.tensor([0]))


def test_scatter_rejects():
    x = torch.randn(4, 3)
    before = x.clone()
    index = torch.tensor([0, 2])
    src = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"index: expected each row once, got 2 again at position 2"):
        ops.scatter_add_rows_(x, torch.tensor([2, 0, 2]), torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"src: expected memory apart from dst"):
        ops.scatter_add_rows_(x, index, x[1:3])
    with pytest.raises(ValueError, match=r"src: expected \[2, 3\], got \[2, 4\]"):
        ops.scatter_add_rows_(x, index, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"src: expected \[2, 3\], got \[3, 3\]"):
        ops.scatter_add_rows_(x, index, torch.ones(3, 3))
    with pytest.raises(TypeError, match=r"src: expected torch.float32 like x, got torch.float64"):
        ops.scatter_add_rows_(x, index, src.double())
    with pytest.raises(TypeError, match=r"x: expected one of .*torch.bfloat16.*, got torch.int64"):
        ops.scatter_add_rows_(x.long(), index, src.long())
    with pytest.raises(TypeError, match=r"index: expected torch.int64, got torch.int32"):
        ops.scatter_add_rows_(x, index.int(), src)
    with pytest.raises(ValueError, match=r"index: expected \[n\], got \[1, 2\]"):
        ops.gather_rows(x, index[None])
    with pytest.raises(ValueError, match=r"x: expected \[B, ...\], got a scalar"):
        ops.gather_rows(torch.tensor(1.0), index)
    assert torch.equal(x, before)


def test_no_gradient():
    x, index, src = torch.randn(4, 3, requires_grad=True), torch.tensor([2]), torch.ones(1, 3)
    with pytest.raises(RuntimeError, match="x: requires grad"):
        ops.gather_rows(x, index)
    with pytest.raises(RuntimeError, match="src: requires grad"):
        ops.scatter_add_rows_(x.detach(), index, src.requires_grad_())
    with torch.no_grad():
        expected = x[2] + 1
        ops.scatter_add_rows_(x, index, src)
        assert torch.equal(ops.gather_rows(x, index)[0], expected)


def test_core_checks_what_it_is_given():
    with pytest.raises(ValueError, match="sizes: expected none below 0, got batch 1, n -1"):
        core.gather_rows(0, 1, 0, -1, 0, 4, 1)
    with pytest.raises(ValueError, match="index: null pointer"):
        core.gather_rows(0, 1, 0, 1, 0, 4, 1)
    with pytest.raises(ValueError, match="mask: null pointer"):
        core.compact(0, 1, 0)
    with pytest.raises(ValueError, match="level: expected one that this processor runs"):
        core.set_cpu_level("avx1024")


# --- threads and processes -------------------------------------------------------------------------------------------


def large_case():
    x = torch.randn(96, 16, 32, 32)
    index = ops.compact(selection(96, "half"))
    return x, index, torch.randn(len(index), 16, 32, 32)


def test_many_threads_at_once():
    x, index, src = large_case()
    expected = x.clone()
    reference.scatter_add_rows_(expected, index, src, True)
    rows = reference.gather_rows(x, index)

    def work(_):
        mine = x.clone()
        for _ in range(5):
            assert torch.equal(ops.gather_rows(mine, index), rows)
        ops.scatter_add_rows_(mine, index, src, True)
        return torch.equal(mine, expected)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(32)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_the_pool_has_started():
    x, index, _ = large_case()
    expected = ops.gather_rows(x, index).numpy().tobytes()
    child = os.fork()
    if child == 0:
        # Only the native core runs here: PyTorch's own threads do not survive a fork.
        same = all(ops.gather_rows(x, index).numpy().tobytes() == expected for _ in range(3))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ops.gather_rows(x, index).numpy().tobytes() == expected


def test_exit_with_sleeping_workers():
    program = """
import torch
from spnet.execution import ops
torch.set_num_threads(2)
ops.gather_rows(torch.randn(64, 16, 32, 32), torch.arange(64))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# --- PyTorch's view of the operators ---------------------------------------------------------------------------------

CASES = {
    "compact": lambda: (selection(9, "half"),),
    "gather_rows": lambda: (torch.randn(5, 3, 4, 2), torch.tensor([3, 0, 3])),
    "gather_rows channels-last": lambda: (
        torch.randn(5, 3, 4, 2).to(memory_format=torch.channels_last),
        torch.tensor([3, 0]),
    ),
    "gather_rows strided": lambda: (torch.randn(5, 6)[:, ::2], torch.tensor([3, 0])),
    "scatter_add_rows_": lambda: (torch.randn(5, 3), torch.tensor([3, 0]), torch.randn(2, 3), True),
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    torch.library.opcheck(getattr(torch.ops.spnet, case.split()[0]).default, CASES[case]())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def block(x, index):
        rows = ops.gather_rows(x, index)
        y = x * 1
        ops.scatter_add_rows_(y, index, rows.sin() * 2, True)
        return y + 1

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 8):
        x = torch.randn(batch, 3, 4, 6).to(memory_format=torch.channels_last)
        index = torch.tensor([4, 1])
        assert torch.equal(compiled(x, index), block(x, index))


def test_compile_with_compact():
    def block(x, decisions):
        index = ops.compact(decisions)
        y = x * 1
        ops.scatter_add_rows_(y, index, ops.gather_rows(x, index) * 2, True)
        return y

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3)
    for kind in ("half", "none", "all"):
        decisions = selection(6, kind)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            assert torch.equal(compiled(x, decisions), block(x, decisions))


@pytest.mark.parametrize("shape", SHAPES[:-2], ids=str)
def test_other_devices_run_the_same_checks_and_layouts(shape):
    index = ops.compact(selection(shape[0], "half"))
    for _, x in layouts(torch.randn(shape)):
        native, plain = ops.gather_rows(x, index), ops._gather_rows_anywhere(x, index)
        assert torch.equal(native, plain)
        assert native.stride() == plain.stride()
        a, b = x.clone(), x.clone()
        ops.scatter_add_rows_(a, index, plain, True)
        ops._scatter_add_rows_anywhere(b, index, plain, True)
        assert torch.equal(a, b)
    with pytest.raises(TypeError, match="decisions"):
        ops._compact_anywhere(torch.ones(3))


# --- build -----------------------------------------------------------------------------------------------------------


def test_build_info():
    info = build_info()
    assert info["torch"] == torch.__version__
    assert info["threads"] == 2
    assert info["cpu_level"] == core.cpu_levels()[-1]
    assert (info["cuda"] is not None) == bool(re.fullmatch(r"nvcc [\d.]+", info["cuda_status"]))
    assert all(re.fullmatch(r"sm_\d+", architecture) for architecture in info["cuda"] or [])


def test_kernels_are_importable():
    assert Path(spnet.kernels.__file__).parent.name == "kernels"


# --- CUDA, as far as it goes without a GPU ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 1000, 1024, 65_535, 65_536, 100_000])
def test_warp_spans_cover_the_mask(n):
    spans = [core.tiling.warp_span(n, 32, warp) for warp in range(32)]
    assert spans[0][0] == 0
    assert spans[-1][1] == n
    assert all(before[1] == after[0] for before, after in zip(spans, spans[1:], strict=False))
    assert all(begin % 32 == 0 for begin, end in spans if end > begin)


@pytest.mark.parametrize("row_elems", [1, 1023, 1024, 1025, 4096])
def test_row_tiles_cover_the_rows(row_elems):
    rows = 3
    tiles = rows * core.tiling.tiles_per_row(row_elems, 1024)
    seen = [0] * (rows * row_elems)
    for tile in range(tiles):
        row, begin, end = core.tiling.row_tile(tile, row_elems, 1024)
        assert 0 < end - begin <= 1024
        for i in range(row * row_elems + begin, row * row_elems + end):
            seen[i] += 1
    assert set(seen) == {1}


def test_divisions_by_multiplying():
    """Of the columns of maps up to 64x64."""
    for divisor in range(1, 65):
        assert all(core.tiling.divide(n, divisor) == n // divisor for n in range(64 * 64))


@pytest.mark.gpu
@pytest.mark.skipif(core.cuda_architectures is None, reason="built without CUDA kernels")
@pytest.mark.parametrize("kind", ["all", "none", "half"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_on_a_gpu(shape, dtype, kind):
    decisions = selection(shape[0], kind)
    index = ops.compact(decisions.cuda())
    assert why_not_native(index.device) == ""
    chosen = reference.compact(decisions)
    assert torch.equal(index.cpu(), chosen)
    src = random_bits((len(chosen), *shape[1:]), dtype, seed=1)
    for name, x in layouts(random_bits(shape, dtype)):
        rows = ops.gather_rows(x.cuda(), index)
        assert torch.equal(bits(rows.cpu()), bits(reference.gather_rows(x, chosen))), name
        for relu in (False, True):
            actual, expected = x.cuda(), x.clone()
            ops.scatter_add_rows_(actual, index, src.cuda(), relu)
            reference.scatter_add_rows_(expected, chosen, src, relu)
            assert_same_numbers(actual.cpu(), expected)


def test_a_gpu_without_kernels_runs_pytorch(monkeypatch):
    run = ops._where_native(lambda x, index: ("native", index), lambda x, index: ("anywhere", index))
    for reason, chosen in (("", "native"), ("it is too old", "anywhere")):
        monkeypatch.setattr(ops, "why_not_native", {torch.device("cpu"): reason}.get)
        assert run(torch.ones(1), 7) == (chosen, 7)


def test_a_build_without_cuda_kernels():
    """Of which nothing is registered for CUDA, where the operators of every other device then run."""
    code = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("spnet._core", {core.__file__!r})
core = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
if "none" in sys.argv:
    core.cuda_architectures = None
import spnet
for name in ("compact", "gather_rows", "scatter_add_rows_"):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"spnet::{{name}}", "CUDA")
print(torch._C._dispatch_has_kernel_for_dispatch_key("spnet::compact", "CUDA"))
"""
    for argument, registered in (("none", "False"), ("all", str(core.cuda_architectures is not None))):
        done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True)
        assert done.stdout.strip() == registered, done.stderr


@pytest.mark.skipif(core.cuda_architectures is None, reason="built without CUDA kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_device_raises():
    with pytest.raises(RuntimeError, match="cudaGetDevice|compact launch"):
        core.cuda.compact(0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="sizes: expected none below 0"):
        core.cuda.gather_rows(0, 0, 0, 1, 0, 0, -1, 0, 4)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_kernels_keep_everything_in_registers(tmp_path):
    source = Path(__file__).parents[1] / "csrc/cuda/rows.cu"
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-cubin", "-Xptxas=-v", source, "-o", tmp_path / "rows.cubin"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) >= 16
    assert set(frames) == {("0", "0", "0")}
