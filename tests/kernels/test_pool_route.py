"""pool_ and route_ against their definitions in float64, and the promise of equal bits."""

import pytest
import torch

from spnet.kernels import parts, pool, pool_, route, route_, slabs

from .poison import assert_guards, guarded, listed

EPS = torch.finfo(torch.float32).eps
MAPS = [(7, 7, 40), (1, 1, 5), (16, 16, 16), (19, 15, 200)]


def summed(x, device, index=None, count=None, by_kernel=True):
    batch, h, w, channels = x.shape
    sums = guarded(torch.full((batch, slabs(h * w), channels), float("nan")), device)
    if by_kernel:
        pool.launch(sums, x, index, count).run()
    else:
        pool_(sums, x, index, count)
    assert_guards(sums)
    return sums


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("count", [None, 0, 1, 4])
@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_pool(dtype, shape, count, by_kernel, device):
    device = device if by_kernel else torch.device("cpu")
    index, n = (None, None) if count is None else listed(5, count, device)
    changed = torch.arange(5, device=device) if count is None else index[:count].long()
    x = torch.full((5, *shape), float("nan"), dtype=dtype, device=device)
    x[changed] = torch.randn(len(changed), *shape, device=device).to(dtype)
    x = guarded(x, device)
    sums = summed(x, device, index, n, by_kernel)
    expected = x[changed].double().sum((1, 2))
    tolerance = shape[0] * shape[1] * EPS * x[changed].double().abs().sum((1, 2))
    assert ((sums[changed].sum(1).double() - expected).abs() <= tolerance).all()
    unchanged = torch.ones(5, dtype=torch.bool, device=device)
    unchanged[changed] = False
    assert sums[unchanged].isnan().all()


def test_the_same_sample_has_the_same_bits_in_every_batch(device):
    x = guarded(torch.randn(6, 19, 15, 72), device)
    whole = summed(x, device)
    index, count = listed(6, 3, device)
    some = summed(x, device, index, count)
    one = summed(guarded(x[2:3], device), device)
    chosen = index[:3].long()
    assert torch.equal(some[chosen], whole[chosen])
    assert torch.equal(one[0], whole[2])


def router(width, channels, device):
    shapes = (width, channels), (width,), (width,)
    return [guarded(torch.randn(shape) / shape[-1] ** 0.5, device) for shape in shapes]


def routed(sums, pixels, weights, device, by_kernel=True):
    margins = guarded(torch.full((len(sums), parts(len(weights[0]))), float("nan")), device)
    arguments = margins, sums, pixels, *weights
    if by_kernel:
        route.launch(*arguments).run()
    else:
        route_(*arguments)
    assert_guards(margins)
    return margins


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize(("batch", "channels", "width"), [(0, 16, 16), (1, 20, 16), (5, 136, 40), (3, 256, 128)])
def test_route(batch, channels, width, by_kernel, device):
    device = device if by_kernel else torch.device("cpu")
    sums, pixels = guarded(torch.randn(batch, 2, channels), device), 300
    w1, b1, w2 = weights = router(width, channels, device)
    margins = routed(sums, pixels, weights, device, by_kernel)
    pooled = sums.double().sum(1) / pixels
    expected = (pooled @ w1.double().T + b1).relu() @ w2.double()
    magnitude = (pooled.abs() @ w1.double().abs().T + b1.abs()) @ w2.double().abs()
    tolerance = (channels + width + 4) * EPS * magnitude
    assert ((margins.double().sum(1) - expected).abs() <= tolerance).all()


def test_a_margin_depends_on_its_sample_alone(device):
    sums, weights = torch.randn(6, 2, 72), router(40, 72, device)
    whole = routed(guarded(sums, device), 300, weights, device)
    one = routed(guarded(sums[3:4], device), 300, weights, device)
    assert torch.equal(one[0], whole[3])
    sums[3, 1, 5] = float("nan")
    poisoned = routed(guarded(sums, device), 300, weights, device)
    assert poisoned[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(poisoned[others], whole[others])


def test_arguments_that_do_not_fit():
    x = torch.zeros(4, 7, 7, 8)
    with pytest.raises(ValueError, match="sums: expected"):
        pool_(torch.zeros(4, 2, 8), x)
    with pytest.raises(ValueError, match="expected both or neither"):
        pool_(torch.zeros(4, 1, 8), x, torch.zeros(4).int())
    with pytest.raises(ValueError, match="x: expected contiguous"):
        pool_(torch.zeros(4, 1, 8), x.transpose(1, 2).transpose(2, 3).contiguous().transpose(2, 3).transpose(1, 2))
    with pytest.raises(ValueError, match="margins: expected"):
        route_(torch.zeros(4, 3), torch.zeros(4, 1, 8), 49, torch.zeros(32, 8), torch.zeros(32), torch.zeros(32))
