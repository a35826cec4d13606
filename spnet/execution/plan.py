"""Lowering: a routed network becomes a flat table of blocks with folded weights, which the fast executions run.

``spnet/execution/table.py`` and ``csrc/plan.h`` describe the table. A plan needs no model class to run, and its file
holds no code.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from spnet.analysis.macs import BlockMacs, Macs, count_macs
from spnet.execution.batch import Batch
from spnet.execution.device import DTYPES, check_cuda, check_device, check_open
from spnet.execution.paths import Paths
from spnet.execution.table import FORMAT_VERSION, IDENTITY, PAD, PROJECTION, Block, Convolution, Network, read_table
from spnet.execution.walk import CudaWalk, Walk
from spnet.models.files import write_whole
from spnet.models.resnet import PadShortcut, SPNet
from spnet.routing import RoutedBlock, RoutedSequential, Router, _BatchNorm1d, uncompiled


def _graph(network: Network, weights: Tensor, dtype: torch.dtype):
    if weights.device.type == "cuda":  # on the CPU, where tests run it, its operators are their twins
        check_open("batch")
        check_cuda(torch.cuda.get_device_capability(weights.device), find_spec("triton") is not None)
    from spnet.execution.graph import Graph  # needs Triton

    return Graph(network, weights, dtype)


_EXECUTIONS = {"cpu": {"walk": Walk, "batch": Batch}, "cuda": {"walk": CudaWalk, "batch": _graph}}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES["cuda"]}
_TENSORS = {
    "table": (torch.int64, 1),
    "weights": (torch.float32, 1),
    "costs": (torch.int64, 2),
    "total": (torch.int64, 1),
    "rates": (torch.float32, 1),
    "dense": (torch.bool, 1),
}


class LoweringError(ValueError):
    """A network that no plan describes; the message says what does not fit."""


class Plan:
    """A lowered network. Call it like the model: ``plan(x)``.

    Args:
        table: int64 [n], the shapes, as described in ``csrc/plan.h``.
        weights: float32 [m], folded weights in the order of the table.
        macs: cost of the network, as counted before folding.
        dtype: float32, bfloat16 or, on CUDA, float16, of the maps and of the packed weights; routers and sums are
            float32 always.
        device: that runs the network: the CPU, or CUDA.

    Attributes:
        impl: "walk" where the native core runs the network, else "batch".
        reason: why it is not "walk", in words; empty where it is.
        rates: float32 [L], each block's execution rate as :func:`spnet.calibrate` has found it; None before.
        choices: per block what ``batch`` does: "routed" (the body on the samples that execute it), or "dense" where
            calibration found the body on all samples to be faster.

    Raises:
        ValueError: an impossible table, weights that do not fit it, or another dtype or device.
    """

    def __init__(
        self,
        table: Tensor,
        weights: Tensor,
        macs: Macs,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        check_device(torch.device(device), dtype)
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"{device}: PyTorch finds no GPU")
        self.device = torch.empty(0, device=device).device  # "cuda" is the current one of them
        self.network = read_table(table)
        expected = sum(math.prod(shape) for shape in self.network.shapes())
        if weights.numel() != expected:
            raise ValueError(f"weights: expected {expected} floats, as the table says, got {weights.numel()}")
        self.weights, self.macs, self.dtype = weights.cpu().contiguous(), macs, dtype
        self.num_classes, self.num_blocks = self.network.num_classes, len(self.network.blocks)
        if len(macs.blocks) != self.num_blocks:
            raise ValueError(f"macs: expected {self.num_blocks} blocks, got {len(macs.blocks)}")
        self.input_shape = self.network[:3]
        self.rates: Tensor | None = None
        self._dense = (False,) * self.num_blocks
        self._executions: dict[str, Walk | Batch] = {}
        self.impl, self.reason = "walk", ""
        try:
            self.execution("walk")
        except LoweringError as e:
            self.impl, self.reason = "batch", str(e)
            self.execution("batch")

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple("dense" if dense else "routed" for dense in self._dense)

    def choose(self, rates: Tensor, dense: Sequence[bool]) -> None:
        """Take what a calibration has found: each block's execution rate, and whether it is to be dense.

        Raises:
            ValueError: not one of each per block.
        """
        if len(rates) != self.num_blocks or len(dense) != self.num_blocks:
            raise ValueError(f"rates, dense: expected {self.num_blocks} of each, got {len(rates)} and {len(dense)}")
        self.rates, self._dense = rates.float().cpu(), tuple(dense)
        if "batch" in self._executions:
            self._executions["batch"].dense = self._dense

    def execution(self, impl: str = "auto") -> Walk | Batch:
        """The weights as one execution has packed them, when it was first asked for.

        Raises:
            LoweringError: the network does not fit ``impl``.
        """
        impl = self.impl if impl == "auto" else impl
        found = self._executions.get(impl)
        if found is None:
            make = _EXECUTIONS[self.device.type].get(impl)
            if make is None:
                raise LoweringError(f"{impl} does not run on {self.device}")
            try:
                found = make(self.network, self.weights.to(self.device), self.dtype)
            except ValueError as e:
                raise LoweringError(str(e).removeprefix("plan: ")) from e
            if impl == "batch":
                found.dense = self._dense
            self._executions[impl] = found
        return found

    @uncompiled
    def __call__(
        self,
        x: Tensor,
        *,
        paths: Tensor | None = None,
        threshold: float = 0.0,
        return_paths: bool = False,
        impl: str = "auto",
    ) -> Tensor | tuple[Tensor, Paths]:
        """Run the network, on the CPU with ``torch.get_num_threads()`` threads; on CUDA nothing waits for the device.

        Args:
            x: [B, C, H, W] of the plan's dtype on its device, any strides.
            paths: bool [B, L] on its device, forces the decisions.
            threshold: a sample executes a block where z_execute - z_skip > threshold.
            return_paths: also return :class:`spnet.Paths`.
            impl: "walk" or "batch"; "auto" takes ``plan.impl``.

        Returns:
            Logits [B, classes] of the plan's dtype, or (logits, Paths).

        Raises:
            ValueError: another shape, dtype or device; LoweringError where the network does not fit ``impl``.
            TypeError: x or paths is no tensor.
        """
        logits, decisions = self.run(x, paths, threshold, impl)
        return (logits, self.paths_of(decisions)) if return_paths else logits

    def run(
        self, x: Tensor, paths: Tensor | None = None, threshold: float = 0.0, impl: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """As a call, but returns (logits, decisions bool [B, L])."""
        _check("x", x, self.dtype, (None, *self.input_shape), self.device)
        if paths is not None:
            _check("paths", paths, torch.bool, (len(x), self.num_blocks), self.device)
        # A negated view of memory, such as z.conj().imag, is not what lies there.
        logits, decisions = self.execution(impl).run(x.resolve_neg(), paths, threshold)
        return logits.to(self.dtype), decisions

    def paths_of(self, decisions: Tensor) -> Paths:
        """Decisions bool [B, L] with their cost."""
        names = tuple(block.name for block in self.macs.blocks)
        return Paths(decisions, self.macs.of_paths(decisions), self.macs.dense, names)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, wholly or not at all: the table, the weights and the cost; no code.

        Raises:
            OSError: a full disk, say; what was there before stays.
        """
        blocks = self.macs.blocks
        with torch.device("cpu"):  # whatever the default is
            unknown = torch.full((self.num_blocks,), torch.nan, dtype=torch.float32)
            tensors = {
                "table": self.network.table(),
                "weights": self.weights,
                "costs": torch.tensor([[b.body, b.shortcut, b.router, b.parameters] for b in blocks]).reshape(-1, 4),
                "total": torch.tensor([self.macs.dense, self.macs.parameters]),
                "rates": unknown if self.rates is None else self.rates,
                "dense": torch.tensor(self._dense, dtype=torch.bool),
            }
        dtype = str(self.dtype).removeprefix("torch.")
        names = "\n".join(block.name for block in blocks)
        metadata = {"spnet-plan": str(FORMAT_VERSION), "dtype": dtype, "blocks": names}
        write_whole(Path(path), save(tensors, metadata | {"sha256": _digest(tensors, metadata)}))


