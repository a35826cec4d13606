"""The launches of whole networks, as the compile check and the tuner need them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from spnet.kernels import compact, conv, max_pool, pool, route, scale, stem, tiling
from spnet.kernels.library import Launch

NETWORKS = ("resnet18", "resnet50", "resnet110_cifar")
BATCHES = (1, 32)  # 1 and multiples of 16 are specialised by Triton's compiler
DTYPES = ("float16", "bfloat16", "tf32", "float32")
BODY = ("first", "inner", "last")


class Conv(NamedTuple):
    """One convolution of a routed network, on square maps."""

    kernel: int
    stride: int
    size: int  # side of the input
    cin: int
    cout: int
    role: str  # one of BODY, or "shortcut", "stem" or "head"
    groups: int = 1

    def dtype(self, of_network: str) -> str:
        return "float32" if self.role == "head" else of_network

    def shape(self, dtype: str, batch: int) -> tiling.Shape:
        """What its tile is chosen by."""
        dtype = self.dtype(dtype)
        of_stem = self.role == "stem"
        cin = stem.CHANNELS * (self.kernel + 1) if of_stem else conv.channels_read(self.cin, self.cout, self.groups)
        rows = batch * (-(-self.size // self.stride)) ** 2
        of_kind = torch_dtype(dtype), dtype == "tf32", self.kernel
        return tiling.Shape.of(*of_kind, cin, self.cout, rows, self.role == "shortcut")

    def launch(self, dtype: str, batch: int, tile: tiling.Tile, device: torch.device) -> Launch:
        """Its launch on new random tensors: that of a body for every second sample of the batch, others for all."""
        dtype = self.dtype(dtype)

        def new(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch_dtype(dtype), device=device).normal_()

        size, tf32 = -(-self.size // self.stride), dtype == "tf32"
        out, bias = new(batch, size, size, self.cout), new(self.cout).float()
        if self.role == "stem":
            padded = new(*stem.padded_shape((batch, self.cin, self.size, self.size), self.kernel, self.stride))
            weight = new(self.cout, self.kernel, stem.CHANNELS * (self.kernel + 1))
            return stem.launch(out, padded, weight, bias, self.stride, True, tf32, tile)
        x = new(batch, self.size, self.size, self.cin)
        weight = new(self.cout, self.kernel, self.kernel, conv.channels_read(self.cin, self.cout, self.groups))
        index = torch.arange(0, 2 * batch, 2, dtype=torch.int32, device=device) % batch
        count = torch.full((1,), -(-batch // 2), dtype=torch.int32, device=device)
        skip_relu = torch.zeros(batch, 16, dtype=torch.bool, device=device)[:, 0]
        options = dict(
            first=(index, count, True, False, False, True, None),
            inner=(index, count, False, False, False, True, None),
            last=(index, count, False, True, True, True, None),
            shortcut=(None, None, False, False, False, True, skip_relu),
            head=(None, None, False, False, False, False, None),
        )
        options, scratch = options[self.role], conv.Scratch.on(device)
        return conv.launch(out, x, weight, bias, self.stride, self.groups, *options, tf32, *scratch, tile)


def torch_dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "tf32" else getattr(torch, name)


def convolutions(network: str) -> list[Conv]:
    """Each distinct convolution of a network, in the order in which it runs."""
    if network == "resnet110_cifar":
        found, channels, size, widths = [Conv(3, 1, 32, 3, 16, "stem")], 16, 32, (16, 32, 64)
    else:
        found, channels, size, widths = [Conv(7, 2, 224, 3, 64, "stem")], 64, 56, (64, 128, 256, 512)
    bottleneck, groups = network in ("resnet50", "resnext50"), 32 if network == "resnext50" else 1
    for stage, width in enumerate(widths):
        cout = 4 * width if bottleneck else width
        width *= 2 if groups > 1 else 1
        for block in range(2):  # those after the second are like the second
            stride = 2 if stage and not block else 1
            if bottleneck:
                found.append(Conv(1, 1, size, channels, width, "first"))
                found.append(Conv(3, stride, size, width, width, "inner", groups))
                found.append(Conv(1, 1, size // stride, width, cout, "last"))
            else:
                found.append(Conv(3, stride, size, channels, width, "first"))
                found.append(Conv(3, 1, size // stride, width, width, "last"))
            if not block and (stride, channels) != (1, cout) and network != "resnet110_cifar":
                found.append(Conv(1, stride, size, channels, cout, "shortcut"))
            channels, size = cout, size // stride
    found.append(Conv(1, 1, 1, channels, 10 if network == "resnet110_cifar" else 1000, "head"))
    return list(dict.fromkeys(found))


def small_launches(batch: int, device: torch.device) -> Iterator[tuple[str, Launch]]:
    """The launches that no tile is chosen for, each in the forms that ResNets need."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    width = 128
    index, count = new(batch, dtype=torch.int32), new(1, dtype=torch.int32)
    decisions, scalar = new(batch, 16, dtype=torch.bool), new(1)
    margins = new(batch, route.parts(width))
    lists = new(16, batch, dtype=torch.int32), new(16, dtype=torch.int32)
    yield f"compact batch {batch}", compact.launch(*lists, decisions)
    yield f"decide batch {batch}", compact.launch_decide(index, count, decisions[:, 0], margins, scalar, scalar)
    for size, channels, dtype in ((56, 256, torch.float16), (7, 2048, torch.float32)):
        sums = new(batch, pool.slabs(size * size), channels)
        router = new(width, channels), new(width), new(width)
        yield f"route {size}x{size} batch {batch}", route.launch(margins, sums, size * size, *router)
        x = new(batch, size, size, channels, dtype=dtype)
        name = f"pool {size}x{size} {str(dtype).removeprefix('torch.')} batch {batch}"
        yield name, pool.launch(sums, x, index, count)
        yield f"{name} dense", pool.launch(sums, x, None, None)
    x, out = (new(batch, 56, 56, 256, dtype=torch.float16) for _ in range(2))
    of_channels, of_samples = (new(256), new(256)), (new(batch, 256), None)
    name = f"scale 56x56 float16 batch {batch}"
    yield name, scale.launch(out, x, *of_channels, index, count, True, False, False, True)
    yield f"{name} dense", scale.launch(out, x, *of_channels, None, None, False, False, False, True)
    yield f"{name} of samples", scale.launch(out, x, *of_samples, index, count, False, True, True, True)
    yield f"{name} of samples in place", scale.launch(x, x, *of_samples, None, count, False, False, False, False)
    for dtype in (torch.float16, torch.float32):
        name = f"max_pool {str(dtype).removeprefix('torch.')} batch {batch}"
        maps = (new(batch, size, size, 64, dtype=dtype) for size in (56, 112))
        yield name, max_pool.launch(*maps, 3, 2, 1)
