"""The main job on real images: the bundled network, dense and skipping, side by side."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from spnet.analysis.macs import align
from spnet.analysis.paths import paths
from spnet.analysis.pictures import write_pictures
from spnet.api import explain, fast_forward
from spnet.preprocessing import preprocess
from spnet.pretrained import load_pretrained, sample_images

NETWORK = "fashion-mnist"


def run_demo(out: Path, batch_size: int, repeats: int) -> str:
    """Answer the sample images by ``masked`` and by the fastest execution; write the pictures of their paths.

    Both run the same network in the channels-last layout and take turns; the fastest of ``repeats`` runs of each
    counts.

    Returns:
        The comparison and the names of the pictures, as text.

    Raises:
        OSError: out cannot be made, before anything is measured, or not be written.
    """
    out.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    model = load_pretrained(NETWORK).to(memory_format=torch.channels_last)
    images, labels = sample_images(NETWORK)
    x = preprocess(model, images).contiguous(memory_format=torch.channels_last)
    batches = x.split(batch_size)
    executions = ["masked", explain(model, batches[0]).impl]

    answers, seconds = {}, {impl: float("inf") for impl in executions}
    for impl in executions:  # also the warm-up
        outputs = [fast_forward(model, batch, impl=impl, return_paths=True) for batch in batches]
        logits, taken = zip(*outputs, strict=True)
        answers[impl] = torch.cat(logits).argmax(1), torch.cat([p.decisions for p in taken])
    for _ in range(repeats):
        for impl in executions:
            start = time.perf_counter()
            for batch in batches:
                fast_forward(model, batch, impl=impl)
            seconds[impl] = min(seconds[impl], time.perf_counter() - start)

    statistics = paths(model, (x, labels), batch_size=batch_size)
    computed = {impl: statistics.macs.double().mean().item() for impl in executions} | {"masked": statistics.dense_macs}
    rows = [("execution", "accuracy", "MMACs per image", "us per image", "speed-up")]
    for impl in executions:
        accuracy = (answers[impl][0] == labels).double().mean().item()
        per_image, ratio = seconds[impl] / len(x) * 1e6, seconds["masked"] / seconds[impl]
        rows.append((impl, f"{accuracy:.1%}", f"{computed[impl] / 1e6:.1f}", f"{per_image:.0f}", f"{ratio:.2f}x"))
    (masked, fastest) = (answers[impl][1] for impl in executions)
    agreement = (masked == fastest).double().mean().item()
    lines = [
        f"{model.config['name']} on {len(x)} real test images, batches of {batch_size}, "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}",
        "",
        *align(rows),
        "",
        f"decisions on which both agree: {agreement:.2%}",
        *(f"written: {path}" for path in write_pictures(statistics, images, out)),
    ]
    return "\n".join(lines)
