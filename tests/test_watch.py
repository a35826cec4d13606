"""What tells that memory, tensors and dictionaries are as they were."""

import mmap
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

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


def unchanged(
    facts: core.Facts | None = None,
    own: dict | None = None,
    layouts: core.Layouts | None = None,
    fingerprint: core.Fingerprint | None = None,
    decisions: torch.Tensor | None = None,
    threads: int = 1,
) -> bool:
    decisions = torch.empty(0, 0, dtype=torch.bool) if decisions is None else decisions
    facts, own = core.Facts([]) if facts is None else facts, {} if own is None else own
    return core.unchanged(facts, own, layouts, fingerprint, decisions.data_ptr(), *decisions.shape, threads)


def matches(watch: core.Fingerprint, threads: int = 1, chosen: tuple[bool, ...] = (True,)) -> bool:
    return unchanged(fingerprint=watch, decisions=torch.tensor([chosen]), threads=threads)


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
    with pytest.raises(ValueError, match="decisions: expected at most 1 columns, got 2"):
        matches(fingerprint([torch.zeros(8)]), 1, (True, True))
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
        (answer,) = {unchanged(facts, threads=threads) for facts in all_facts}
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
            assert unchanged(facts, threads=threads)
            value.__class__ = Second
            assert not unchanged(facts, threads=threads)
            value.__class__ = First


def test_facts_that_are_old_news():
    """What changes before the first comparison is a change."""
    a = {"x": 1}
    facts = core.Facts([[a, "x", a["x"]]])
    a["x"] = 2
    assert not unchanged(facts)


def test_no_facts():
    for lists in ([], [[]], [[{}]]):
        assert unchanged(core.Facts(lists))


@pytest.mark.parametrize("malformed", [["x"], [{}, "x"], [1], [{}, 1], [{}, "x", 1, "y"], [{}, "x", 1, 2], [{}, None]])
def test_malformed_facts(malformed):
    with pytest.raises(ValueError, match="facts: expected dictionaries"):
        core.Facts([malformed])


def test_own_facts():
    own = {"x": "1"}
    facts = core.Facts([[None, "x", own["x"], {}], [{}]])
    for _ in range(2):
        assert unchanged(facts, own)
        assert not unchanged(facts, {"x": "2"})
        assert not unchanged(facts)


@pytest.fixture
def exchange():
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if table is None:
        pytest.skip("this PyTorch has no DLPack tables")
    return table


@pytest.mark.parametrize("threads", [1, 2])
def test_layouts(threads, exchange):
    x = torch.zeros(4, 6)
    y = torch.zeros(3, dtype=torch.bfloat16)
    watch = core.Layouts([[x], [], [y]], exchange)
    facts, nothing = core.Facts([[]] * 3), core.Fingerprint(0, 0, 3, 1)

    def same(*chosen: bool) -> bool:
        return unchanged(facts, None, watch, nothing, torch.tensor([chosen]), threads)

    first = x.data
    x.fill_(1)
    assert same()
    for data in (first.t(), first.view(6, 4), first[1:], first.view(24), first.view(torch.int32), first.clone()):
        x.data = data
        assert not same()
        assert same(False)
        x.data = first
        assert same()
    without_memory = first.to_sparse()
    torch.utils.swap_tensors(x, without_memory)
    assert not same()
    torch.utils.swap_tensors(x, without_memory)
    assert same()
    y.data = y.data.view(torch.float16)
    assert not same()
    assert not same(True, True)
    assert same(True, True, False)
    with pytest.raises(ValueError, match="layouts: expected 2 parts, got 3"):
        unchanged(layouts=watch, fingerprint=core.Fingerprint(0, 0, 2, 1))
    with pytest.raises(Exception, match=r"."):
        core.Layouts([[object()]], exchange)


def test_decisions_of_many_samples():
    """A part is chosen by any of them, or always where there is no decision for it."""
    buffers = [random_bytes(100) for _ in range(5)]
    watch = fingerprint(buffers, parts=[*range(5)])
    decisions = torch.zeros(70, 4, dtype=torch.bool)
    decisions[69, 1] = decisions[0, 2] = decisions[33, 2] = True
    for part, chosen in enumerate((False, True, True, False, True)):
        buffers[part][50] ^= 1
        assert unchanged(fingerprint=watch, decisions=decisions) is not chosen
        assert unchanged(fingerprint=watch, decisions=decisions[:0]) is not (part == 4)
        assert not unchanged(fingerprint=watch)
        buffers[part][50] ^= 1


