"""The operators as PyTorch sees them: schema, fake tensors, torch.compile, gradients."""

import pytest
import torch

import spnet.kernels as kernels
from spnet.kernels.library import _check_tensors

OPS = torch.ops.spnet


def conv_arguments():
    index, count = torch.tensor([0, 2, 3, 9], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    out, x, weight = torch.randn(4, 4, 4, 8), torch.randn(4, 7, 7, 5), torch.randn(8, 3, 3, 5)
    scratch = kernels.Scratch.on(torch.device("cpu"))
    return out, x, weight, torch.randn(8), 2, 1, index, count, True, True, True, True, None, False, *scratch


def shortcut_arguments():
    skips = (torch.rand(4, 3) < 0.5)[:, 1]
    out, x, weight = torch.randn(4, 7, 7, 8), torch.randn(4, 7, 7, 5), torch.randn(8, 1, 1, 5)
    return out, x, weight, torch.randn(8), 1, 1, None, None, False, False, False, True, skips, False, None, None


def list_arguments():
    return torch.zeros(3, 4).int(), torch.zeros(3).int(), torch.rand(4, 3) < 0.5


def decide_arguments():
    index, count, decisions = list_arguments()
    return index[1], count[:1], decisions[:, 1], torch.randn(4, 2), torch.zeros(1), torch.zeros(1)


CASES = {
    "conv_": conv_arguments,
    "conv_ shortcut": shortcut_arguments,
    "stem_conv_": lambda: (
        torch.randn(2, 4, 4, 8),
        torch.randn(kernels.padded_shape((2, 3, 8, 8), 7, 2)),
        torch.randn(8, 7, 32),
        torch.randn(8),
        2,
        True,
        False,
    ),
    "pool_": lambda: (torch.randn(4, 1, 5), torch.randn(4, 7, 7, 5), None, None),
    "route_": lambda: (
        torch.randn(4, 2),
        torch.randn(4, 1, 5),
        49,
        torch.randn(32, 5),
        torch.randn(32),
        torch.randn(32),
    ),
    "compact_": list_arguments,
    "decide_": decide_arguments,
    "scale_": lambda: (
        (torch.randn(4, 7, 7, 5), torch.randn(4, 7, 7, 5), torch.randn(5), torch.randn(5))
        + (torch.arange(4).int(), torch.ones(1).int(), True, True, True, True)
    ),
    "max_pool_": lambda: (torch.randn(2, 4, 4, 8), torch.randn(2, 7, 7, 8), 3, 2, 1),
}


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case, where):
    arguments = [a.to(where) if isinstance(a, torch.Tensor) else a for a in CASES[case]()]
    torch.library.opcheck(getattr(OPS, case.split()[0]).default, arguments)


def test_tensors_of_several_devices():
    with pytest.raises(ValueError, match=r"^conv_: expected all tensors on one device, got cpu, meta$"):
        _check_tensors("conv_", (torch.empty(1), 2, None, torch.empty(1, device="meta")))


@pytest.mark.parametrize(
    ("case", "argument"), [("conv_", 2), ("stem_conv_", 3), ("pool_", 1), ("route_", 3), ("decide_", 3), ("scale_", 2)]
)
def test_no_gradient(case, argument):
    arguments = CASES[case]()
    arguments[argument].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{case}: an argument requires grad"):
        getattr(OPS, case)(*arguments)
    with torch.no_grad():
        getattr(OPS, case)(*arguments)


def block(x, state, sums, w1, w2, router, threshold):
    """A basic block with an identity shortcut, and the decisions of its router."""
    batch, h, w, channels = x.shape
    state = state.copy_(x)
    index, count = torch.zeros(batch, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    decisions = torch.zeros(batch, dtype=torch.bool)
    margins = torch.zeros(batch, kernels.parts(len(router.w1)))
    inner, bias = torch.zeros_like(x), torch.zeros(channels)
    kernels.pool_(sums, state)
    kernels.route_(margins, sums, h * w, router.w1, router.b1, router.w2)
    kernels.decide_(index, count, decisions, margins, router.b2, threshold)
    kernels.conv_(inner, state, w1, bias, index=index, count=count, gather=True)
    kernels.conv_(state, inner, w2, bias, index=index, count=count, scatter=True, add=True)
    return state, decisions


def test_compile():
    x = torch.rand(5, 6, 6, 8)
    router = kernels.RouterWeights(torch.randn(16, 8), torch.randn(16), torch.randn(16), torch.zeros(1))
    weights = torch.randn(8, 3, 3, 8), torch.randn(8, 3, 3, 8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")

    def run(f, threshold):
        return f(x, torch.zeros_like(x), torch.zeros(5, 1, 8), *weights, router, torch.tensor([threshold]))

    margins = torch.relu(x.mean((1, 2)) @ router.w1.T + router.b1) @ router.w2
    for threshold in (margins.median().item(), 1e9):
        state, decisions = run(block, threshold)
        assert torch.equal(decisions, margins > threshold)
        hidden = torch.relu(torch.conv2d(x.permute(0, 3, 1, 2), weights[0].permute(0, 3, 1, 2), padding=1))
        body = torch.conv2d(hidden, weights[1].permute(0, 3, 1, 2), padding=1).permute(0, 2, 3, 1)
        torch.testing.assert_close(state, torch.where(decisions[:, None, None, None], torch.relu(x + body), x))
        for found, expected in zip(run(compiled, threshold), (state, decisions), strict=True):
            assert torch.equal(found, expected)
