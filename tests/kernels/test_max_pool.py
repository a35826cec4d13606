"""max_pool_ against torch.nn.functional.max_pool2d, to the bit."""

import pytest
import torch
import torch.nn.functional as F

from spnet.kernels import max_pool, max_pool_, pooled_shape

from .poison import assert_guards, guarded


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize(
    ("dtype", "pool"),
    [(torch.float16, (3, 2, 1)), (torch.bfloat16, (2, 2, 0)), (torch.float32, (3, 1, 1))],
    ids=str,
)
@pytest.mark.parametrize("shape", [(3, 7, 6, 20), (1, 3, 2, 64), (2, 5, 5, 72), (0, 4, 4, 8)], ids=str)
def test_max_pool(shape, pool, dtype, by_kernel, device):
    device = device if by_kernel else torch.device("cpu")
    x = torch.randn(shape)
    if len(x):
        x[0, 1, 1, 3] = float("nan")
        x[-1, :, :, 5] = float("-inf")
    x = guarded(x.to(dtype), device)
    out = guarded(torch.full(pooled_shape(shape, *pool), 7.0, dtype=dtype), device)
    max_pool.launch(out, x, *pool).run() if by_kernel else max_pool_(out, x, *pool)
    expected = F.max_pool2d(x.permute(0, 3, 1, 2), *pool).permute(0, 2, 3, 1)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    assert_guards(out)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(x=torch.zeros(1, 8, 8, 4).double()), TypeError, "x: expected"),
        (dict(out=torch.zeros(1, 4, 5, 4)), ValueError, "out: expected"),
        (dict(padding=2), ValueError, "padding"),
        (dict(stride=0), ValueError, "stride"),
        (dict(x=torch.zeros(1, 8, 16, 4)[:, :, ::2]), ValueError, "x: expected contiguous"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(change, error, text):
    arguments = dict(out=torch.zeros(1, 4, 4, 4), x=torch.zeros(1, 8, 8, 4), kernel=3, stride=2, padding=1)
    with pytest.raises(error, match=text):
        max_pool_(**(arguments | change))
    max_pool_(**arguments)
