"""Each loss term against numbers worked out by hand."""

import math

import pytest
import torch

import spnet
from spnet.models import SPNetOutput
from spnet.routing import straight_through_gumbel
from spnet.training import DynamicAuxiliary, SPNetLoss
from spnet.training.losses import (
    activation_loss,
    classification_loss,
    evolution_loss_across,
    evolution_loss_within,
    executing_path_loss,
    logits_loss,
)

LN3 = math.log(3)  # softmax(0, ln 3) = (1/4, 3/4)

# [4, 3]: the blocks' rates are 3/4, 1/4 and 1.
DECISIONS = [[1, 0, 1], [1, 0, 1], [1, 0, 1], [0, 1, 1]]


def close(value, expected):
    torch.testing.assert_close(value, torch.as_tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def leaf(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


# ------------------------------------------------------------------------------------------------------- L_cls


def test_classification_loss():
    first = leaf([[0.0, 0.0], [0.0, 0.0]])
    last = leaf([[0.0, LN3], [0.0, LN3]])
    loss = classification_loss([first, last], torch.tensor([1, 0]), [0.5, 1.0])
    # first: ln 2 for both; last: (-ln 3/4 - ln 1/4) / 2 = (0.287682 + 1.386294) / 2
    close(loss, 0.5 * 0.693147 + 0.836988)
    loss.backward()
    # weight * (softmax - one-hot) / 2
    close(first.grad, [[0.125, -0.125], [-0.125, 0.125]])
    close(last.grad, [[0.125, -0.125], [-0.375, 0.375]])


def test_classification_loss_needs_a_weight_per_stage():
    with pytest.raises(ValueError, match="stage_weights: expected 2, one per stage, got 3"):
        classification_loss([torch.zeros(1, 2)] * 2, torch.tensor([0]), (0.1, 0.2, 1.0))


# ------------------------------------------------------------------------------------------------------- L_act


@pytest.mark.parametrize(
    ("targets", "hinge", "expected"),
    [
        ([0.5, 0.5, 0.5], False, 0.125),  # (1/16 + 1/16 + 1/4) / 3
        ([0.5, 0.5, 0.5], True, 0.104167),  # the second block is below its target: (1/16 + 0 + 1/4) / 3
        ([0.75, 0.5, 0.5], False, 0.104167),  # (0 + 1/16 + 1/4) / 3
        ([0.5, 0.5, 1.0], False, 0.0625),  # the third is exempt: (1/16 + 1/16) / 2
        ([0.5, 0.5, 1.0], True, 0.03125),  # (1/16 + 0) / 2
        ([1.0, 0.0, 1.0], False, 0.0625),  # only the second counts
        ([1.0, 1.0, 1.0], False, 0.0),
        ([1.0, 1.0, 1.0], True, 0.0),
    ],
)
def test_activation_loss(targets, hinge, expected):
    close(activation_loss(torch.tensor(DECISIONS).float(), torch.tensor(targets), hinge), expected)


@pytest.mark.parametrize(
    ("targets", "hinge", "expected"),
    [
        ([0.5, 0.5, 0.5], False, [1 / 24, -1 / 24, 1 / 12]),  # 2 (rate - t) / (3 blocks * 4 samples)
        ([0.5, 0.5, 0.5], True, [1 / 24, 0, 1 / 12]),
        ([0.5, 0.5, 1.0], False, [1 / 16, -1 / 16, 0]),  # 2 (rate - t) / (2 * 4)
    ],
)
def test_activation_loss_gradient(targets, hinge, expected):
    decisions = leaf(DECISIONS)
    activation_loss(decisions, torch.tensor(targets), hinge).backward()
    close(decisions.grad, [expected] * 4)


def test_activation_loss_of_one_sample():
    close(activation_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0.5, 0.25])), 0.15625)  # (1/4 + 1/16) / 2


