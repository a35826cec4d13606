"""Lowering: a routed network becomes a flat table of blocks with folded weights, read by the native executions.

``csrc/plan.h`` describes the same table. A plan needs no model class to run, and its file holds no code.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from spnet.analysis.macs import BlockMacs, Macs, count_macs
from spnet.execution.paths import Paths
from spnet.models.files import write_whole
from spnet.models.resnet import PadShortcut, SPNet
from spnet.native import core
from spnet.routing import RoutedBlock, Router

FORMAT_VERSION = 1
_IDENTITY, _PAD, _PROJECTION = 0, 1, 2
_PRECISIONS = {torch.float32: core.Precision.float32, torch.bfloat16: core.Precision.bfloat16}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _PRECISIONS}
_TENSORS = {
    "table": (torch.int64, 1),
    "weights": (torch.float32, 1),
    "costs": (torch.int64, 2),
    "total": (torch.int64, 1),
}


class LoweringError(ValueError):
    """A network that no plan describes; the message says what does not fit."""


class Plan:
    """A lowered network. Call it like the model: ``plan(x)``.

    Args:
        table: int64 [n], the shapes, as described in ``csrc/plan.h``.
        weights: float32 [m], folded weights in the order of the table.
        macs: cost of the network, as counted before folding.
        dtype: float32 or bfloat16, of the maps and of the packed weights; routers and sums are float32 always.

    Raises:
        ValueError: an impossible table, weights that do not fit it, or a dtype that this processor does not compute.
    """

    def __init__(self, table: Tensor, weights: Tensor, macs: Macs, dtype: torch.dtype = torch.float32):
        if dtype not in _PRECISIONS or (dtype == torch.bfloat16 and not core.has_bfloat16()):
            raise ValueError(f"dtype: {dtype} is not computed by this processor and build")
        self.table, self.weights, self.macs, self.dtype = table.contiguous(), weights.contiguous(), macs, dtype
        tables = (self.table.data_ptr(), self.table.numel(), self.weights.data_ptr(), self.weights.numel())
        self._native = core.Plan(*tables, _PRECISIONS[dtype])
        _, channels, height, width, self.num_classes, self.num_blocks = self.table[:6].tolist()
        if len(macs.blocks) != self.num_blocks:
            raise ValueError(f"macs: expected {self.num_blocks} blocks, got {len(macs.blocks)}")
        self.input_shape = (channels, height, width)

    def __call__(
        self, x: Tensor, *, paths: Tensor | None = None, threshold: float = 0.0, return_paths: bool = False
    ) -> Tensor | tuple[Tensor, Paths]:
        """Run the network, each worker thread one sample at a time; ``torch.get_num_threads()`` of them.

        Args:
            x: [B, C, H, W] of the plan's dtype on the CPU, any strides.
            paths: bool [B, L], forces the decisions.
            threshold: a sample executes a block where z_execute - z_skip > threshold.
            return_paths: also return :class:`spnet.Paths`.

        Returns:
            Logits [B, classes] of the plan's dtype, or (logits, Paths).

        Raises:
            ValueError: another shape, dtype or device.
        """
        _check("x", x, self.dtype, (None, *self.input_shape))
        batch = len(x)
        if paths is not None:
            _check("paths", paths, torch.bool, (batch, self.num_blocks))
            paths = paths.contiguous()
        values = x.detach().float()  # bfloat16 pixels are converted once; float32 ones are not copied
        logits = torch.empty(batch, self.num_classes)
        decisions = torch.empty(batch, self.num_blocks, dtype=torch.bool)
        self._native.run(
            values.data_ptr(),
            batch,
            *values.stride(),
            0 if paths is None else paths.data_ptr(),
            threshold,
            logits.data_ptr(),
            decisions.data_ptr(),
            torch.get_num_threads(),
        )
        logits = logits.to(self.dtype)
        if not return_paths:
            return logits
        names = tuple(block.name for block in self.macs.blocks)
        return logits, Paths(decisions, self.macs.of_paths(decisions), self.macs.dense, names)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, wholly or not at all: the table, the weights and the cost; no code.

        Raises:
            OSError: a full disk, say; what was there before stays.
        """
        blocks = self.macs.blocks
        tensors = {
            "table": self.table,
            "weights": self.weights,
            "costs": torch.tensor([[b.body, b.shortcut, b.router, b.parameters] for b in blocks]).reshape(-1, 4),
            "total": torch.tensor([self.macs.dense, self.macs.parameters]),
        }
        dtype = str(self.dtype).removeprefix("torch.")
        names = "\n".join(block.name for block in blocks)
        metadata = {"spnet-plan": str(FORMAT_VERSION), "dtype": dtype, "blocks": names}
        write_whole(Path(path), save(tensors, metadata | {"sha256": _digest(tensors, metadata)}))


