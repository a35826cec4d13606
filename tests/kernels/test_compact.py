"""compact_ and decide_: integers and decisions compare exactly."""

import pytest
import torch

from spnet.kernels import compact, compact_, decide_, parts

from .poison import assert_guards, guarded

POISON = -7


def buffers(batch, device):
    index = guarded(torch.full((batch,), POISON, dtype=torch.int32), device)
    return index, guarded(torch.tensor([POISON], dtype=torch.int32), device)


def check(index, count, decisions):
    expected = decisions.nonzero().squeeze(1).int()
    assert count.tolist() == [len(expected)]
    assert torch.equal(index[: len(expected)], expected)
    assert (index[len(expected) :] == POISON).all()


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("batch", [0, 1, 5, 1023, 1024, 2500])
def test_compact(batch, rate, by_kernel, device):
    """Three of four columns, into rows and counts that lie apart."""
    device = device if by_kernel else torch.device("cpu")
    decisions = guarded(torch.rand(batch, 4) < rate, device)[:, 1:]
    index = guarded(torch.full((3, batch + 5), POISON, dtype=torch.int32), device)
    count = guarded(torch.full((3, 4), POISON, dtype=torch.int32), device)
    run = (lambda *a: compact.launch(*a).run()) if by_kernel else compact_
    run(index[:, :batch], count[:, 0], decisions)
    for block in range(3):
        check(index[block, :batch], count[block, :1], decisions[:, block])
    assert (index[:, batch:] == POISON).all()
    assert (count[:, 1:] == POISON).all()
    assert_guards(index)
    assert_guards(count)


def test_largest_batch(device):
    decisions = guarded(torch.rand(65_536) < 0.5, device)
    index, count = buffers(65_536, device)
    compact.launch(index[None], count, decisions[:, None]).run()
    check(index, count, decisions)
    assert_guards(index)
    assert_guards(count)


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("width", [16, 40, 128, 300])
def test_decide(width, by_kernel, device):
    device = device if by_kernel else torch.device("cpu")
    batch = 1030
    # Eighths, whose sums are exact in any order: ties with the threshold are ties.
    margins = torch.randint(-8, 9, (batch, parts(width))) / 8
    margins[3, 0] = float("nan")
    margins = guarded(margins, device)
    b2, threshold = guarded(torch.tensor([0.25]), device), guarded(torch.tensor([-0.125]), device)
    decisions = guarded(torch.zeros(batch, 3, dtype=torch.bool), device)
    index, count = buffers(batch, device)
    run = (lambda *a: compact.launch_decide(*a).run()) if by_kernel else decide_
    run(index, count, decisions[:, 1], margins, b2, threshold)
    expected = margins.sum(1) + 0.25 > -0.125
    assert (margins.sum(1) + 0.25 == -0.125).any()
    assert not expected[3]
    assert torch.equal(decisions[:, 1], expected)
    assert not decisions[:, [0, 2]].any()
    check(index, count, expected)
    assert_guards(index)
    assert_guards(count)


def test_arguments_that_do_not_fit():
    index, count, decisions = torch.zeros(1, 4).int(), torch.zeros(1).int(), torch.zeros(4, 1).bool()
    with pytest.raises(TypeError, match="decisions: expected torch.bool"):
        compact_(index, count, decisions.int())
    with pytest.raises(ValueError, match="index: expected"):
        compact_(index[:, :3], count, decisions)
    with pytest.raises(ValueError, match="count: expected"):
        compact_(index, torch.zeros(2).int(), decisions)
    with pytest.raises(ValueError, match="index: expected contiguous rows"):
        compact_(torch.zeros(1, 8).int()[:, ::2], count, decisions)
    with pytest.raises(ValueError, match="at most 65536"):
        compact_(torch.zeros(1, 65_537).int(), count, torch.zeros(65_537, 1).bool())
    rest = torch.zeros(1), torch.zeros(1)
    with pytest.raises(ValueError, match="decisions: expected"):
        decide_(index[0], count, decisions, torch.zeros(4, 8), *rest)
    with pytest.raises(ValueError, match="margins: expected"):
        decide_(index[0], count, decisions[:, 0], torch.zeros(3, 8), *rest)
