"""Multiply-accumulates and parameters, per block and in all.

Counted are the multiply-accumulates of convolutions and matrix products, as usual; normalisation, activation and
pooling are not. The formulas are those of ``torch.utils.flop_counter``, which leaves out recurrent layers.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from spnet.routing import RoutedBlock, Run, active, own_weight, routed_blocks, unwrapped


@dataclass(frozen=True)
class BlockMacs:
    """Cost of one routed block for one sample, in multiply-accumulates; and its parameters."""

    name: str
    body: int  # saved by a skip
    shortcut: int
    router: int
    parameters: int


@dataclass(frozen=True)
class Macs:
    """Cost of a model for one sample, in multiply-accumulates (FLOPs are twice that); and its parameters."""

    dense: int  # stem, bodies, shortcuts, routers and head
    parameters: int
    blocks: tuple[BlockMacs, ...]

    @property
    def flops(self) -> int:
        """2 x MACs; publications mix the two."""
        return 2 * self.dense

    def of_paths(self, decisions: Tensor) -> Tensor:
        """Cost of each sample's path: decisions bool [B, L] -> int64 [B], on the same device."""
        device = decisions.device
        if device not in self._bodies:  # kept: a copy to a GPU would wait for it
            self._bodies[device] = torch.tensor([b.body for b in self.blocks], dtype=torch.int64, device=device)
        return self.dense - (self._bodies[device] * ~decisions).sum(1)

    @cached_property
    def _bodies(self) -> dict[torch.device, Tensor]:
        return {}


_switching = threading.RLock()
# The CPU's form of attention has no formula of its own.
_aten = torch.ops.aten
_SAME_COST = {_aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention}
# Whole recurrent layers, oneDNN's of nn.LSTM and cuDNN's of all kinds.
_FORMULAS = {
    _aten.mkldnn_rnn_layer: lambda x, w_input, w_state, *_, **__: _recurrent(x, [w_input, w_state]),
    _aten._cudnn_rnn: lambda x, weights, *_, **__: _recurrent(x, weights),
}
_SCALARS = frozenset([bool, int, float, str])
_cache: WeakKeyDictionary[nn.Module, tuple[tuple, Macs]] = WeakKeyDictionary()


def count_macs(model: nn.Module, shape: Iterable[int], dtype: torch.dtype | None = None) -> Macs:
    """Count the multiply-accumulates of one sample by running the dense model once on a sample of zeros.

    The result is kept as long as the model consists of the same modules with parameters of the same shapes and with
    the same numbers and strings in their attributes. An operator that is none of ATen's and has no formula, such as a
    quantized layer, counts as nothing and is warned of.

    Args:
        model: a network in evaluation mode, with or without RoutedBlocks.
        shape: of one sample, such as (3, 32, 32).
        dtype: of the sample, such as torch.int64 where it is tokens; by default that of the weights.

    Raises:
        TypeError: model is no module.
        ValueError: a model in training mode (the sample of zeros would enter its running statistics).
    """
    model = unwrapped(model)
    modules = list(model.modules())
    if any(getattr(m, "training", False) for m in modules):  # what TorchScript has frozen has no mode
        raise ValueError(f"model: expected evaluation mode, but {type(model).__name__} is in training mode")
    # Weak references: the id of a module that was replaced may come back as the id of another.
    parameters = chain.from_iterable(m._parameters.values() for m in modules)
    shapes = tuple(None if p is None else p.shape for p in parameters)
    structure = tuple(shape), dtype, shapes, [(ref(m), ref(type(m)), _settings(m)) for m in modules]
    kept = _cache.get(model)
    if kept is None or kept[0] != structure:
        kept = _cache[model] = structure, _count(model, *structure[:2])
    return kept[1]


def _settings(module: nn.Module) -> list:
    """The attributes that say how a module computes, such as a stride; nothing that might hold the model."""
    return [tuple(v) if type(v) is list else v for v in vars(module).values() if _is_setting(v)]


def _is_setting(value: object) -> bool:
    kind = type(value)
    return kind in _SCALARS or ((kind is tuple or kind is list) and all(map(_is_setting, value)))


