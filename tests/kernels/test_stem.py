"""stem_conv_ against PyTorch's convolution in float64."""

import pytest
import torch
import torch.nn.functional as F

from spnet.kernels import interior, pack_stem_weight, padded_shape, stem, stem_conv_
from spnet.kernels.tiling import Tile

from .poison import assert_guards, guarded

TILE = Tile(block_m=32, block_n=16, block_k=16, group_m=2, warps=4, stages=2, programs_per_sm=1)


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kernel", "stride", "shape"),
    [(7, 2, (2, 3, 14, 14)), (7, 2, (3, 3, 9, 12)), (3, 1, (2, 1, 7, 5)), (3, 2, (1, 4, 5, 6))],
)
def test_stem(kernel, stride, shape, dtype, by_kernel, device):
    device = device if by_kernel else torch.device("cpu")
    x, weight = torch.randn(shape, device=device), torch.randn(20, shape[1], kernel, kernel, device=device).to(dtype)
    bias = guarded(torch.randn(20), device)
    padded = guarded(torch.zeros(padded_shape(shape, kernel, stride), dtype=dtype), device)
    interior(padded, shape, kernel).copy_(x)
    h_out, w_out = -(-shape[2] // stride), -(-shape[3] // stride)
    out = guarded(torch.full((shape[0], h_out, w_out, 20), float("nan"), dtype=dtype), device)
    arguments = out, padded, guarded(pack_stem_weight(weight), device), bias
    if by_kernel:
        stem.launch(*arguments, stride, True, False, tile=TILE).run()
    else:
        stem_conv_(*arguments, stride=stride)

    def product(x, weight, bias):
        return F.conv2d(x, weight, bias, stride, kernel // 2).permute(0, 2, 3, 1)

    wide = x.to(dtype).double(), weight.double(), bias.double()
    expected = product(*wide).relu()
    terms = shape[1] * kernel * kernel + 2
    tolerance = terms * torch.finfo(torch.float32).eps * product(*(t.abs() for t in wide))
    tolerance += torch.finfo(dtype).eps * expected
    assert ((out.double() - expected).abs() <= tolerance).all()
    assert_guards(out)


def test_arguments_that_do_not_fit():
    padded, weight = torch.zeros(padded_shape((2, 3, 8, 8), 3, 1)), torch.zeros(16, 3, 16)
    out, bias = torch.zeros(2, 8, 8, 16), torch.zeros(16)
    stem_conv_(out, padded, weight, bias, stride=1)
    with pytest.raises(ValueError, match="at most 4 channels"):
        padded_shape((2, 5, 8, 8), 3, 1)
    with pytest.raises(ValueError, match="weight: expected"):
        stem_conv_(out, padded, torch.zeros(16, 3, 12), bias, stride=1)
    with pytest.raises(ValueError, match="out: expected"):
        stem_conv_(out[:, :, :6], padded, weight, bias, stride=1)
    with pytest.raises(ValueError, match="stride: expected 1 or 2"):
        stem_conv_(out, padded, weight, bias, stride=4)
