"""``convert`` on the networks of torchvision and timm, with random weights; ``make test-vision`` runs it."""

import pytest
import torch
from torch import nn

import spnet
from spnet.analysis.macs import count_macs
from spnet.routing import routed_blocks

timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision.models")

# Name: residual blocks, input size.
TORCHVISION = {
    "resnet18": (8, 64),
    "resnet50": (16, 64),
    "resnext50_32x4d": (16, 64),
    "wide_resnet50_2": (16, 64),
    "regnet_x_400mf": (22, 64),
    "regnet_y_400mf": (16, 64),
    "mobilenet_v2": (10, 64),
    "convnext_tiny": (18, 64),
}
TIMM = {
    "resnet18": (8, 64),
    "resnet50d": (16, 64),
    "edgenext_xx_small": (12, 64),
    "resnetblur50": (16, 64),
    "resnext50_32x4d": (16, 64),
    "seresnet50": (16, 64),
    "resnetrs50": (16, 64),
    "ecaresnet50t": (16, 64),
    "legacy_seresnet18": (8, 64),
    "resnest14d": (4, 64),
    "res2net50_26w_4s": (16, 64),
    "skresnet18": (8, 64),
    "regnetx_002": (13, 64),
    "regnety_002": (13, 64),
    "regnetz_005": (17, 64),
    "resnetv2_18": (8, 64),
    "resnetv2_50": (16, 64),
    "resnetv2_50x1_bit": (16, 64),
    "resnetv2_50d_evos": (16, 64),
    "nf_resnet26": (8, 64),
    "botnet26t_256": (8, 256),
}
# What the others compute is no plan: other attention, activations and normalisations.
PLANNED = ["resnet18", "resnet50", "wide_resnet50_2", "resnet50d", "seresnet50", "resnetrs50"]
PLANNED += ["resnext50_32x4d", "regnet_x_400mf", "regnet_y_400mf", "regnetx_002", "regnety_002"]
PLANNED += ["resnetv2_18", "resnetv2_50"]
WITH_DROP_PATH = {"resnet50d", "regnetx_002", "resnetv2_50"}


def _torchvision(name: str) -> nn.Module:
    return models.get_model(name, weights=None)


def _timm(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=False, **({"drop_path_rate": 0.1} if name in WITH_DROP_PATH else {}))


NETWORKS = [pytest.param(_torchvision, n, *v, id=f"torchvision-{n}") for n, v in TORCHVISION.items()]
NETWORKS += [pytest.param(_timm, n, *v, id=f"timm-{n}") for n, v in TIMM.items()]


def _shake(model: nn.Module) -> nn.Module:
    """Statistics of a trained network; and no weights of zero, by which new blocks often start as the identity."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
        for p in model.parameters():
            if p.dim() <= 1:
                p.add_(torch.rand_like(p) * 0.2 + 0.1)
    return model.eval()


@pytest.mark.parametrize(("make", "name", "blocks", "size"), NETWORKS)
def test_convert(make, name, blocks, size):
    original = _shake(make(name))
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected = original(x)
    parameters, dense = list(original.parameters()), count_macs(original, (3, size, size)).dense

    model = spnet.convert(original)
    assert len(routed_blocks(model)) == blocks
    routers = {p for b in routed_blocks(model).values() for p in b.router.parameters()}
    assert set(parameters) == set(model.parameters()) - routers

    paths = torch.ones(3, blocks, dtype=torch.bool)
    assert torch.equal(spnet.fast_forward(model, x, impl="masked", paths=paths), expected)
    assert torch.equal(spnet.fast_forward(model, x, impl="routed", paths=paths), expected)
    macs = count_macs(model, (3, size, size))
    assert macs.dense == dense + sum(b.router for b in macs.blocks)
    assert not any("not a child of a RoutedSequential" in what for what in spnet.explain(model, x).blocks.values())

    paths = torch.rand(3, blocks) < 0.5
    masked = spnet.fast_forward(model, x, impl="masked", paths=paths)
    routed = spnet.fast_forward(model, x, impl="routed", paths=paths)
    torch.testing.assert_close(routed, masked, rtol=0, atol=1e-4 * masked.abs().max().item())
    assert not torch.equal(masked, expected)
    assert spnet.explain(model, x).impl == ("walk" if name in PLANNED else "routed")
    planned = spnet.fast_forward(model, x, paths=paths)
    torch.testing.assert_close(planned, masked, rtol=0, atol=1e-4 * masked.abs().max().item())

    again = spnet.convert(make(name)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(spnet.fast_forward(again, x, impl="masked", paths=paths), masked)


@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf"])
def test_training(name):
    model = spnet.convert(_torchvision(name))
    output = spnet.forward_training(model, torch.randn(4, 3, 64, 64))
    loss, _ = spnet.training.SPNetLoss(0.5, stage_weights=[1.0], path=0, logits=0)(output, torch.arange(4))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_attention_with_a_residual_form_of_its_own():
    model = _shake(_timm("gcresnet33ts"))
    with pytest.raises(ValueError, match=r"block 'stages.0.0' contains block 'stages.0.0.attn'"):
        spnet.convert(model)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    model = spnet.convert(model, where=lambda name, module: not name.endswith("attn"))
    assert torch.equal(model(x), expected)
    assert len(routed_blocks(model)) == 10


@pytest.mark.parametrize(("make", "name"), [(_torchvision, "vit_b_16"), (_torchvision, "vgg11"), (_timm, "dla34")])
def test_networks_without_convolutional_residual_blocks(make, name):
    with pytest.raises(ValueError, match="has no residual block to route; looked at 'the model'"):
        spnet.convert(make(name))