def _check(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    fits = t.dim() == len(shape) and all(e in (None, s) for e, s in zip(shape, t.shape, strict=True))
    if not fits or t.dtype != dtype or t.device.type != "cpu":
        expected = ", ".join("B" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: expected {dtype} [{expected}] on cpu, got {t.dtype} {list(t.shape)} on {t.device}")


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Of all that a plan file says: one flipped bit in the weights would only make its answers wrong."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(t.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_plan(path: str | Path) -> Plan:
    """Read a plan that :meth:`Plan.save` wrote.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a truncated, damaged or foreign file, another version, or impossible sizes.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: no plan at {path}")
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            if metadata.get("spnet-plan") != str(FORMAT_VERSION):
                found = metadata.get("spnet-plan", "none")
                raise ValueError(f"path: {path} has plan version {found}, expected {FORMAT_VERSION}")
            # Copied: what is mapped from the file changes, or is gone, with the file.
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}
    except SafetensorError as e:
        raise ValueError(f"path: {path} is no complete plan ({e})") from e
    names, dtype = metadata.get("blocks", "").split("\n"), metadata.get("dtype")
    fits = {name: (t.dtype, t.dim()) for name, t in tensors.items()} == _TENSORS and dtype in _DTYPES
    if not fits or tensors["costs"].shape != (len(names), 4) or tensors["total"].shape != (2,):
        raise ValueError(f"path: {path} is no plan: its tensors have other names, types or shapes")
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise ValueError(f"path: {path} is damaged: its checksum is another one")
    blocks = tuple(BlockMacs(name, *row) for name, row in zip(names, tensors["costs"].tolist(), strict=True))
    return Plan(tensors["table"], tensors["weights"], Macs(*tensors["total"].tolist(), blocks), _DTYPES[dtype])


@torch.no_grad()
def lower(model: nn.Module) -> Plan:
    """Lower a routed network in evaluation mode: BatchNorm folded, two router logits folded into one margin.

    Covers the CIFAR family of :class:`spnet.models.SPNet`: basic blocks, option-A or projection shortcuts, any
    depth, widths and classes, 1 to 512 input channels, inputs up to 64x64; float32 and bfloat16 on the CPU.

    Raises:
        LoweringError: a network that does not fit; the message says why.
    """
    check_fit(model)
    stem = model.features.stem
    blocks = [block for stage in model.stages for block in stage]
    if len(set(map(id, blocks))) < len(blocks):
        raise LoweringError("a block stands in two places, so its executions have no one column in the paths")
    size, head = model.input_size, model.heads[-1]
    table = [FORMAT_VERSION, model.in_channels, size, size, model.num_classes, len(blocks), stem[0].out_channels, 1]
    weights = [*_fold(stem[0], stem[1])]
    for number, block in enumerate(blocks):
        row, folded = _lower_block(number, block)
        table += row
        weights += folded
    flat = torch.cat([w.detach().float().flatten() for w in (*weights, head.weight, head.bias)])
    macs = count_macs(model, (model.in_channels, size, size))
    return Plan(torch.tensor(table), flat, macs, stem[0].weight.dtype)


def check_fit(model: nn.Module) -> None:
    """Raise the LoweringError of :func:`lower` for what can be said without reading the blocks."""
    if type(model) is not SPNet:
        raise LoweringError(f"{type(model).__name__} is not one of spnet's own networks")
    stem = list(model.features.stem)
    if [type(m) for m in stem] != [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] or not _is_3x3(stem[0]):
        raise LoweringError("the stem is not a 3x3 convolution with BatchNorm and ReLU")
    weight = stem[0].weight
    if weight.dtype not in _PRECISIONS or weight.device.type != "cpu":
        raise LoweringError(f"{weight.dtype} on {weight.device} is neither float32 nor bfloat16 on the CPU")
    if weight.dtype == torch.bfloat16 and not core.has_bfloat16():
        raise LoweringError("this processor does not multiply bfloat16")
    if model.input_size > 64 or model.in_channels > 512:
        raise LoweringError(f"inputs of [{model.in_channels}, {model.input_size}, {model.input_size}] are too large")
    for module in model.modules():
        if module.training:
            raise LoweringError("the network is in training mode")
        if module._forward_hooks or module._forward_pre_hooks:
            raise LoweringError("a forward hook expects the modules to be called")


def _lower_block(number: int, block: nn.Module) -> tuple[list[int], list[Tensor]]:
    """One row of the table and the weights that belong to it."""
    if type(block) is not RoutedBlock or type(block.router) is not Router or type(block.activation) is not nn.ReLU:
        raise LoweringError(f"block {number} is no RoutedBlock with a spnet.Router and a ReLU")
    body = list(block.body)
    basic = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d]
    if [type(m) for m in body] != basic or not (_is_3x3(body[0]) and _is_3x3(body[3])):
        raise LoweringError(f"block {number} has no body of two 3x3 convolutions with BatchNorm")
    first, second, shortcut = body[0], body[3], block.shortcut
    weights = [*_fold(first, body[1]), *_fold(second, body[4])]
    kind, front = _PROJECTION, 0
    if type(shortcut) is nn.Identity:
        kind = _IDENTITY
    elif type(shortcut) is PadShortcut:
        kind, front = _PAD, shortcut.pad[0]
    else:
        weights += _fold(*shortcut)
    router = block.router
    weights += fuse_linear_bn_weights(router.fc1.weight, router.fc1.bias, *_statistics(router.bn))
    # The two logits matter by their difference alone.
    (w_skip, w_execute), (b_skip, b_execute) = router.fc2.weight, router.fc2.bias
    weights += [w_execute - w_skip, b_execute - b_skip]
    channels = [first.in_channels, first.out_channels, second.out_channels]
    return [*channels, first.stride[0], kind, front, router.fc1.out_features, 0], weights


def _is_3x3(conv: nn.Conv2d) -> bool:
    plain = conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    square = conv.stride in ((1, 1), (2, 2))
    return plain and square and conv.kernel_size == (3, 3) and conv.padding == (1, 1)


def _statistics(bn: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple:
    # In float32 also for a half model: its rounding belongs at the end.
    return bn.running_mean.float(), bn.running_var.float(), bn.eps, bn.weight.float(), bn.bias.float()


def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    bias = None if conv.bias is None else conv.bias.float()
    return fuse_conv_bn_weights(conv.weight.float(), bias, *_statistics(bn))
