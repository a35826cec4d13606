"""Plans that are kept with their models and lowered anew where a model has changed since.

Lowering copies the weights, so a kept plan is compared with its model at every use: a stale answer is a defect.
``spnet.lower(model)`` is for who wants a plan without the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spnet.execution.plan import LoweringError, Plan, check_fit, lower
from spnet.models import SPNet
from spnet.native import core
from spnet.routing import routed_blocks

# The dictionaries of a module that say what it consists of and whether it may be passed over.
_PARTS = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class _Watch:
    """Everything about a model that its plan depends on, in a form that is quick to compare."""

    def __init__(self, model: SPNet):
        modules = list(model.modules())
        # In lists, of which each thread takes the next.
        self._facts = core.Facts([list(_facts(modules[i : i + 64], model)) for i in range(0, len(modules), 64)])
        blocks = {id(m): number for number, m in enumerate(routed_blocks(model).values())}
        # A quarter of the weights of a ResNet-50: no inference reads them.
        for_training = {id(m) for part in (*model.heads[:-1], *(model.align or ())) for m in part.modules()}
        tensors: dict[int, tuple[Tensor, tuple[int, int] | None]] = {}  # with the address and bytes of its memory
        spans: dict[tuple[int, int], int] = {}  # -> block whose body alone reads it, or L
        for module, part in _readers(model, blocks, len(blocks)):
            if id(module) in for_training:
                continue
            for name, t in (*module._parameters.items(), *module._buffers.items()):
                on_cpu = t is not None and t.device.type == "cpu"
                # BatchNorm's count of batches is read by no inference, but its running statistics are written past
                # their version counters: where versions are all there is to compare, its own stands for theirs.
                if t is None or (on_cpu and name == "num_batches_tracked"):
                    continue
                span = None
                if on_cpu:
                    storage = t.untyped_storage()
                    span = storage.data_ptr(), storage.nbytes()
                    spans[span] = part if spans.get(span, part) == part else len(blocks)
                tensors[id(t)] = t, span
        parts: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
        for t, span in tensors.values():
            parts[spans.get(span, len(blocks))].append(t)
        exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
        self._layouts = None if exchange is None else core.Layouts(parts, exchange)
        self._moved = [_moved(part) for part in parts] if exchange is None else []
        self._elsewhere = [t for t, span in tensors.values() if span is None]
        if any(t.is_inference() for t in self._elsewhere):
            raise LoweringError("weights made in inference mode have no version to compare with the plan's")
        self._versions = [t._version for t in self._elsewhere]
        # The version counter of PyTorch misses what is written through .data: the bytes themselves do not.
        table = sorted((part, *span) for span, part in spans.items())
        table = torch.tensor([(address, size, part) for part, address, size in table], dtype=torch.int64, device="cpu")
        self._fingerprint = core.Fingerprint(table.data_ptr(), len(table), len(parts), torch.get_num_threads())
        self._all = b"\1" * len(parts)

    def unchanged(self, model: nn.Module, decisions: Tensor | None = None) -> bool:
        """Whether the plan is that of the model, for samples that take these paths, bool [B, L]; by default for all."""
        chosen = self._all
        if decisions is not None and decisions.device.type == "cpu":  # those on a device are not waited for
            chosen = decisions.any(0).numpy().tobytes() + b"\1"
        threads = torch.get_num_threads()
        return (
            [t._version for t in self._elsewhere] == self._versions
            and not any(moved() for moved, needed in zip(self._moved, chosen, strict=False) if needed)
            and core.same_objects(self._layouts, chosen, self._facts, vars(model), threads)
            # Last: the bytes are safe to read only where the tensors still lie there.
            and self._fingerprint.matches(chosen, threads)
        )


def _readers(module: nn.Module, blocks: dict[int, int], part: int) -> Iterator[tuple[nn.Module, int]]:
    """Every module in every place where it stands, and the number of the block whose body that is in; else ``part``."""
    yield module, part
    for name, child in module._modules.items():
        if child is not None:
            yield from _readers(child, blocks, blocks[id(module)] if name == "body" and id(module) in blocks else part)


def _facts(modules: list[nn.Module], model: nn.Module) -> Iterator:
    """The entries of the modules' dictionaries, as ``core.Facts`` takes them.

    Held by the watch and so never mistaken for others that were given their addresses. But what might lead back to
    the model is not held, or it would live on in the cache: its own dictionary, and attributes that lowering would
    not understand.
    """
    for m in modules:
        attributes = vars(m)
        yield None if m is model else attributes
        for name, value in attributes.items():
            yield from (name, value if name in _PARTS or name in _HOOKS or _is_plain(value) else ...)
        for name in _PARTS:
            # Without children or weights it belongs to a module that asks for none.
            if attributes[name]:
                yield attributes[name]
                for entry in attributes[name].items():
                    yield from entry
        for name in _HOOKS:
            yield attributes[name]


def _is_plain(value: object) -> bool:
    """Whether it is a number, a string, None or a tuple of these, which nobody can change in place."""
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _moved(tensors: list[Tensor]) -> Callable[[], bool]:
    """Tells whether tensors lie otherwise than now, where PyTorch is older than the part of DLPack that does."""

    def layouts() -> list[tuple]:
        return [(t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for t in tensors]

    before = layouts()
    return lambda: layouts() != before


_kept: WeakKeyDictionary[nn.Module, tuple[_Watch, Plan]] = WeakKeyDictionary()


def plan_of(model: nn.Module) -> Plan:
    """The model's plan, lowered anew where the model has changed since.

    Raises:
        LoweringError: the model does not fit.
    """
    kept = _kept.get(model)
    return kept[1] if kept is not None and kept[0].unchanged(model) else _lowered(model)


def run_plan(model: nn.Module, run: Callable[[Plan], tuple[Tensor, Tensor]]) -> tuple[Plan, Tensor, Tensor]:
    """The model's plan, and the logits and decisions that ``run`` returns for it.

    Run first and compared afterwards: the weights of a body that no sample executed need not be read, and a device
    computes meanwhile.

    Raises:
        LoweringError: the model does not fit.
    """
    kept = _kept.get(model)
    if kept is not None:
        watch, plan = kept
        try:
            logits, decisions = run(plan)
        except Exception:
            if watch.unchanged(model):
                raise
        else:
            if watch.unchanged(model, decisions):
                return plan, logits, decisions
    plan = _lowered(model)
    return plan, *run(plan)


def _lowered(model: nn.Module) -> Plan:
    check_fit(model)
    # Watched before it is read: a change in between is found by the next comparison.
    watch = _Watch(model)
    plan = lower(model)
    _kept[model] = watch, plan
    return plan