def _check(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], device: torch.device) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    fits = t.dim() == len(shape) and all(e in (None, s) for e, s in zip(shape, t.shape, strict=True))
    if not fits or t.dtype != dtype or t.device != device:
        expected = ", ".join("B" if s is None else str(s) for s in shape)
        raise ValueError(
            f"{name}: expected {dtype} [{expected}] on {device}, got {t.dtype} {list(t.shape)} on {t.device}"
        )


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Of all that a plan file says: one flipped bit in the weights would only make its answers wrong."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(t.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@uncompiled
def load_plan(path: str | Path, device: torch.device | str = "cpu") -> Plan:
    """Read a plan that :meth:`Plan.save` wrote, for the CPU or CUDA, whichever it was saved from.

    Raises:
        FileNotFoundError: no file there.
        ValueError: a truncated, damaged or foreign file, another version, impossible sizes, or what the device does
            not run.
    """
    path = Path(path)
    if not path.is_file():
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
    macs = Macs(*tensors["total"].tolist(), blocks)
    plan = Plan(tensors["table"], tensors["weights"], macs, _DTYPES[dtype], device)
    plan.choose(tensors["rates"], tensors["dense"].tolist())
    if plan.rates.isnan().any():
        plan.rates = None
    return plan


@uncompiled
@torch.no_grad()
def lower(model: nn.Module) -> Plan:
    """Lower a routed network in evaluation mode: BatchNorm folded, two router logits folded into one margin.

    Covers networks whose forward is that of :class:`spnet.models.SPNet`, in their CIFAR and ImageNet forms: a stem of
    one convolution with or without max-pooling, bodies of convolutions with BatchNorm, identity, option-A or projection
    shortcuts; any depth, widths, groups and classes; float32 and bfloat16 on the CPU. On CUDA, where nothing has been
    measured yet, with ``SPNET_EXPERIMENTAL_CUDA_BATCH=1`` in the environment: also float16; bodies of 1x1 and 3x3
    convolutions of one group; compute capability 8.0 or higher; with ``SPNET_EXPERIMENTAL_CUDA_WALK=1``: float16 and
    bfloat16 networks whose maps fit shared memory. The plan runs on the model's device.

    Raises:
        LoweringError: a network that does not fit; the message says why.
    """
    check_fit(model)
    lines = nn.Sequential, RoutedSequential
    if type(model.features) not in lines or any(type(part) not in lines for part in model.features):
        raise LoweringError("the features are not a stem and stages, each a plain sequence of modules")
    stem, *stages = map(list, model.features)
    blocks = [block for stage in stages for block in stage]
    if len(set(map(id, blocks))) < len(blocks):
        raise LoweringError("a block stands in two places, so its executions have no one column in the paths")
    size, head = model.input_size, model.heads[-1]
    if [type(m) for m in stem[2:]] not in ([nn.ReLU], [nn.ReLU, nn.MaxPool2d]):
        raise LoweringError("the stem is not a convolution with BatchNorm, ReLU and at most a max-pooling")
    pool = _lower_pool(stem[3]) if len(stem) == 4 else (0, 0, 0)
    [first], weights = _lower_chain("the stem", nn.Sequential(*stem[:2]))
    rows = []
    for number, block in enumerate(blocks):
        row, folded = _lower_block(number, block)
        rows.append(row)
        weights += folded
    network = Network(model.in_channels, size, size, head.out_features, pool, first, tuple(rows))
    flat = torch.cat([w.detach().float().flatten() for w in (*weights, head.weight, head.bias)])
    macs = count_macs(model, (model.in_channels, size, size))
    try:
        return Plan(network.table(), flat, macs, stem[0].weight.dtype, head.weight.device)
    except ValueError as e:
        raise LoweringError(str(e).removeprefix("plan: ")) from e


