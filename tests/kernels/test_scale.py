"""scale_ against its definition in float64."""

import pytest
import torch

from spnet.kernels import scale, scale_

from .poison import assert_guards, guarded, listed

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# index and count given, gather, scatter, add
MODES = [
    (False, False, False, False),
    (True, False, False, False),
    (True, True, False, False),
    (True, False, True, True),
    (True, True, True, True),
]


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("of_samples", [False, True])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 6, 20), (6, 1, 1, 3), (4, 9, 4, 136)], ids=str)
def test_scale(shape, mode, of_samples, by_kernel, device):
    device = device if by_kernel else torch.device("cpu")
    counted, gather, scatter, add = mode
    batch, _, _, channels = shape
    for number, count in enumerate((0, 1, batch - 1) if counted else (batch,)):
        dtype, relu = FLOATS[(number + MODES.index(mode)) % 3], (number + of_samples) % 2 == 0
        index, counts = listed(batch, count, device) if counted else (None, None)
        chosen = index[:count].long() if counted else torch.arange(count, device=device)
        first = torch.arange(count, device=device)
        read, written = chosen if gather else first, chosen if scatter else first
        x, out = (torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2))
        x[read] = torch.randn(count, *shape[1:], device=device).to(dtype)
        if add:
            out[written] = torch.randn(count, *shape[1:], device=device).to(dtype)
        x, out = guarded(x, device), guarded(out, device)
        if of_samples:
            factors = torch.full((batch, channels), float("nan"))
            factors[:count] = torch.randn(count, channels)
            factors, shift = guarded(factors, device), None
            y = x[read].double() * factors[:count, None, None].double().sigmoid()
        else:
            factors, shift = (guarded(torch.randn(channels), device) for _ in range(2))
            y = x[read].double() * factors.double() + shift.double()
        if add:
            y = y + out[written].double()
        expected = y.relu() if relu else y
        options = dict(index=index, count=counts, gather=gather, scatter=scatter, add=add, relu=relu)
        if by_kernel:
            scale.launch(out, x, factors, shift, *options.values()).run()
        else:
            scale_(out, x, factors, shift, **options)
        found = out[written].double()
        tolerance = 8 * torch.finfo(torch.float32).eps * (x[read].double().abs() + 3) * 4
        assert ((found - expected).abs() <= tolerance + torch.finfo(dtype).eps * expected.abs()).all()
        untouched = torch.ones(batch, dtype=torch.bool, device=device)
        untouched[written] = False
        assert out[untouched].isnan().all()
        assert_guards(out)


def test_in_place(device):
    x, logits = torch.randn(3, 4, 4, 20, device=device), torch.randn(3, 20, device=device)
    count = torch.tensor([2], dtype=torch.int32, device=device)
    expected = x * logits[:, None, None].sigmoid()
    y = x.clone()
    scale.launch(y, y, logits, None, None, count, False, False, False, False).run()
    torch.testing.assert_close(y[:2], expected[:2])
    assert torch.equal(y[2], x[2])


def test_nan_stays_in_its_place(device):
    x = torch.randn(2, 3, 3, 4, device=device)
    x[1, 2, 0, 3] = float("nan")
    out, numbers = torch.zeros_like(x), torch.ones(4, device=device)
    scale.launch(out, x, numbers, numbers, None, None, False, False, False, True).run()
    assert torch.equal(out.isnan(), x.isnan())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(x=torch.zeros(2, 3, 3, 4).double()), TypeError, "x: expected"),
        (dict(out=torch.zeros(2, 3, 4, 4)), ValueError, "out: expected"),
        (dict(out=torch.zeros(3, 3, 3, 4)), ValueError, "out, scale: expected batch 2"),
        (dict(scale=torch.zeros(2, 4)), ValueError, "scale: expected"),
        (dict(shift=None), ValueError, "scale: expected"),
        (dict(shift=None, scale=torch.zeros(1, 4)), ValueError, "out, scale: expected batch 2"),
        (dict(shift=torch.zeros(4).half()), TypeError, "shift: expected torch.float32"),
        (dict(gather=True), ValueError, "index, count"),
        (dict(x=torch.zeros(2, 3, 6, 4)[:, :, ::2]), ValueError, "x: expected contiguous"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(change, error, text):
    arguments = dict(out=torch.zeros(2, 3, 3, 4), x=torch.zeros(2, 3, 3, 4), scale=torch.ones(4), shift=torch.ones(4))
    with pytest.raises(error, match=text):
        scale_(**(arguments | change))
    scale_(**arguments)
    assert (arguments["out"] == 1).all()