def test_activation_loss_drives_the_rates_to_their_targets():
    targets = torch.tensor([0.2, 0.5, 0.9])
    logits = torch.zeros(3, 2, requires_grad=True)
    for _ in range(300):
        decisions = straight_through_gumbel(logits.expand(256, 3, 2))
        (gradient,) = torch.autograd.grad(activation_loss(decisions, targets), logits)
        logits.data -= 5 * gradient
    # A Gumbel-softmax sample is hard with the probability of the softmax.
    torch.testing.assert_close(logits.detach().softmax(1)[:, 1], targets, rtol=0, atol=0.05)


# ------------------------------------------------------------------------------------------ L_path and L_logits


def test_executing_path_loss():
    z = leaf([[[1.0, 2.0], [3.0, 4.0]]])
    z_aux = leaf([[[1.0, 0.0], [0.0, 4.0]]])
    loss = executing_path_loss(z, z_aux)
    close(loss, 3.25)  # (0 + 4 + 9 + 0) / 4
    loss.backward()
    close(z.grad, [[[0.0, 1.0], [1.5, 0.0]]])  # 2 (z - z_aux) / 4
    assert z_aux.grad is None


@pytest.mark.parametrize(
    ("pairing", "expected", "first_gradient"),
    [
        ("final", 10.25, [0.0, 0.5]),  # 0.5 * (0 + 1) / 2 + (4 + 16) / 2; gradient 0.5 * (z - z_aux)
        ("equal", 11.25, [0.5, -1.0]),  # 0.5 * (1 + 4) / 2 + (4 + 16) / 2
    ],
)
def test_logits_loss(pairing, expected, first_gradient):
    first, last = leaf([[1.0, 2.0]]), leaf([[3.0, 5.0]])
    first_aux, last_aux = leaf([[0.0, 4.0]]), leaf([[1.0, 1.0]])
    loss = logits_loss([first, last], [first_aux, last_aux], [0.5, 1.0], pairing)
    close(loss, expected)
    loss.backward()
    close(first.grad, [first_gradient])
    close(last.grad, [[2.0, 4.0]])
    assert first_aux.grad is None
    assert last_aux.grad is None


def test_logits_loss_errors():
    z = [torch.zeros(1, 2)] * 2
    with pytest.raises(ValueError, match="pairing: expected 'final' or 'equal', got 'first'"):
        logits_loss(z, z, [0.5, 1.0], "first")
    with pytest.raises(ValueError, match="stage_weights: expected 2"):
        logits_loss(z, z, [1.0])


# ------------------------------------------------------------------------------------------------------- L_evo


def test_evolution_loss_within():
    # [B=2, blocks, C=2]
    three = torch.tensor([[[0.0, 0], [1, 0], [1, 1]], [[0, 0], [1, 0], [3, 0]]])  # cos 0 and 1: (1 + 0) / 2
    four = torch.tensor([[[0.0, 0], [9, 9], [1, 1], [0, 0]]] * 2)  # blocks 0, 2, 3: cos -1, so 2
    five = torch.tensor([[[1.0, 1], [7, 7], [4, 5], [8, 8], [6, 5]]] * 2)  # blocks 0, 2, 4: (3, 4), (2, 0), cos 0.6
    two, one = four[:, :2], four[:, :1]  # no two differences
    close(evolution_loss_within([three]), 0.5)
    close(evolution_loss_within([three, four, five]), 2.9)
    close(evolution_loss_within([three, two, one]), 0.5)
    close(evolution_loss_within([two, one]), 0.0)
    close(evolution_loss_within([three[:1]]), 1.0)  # a batch of one


def test_evolution_loss_within_gradient():
    features = leaf([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]])
    evolution_loss_within([features]).backward()
    # a = (1, 0), b = (0, 1): the gradient of 1 - cos is (0, -1) for a and (-1, 0) for b;
    # first gets -a's, middle a's - b's, last b's.
    close(features.grad, [[[0.0, 1.0], [1.0, -1.0], [-1.0, 0.0]]])