def check_fit(model: nn.Module) -> None:
    """Raise the LoweringError of :func:`lower` for what can be said without reading the blocks."""
    if getattr(type(model), "forward", None) is not SPNet.forward:
        raise LoweringError(f"{type(model).__name__} is not one of spnet's own networks")
    head = model.heads[-1]
    if type(head) is not nn.Linear or head.bias is None:
        raise LoweringError("the last head is not a linear layer with a bias")
    weight = head.weight
    try:
        check_device(weight.device, weight.dtype)
    except ValueError as e:
        raise LoweringError(str(e)) from e
    for module in model.modules():
        if module.training:
            raise LoweringError("the network is in training mode")
        if module._forward_hooks or module._forward_pre_hooks:
            raise LoweringError("a forward hook expects the modules to be called")
        forward = vars(module).get("forward")
        if forward is not None and not getattr(forward, "same_in_evaluation", False):
            raise LoweringError(f"the forward of a {type(module).__name__} has been replaced")


def _lower_block(number: int, block: nn.Module) -> tuple[Block, list[Tensor]]:
    """One block and the weights that belong to it."""
    name = f"block {number}"
    if type(block) is not RoutedBlock or type(block.router) is not Router or type(block.activation) is not nn.ReLU:
        raise LoweringError(f"{name} is no RoutedBlock with a spnet.Router and a ReLU")
    body, weights = _lower_chain(f"the body of {name}", block.body)
    shortcut, kind, stride, front = block.shortcut, IDENTITY, 1, 0
    if type(shortcut) is PadShortcut:
        kind, stride, front = PAD, shortcut.stride, shortcut.pad[0]
    elif type(shortcut) is not nn.Identity:
        [projection], folded = _lower_chain(f"the shortcut of {name}", shortcut)
        kind, stride = PROJECTION, projection.stride
        if projection != Convolution(body[0].cin, body[-1].cout, 1, stride):
            raise LoweringError(f"the shortcut of {name} is not a 1x1 convolution")
        weights += folded
    router = block.router
    parts = type(router.fc1), type(router.bn), type(router.dropout), type(router.fc2)
    if parts != (nn.Linear, _BatchNorm1d, nn.Dropout, nn.Linear) or router.fc2.out_features != 2:
        raise LoweringError(f"the router of {name} does not consist of what a spnet.Router does")
    if router.fc2.bias is None:
        raise LoweringError(f"the router of {name} has no bias")
    weights += fuse_linear_bn_weights(router.fc1.weight, router.fc1.bias, *_statistics(router.bn))
    # The two logits matter by their difference alone.
    (w_skip, w_execute), (b_skip, b_execute) = router.fc2.weight, router.fc2.bias
    weights += [w_execute - w_skip, b_execute - b_skip]
    return Block(tuple(body), kind, stride, front, router.fc1.out_features), weights


