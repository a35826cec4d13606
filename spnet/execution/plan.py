"""Plans: a routed network as a flat table of blocks with folded weights, which the fast executions run.

``spnet/execution/table.py`` and ``csrc/plan.h`` describe the table. A plan needs no model class to run, and its file
holds no code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch._subclasses import FakeTensor

from spnet.analysis.macs import BlockMacs, Macs
from spnet.execution.batch import Batch
from spnet.execution.device import DTYPES, check_cuda, check_device
from spnet.execution.paths import Paths
from spnet.execution.table import FORMAT_VERSION, Network, read_table
from spnet.execution.walk import CudaWalk, Walk
from spnet.models.files import write_whole
from spnet.routing import uncompiled


def _graph(network: Network, weights: Tensor, dtype: torch.dtype):
    if weights.device.type == "cuda":  # on the CPU, where tests run it, its operators are their twins
        check_cuda(torch.cuda.get_device_capability(weights.device), find_spec("triton") is not None)
    from spnet.execution.graph import Graph  # needs Triton

    return Graph(network, weights, dtype)


_EXECUTIONS = {"cpu": {"walk": Walk, "batch": Batch}, "cuda": {"walk": CudaWalk, "batch": _graph}}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_TENSORS = {
    "table": (torch.int64, 1),
    "weights": (torch.float32, 1),
    "costs": (torch.int64, 2),
    "total": (torch.int64, 1),
    "rates": (torch.float32, 1),
    "dense": (torch.bool, 1),
}
_KEYS = torch._C._TorchDispatchModeKey
_TRACING = _KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL


class LoweringError(ValueError):
    """A network that no plan describes; the message says what does not fit."""


class Plan:
    """A lowered network. Call it like the model: ``plan(x)``.

    Args:
        table: int64 [n], the shapes, as described in ``csrc/plan.h``.
        weights: float32 [m], folded weights in the order of the table.
        macs: cost of the network, as counted before folding.
        dtype: float32, bfloat16 or float16, of the maps and of the packed weights; routers and sums are float32 always.
            On the CPU float16 is computed in float32, and so is bfloat16 where the processor does not multiply it.
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
        try:
            device = torch.device(device)
        except RuntimeError as e:
            raise ValueError(f"device: expected the CPU or CUDA, got {device!r}") from e
        check_device(device, dtype)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"{device}: PyTorch finds no GPU")
        self.device = torch.empty(0, device=device).device  # "cuda" is the current one of them
        self.network = read_table(table)
        expected = sum(math.prod(shape) for shape in self.network.shapes())
        if weights.dtype != torch.float32 or weights.numel() != expected:
            got = f"{weights.numel()} of {weights.dtype}"
            raise ValueError(f"weights: expected {expected} of torch.float32, as the table says, got {got}")
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

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.input_shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Plan({dtype} [B, {shape}] -> [B, {self.num_classes}], {self.num_blocks} blocks, "
            f"by {self.impl} on {self.device})"
        )

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
            LoweringError: an unknown ``impl``, or one that the network does not fit.
        """
        impl = self.impl if impl == "auto" else impl
        found = self._executions.get(impl)
        if found is None:
            make = _EXECUTIONS[self.device.type]
            if impl not in make:
                raise LoweringError(f"impl: a plan runs by {' or '.join(map(repr, make))}, got {impl!r}")
            try:
                found = make[impl](self.network, self.weights.to(self.device), self.dtype)
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
        """Run the network, on the CPU with ``torch.get_num_threads()`` threads; on CUDA nothing waits for the device,
        except where ``batch`` captures the graph of a new batch size.

        Args:
            x: [B, C, H, W] of the plan's dtype on its device, any strides.
            paths: bool [B, L] on its device, forces the decisions.
            threshold: a sample executes a block where z_execute - z_skip > threshold.
            return_paths: also return :class:`spnet.Paths`.
            impl: "walk" or "batch"; "auto" takes ``plan.impl``.

        Returns:
            Logits [B, classes] of the plan's dtype, or (logits, Paths).

        Raises:
            ValueError: another shape, dtype or device, x that requires grad, a threshold that is NaN, or a call that is
                traced or transformed; LoweringError for an unknown ``impl``, or one that the network does not fit.
            TypeError: x or paths is no tensor, or threshold no number.
        """
        refuse_recorded(x)
        logits, decisions = self.run(x, paths, threshold, impl)
        return (logits, self.paths_of(decisions)) if return_paths else logits

    def run(
        self, x: Tensor, paths: Tensor | None = None, threshold: float = 0.0, impl: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """As a call, but returns (logits, decisions bool [B, L])."""
        _check("x", x, self.dtype, (None, *self.input_shape), self.device)
        if paths is not None:
            _check("paths", paths, torch.bool, (len(x), self.num_blocks), self.device)
        threshold = checked_threshold(threshold)
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
        write_whole(Path(path), self._bytes())

    def __reduce__(self):
        """Copies, and pickles such as other processes are sent, hold what a file does."""
        return _read, (self._bytes(), str(self.device), "pickle")

    def _bytes(self) -> bytes:
        blocks = self.macs.blocks
        with torch.device("cpu"):  # whatever the default is
            unknown = torch.full((self.num_blocks,), torch.nan, dtype=torch.float32)
            tensors = {
                "table": self.network.table(),
                "weights": self.weights,
                "costs": torch.tensor(
                    [[b.body, b.shortcut, b.router, b.parameters] for b in blocks], dtype=torch.int64
                ).reshape(-1, 4),
                "total": torch.tensor([self.macs.dense, self.macs.parameters]),
                "rates": unknown if self.rates is None else self.rates,
                "dense": torch.tensor(self._dense, dtype=torch.bool),
            }
        dtype = str(self.dtype).removeprefix("torch.")
        names = "\n".join(block.name for block in blocks)
        metadata = {"spnet-plan": str(FORMAT_VERSION), "dtype": dtype, "blocks": names}
        return save(tensors, metadata | {"sha256": _digest(tensors, metadata)})


def _check(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], device: torch.device) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if t.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense Tensor, got one of {t.layout}")
    fits = t.dim() == len(shape) and all(e in (None, s) for e, s in zip(shape, t.shape, strict=True))
    if not fits or t.dtype != dtype or t.device != device:
        expected = ", ".join("B" if s is None else str(s) for s in shape)
        raise ValueError(
            f"{name}: expected {dtype} [{expected}] on {device}, got {t.dtype} {list(t.shape)} on {t.device}"
        )


def refuse_recorded(x: Tensor) -> None:
    """Raise a ValueError where PyTorch records or transforms operators: it would not see what native code computes."""
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x: requires grad, but this is inference only; pass x.detach(), or call model(x)")
    traced = torch.jit.is_tracing() or isinstance(x, FakeTensor)
    if torch._C._len_torch_dispatch_stack():  # a mode of a user, such as one that counts operators, is none of these
        traced = traced or any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING)
    if traced or (isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x)):
        raise ValueError("x: fast_forward and plans cannot be traced or transformed; export model(x) instead")


def checked_threshold(threshold: float) -> float:
    """As a Python number, infinite where it is beyond float32, in which margins are."""
    try:
        math.isnan(threshold)  # raises for a string, which float would read
        value = float(threshold)
    except OverflowError:
        value = math.inf if threshold > 0 else -math.inf
    except (TypeError, ValueError) as e:
        raise TypeError(f"threshold: expected a number, got {type(threshold).__name__}") from e
    if math.isnan(value):
        raise ValueError("threshold: expected a number, got NaN")
    return value if abs(value) <= torch.finfo(torch.float32).max else math.copysign(math.inf, value)


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
        TypeError: path is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no plan at {path}")
    return _read(path.read_bytes(), device, f"path: {path}")


def _read(data: bytes, device: torch.device | str, source: str) -> Plan:
    """The plan of a file's bytes."""
    try:
        tensors = load(data)
    except (SafetensorError, KeyError) as e:  # a KeyError of a type that safetensors knows, but not for PyTorch
        raise ValueError(f"{source} is no complete plan ({e})") from e
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    if metadata.get("spnet-plan") != str(FORMAT_VERSION):
        found = metadata.get("spnet-plan", "none")
        raise ValueError(f"{source} has plan version {found}, expected {FORMAT_VERSION}")
    names, dtype = metadata.get("blocks", ""), metadata.get("dtype")
    names = names.split("\n") if names else []
    fits = {name: (t.dtype, t.dim()) for name, t in tensors.items()} == _TENSORS and dtype in _DTYPES
    if not fits or tensors["costs"].shape != (len(names), 4) or tensors["total"].shape != (2,):
        raise ValueError(f"{source} is no plan: its tensors have other names, types or shapes")
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise ValueError(f"{source} is damaged: its checksum is another one")
    blocks = tuple(BlockMacs(name, *row) for name, row in zip(names, tensors["costs"].tolist(), strict=True))
    macs = Macs(*tensors["total"].tolist(), blocks)
    plan = Plan(tensors["table"], tensors["weights"], macs, _DTYPES[dtype], device)
    plan.choose(tensors["rates"], tensors["dense"].tolist())
    if plan.rates.isnan().any():
        plan.rates = None
    return plan
