"""How steady routing is, against counts and angles worked out by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

import spnet
from spnet.analysis.stability import evolution_alignment, path_churn
from spnet.training.losses import evolution_loss_across, evolution_loss_within
from tests.conftest import settle


def test_path_churn():
    before = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    after = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    assert path_churn(before, after) == path_churn(after, before) == 3 / 6
    assert path_churn(before, before) == 0
    assert path_churn(before, ~before) == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.ones(2, 3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)),
        (torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3)),
        (torch.ones(2, 0, dtype=torch.bool), torch.ones(2, 0, dtype=torch.bool)),
    ],
)
def test_path_churn_of_something_else(before, after):
    with pytest.raises(ValueError, match=r"decisions: expected bool \[N, L\] .* got .* and "):
        path_churn(before, after)


class Stages(torch.nn.Module):
    """The input [B, blocks, C] is the features of the only stage."""

    align = None

    def forward_stages(self, x):
        return spnet.SPNetOutput((), x, x, (x,), (x[:, -1],))


def test_alignment_leaves_out_pairs_without_an_angle():
    straight = [[0.0, 0], [1, 1], [3, 3]]
    right_angle = [[0.0, 0], [2, 0], [2, 5]]
    back = [[0.0, 0], [1, 0], [0, 0]]
    resting = [[0.0, 0], [1, 0], [1, 0]]
    model, labels = Stages().eval(), torch.zeros(0)
    batches = [(torch.tensor([straight, resting, right_angle]), labels), (torch.tensor([back, straight]), labels)]
    assert evolution_alignment(model, batches) == pytest.approx((1 + 0 - 1 + 1) / 4)
    assert math.isnan(evolution_alignment(model, [(torch.tensor([resting]), labels)]))
    with pytest.raises(ValueError, match="expected evaluation mode, but Stages is in training mode"):
        evolution_alignment(model.train(), batches)


@pytest.mark.parametrize(("name", "size"), [("resnet32_cifar", 32), ("resnet18", 64)])
def test_alignment_is_of_the_pairs_that_the_loss_aligns(name, size):
    model = settle(spnet.create_model(name, num_classes=5, input_size=size), bias=1, spread=0)  # every block executes
    x = torch.randn(6, 3, size, size)
    with torch.no_grad():
        output = model.forward_stages(x)
        torch.testing.assert_close(output.stage_logits[-1], model(x))
    assert output.decisions.all()
    if size == 32:
        pairs, loss = 3, evolution_loss_within(output.features)
    else:
        pairs, loss = 3, evolution_loss_across(output.stage_features)
    got = evolution_alignment(model, [(x[:4], None), (x[4:], None)])
    assert got == pytest.approx(1 - loss.item() / pairs, rel=1e-4)


def test_alignment_of_a_network_that_skips():
    model = settle(spnet.create_model("resnet32_cifar"), spread=3)
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        output = model.forward_stages(x)
    assert output.decisions.dtype == torch.bool
    cosines = []
    for f in output.features:
        for first, middle, last in f[:, [0, 2, 4]]:
            if not middle.equal(first) and not last.equal(middle):
                cosines.append(F.cosine_similarity(middle - first, last - middle, dim=0).item())
    assert 0 < len(cosines) < 24
    assert evolution_alignment(model, [(x, None)]) == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)