def _lower_pool(pool: nn.MaxPool2d) -> tuple[int, int, int]:
    sizes = [set(n) if isinstance(n, tuple) else {n} for n in (pool.kernel_size, pool.stride, pool.padding)]
    if any(len(s) != 1 for s in sizes) or pool.dilation not in (1, (1, 1)) or pool.ceil_mode or pool.return_indices:
        raise LoweringError("the stem has a max-pooling that is not square, undilated and rounded down")
    return tuple(s.pop() for s in sizes)


def _lower_chain(name: str, chain: nn.Module) -> tuple[list[Convolution], list[Tensor]]:
    """The shapes and folded weights of Conv-BN-ReLU-...-Conv-BN."""
    modules = list(chain) if type(chain) is nn.Sequential else []
    types, pattern = [type(m) for m in modules], [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    if not types or (pattern * len(types))[: len(types)] != types or types[-1] is not nn.BatchNorm2d:
        raise LoweringError(f"{name} is not a chain of convolutions with BatchNorm and ReLU")
    shapes, weights = [], []
    for conv, bn in zip(modules[::3], modules[1::3], strict=True):
        square = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding))
        if not square or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
            raise LoweringError(f"{name} has a convolution that is not square, undilated and zero-padded")
        sizes = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        shapes.append(Convolution(conv.in_channels, conv.out_channels, *sizes, conv.groups))
        bias = None if conv.bias is None else conv.bias.float()
        weights += fuse_conv_bn_weights(conv.weight.float(), bias, *_statistics(bn))
    return shapes, weights


def _statistics(bn: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple:
    if bn.running_mean is None or bn.weight is None:
        raise LoweringError("a BatchNorm has no running statistics or no weights")
    # In float32 also for a half model: its rounding belongs at the end.
    return bn.running_mean.float(), bn.running_var.float(), bn.eps, bn.weight.float(), bn.bias.float()