def _recurrent(x: Tensor, weights: Iterable[Tensor]) -> int:
    """FLOPs of recurrent layers for x [..., C]: every matrix is used once at each step."""
    return 2 * x[..., 0].numel() * sum(w.numel() for w in weights if w.dim() == 2)


class _Counter(TorchDispatchMode):
    """Adds up the multiply-accumulates of every operator in this thread.

    Not ``FlopCounterMode``: its global module hooks would also see the forwards of other threads.
    """

    macs = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # by default the compiler is imported to be told to keep out: two seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = _SAME_COST.get(func._overloadpacket, func._overloadpacket)
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is None:
            with self:  # under inference_mode a linear layer arrives whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            if func.namespace != "aten":
                warnings.warn(f"model: the cost of {func} is not known and counts as nothing", stacklevel=2)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self.macs += formula(*args, **kwargs, out_val=out) // 2
        return out


class _DenseRun(Run):
    """One forward that executes every block and notes what its parts cost."""

    def __init__(self, counter: _Counter):
        self._counter = counter
        self.parts: dict[int, tuple[int, ...]] = {}  # by id of the block: body, shortcut, router

    def block(self, block: RoutedBlock, x: Tensor) -> Tensor:
        marks, outputs = [self._counter.macs], []
        for part in (block.router, block.shortcut, block.body):
            outputs.append(part(x))
            marks.append(self._counter.macs)
        router, shortcut, body = (after - before for before, after in zip(marks, marks[1:], strict=False))
        self.parts[id(block)] = body, shortcut, router
        return block.activation(outputs[1] + outputs[2])


@contextmanager
def _attention_by_parts() -> Iterator[None]:
    """nn.MultiheadAttention without its fast path, one operator that has no formula; the switch is the process's."""
    with _switching:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


@torch.no_grad()
def _count(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None) -> Macs:
    blocks = routed_blocks(model)
    weight = own_weight(model)
    if weight is None:
        weight = next(filter(Tensor.is_floating_point, model.parameters()), torch.empty(0))
    counter = _Counter()
    run = _DenseRun(counter)
    with _attention_by_parts(), active(run), counter:
        model(torch.zeros(1, *shape, dtype=dtype or weight.dtype, device=weight.device))
    rows = tuple(
        BlockMacs(name, *run.parts.get(id(block), (0, 0, 0)), sum(p.numel() for p in block.parameters()))
        for name, block in blocks.items()
    )
    return Macs(counter.macs, sum(p.numel() for p in model.parameters()), rows)


def format_macs(macs: Macs) -> str:
    """A table for a terminal: MMACs and parameters of each routed block, what lies outside them, and the totals.

    The parameters include what only training uses, such as stage heads.
    """
    inside = [sum(getattr(b, part) for b in macs.blocks) for part in ("body", "shortcut", "router", "parameters")]
    blocks = [
        (b.name, *(f"{m / 1e6:.3f}" for m in (b.body, b.shortcut, b.router)), f"{b.parameters:,}") for b in macs.blocks
    ]
    if blocks:
        outside = macs.dense - sum(inside[:3]), macs.parameters - inside[3]
        rows = [
            ("block", "body", "shortcut", "router", ""),
            ("", "MMACs", "MMACs", "MMACs", "parameters"),
            *blocks,
            ("all blocks", *(f"{m / 1e6:.3f}" for m in inside[:3]), f"{inside[3]:,}"),
            ("outside them", f"{outside[0] / 1e6:.3f}", "", "", f"{outside[1]:,}"),
        ]
        lines = align(rows)
    else:
        lines = ["no routed blocks: every sample executes everything"]
    cost = f"{macs.dense / 1e9:.3g} GMAC ({macs.flops / 1e9:.3g} GFLOPs, counted as 2 x MACs)"
    return "\n".join([*lines, f"dense: {cost} per sample; {macs.parameters:,} parameters"])


def mega(macs: float, digits: int = 4) -> str:
    """Millions, with so many significant digits or all before the point: no 1.56e+04."""
    millions = macs / 1e6
    return f"{millions:.{digits}g}" if millions < 10 ** (digits - 1) else f"{millions:.0f}"


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose first column is flush left and whose others are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    return [
        "  ".join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], others, strict=True))]).rstrip()
        for row in rows
    ]