@pytest.mark.parametrize("skipped", [(0, 1), (1, 2), (0, 1, 2)])
def test_evolution_loss_of_a_sample_that_skips_between_two_features(skipped):
    # The difference is exactly zero and has no direction: cos = 0, and no gradient instead of one of 1e8.
    rows = [[1.0, 2.0], [3.0, -1.0], [0.0, 5.0]]
    for i in skipped:
        rows[i] = [1.0, 2.0]
    features = leaf([rows])
    loss = evolution_loss_within([features])
    close(loss, 1.0)
    loss.backward()
    close(features.grad, [[[0.0, 0.0]] * 3])


def test_evolution_loss_of_a_skipping_sample_leaves_the_others_alone():
    features = leaf([[[1.0, 2.0], [1.0, 2.0], [0.0, 5.0]], [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]])
    loss = evolution_loss_within([features])
    close(loss, 1.0)
    loss.backward()
    close(features.grad, [[[0.0, 0.0]] * 3, [[0.0, 0.5], [0.5, -0.5], [-0.5, 0.0]]])  # means over two samples


def test_evolution_loss_across():
    f = [torch.tensor([v]) for v in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0])]
    # Differences to the last: (1, 1), (0, 1), (1, 0); cos of the pairs: 0.707107, 0.707107, 0.
    close(evolution_loss_across(f), 2 * 0.292893 + 1)
    close(evolution_loss_across([f[0], f[1], 2 * f[2]]), 1 - 0.894427)  # (0, 2), (-1, 2): cos 4 / (2 * 5 ** 0.5)
    close(evolution_loss_across(f[:2]), 0.0)  # one difference, no pair
    close(evolution_loss_across(f[:1]), 0.0)


def test_evolution_loss_across_gradient():
    first, second, last = leaf([[0.0, 1.0]]), leaf([[1.0, 0.0]]), leaf([[1.0, 1.0]])
    evolution_loss_across([first, second, last]).backward()
    # a = last - first = (1, 0), b = last - second = (0, 1): gradients (0, -1) and (-1, 0)
    close(first.grad, [[0.0, 1.0]])
    close(second.grad, [[1.0, 0.0]])
    close(last.grad, [[-1.0, -1.0]])


def test_evolution_loss_across_needs_one_width():
    with pytest.raises(ValueError, match=r"stage_features: expected stages aligned to one width, got \[16, 32, 64\]"):
        evolution_loss_across([torch.zeros(1, c) for c in (16, 32, 64)])


# -------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_terms_are_float32_for_half_precision_inputs(dtype):
    # Numbers that both types represent exactly, so that the results are those of the tests above.
    def t(values):
        return torch.tensor(values, dtype=dtype)

    close(classification_loss([t([[0.0, 0.0]])], torch.tensor([1]), [1.0]), 0.693147)
    close(activation_loss(t(DECISIONS), torch.tensor([0.5, 0.5, 1.0])), 0.0625)
    close(activation_loss(t(DECISIONS), torch.ones(3)), 0.0)
    close(executing_path_loss(t([[[1.0, 2.0]]]), t([[[1.0, 0.0]]])), 2.0)
    close(logits_loss([t([[3.0, 5.0]])], [t([[1.0, 1.0]])], [1.0]), 10.0)
    close(evolution_loss_within([t([[[0.0, 0], [3, 4], [4, 4]]])]), 0.4)
    close(evolution_loss_within([t([[[0.0, 0]]])]), 0.0)
    close(evolution_loss_across([t([[0.0, 0.0]]), t([[2.0, 0.0]]), t([[3.0, 4.0]])]), 1 - 0.921635)  # 19 / (5 * 17^0.5)
    close(evolution_loss_across([t([[0.0, 0.0]])]), 0.0)


def tensor_pair(values, aux_values):
    return [torch.tensor(v) for v in values], [torch.tensor(v) for v in aux_values]


