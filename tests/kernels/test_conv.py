"""conv_ against its definition in float64; the tolerance is the rounding of the sums and of the result."""

import pytest
import torch
import torch.nn.functional as F

from spnet.kernels import Scratch, conv, conv_, pack_weight
from spnet.kernels.tiling import Tile

from .poison import assert_guards, guarded, listed

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
TILE = Tile(block_m=32, block_n=32, block_k=16, group_m=2, warps=4, stages=2, programs_per_sm=1)
LARGE_TILE = Tile(block_m=128, block_n=128, block_k=64, group_m=8, warps=8, stages=3, programs_per_sm=1)

# k, stride, H, W, Cin, Cout: 7x7 maps share a tile, channels that are no multiple of a block, a map of one pixel
GEOMETRIES = [
    (1, 1, 7, 7, 32, 32),
    (1, 2, 7, 5, 20, 40),
    (3, 1, 7, 7, 16, 36),
    (3, 2, 6, 5, 24, 32),
    (3, 1, 1, 1, 5, 3),
]
# index and count given, gather, scatter, add
MODES = {
    "dense": (False, False, False, False),
    "compact": (True, False, False, False),
    "gather": (True, True, False, False),
    "scatter_add": (True, False, True, True),
    "gather_scatter": (True, True, True, False),
}


