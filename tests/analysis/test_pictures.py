"""Pictures: what they show, that no text overlaps or is cut off, and what is refused."""

from __future__ import annotations

from itertools import combinations
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from spnet.analysis.paths import PathStatistics
from spnet.analysis.pictures import cost_histogram, easiest_hardest, rate_heat_map, write_pictures

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def statistics(
    blocks: tuple[str, ...], classes: tuple[str, ...], samples: int = 120, rate: float = 0.6, labelled: bool = True
) -> PathStatistics:
    g = torch.Generator().manual_seed(0)
    decisions = torch.rand(samples, len(blocks), generator=g) < rate
    bodies = torch.tensor([4_718_592 if i % 5 else 3_538_944 for i in range(len(blocks))])
    dense = 300_000 + bodies.sum().item()
    predictions, labels = torch.randint(len(classes), (2, samples), generator=g)
    macs = dense - (~decisions * bodies).sum(1)
    losses = torch.rand(samples, generator=g)
    return PathStatistics(
        decisions,
        macs,
        dense,
        tuple(bodies.tolist()),
        blocks,
        predictions,
        losses,
        labels if labelled else None,
        classes,
    )


def stages(*sizes: int) -> tuple[str, ...]:
    return tuple(f"features.stage{s + 1}.{i}" for s, n in enumerate(sizes) for i in range(n))


