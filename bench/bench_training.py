"""One training step: SP-Net against routers with their activation loss alone, and against the static network.

All three are trained by the trainer, on random images. ``python -m pytest bench/bench_training.py --benchmark-only``
"""

import dataclasses
import functools
import statistics

import torch
from timing import take_turns

from spnet.training import TrainConfig, Trainer
from spnet.training.data import ImageSet, Loader

BATCH = 128
OBJECTIVES = {
    "static": {"static": True},
    # The objective of ConvNet-AIG: no auxiliary module, no regularizer.
    "mask only": {"weight_path": 0.0, "weight_logits": 0.0, "weight_evolution": 0.0},
    "SP-Net": {},
}


def test_step(benchmark, report, tmp_path):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = TrainConfig(model="resnet20_cifar", batch_size=BATCH, device=device, lr=0.01)
    pixels, labels = torch.randint(256, (BATCH, 1, 32, 32), dtype=torch.uint8), torch.randint(10, (BATCH,))
    images = ImageSet(pixels, labels, tuple(map(str, range(10))), mean=(0.5,), std=(0.25,))
    train, test = (Loader(images, BATCH, train=train, device=device) for train in (True, False))
    batch = next(iter(train.epoch(0)))
    calls = {}
    for name, settings in OBJECTIVES.items():
        settings |= {"out": str(tmp_path / name)}
        trainer = Trainer(dataclasses.replace(config, **settings), train_loader=train, test_loader=test)
        trainer.model.train()
        calls[name] = functools.partial(trainer._train_step, *batch)
    assert all(call()["loss"].isfinite() for call in calls.values())
    # The trainer of the last objective is SP-Net's: what following its parameters takes of its step.
    calls["auxiliary update"] = functools.partial(trainer.auxiliary.update, trainer.model)
    times = take_turns(calls, 10.0)
    best = {name: min(t) for name, t in times.items()}
    share = best["auxiliary update"] / best["SP-Net"]
    benchmark.group = "training step, resnet20_cifar"
    benchmark.extra_info |= {
        "minimum_ms": {name: t * 1e3 for name, t in best.items()},
        "median_ms": {name: statistics.median(t) * 1e3 for name, t in times.items()},
        "auxiliary_update_share": share,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
    }
    benchmark.pedantic(calls["SP-Net"], rounds=3, warmup_rounds=1)
    listed = ", ".join(f"{name} {best[name] * 1e3:.0f} ms ({best[name] / best['static']:.2f}x)" for name in OBJECTIVES)
    report(
        f"training step, resnet20_cifar, batch {BATCH}, {device}: {listed}; auxiliary update {share:.2%} of SP-Net's"
    )