class Case:
    """Arguments of one conv_ and what it has to compute."""

    def __init__(self, geometry, mode, dtype, count, batch, device, relu=True, skip_relu=None, groups=1):
        kernel, stride, h, w, cin, cout = geometry
        counted, gather, scatter, add = MODES[mode]
        self.index, self.count = listed(batch, count, device) if counted else (None, None)
        n = count if counted else batch
        chosen = self.index[:n].long() if counted else torch.arange(n, device=device)
        first = torch.arange(n, device=device)
        self.read, self.written = chosen if gather else first, chosen if scatter else first
        x = torch.full((batch, h, w, cin), float("nan"), dtype=dtype, device=device)
        x[self.read] = torch.randn(n, h, w, cin, device=device).to(dtype)
        h_out, w_out = -(-h // stride), -(-w // stride)
        out = torch.full((batch, h_out, w_out, cout), float("nan"), dtype=dtype, device=device)
        if add:
            out[self.written] = torch.randn(n, h_out, w_out, cout, device=device).to(dtype)
        weight = torch.randn(cout, cin // groups, kernel, kernel, device=device).to(dtype)
        self.x, self.out = guarded(x, device), guarded(out, device)
        self.weight = guarded(pack_weight(weight, groups), device)
        self.bias = guarded(torch.randn(cout), device)
        self.options = dict(
            stride=stride, index=self.index, count=self.count, gather=gather, scatter=scatter, add=add, relu=relu,
            groups=groups,
        )  # fmt: skip
        self.options["skip_relu"] = skip_relu

        def product(x, weight, bias):
            operands = x.permute(0, 3, 1, 2).double(), weight.double(), bias.double()
            y = F.conv2d(*operands, stride, kernel // 2, groups=groups)
            return y.permute(0, 2, 3, 1)

        rows = self.x[self.read]
        self.expected = product(rows, weight, self.bias)
        magnitude = product(rows.abs(), weight.abs(), self.bias.abs())
        if add:
            self.expected = self.expected + self.out[self.written].double()
            magnitude = magnitude + self.out[self.written].abs()
        # Every one of the sum's roundings is at most eps / 2 of the sum of magnitudes; then one of the result.
        terms = kernel * kernel * cin + 2
        self.tolerance = terms * torch.finfo(torch.float32).eps * magnitude
        self.tolerance += torch.finfo(dtype).eps * self.expected.abs()
        if relu:
            clamped = self.expected.clamp(min=0)
            keep = None if skip_relu is None else skip_relu[:, None, None, None]
            self.expected = clamped if keep is None else torch.where(keep, self.expected, clamped)

    def run(self, tile=TILE, scratch=(None, None)):
        """By the kernel itself, on whatever device. Returns in how many parts the sums were cut."""
        options = {"tf32": False, **self.options}
        launch = conv.launch(self.out, self.x, self.weight, self.bias, *_ordered(options), *scratch, tile=tile)
        launch.run()
        return launch.arguments["SPLIT"]

    def check(self):
        found = self.out[self.written].double()
        assert not found.isnan().any()
        assert ((found - self.expected).abs() <= self.tolerance).all()
        untouched = torch.ones(len(self.out), dtype=torch.bool, device=self.out.device)
        untouched[self.written] = False
        assert self.out[untouched].isnan().all()
        assert_guards(self.out)


def _ordered(options):
    names = "stride groups index count gather scatter add relu skip_relu tf32".split()
    return [options[name] for name in names]


@pytest.mark.parametrize(("mode", "count"), [("dense", 6), *((m, n) for m in MODES if m != "dense" for n in (0, 1, 5))])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_kernel(geometry, mode, count, device):
    dtype = FLOATS[(GEOMETRIES.index(geometry) + count) % 3]
    case = Case(geometry, mode, dtype, count, 6, device)
    case.run()
    case.check()


# Cin, Cout, groups: a bundle of whole groups, cut off or not; groups of whole bundles; bundles that straddle groups,
# also at their end, where a tile may not read as many channels as at the beginning
GROUPS = [(32, 32, 8), (128, 192, 32), (24, 80, 4), (96, 96, 4), (144, 144, 6), (8, 256, 2), (72, 120, 3), (5, 70, 5)]


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_groups(groups, by_kernel, device):
    """Of tiles as wide as a bundle and narrower ones, of steps that reach beyond a bundle's channels."""
    device = device if by_kernel else torch.device("cpu")
    cin, cout, groups = groups
    for number, tile in enumerate((TILE, TILE._replace(block_n=128), TILE._replace(block_n=16, block_k=64))):
        mode = list(MODES)[(number + groups) % len(MODES)]
        dtype = FLOATS[(number + cout) % 3]
        case = Case((1 + 2 * (number % 2), 1 + number // 2, 3, 4, cin, cout), mode, dtype, 3, 4, device, groups=groups)
        case.run(tile) if by_kernel else conv_(case.out, case.x, case.weight, case.bias, **case.options)
        case.check()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_dtypes(dtype, relu, device):
    case = Case((3, 1, 5, 5, 20, 20), "scatter_add", dtype, 4, 5, device, relu=relu)
    case.run()
    case.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_twin(geometry, mode):
    case = Case(geometry, mode, torch.bfloat16, 4, 6, torch.device("cpu"))
    conv_(case.out, case.x, case.weight, case.bias, **case.options)
    case.check()


@pytest.mark.parametrize("by_kernel", [False, True])
def test_shortcut_gets_relu_only_where_the_sample_skips(by_kernel, device):
    device = device if by_kernel else torch.device("cpu")
    decisions = guarded(torch.rand(6, 3) < 0.5, device)[:, 1]
    case = Case((1, 2, 7, 7, 16, 32), "dense", torch.float32, 6, 6, device, skip_relu=decisions)
    case.run() if by_kernel else conv_(case.out, case.x, case.weight, case.bias, **case.options)
    case.check()
    assert (case.out[decisions] < 0).any()
    assert not (case.out[~decisions] < 0).any()


def test_nan_stays_in_its_sample(device):
    case = Case((3, 1, 3, 3, 16, 32), "scatter_add", torch.float16, 4, 6, device)
    case.x[2, 1, 1] = float("nan")
    case.run()
    others = case.written[[0, 1, 3]]
    assert case.out[case.written[2]].isnan().all()
    assert not case.out[others].isnan().any()


@pytest.mark.parametrize("tile", [TILE, TILE._replace(block_m=64, block_k=32, stages=3)])
def test_tf32_is_rounded_to_the_nearest(tile, device):
    """The same bits as of operands that were rounded before, whatever the tensor cores cut off."""
    case = Case((3, 1, 5, 5, 32, 32), "gather", torch.float32, 4, 5, device)
    case.options["tf32"] = True
    not_a_number = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # as GPUs write it
    case.x[case.read[1], 2, 2, 3] = not_a_number.to(device)
    case.run(tile)
    found = case.out[case.written].clone()
    for operand in (case.x, case.weight):
        rounded = ((operand.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
        assert not torch.equal(rounded, operand)
        operand.copy_(torch.where(operand.isnan(), operand, rounded))
    case.run(tile)
    assert torch.equal(found.isnan(), case.out[case.written].isnan())
    assert torch.equal(found.nan_to_num(), case.out[case.written].nan_to_num())
    assert found[1].isnan().any()
    assert not found[[0, 2, 3]].isnan().any()


def test_a_map_of_more_than_2_31_numbers(device):
    """Of which only those that are read take memory on the CPU."""
    x = torch.empty(2**31 + 16, dtype=torch.float16, device=device).as_strided((1, 3, 1, 16), (0, 2**30, 16, 1))
    for row in (0, 2):
        x[0, row] = torch.randn(1, 16, device=device)
    out, bias = (torch.zeros(shape, device=device) for shape in ((1, 2, 1, 16), (16,)))
    out, weight = out.half(), torch.eye(16, device=device).half().view(16, 1, 1, 16)
    geometry = dict(KERNEL_H=1, KERNEL_W=1, STRIDE_H=2, STRIDE_W=1, PADDING=0, GROUPS=1)
    modes = dict(GATHER=False, SCATTER=False, ADD=False, RELU=False)
    lists = None, None, None
    conv.launch_product(out, x, weight, bias, *lists, geometry, modes, tf32=False, scratch=None, tile=TILE).run()
    assert torch.equal(out, x[:, ::2])


@pytest.mark.parametrize(
    ("tile", "channels", "mode"),
    [
        (TILE._replace(block_m=16, block_n=64, block_k=32, group_m=8), (16, 80), "gather"),
        (TILE._replace(group_m=1), (16, 80), "scatter_add"),
        (LARGE_TILE, (64, 256), "gather"),
        (LARGE_TILE, (40, 72), "scatter_add"),
    ],
)
def test_other_tiles(tile, channels, mode, device):
    case = Case((3, 1, 7, 7, *channels), mode, torch.float16, 5, 6, device)
    case.run(tile)
    case.check()


@pytest.mark.parametrize("mode", MODES)
def test_programs_that_share_a_tile(mode, device):
    """Whichever of them is the last, and again with the same scratch memory."""
    scratch = Scratch.on(device)
    scratch.partials.fill_(float("nan"))
    for split, dtype in ((3, FLOATS[list(MODES).index(mode) % 3]), (9, torch.float32)):
        case = Case((3, 1, 3, 3, 16, 36), mode, dtype, 4, 6, device)
        out = case.out.clone()
        assert case.run(TILE._replace(split=split), scratch) == split
        case.check()
        assert not scratch.counters.any()
    found = case.out.clone()
    case.out.copy_(out)
    case.run(TILE._replace(split=9), scratch)
    assert torch.equal(found.nan_to_num(), case.out.nan_to_num())


def test_tiles_are_not_shared_where_the_parts_would_differ_or_have_no_room(device):
    case = Case((3, 1, 3, 3, 16, 16), "gather", torch.float16, 4, 6, device)
    scratch, tiles = Scratch.on(device), 2  # 6 samples of 9 pixels in blocks of 32
    assert case.run(TILE._replace(split=2), scratch) == 1
    assert case.run(TILE._replace(split=3)) == 1
    assert case.run(TILE._replace(split=3), scratch._replace(counters=scratch.counters[: tiles - 1])) == 1
    assert case.run(TILE._replace(split=3), scratch._replace(partials=scratch.partials[: 3 * tiles * 32 * 32 - 1])) == 1
    case.check()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(stride=3), ValueError, "stride: expected 1 or 2, got 3"),
        (dict(groups=3), ValueError, "groups: expected a divisor of 16 and 32 channels, got 3"),
        (dict(groups=2, weight=torch.zeros(32, 3, 3, 8).half()), ValueError, r"weight: expected \[-1, -1, -1, 16\]"),
        (dict(gather=True), ValueError, "index, count"),
        (dict(count=torch.zeros(1, dtype=torch.int64)), TypeError, "count: expected torch.int32"),
        (dict(skip_relu=torch.zeros(6, dtype=torch.bool), relu=False), ValueError, "skip_relu"),
        (dict(x=torch.zeros(6, 7, 7, 16)), TypeError, "weight: expected torch.float32"),
        (dict(x=torch.zeros(7, 7, 16).half()), ValueError, "x: expected"),
        (dict(x=torch.zeros(6, 7, 14, 16).half()[:, :, ::2]), ValueError, "x: expected contiguous"),
        (dict(x=torch.zeros(5, 7, 7, 16).half()), ValueError, "out: expected batch 5"),
        (dict(out=torch.zeros(6, 4, 7, 32).half()), ValueError, "out: expected"),
        (dict(weight=torch.zeros(32, 5, 5, 16).half()), ValueError, "weight: expected"),
        (dict(bias=torch.zeros(32).half()), TypeError, "bias: expected torch.float32"),
        (dict(scratch=(torch.zeros(9), torch.zeros(9))), TypeError, "counters: expected torch.int32"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(change, error, text):
    arguments = dict(out=(6, 7, 7, 32), x=(6, 7, 7, 16), weight=(32, 3, 3, 16))
    arguments = {name: torch.zeros(shape).half() for name, shape in arguments.items()} | dict(bias=torch.zeros(32))
    with pytest.raises(error, match=text):
        conv_(**(arguments | change))
    conv_(**arguments)


def test_sizes_beyond_32_bits():
    def arguments(width, cin, cout):
        out, x, weight = (1, 1, width, cout), (1, 1, width, cin), (cout, 3, 3, cin)
        return (torch.empty(shape, dtype=torch.float16, device="meta") for shape in (out, x, weight))

    for width, cin, cout in ((2**31, 1, 1), (2**20, 2**10, 1), (1, 2**14, 2**14)):
        with pytest.raises(ValueError, match="x, weight: expected at most"):
            conv_(*arguments(width, cin, cout), torch.empty(cout, device="meta"))