def drawn(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that is drawn, and where, in pixels."""
    found, draw = [], Text.draw

    def record(text: Text, renderer, *args, **kwargs):
        if text.get_visible() and text.get_text():
            found.append((text.get_text(), text.get_window_extent(renderer)))
        return draw(text, renderer, *args, **kwargs)

    with mock.patch.object(Text, "draw", record):
        FigureCanvasAgg(figure).draw()
    return found


def assert_readable(figure: Figure) -> None:
    """Every text lies inside the figure, and no two overlap by more than a pixel."""
    boxes = drawn(figure)
    width, height = figure.canvas.get_width_height()
    assert [s for s, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1] == []
    for (s, a), (t, b) in combinations(boxes, 2):
        over_x, over_y = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(over_x, over_y) <= 1, f"{s!r} and {t!r} overlap"


CASES = {
    "15 blocks": (stages(5, 5, 5), FASHION),
    "54 blocks": (stages(18, 18, 18), FASHION),
    "1 block": (stages(1), FASHION),
    "unequal stages": (stages(3, 4, 6, 3), FASHION[:2]),
    "names of no scheme": (("first.conv_block", "second.conv_block", "third.conv_block"), FASHION),
    "100 classes": (stages(3, 3, 3), tuple(f"a rather long class name {i}" for i in range(100))),
    "1 class": (stages(2, 2), ("$odd_name$",)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("picture", [rate_heat_map, cost_histogram])
def test_readable(case, picture):
    assert_readable(picture(statistics(*CASES[case])))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_all_skipped_and_all_executed(rate):
    stats = statistics(*CASES["15 blocks"], rate=rate)
    for picture in (rate_heat_map, cost_histogram):
        assert_readable(picture(stats))


def test_heat_map_shows_the_rates():
    stats = statistics(stages(2, 1), ("a", "none", "c"), labelled=False)
    stats.predictions[stats.predictions == 1] = 0
    ax = rate_heat_map(stats).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["all samples", "a", "c"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1", "0"]
    cells = [t.get_text() for t in ax.texts]
    expected = torch.cat([stats.rates[None], stats.class_rates[[0, 2]]]).flatten()
    assert cells[:9] == [f"{100 * r:.0f}" for r in expected.tolist()]
    assert set(cells[9:]) == {"stage1", "stage2"}
    mean, classes = (np.asarray(mesh.get_array()) for mesh in ax.collections)
    assert mean.ravel().tolist() == stats.rates.tolist()
    assert np.array_equal(classes, stats.class_rates[[0, 2]].numpy())
    assert "by predicted class" in ax.get_title()


def test_histogram_counts_every_sample_and_marks_mean_and_dense():
    stats = statistics(*CASES["15 blocks"])
    ax = cost_histogram(stats).axes[0]
    assert sum(bar.get_height() for bar in ax.patches) == len(stats)
    mean, dense = (line.get_xdata()[0] for line in ax.lines)
    assert mean == pytest.approx(stats.macs.double().mean().item() / 1e6)
    assert dense == pytest.approx(stats.dense_macs / 1e6)
    assert "MMACs" in ax.get_xlabel()
    left, right = ax.get_xlim()
    assert left <= 0
    assert right > dense


def test_histogram_counts_dense_samples():
    ax = cost_histogram(statistics(*CASES["15 blocks"], rate=1.0)).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [0] * 15 + [120]


@pytest.mark.parametrize("samples", [1, 3, 120])
def test_histogram_counts_in_whole_samples(samples):
    ax = cost_histogram(statistics(*CASES["15 blocks"], samples=samples)).axes[0]
    assert all(tick == round(tick) for tick in ax.get_yticks())


def shown(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in figure.findobj(AxesImage)]


def marked_images(samples: int, *shape: int) -> torch.Tensor:
    """Each image is filled with its own number."""
    return torch.arange(samples, dtype=torch.uint8).view(-1, *[1] * len(shape)).expand(samples, *shape)


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (20, 30, 3), (30, 20, 3)])
def test_easiest_and_hardest_images(shape):
    stats = statistics(*CASES["15 blocks"])
    images = marked_images(len(stats), *shape)
    figure = easiest_hardest(stats, images.numpy() if len(shape) == 2 else images, n=8)
    order = stats.by_difficulty.tolist()
    assert [image.flat[0] for image in shown(figure)] == order[:8] + order[:-9:-1]
    assert_readable(figure)


def test_captions():
    stats = statistics(*CASES["15 blocks"])
    i, j = stats.by_difficulty[:2].tolist()
    stats.labels[i], stats.predictions[i] = 1, 1
    stats.labels[j], stats.predictions[j] = 2, 9
    captions = [text for text, _ in drawn(easiest_hardest(stats, marked_images(len(stats), 4, 4), n=2))]
    share = [f"{stats.macs[k] / stats.dense_macs:.0%} of dense" for k in (i, j)]
    start = captions.index("Trouser")
    assert captions[start : start + 5] == ["Trouser", share[0], "Pullover", share[1], "taken for Ankle boot"]


def test_fewer_samples_than_places():
    stats = statistics(*CASES["15 blocks"], samples=1)
    figure = easiest_hardest(stats, marked_images(1, 8, 8))
    assert len(shown(figure)) == 2
    assert_readable(figure)


def test_long_and_odd_names_under_images():
    stats = statistics(stages(2), ("$x_1$ and a very long name of a class", "another very long name of a class"))
    assert_readable(easiest_hardest(stats, marked_images(len(stats), 16, 16)))


def test_write_pictures(tmp_path):
    stats = statistics(*CASES["15 blocks"], samples=30)
    written = write_pictures(stats, marked_images(30, 28, 28), tmp_path / "new" / "folder")
    assert [p.name for p in written] == ["rates.png", "cost.png", "images.png"]
    for path in written:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") == 1200, "pixels wide"


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.zeros(29, 8, 8, dtype=torch.uint8), r"uint8 \[29, 8, 8\]"),
        (torch.zeros(30, 8, 8), r"float32 \[30, 8, 8\]"),
        (torch.zeros(30, 3, 8, 8, dtype=torch.uint8), r"uint8 \[30, 3, 8, 8\]"),
        (torch.zeros(30, 8, dtype=torch.uint8), r"uint8 \[30, 8\]"),
    ],
)
def test_wrong_images_write_nothing(tmp_path, images, got):
    stats = statistics(*CASES["15 blocks"], samples=30)
    with pytest.raises(ValueError, match=rf"images: expected uint8 \[30, H, W\].*, got {got}"):
        write_pictures(stats, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_at_least_one_image():
    stats = statistics(*CASES["15 blocks"], samples=3)
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        easiest_hardest(stats, marked_images(3, 8, 8), n=0)