@pytest.fixture
def outputs():
    """The output of a network of two stages and three blocks, and of its auxiliary module, for two samples."""
    logits, aux_logits = tensor_pair(
        ([[0.0, 0.0], [0.0, 0.0]], [[0.0, LN3], [0.0, LN3]]), ([[0.0, 1.0], [0.0, 0.0]], [[2.0, LN3], [0.0, LN3]])
    )
    z, z_aux = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    z_aux[0, 1, 1] = 6.0
    decisions = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    features = (torch.tensor([[[0.0, 0.0], [3.0, 4.0], [4.0, 4.0]]] * 2), torch.ones(2, 1, 2))
    stage_features = tuple(torch.tensor([v, v]) for v in ([0.0, 1.0], [1.0, 0.0], [1.0, 1.0]))
    output = SPNetOutput(tuple(logits), z, decisions, features, stage_features)
    return output, SPNetOutput(tuple(aux_logits), z_aux, decisions, features, stage_features)


LABELS = torch.tensor([1, 0])
TERMS = {
    "cls": 0.5 * 0.693147 + 0.836988,
    "act": (0.25 + 0.25 + 0.0) / 3,  # rates 1, 0, 1/2, targets 1/2
    "path": 3.0,  # 36 / 12
    # pairing "final", differences to (2, ln 3), (0, ln 3): stage 1 (4 + 2 ln2(3)) / 4, stage 2 4 / 4
    "logits": 0.5 * (4 + 2 * 1.098612**2) / 4 + 1.0,
    "evo": 0.4,
}


@pytest.mark.parametrize("rates", [0.5, [0.5], [0.5, 0.5, 0.5]])
def test_total_is_the_weighted_sum(outputs, rates):
    loss = SPNetLoss(rates, stage_weights=(0.5, 1.0), activation=2.0, path=0.1, logits=0.3, evolution=10.0)
    total, terms = loss(outputs[0], LABELS, outputs[1])
    assert list(terms) == list(TERMS)
    for name, term in terms.items():
        close(term, TERMS[name])
    # 1.183562 + 2 * 0.166667 + 0.1 * 3 + 0.3 * 1.801737 + 10 * 0.4
    close(total, 6.357416)


def test_options_reach_their_terms(outputs):
    loss = SPNetLoss([0.5, 0.5, 1.0], stage_weights=(0.5, 1.0), hinge=True, pairing="equal", evolution_form="across")
    terms = loss(outputs[0], LABELS, outputs[1])[1]
    close(terms["act"], 0.125)  # (1/4 + 0) / 2
    close(terms["logits"], 0.5 * 0.25 + 1.0)  # the first stage against (0, 1), (0, 0)
    close(terms["evo"], 1.0)  # (1, 0) and (0, 1)


def test_terms_of_weight_zero_are_left_out(outputs):
    off = dict(activation=0, path=0, logits=0, evolution=0)
    loss = SPNetLoss(0.5, stage_weights=(0.5, 1.0), **off)
    assert not loss.needs_auxiliary
    total, terms = loss(outputs[0], LABELS)
    assert list(terms) == ["cls"]
    close(total, TERMS["cls"])
    loss = SPNetLoss(0.5, stage_weights=(0.5, 1.0), **{**off, "logits": 1})
    assert loss.needs_auxiliary
    assert list(loss(outputs[0], LABELS, outputs[1])[1]) == ["cls", "logits"]


@pytest.mark.parametrize("rates", [-0.1, 1.1, math.nan, [0.5, 2.0]])
def test_target_rates_out_of_range(rates):
    with pytest.raises(ValueError, match=r"target_rates: expected values in \[0, 1\]"):
        SPNetLoss(rates)


@pytest.mark.parametrize("name", ["activation", "path", "logits", "evolution", "stage_weights"])
@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weights_out_of_range(name, weight):
    with pytest.raises(ValueError, match=f"^{name}: expected at least 0 and finite, got {weight}$"):
        SPNetLoss(0.5, **{name: (0.1, weight) if name == "stage_weights" else weight})