MOST_LOCKED = 16 * 1024 * 1024  # bytes that are compared with Python's lock held, as in csrc/bind_watch.cpp


@pytest.mark.parametrize("size", [RANGE, MOST_LOCKED // 4 + 1])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_everything_at_once(threads, size, exchange):
    """In every place, alone and beside others: an entry, a layout, a byte."""
    entries = [{"x": 1} for _ in range(5)]
    facts = core.Facts([[each, "x", 1] for each in entries])
    tensors = [torch.zeros(size, dtype=torch.uint8) for _ in range(4)]
    bytes_ = fingerprint(tensors, parts=[*range(4)])
    layouts = core.Layouts([[t] for t in tensors], exchange)

    def same(**of) -> bool:
        return unchanged(facts, None, layouts, bytes_, threads=threads, **of)

    def others(part: int) -> torch.Tensor:
        return torch.arange(4)[None] != part

    assert same()
    for each in entries:
        each["x"] = 2
        assert not same()
        each["x"] = 1
    for part, t in enumerate(tensors):
        for place in (0, size - 1):
            t[place] = 1
            assert not same()
            assert same(decisions=others(part))
            t[place] = 0
        data = t.data
        t.data = data.view(torch.int8)
        assert not same()
        assert same(decisions=others(part))
        t.data = data
        assert same()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("size", [RANGE, MOST_LOCKED])
@pytest.mark.parametrize("gone", [0, 1, 4])
def test_memory_that_is_gone_is_not_read(gone, size, exchange):
    """A layout has changed, and what lay there can be read no more, even while the tensors before are asked."""
    regions = [mmap.mmap(-1, size) for _ in range(5)]
    tensors = [torch.frombuffer(region, dtype=torch.uint8) for region in regions]
    bytes_ = fingerprint(tensors, parts=[*range(5)])
    layouts = core.Layouts([[t] * (20_000 if part == 0 else 1) for part, t in enumerate(tensors)], exchange)
    assert unchanged(None, None, layouts, bytes_)
    tensors[gone].data = torch.zeros(size, dtype=torch.uint8)
    regions[gone].close()
    others = torch.arange(5)[None] != gone
    child = os.fork()
    if child == 0:  # which the system ends where it reads what is gone
        answers = [
            [unchanged(None, None, layouts, bytes_, chosen, threads) for chosen in (None, ~others, others)]
            for threads in (1, 2, 5)
        ]
        os._exit(answers != [[False, False, True]] * 3)
    assert os.waitpid(child, 0)[1] == 0


def test_many_threads_at_once(exchange):
    """With the one watch, some of them with so many bytes that Python's lock is given away."""
    entries = [{"x": 1} for _ in range(3)]
    facts = core.Facts([[each, "x", 1] for each in entries])
    tensors = [torch.zeros(size, dtype=torch.uint8) for size in (2 * RANGE, 100, MOST_LOCKED, 5 * RANGE)]
    bytes_ = fingerprint(tensors, parts=[*range(4)])
    layouts = core.Layouts([[t] for t in tensors], exchange)

    def same(seed: int) -> list[bool]:
        few = torch.tensor([[True, True, False]])
        return [
            unchanged(facts, None, layouts, bytes_, None if i % 8 == seed else few, 1 + (seed + i) % 3)
            for i in range(16)
        ]

    with ThreadPoolExecutor(8) as pool:
        assert all(map(all, pool.map(same, range(8))))
        entries[1]["z"] = 1
        assert not any(map(any, pool.map(same, range(8))))
        del entries[1]["z"]
        assert all(map(all, pool.map(same, range(8))))
        tensors[3][-1] = 1
        assert not any(map(any, pool.map(same, range(8))))


def test_pythons_lock():
    """Another thread of Python goes on only while many bytes are compared."""
    x = torch.zeros(MOST_LOCKED + 1, dtype=torch.uint8)
    few, many = fingerprint([x[1:]]), fingerprint([x])
    turns, stop = [0], []

    def turn():
        while not stop:
            turns[0] += 1
            time.sleep(0)  # gives the lock away

    def passes(watch: core.Fingerprint) -> bool:
        before = turns[0]
        core.unchanged(facts, {}, None, watch, 0, 0, 0, 1)
        return turns[0] != before

    facts = core.Facts([])
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody takes it
    try:
        other = threading.Thread(target=turn)
        other.start()
        assert any(passes(many) for _ in range(1000))
        assert not any(passes(few) for _ in range(20))
    finally:
        stop.append(True)
        sys.setswitchinterval(interval)
        other.join()
