"""What tells that memory, tensors and dictionaries are as they were."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spnet.native import core

RANGE = 128 * 1024  # bytes that one thread takes at a time, as in csrc/cpu/fingerprint.cpp
SIZES = (0, 1, 7, 8, 63, 64, 65, 255, 256, 1000, RANGE - 1, RANGE, RANGE + 1, 3 * RANGE + 77)


@pytest.fixture(params=core.cpu_levels())
def level(request):
    before = core.cpu_level()
    core.set_cpu_level(request.param)
    yield request.param
    core.set_cpu_level(before)


def fingerprint(buffers: list[torch.Tensor], threads: int = 1, parts: list[int] | None = None) -> core.Fingerprint:
    parts = parts or [0] * len(buffers)
    spans = [(b.data_ptr(), b.nbytes, part) for b, part in zip(buffers, parts, strict=True)]
    table = torch.tensor(spans, dtype=torch.int64).reshape(-1, 3)
    return core.Fingerprint(table.data_ptr(), len(table), max(parts, default=0) + 1, threads)


def matches(watch: core.Fingerprint, threads: int = 1, chosen: tuple[bool, ...] = (True,)) -> bool:
    return watch.matches(bytes(chosen), threads)


def random_bytes(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n,), dtype=torch.uint8)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_place_of_every_span(level, threads):
    buffers = [random_bytes(n) for n in SIZES]
    watch = fingerprint(buffers, threads)
    assert matches(watch)
    for b in buffers:
        for place in {p % len(b) for p in (0, 1, 7, 8, 100, len(b) // 2, -9, -8, -1)} if len(b) else ():
            b[place] ^= 1 << place % 8
            assert not matches(watch, threads), (len(b), place)
            b[place] ^= 1 << place % 8
    assert matches(watch, threads)


def test_what_stands_beside_a_span_does_not_matter(level):
    buffer = random_bytes(1000)
    watch = fingerprint([buffer[3:501], buffer[600:601]])
    buffer[:3] += 1
    buffer[501:600] += 1
    buffer[601:] += 1
    assert matches(watch)


@given(st.data())
def test_changes_that_sums_would_miss(data):
    """Of several words at once: moved, swapped, negated, doubled, raised here and lowered there."""
    n = data.draw(st.integers(2, 3 * RANGE // 4))
    x = torch.randn(n)
    watch = fingerprint([x])
    before = x.clone()
    i, j = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))
    step = data.draw(st.sampled_from([1, 2, 16, 32, 64, 4096]))
    change = data.draw(st.sampled_from(["swap", "negate", "negate all", "double", "shift", "raise and lower"]))
    if change == "swap":
        x[[i, j]] = x[[j, i]]
    elif change == "negate":
        x[i::step].neg_()
    elif change == "negate all":
        x.neg_()
    elif change == "double":
        x[i::step] *= 2
    elif change == "shift":
        x.copy_(before.roll(step))
    else:
        bits = x.view(torch.int32)
        bits[i] += 1
        bits[j] -= 1
    assert matches(watch) == torch.equal(x.view(torch.int32), before.view(torch.int32))


def test_top_bits(level):
    """Of two words in a lane: their differences add up to nothing."""
    x = torch.randint(-(2**62), 2**62, (RANGE // 8,))
    watch = fingerprint([x])
    for lanes in (2, 4, 8, 16, 32):
        for distance in range(1, 130):
            x[lanes * torch.tensor([0, distance])] ^= -(2**63)
            assert not matches(watch)
            x[lanes * torch.tensor([0, distance])] ^= -(2**63)


def test_swapped_spans(level):
    a, b = random_bytes(64), random_bytes(64)
    watch = fingerprint([a, b])
    keep = a.clone()
    a.copy_(b), b.copy_(keep)
    assert not matches(watch)


def test_zeros_that_move(level):
    """A word among zeros, wherever it stands."""
    x = torch.zeros(RANGE // 8, dtype=torch.int64)
    x[0] = 1
    watch = fingerprint([x])
    for place in (1, 2, 8, 32, 33, 64, 4096, len(x) - 1):
        x.zero_()[place] = 1
        assert not matches(watch)


@pytest.mark.parametrize("threads", [1, 2])
def test_parts_by_themselves(level, threads):
    """Small ones, of several spans, longer than a range, empty; a change is seen where its part is chosen alone."""
    parts = [0, 0, 1, 1, 2, 3, 5]  # none is part 4
    buffers = [random_bytes(n) for n in (7, 100, RANGE - 1, RANGE + 1, 1, 3 * RANGE, 64)]
    watch = fingerprint(buffers, threads, parts)
    for b, part in zip(buffers, parts, strict=True):
        for place in {0, len(b) // 2, len(b) - 1}:
            b[place] ^= 1
            for chosen in range(6):
                alone = tuple(p == chosen for p in range(6))
                assert matches(watch, threads, alone) == (chosen != part)
                assert matches(watch, threads, tuple(not a for a in alone)) == (chosen == part)
            b[place] ^= 1
    buffers[0][0] ^= 1
    assert matches(watch, threads, (False,) * 6)


def test_nothing_to_watch():
    assert matches(fingerprint([]))
    assert matches(fingerprint([torch.empty(0)]), 4)


def test_impossible_spans():
    with pytest.raises(ValueError, match="spans: "):
        core.Fingerprint(0, 1, 1, 1)
    with pytest.raises(ValueError, match="spans: "):
        core.Fingerprint(0, -1, 1, 1)
    for chosen in (b"", b"\1\1"):
        with pytest.raises(ValueError, match=f"chosen: expected 1 parts, got {len(chosen)}"):
            fingerprint([torch.zeros(8)]).matches(chosen, 1)
    for span in ((0, 8, 0), (16, -1, 0), (0, 0, -1), (0, 0, 2)):
        table = torch.tensor([span])
        with pytest.raises(ValueError, match="spans: "):
            core.Fingerprint(table.data_ptr(), 1, 2, 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_facts(threads):
    a, b, empty, value = {"x": (1, 2), "y": object()}, {"weight": object()}, {}, object()
    first, second = [a, "x", a["x"], "y", ..., empty], [b, "weight", b["weight"]]
    all_facts = [core.Facts([first, second]), core.Facts([[*first, *second]])]

    def same() -> bool:
        (answer,) = {core.same_objects(None, b"", facts, {}, threads) for facts in all_facts}
        return answer

    assert same()
    a["y"] = value
    assert same()
    for change, undo in [
        (lambda: a.update(x=(1, 3)), lambda: a.update(x=first[2])),
        (lambda: a.update(z=1), lambda: a.pop("z")),
        (lambda: empty.update(z=1), empty.clear),
        (lambda: b.update(z=1), lambda: b.pop("z")),
        (lambda: b.update(weight=None), lambda: b.update(weight=second[-1])),
        (b.clear, lambda: b.update(weight=second[-1])),
        (lambda: a.update(x=a.pop("x")), lambda: a.update(y=a.pop("y"))),
        (lambda: a.pop("y"), lambda: a.update(y=value)),
    ]:
        assert same()
        change()
        assert not same()
        assert not same()
        undo()
        assert same()


@pytest.mark.parametrize("threads", [1, 2])
def test_facts_of_another_class(threads):
    class First:
        pass

    class Second:
        pass

    value = First()
    for facts in (core.Facts([[{"x": value}, "x", value]]), core.Facts([[{}], [{"x": value}, "x", value]])):
        for _ in range(2):
            assert core.same_objects(None, b"", facts, {}, threads)
            value.__class__ = Second
            assert not core.same_objects(None, b"", facts, {}, threads)
            value.__class__ = First


def test_facts_that_are_old_news():
    """What changes before the first comparison is a change."""
    a = {"x": 1}
    facts = core.Facts([[a, "x", a["x"]]])
    a["x"] = 2
    assert not core.same_objects(None, b"", facts, {}, 1)


def test_no_facts():
    for lists in ([], [[]], [[{}]]):
        assert core.same_objects(None, b"", core.Facts(lists), {}, 1)


@pytest.mark.parametrize("malformed", [["x"], [{}, "x"], [1], [{}, 1], [{}, "x", 1, "y"], [{}, "x", 1, 2], [{}, None]])
def test_malformed_facts(malformed):
    with pytest.raises(ValueError, match="facts: expected dictionaries"):
        core.Facts([malformed])


def test_own_facts():
    own = {"x": "1"}
    facts = core.Facts([[None, "x", own["x"], {}], [{}]])
    for _ in range(2):
        assert core.same_objects(None, b"", facts, own, 1)
        assert not core.same_objects(None, b"", facts, {"x": "2"}, 1)
        assert not core.same_objects(None, b"", facts, {}, 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_layouts(threads):
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        pytest.skip("this PyTorch has no DLPack tables")
    x = torch.zeros(4, 6)
    y = torch.zeros(3, dtype=torch.bfloat16)
    watch = core.Layouts([[x], [], [y]], exchange)

    def same(chosen: bytes = b"\1\1\1") -> bool:
        return core.same_objects(watch, chosen, core.Facts([[]] * 3), {}, threads)

    first = x.data
    x.fill_(1)
    assert same()
    for data in (first.t(), first.view(6, 4), first[1:], first.view(24), first.view(torch.int32), first.clone()):
        x.data = data
        assert not same()
        assert same(b"\0\1\1")
        x.data = first
        assert same()
    without_memory = first.to_sparse()
    torch.utils.swap_tensors(x, without_memory)
    assert not same()
    torch.utils.swap_tensors(x, without_memory)
    assert same()
    y.data = y.data.view(torch.float16)
    assert not same()
    assert same(b"\1\1\0")
    with pytest.raises(ValueError, match="chosen: expected 3 parts, got 2"):
        same(b"\1\1")
    with pytest.raises(Exception, match=r"."):
        core.Layouts([[object()]], exchange)
