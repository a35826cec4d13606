"""Path statistics of a network whose decisions are written into its input."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spnet
from spnet.analysis.macs import count_macs
from spnet.analysis.paths import paths, short_names, shorten

WIDTH, BLOCKS, CLASSES = 6, 3, 3


class Gate(nn.Module):
    """Opens where one component of the input is positive; costs nothing."""

    def __init__(self, component: int):
        super().__init__()
        self.component = component

    def forward(self, x: Tensor) -> Tensor:
        z = x[:, self.component]
        return torch.stack([torch.zeros_like(z), z], 1)


class Net(nn.Module):
    """x [B, 6] -> logits x[:, 3:], decisions x[:, :3] > 0; the bodies add nothing but cost 6 x 6, 12 x 6, 18 x 6."""

    def __init__(self):
        super().__init__()
        bodies = [nn.Sequential(nn.Linear(WIDTH, 3 * i), nn.Linear(3 * i, WIDTH)) for i in (1, 2, 3)]
        for body in bodies:
            nn.init.zeros_(body[1].weight)
            nn.init.zeros_(body[1].bias)
        self.stage = spnet.RoutedSequential(*(spnet.RoutedBlock(body, Gate(i)) for i, body in enumerate(bodies)))
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight.data = torch.cat([torch.zeros(CLASSES, BLOCKS), torch.eye(CLASSES)], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(x))


HEAD, BODIES = 18, (36, 72, 108)


@pytest.fixture
def net() -> Net:
    return Net().eval()


def sample(decisions: str, logits: tuple[float, ...]) -> list[float]:
    return [1.0 if d == "1" else -1.0 for d in decisions] + list(logits)


X = torch.tensor(
    [
        sample("111", (5, 0, 0)),
        sample("100", (3, 0, 0)),
        sample("100", (1, 0, 0)),
        sample("010", (0, 9, 0)),
        sample("111", (0, 1, 0)),
    ]
)
LABELS = torch.tensor([0, 0, 0, 1, 0])  # the last is predicted as 1; class 2 has no sample


def test_every_number_by_hand(net):
    stats = paths(net, [(X[:2], LABELS[:2]), (X[2:], LABELS[2:])])
    dense = HEAD + sum(BODIES)
    assert (stats.dense_macs, stats.body_macs) == (dense, BODIES)
    assert stats.blocks == ("stage.0", "stage.1", "stage.2")
    assert stats.decisions.tolist() == (X[:, :3] > 0).tolist()
    assert stats.macs.tolist() == [dense, HEAD + 36, HEAD + 36, HEAD + 72, dense]
    assert stats.macs.dtype == torch.int64
    assert stats.fraction == pytest.approx((2 * dense + 3 * HEAD + 144) / (5 * dense))
    assert stats.rates.tolist() == pytest.approx([0.8, 0.6, 0.4])
    assert stats.class_samples.tolist() == [4, 1, 0]
    assert stats.class_rates[0].tolist() == pytest.approx([1.0, 0.5, 0.5])
    assert stats.class_rates[1].tolist() == [0.0, 1.0, 0.0]
    assert stats.class_rates[2].isnan().all()
    assert stats.class_macs[:2].tolist() == pytest.approx([(2 * dense + 2 * HEAD + 72) / 4, HEAD + 72])
    assert stats.predictions.tolist() == [0, 0, 0, 1, 1]
    assert stats.accuracy == 0.8
    expected = [math.log(math.exp(a) + math.exp(b) + 1) - c for a, b, c in
                ((5, 0, 5), (3, 0, 3), (1, 0, 1), (9, 0, 9), (0, 1, 0))]  # fmt: skip
    assert stats.losses.tolist() == pytest.approx(expected, abs=1e-4)
    found, counts = stats.distinct_paths
    assert found.tolist() == [[True] * 3, [True, False, False], [False, True, False]]
    assert counts.tolist() == [2, 2, 1]
    assert len(stats) == 5


def test_easy_is_cheap_and_then_sure(net):
    # Two cheapest of equal cost: the surer first. Two dense ones: the misclassified last.
    assert paths(net, (X, LABELS)).by_difficulty.tolist() == [1, 2, 3, 0, 4]


def test_without_labels_the_predicted_class_counts(net):
    stats = paths(net, X)
    assert stats.labels is None
    assert stats.accuracy is None
    assert stats.classes.tolist() == [0, 0, 0, 1, 1]
    assert stats.class_samples.tolist() == [3, 2, 0]
    assert stats.losses[4] == pytest.approx(math.log(math.e + 2) - 1, abs=1e-5)
    assert stats.to_dict()["classes"][0]["accuracy"] is None
    assert "predicted class" in str(stats)
    assert "accuracy" not in str(stats)


def test_subset(net):
    stats = paths(net, (X, LABELS))
    part = stats.subset(torch.tensor([4, 0]))
    assert part.macs.tolist() == stats.macs[[4, 0]].tolist()
    assert part.labels.tolist() == LABELS[[4, 0]].tolist()
    with pytest.raises(ValueError, match="positions: expected at least one sample, got none"):
        stats.subset(torch.tensor([], dtype=torch.int64))
    with pytest.raises(IndexError):
        stats.subset(torch.tensor([5]))


def test_forms_of_data(net):
    expected = paths(net, (X, LABELS))
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=2)
    batches = list(zip(X.split(3), LABELS.split(3), strict=True))
    arrays = LABELS.numpy()
    for data in ((X, arrays), [(X, arrays)]):
        assert torch.equal(paths(net, data, batch_size=2).losses, expected.losses)
    for data in ([X, LABELS], loader, batches, tuple(batches), iter(batches), [(X[:0], LABELS[:0]), (X, LABELS)]):
        stats = paths(net, data)
        assert torch.equal(stats.decisions, expected.decisions)
        assert torch.equal(stats.labels, LABELS)
    assert torch.equal(paths(net, (X, LABELS.int()), batch_size=2).losses, expected.losses)
    for data in (X, (X, None), [X], X.split(3), [(X, None)], [(X[:2], None), X[2:]]):
        stats = paths(net, data)
        assert torch.equal(stats.decisions, expected.decisions)
        assert stats.labels is None


def test_class_names(net):
    class Loader(list):
        class_names = ("left", "middle", "right")

    data = Loader([(X, LABELS)])
    assert paths(net, [(X, LABELS)]).class_names == ("0", "1", "2")
    assert paths(net, data).class_names == ("left", "middle", "right")
    net.data = {"class_names": ["a", "b", "c"]}
    assert paths(net, data).class_names == ("a", "b", "c")
    net.data = {"class_names": ["a"]}
    assert paths(net, data).class_names == ("left", "middle", "right")


def test_a_network_of_ours():
    model = spnet.SPNet([2, 1], [4, 8], num_classes=3, in_channels=1, input_size=8).eval()
    for block in model.stages[0]:
        block.router.fc2.bias.data.zero_()
    x = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    stats = paths(model, x, batch_size=7)
    output, taken = spnet.fast_forward(model, x, impl="masked", return_paths=True)
    assert torch.equal(stats.decisions, taken.decisions)
    assert torch.equal(stats.macs, taken.macs)
    assert torch.equal(stats.predictions, output.argmax(1))
    assert stats.dense_macs == count_macs(model, (1, 8, 8)).dense
    assert stats.blocks == taken.blocks


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_class_means_add_up(n, seed):
    g = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(n, WIDTH, generator=g), torch.randint(CLASSES, (n,), generator=g)
    stats = paths(Net().eval(), (x, labels), batch_size=16)
    weights = stats.class_samples.double() / n
    assert torch.allclose(weights @ stats.class_rates.nan_to_num(), stats.rates)
    assert (weights @ stats.class_macs.nan_to_num()).item() == pytest.approx(stats.macs.double().mean().item())
    found, counts = stats.distinct_paths
    assert counts.sum() == n
    assert torch.equal(counts, counts.sort(descending=True).values)
    assert {tuple(p) for p in found.tolist()} == {tuple(p) for p in stats.decisions.tolist()}
    assert sorted(stats.by_difficulty.tolist()) == list(range(n))


def test_summary_is_json(net):
    stats = paths(net, (X, LABELS))
    summary = json.loads(json.dumps(stats.to_dict(), allow_nan=False))
    assert summary["samples"] == 5
    assert summary["distinct_paths"] == 3
    assert summary["samples_of_most_common_paths"] == [2, 2, 1]
    assert summary["blocks"][2] == {"name": "stage.2", "body_macs": 108, "rate": pytest.approx(0.4)}
    assert summary["classes"][0]["rates"] == pytest.approx([1.0, 0.5, 0.5])
    assert summary["classes"][0]["accuracy"] == 0.75
    nothing = {"accuracy": None, "mean_macs": None, "rates": None}
    assert summary["classes"][2] == {"name": "2", "samples": 0, **nothing}


def test_text(net):
    net.data = {"class_names": ["Sandal", "Coat", "Bag"]}
    text = str(paths(net, (X, LABELS)))
    lines = text.splitlines()
    assert lines[0] == "5 samples, accuracy 80.00%"
    assert "distinct paths: 3; most common: 40.0%, 40.0%, 20.0%" in text
    classes = next(i for i, line in enumerate(lines) if line.startswith("class "))
    assert lines[classes + 1].split() == ["Coat", "1", "100.0%", f"{90 / 234:.1%}"]
    assert lines[classes + 2].split()[0] == "Sandal"
    assert "Bag" not in text, "a class without samples has no row"
    assert lines[-3].split() == ["0", "0.00", "80.0%", "Coat", "0%", "Sandal", "100%"]
    assert max(map(len, lines)) < 100


def test_text_of_many_classes_shows_both_ends():
    net = Net().eval()
    net.head = nn.Linear(WIDTH, 100).eval()
    x = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(0))
    text = str(paths(net, (x, torch.arange(400) % 100)))
    assert "... 80 between ..." in text
    assert len(text.splitlines()) < 40


@pytest.mark.parametrize("data", [[], X[:0], (X[:0], LABELS[:0]), [(X[:0], LABELS[:0])]])
def test_no_samples(net, data):
    with pytest.raises(ValueError, match="data: expected at least one sample, got none"):
        paths(net, data)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 0]), ValueError, "labels: expected 0 to 2, got 3 at position 3"),
        (torch.tensor([0, 0, 0, 0, -1]), ValueError, "labels: expected 0 to 2, got -1 at position 4"),
        (torch.tensor([0, 1]), ValueError, "labels: expected 5, one per sample, got 2"),
        (torch.zeros(5), TypeError, "labels: expected integers, got torch.float32"),
    ],
)
def test_wrong_labels(net, labels, error, message):
    with pytest.raises(error, match=message):
        paths(net, (X, labels), batch_size=2)


def test_wrong_labels_in_batches(net):
    with pytest.raises(ValueError, match=r"labels: expected \[5\], one per sample, got \[5, 3\]"):
        paths(net, [(X, torch.zeros(5, 3, dtype=torch.int64))])
    with pytest.raises(ValueError, match="labels: expected with every batch or with none"):
        paths(net, [(X, LABELS), X])
    with pytest.raises(ValueError, match="labels: expected with every batch or with none"):
        paths(net, [X, (X, LABELS)])


def test_wrong_data(net):
    with pytest.raises(TypeError, match="data: expected batches of x or"):
        paths(net, ["no tensor"])
    with pytest.raises(TypeError, match="x: expected a Tensor"):
        paths(net, [(X.numpy(), LABELS)])


@pytest.mark.parametrize("batch_size", [0, -1])
def test_wrong_batch_size(net, batch_size):
    with pytest.raises(ValueError, match=f"^batch_size: expected at least 1, got {batch_size}$"):
        paths(net, X, batch_size=batch_size)


def test_wrong_models(net):
    with pytest.raises(ValueError, match="expected RoutedBlocks"):
        paths(nn.Linear(6, 3).eval(), X)
    with pytest.raises(ValueError, match="training mode"):
        paths(net.train(), X)
    with pytest.raises(ValueError, match=r"model: expected logits \[B, classes\] as its output, got \[5, 1, 6\]"):
        paths(nn.Sequential(net.stage, nn.Unflatten(1, (1, 6))).eval(), X)


def test_samples_of_two_shapes():
    block = spnet.RoutedBlock(nn.Conv2d(2, 2, 3, padding=1), spnet.Router(2, width=4))
    net = nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(ValueError, match=r"data: expected samples of one shape, got also \[2, 8, 8\]"):
        paths(net, [torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 8, 8)])


def test_short_names():
    assert short_names(("features.stage1.0", "features.stage2.0")) == ["stage1.0", "stage2.0"]
    assert short_names(("a.0", "a.1")) == ["0", "1"]
    assert short_names(("a.0", "a")) == ["a.0", "a"]
    assert short_names(("a.b",)) == ["b"]
    assert short_names(("",)) == [""]


def test_shorten():
    assert shorten("Ankle boot") == "Ankle boot"
    assert shorten("tench, Tinca tinca", 12) == "tench, Ti..."
    assert shorten("tench, Tinca tinca", 10) == "tench..."
