"""Time of one forward against the executed fraction: network x batch x fraction x implementation.

A group holds the implementations of one cell, so the table's ratios are those of one run. The paths are
forced at random per sample; ``masked`` is the dense network.
"""

import pytest
import torch

import spnet
from spnet.routing import routed_blocks

IMPLEMENTATIONS = ["masked", "routed", "walk"]


@pytest.fixture(scope="module", params=["resnet32_cifar", "resnet110_cifar"])
def network(request):
    torch.manual_seed(0)
    return spnet.create_model(request.param).eval().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("executed", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("batch", [1, 16, 128])
def test_forward(benchmark, network, batch, executed, impl):
    torch.manual_seed(1)
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    paths = torch.rand(batch, len(routed_blocks(network))) < executed
    expected = spnet.fast_forward(network, x, impl="masked", paths=paths)
    got, taken = spnet.fast_forward(network, x, impl=impl, paths=paths, return_paths=True)
    # Against each sample's own scale: fresh weights give logits of 1e5, and a small one among them is all rounding.
    scale = expected.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(got / scale, expected / scale, rtol=1e-4, atol=1e-4)
    benchmark.group = f"{network.config['name']}, batch {batch}, {executed:.0%} of block executions"
    macs = taken.macs.sum().item()
    benchmark.extra_info |= {"executed_macs": macs, "dense_macs": taken.dense_macs * batch}
    benchmark.pedantic(spnet.fast_forward, (network, x), {"impl": impl, "paths": paths}, rounds=5, warmup_rounds=1)