def test_errors(outputs):
    output, auxiliary = outputs
    with pytest.raises(ValueError, match="pairing: expected 'final' or 'equal', got 'last'"):
        SPNetLoss(0.5, pairing="last")
    with pytest.raises(ValueError, match="evolution_form: expected 'within' or 'across', got 'between'"):
        SPNetLoss(0.5, evolution_form="between")
    with pytest.raises(ValueError, match="target_rates: expected 1 or 3 rates, got 2"):
        SPNetLoss([0.5, 0.5], stage_weights=(0.5, 1.0))(output, LABELS, auxiliary)
    with pytest.raises(TypeError, match=r"output: expected the SPNetOutput of .* got Tensor; call model.train\(\)"):
        SPNetLoss(0.5)(output.stage_logits[-1], LABELS)
    with pytest.raises(TypeError, match=r"auxiliary: expected the SPNetOutput of .* got Tensor; call model.train\(\)"):
        SPNetLoss(0.5)(output, LABELS, auxiliary.stage_logits[-1])
    with pytest.raises(ValueError, match="auxiliary: .* got None"):
        SPNetLoss(0.5, stage_weights=(0.5, 1.0))(output, LABELS)
    with pytest.raises(ValueError, match="stage_weights: expected 2, one per stage, got 3"):
        SPNetLoss(0.5)(output, LABELS, auxiliary)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet18"])
def test_of_a_network(name, batch):
    form = "across" if name == "resnet18" else "within"
    stage_weights = (0.01, 0.1, 0.2, 1.0) if name == "resnet18" else (0.1, 0.2, 1.0)
    model = spnet.create_model(name, num_classes=4, in_channels=1).train()
    auxiliary = DynamicAuxiliary(model)
    x, labels = torch.randn(batch, 1, 64, 64), torch.arange(batch)
    total, terms = SPNetLoss(0.5, stage_weights=stage_weights, evolution_form=form)(model(x), labels, auxiliary(x))
    assert all(t.dtype == torch.float32 and t.dim() == 0 and t.isfinite() for t in (total, *terms.values()))
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(b.router.fc2.bias.grad.any() for b in spnet.routing.routed_blocks(model).values())
    assert all(p.grad is None for p in auxiliary.parameters())


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet18"])
def test_of_a_network_in_bfloat16(name):
    model = spnet.create_model(name, num_classes=3, input_size=32).bfloat16()
    x = torch.randn(4, 3, 32, 32).bfloat16()
    output, auxiliary = model(x), DynamicAuxiliary(model)(x)
    form = dict(evolution_form="across") if name == "resnet18" else {}
    total, terms = SPNetLoss(0.5, stage_weights=[1.0] * len(output.stage_logits), **form)(
        output, torch.tensor([0, 1, 2, 0]), auxiliary
    )
    assert set(terms) == {"cls", "act", "path", "logits", "evo"}
    assert total.isfinite()
    total.backward()
    assert all(p.grad is not None for p in model.parameters())
    in_evaluation = model.eval().forward_stages(x)
    assert torch.equal(in_evaluation.stage_logits[-1], model(x))


def test_static_network_has_only_the_classification_loss():
    model = spnet.create_model("resnet20_cifar", num_classes=4, in_channels=1, routed=False).train()
    total, terms = SPNetLoss(0.5)(model(torch.randn(2, 1, 32, 32)), torch.tensor([0, 3]))
    assert list(terms) == ["cls"]
    assert total == terms["cls"]


@pytest.mark.parametrize("form", ["within", "across"])
@pytest.mark.parametrize("hinge", [False, True])
def test_the_device_is_asked_for_nothing(form, hinge):
    """Which a GPU would have to answer before the step goes on, and a tensor without numbers cannot."""

    def new(*shape):
        return torch.randn(shape, device="meta", requires_grad=True)

    network, auxiliary = (
        SPNetOutput((new(4, 5), new(4, 5)), new(4, 6, 2), new(4, 6), (new(4, 3, 8),) * 2, (new(4, 8),) * 3)
        for _ in range(2)
    )
    loss = SPNetLoss(
        [0.5, 1.0, 0.5, 0.5, 0.5, 1.0], stage_weights=(0.5, 1.0), evolution=1.0, evolution_form=form, hinge=hinge
    )
    total, terms = loss(network, torch.zeros(4, dtype=torch.int64, device="meta"), auxiliary)
    assert terms.keys() == {"cls", "act", "path", "logits", "evo"}
    total.backward()
