"""The bundled network on its real images and its own paths, and accuracy against measured time.

``python -m pytest bench/bench_real_paths.py --benchmark-only``
"""

import functools
import math
import statistics

import pytest
import torch
from timing import in_rotation, minima, take_turns

import spnet
from spnet.analysis.curves import whole_epochs
from spnet.analysis.paths import short_names
from spnet.api import IMPLEMENTATIONS
from spnet.pretrained import ASSETS
from spnet.training import evaluate
from spnet.training.data import Loader, make_loader
from spnet.training.report import read_log

NETWORK = "fashion-mnist"
BATCHES = [1, 16, 100, 1000]
THRESHOLDS = [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0]


@functools.cache
def images() -> tuple[spnet.SPNet, torch.Tensor, torch.Tensor]:
    model = spnet.load_pretrained(NETWORK).to(memory_format=torch.channels_last)
    pixels, labels = spnet.sample_images(NETWORK)
    return model, spnet.preprocess(model, pixels).contiguous(memory_format=torch.channels_last), labels


def test_set() -> Loader | None:
    try:
        return make_loader("fashion-mnist", "test", batch_size=500)
    except FileNotFoundError:
        return None


def fitting(model: spnet.SPNet, x: torch.Tensor) -> list[str]:
    """The implementations that take this model here."""
    found = []
    for impl in IMPLEMENTATIONS:
        try:
            spnet.fast_forward(model, x, impl=impl)
        except ValueError:
            continue
        found.append(impl)
    return found


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: f"B{b}")
def test_real_paths(benchmark, report, batch):
    """Every implementation on real images, whose routers decide."""
    model, x, labels = images()
    batches = x.split(batch)[:100]
    calls = {}
    for impl in fitting(model, x[:2]):
        for part in batches[:10]:
            expected = spnet.fast_forward(model, part, impl="masked", return_paths=True)
            got = spnet.fast_forward(model, part, impl=impl, return_paths=True)
            same = (got[1].decisions == expected[1].decisions).all(1)
            assert same.float().mean() > 0.9, f"{impl} decides otherwise"
            torch.testing.assert_close(got[0][same], expected[0][same], rtol=1e-3, atol=1e-3)
        forward = functools.partial(spnet.fast_forward, model, impl=impl)
        calls[impl] = in_rotation([functools.partial(forward, part) for part in batches])
    times = take_turns(calls, 5.0)
    best = {impl: min(t) for impl, t in times.items()}
    _, taken = spnet.fast_forward(model, x, return_paths=True)
    share = taken.macs.double().mean().item() / taken.dense_macs
    chosen = spnet.explain(model, x[:batch]).impl
    benchmark.group = f"real paths, {model.config['name']}"
    benchmark.extra_info |= {
        "batch": batch,
        "minimum_ms": {impl: t * 1e3 for impl, t in best.items()},
        "median_ms": {impl: statistics.median(t) * 1e3 for impl, t in times.items()},
        "executed_share": share,
        "auto": chosen,
        "threads": torch.get_num_threads(),
    }
    benchmark.pedantic(calls[chosen], rounds=5, warmup_rounds=1)
    listed = ", ".join(f"{impl} {t * 1e6 / batch:.0f}" for impl, t in best.items())
    report(
        f"real paths, {model.config['name']}, B={batch}: {best['masked'] / best[chosen]:.2f}x masked by {chosen} at "
        f"{share:.0%} of the MACs; us per image: {listed}"
    )


def test_blocks(benchmark, report):
    """What each block costs where it is executed, beside how often real images execute it."""
    model, x, _ = images()
    x = x[:200]
    _, taken = spnet.fast_forward(model, x, return_paths=True)
    count = taken.decisions.shape[1]
    alone = {i: torch.eye(count, dtype=torch.bool)[i].expand(len(x), -1).contiguous() for i in range(count)}
    alone[-1] = torch.zeros_like(alone[0])
    best = minima({i: functools.partial(spnet.fast_forward, model, x, paths=p) for i, p in alone.items()}, 6.0)
    us = [(best[i] - best[-1]) * 1e6 / len(x) for i in range(count)]
    rates = taken.decisions.double().mean(0).tolist()
    benchmark.group = "blocks"
    benchmark.extra_info |= {"blocks": short_names(taken.blocks), "block_us": us, "rates": rates}
    benchmark.pedantic(spnet.fast_forward, (model, x), rounds=5, warmup_rounds=1)
    listed = ", ".join(f"{t:.1f} ({r:.0%})" for t, r in zip(us, rates, strict=True))
    report(f"us per image of each block where executed (how often): {listed}; all else {best[-1] * 1e6 / len(x):.1f}")


def test_thresholds(benchmark, report):
    """Accuracy and measured time of one network at several router thresholds, beside the static network.

    Time is that of the 1,000 images that come with the network, in batches of 100; accuracy is that of the whole
    test set, without which there is no figure for the static network.
    """
    model, x, labels = images()
    whole = test_set()
    batches = x.split(100)

    def forward(threshold: float) -> None:
        for part in batches:
            spnet.fast_forward(model, part, threshold=threshold)

    # The static network has the cost of one that executes everything.
    thresholds = {"static": -math.inf} | {str(t): t for t in THRESHOLDS}
    calls = {name: functools.partial(forward, threshold) for name, threshold in thresholds.items()}
    times = take_turns(calls, 12.0)
    points = {}
    for name, threshold in thresholds.items():
        tested = evaluate(model, whole or [(x, labels)], threshold=threshold)
        points[name] = {
            "us_per_image": min(times[name]) * 1e6 / len(x),
            "accuracy": tested.accuracy,
            "executed_share": tested.macs / tested.dense_macs,
        }
    logs = [ASSETS / NETWORK / "training" / f"{run}.jsonl" for run in ("static", "static36")]
    epochs = [epoch for log in logs for epoch in whole_epochs(read_log(log))]
    points["static"]["accuracy"] = epochs[-1]["test"]["accuracy"] if whole else None
    benchmark.group = "accuracy against time"
    benchmark.extra_info |= {"points": points, "images": tested.samples, "static_epochs": len(epochs)}
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(calls["0.0"], rounds=3, warmup_rounds=1)
    for name, p in points.items():
        accuracy = "not known" if p["accuracy"] is None else f"{p['accuracy']:.2%} of {tested.samples}"
        report(
            f"threshold {name}: accuracy {accuracy}, {p['us_per_image']:.0f} us per image, "
            f"{p['executed_share']:.0%} of the MACs"
        )
