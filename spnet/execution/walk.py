"""``walk``: the model's plan, run by the native core, one sample per worker thread; lowered once and kept.

Lowering copies the weights, so a kept plan is compared with its model before every use: a stale answer is a defect.
``spnet.lower(model)`` is for who wants a plan without the comparison.
"""

from __future__ import annotations

from itertools import chain
from operator import is_
from weakref import WeakKeyDictionary

import torch
from torch import nn

from spnet.execution.plan import Plan, check_fit, lower
from spnet.native import core


class _Watch:
    """Everything about a model that its plan depends on, in a form that is quick to compare."""

    def __init__(self, model: nn.Module):
        # Not the model itself: the cache holds it weakly.
        modules = [m for m in model.modules() if m is not model]
        self._attributes = [m.__dict__ for m in modules]
        # An empty dictionary belongs to a module without children or weights, which stays one whatever is added.
        states = (d for m in (model, *modules) for d in (m._modules, m._parameters, m._buffers))
        self._states = [d for d in states if d]
        self._hooks = [d for m in (model, *modules) for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._parts = self._current_parts()
        self._tensors = [t for t in self._parts if isinstance(t, torch.Tensor)]
        self._addresses = self._current_addresses()
        # The version counter of PyTorch misses what is written through .data: the bytes themselves do not.
        storages = [t.untyped_storage() for t in self._tensors if t.device.type == "cpu"]
        self._spans = torch.tensor([(s.data_ptr(), s.nbytes()) for s in storages], dtype=torch.int64)
        self._fingerprint = self._current_fingerprint()

    def _current_parts(self) -> list:
        return list(chain.from_iterable(d.values() for d in self._states))

    def _current_addresses(self) -> list[int]:
        return [t.data_ptr() for t in self._tensors]

    def _current_fingerprint(self) -> int:
        return core.fingerprint(self._spans.data_ptr(), len(self._spans))

    def unchanged(self) -> bool:
        parts = self._current_parts()
        return (
            len(parts) == len(self._parts)
            and all(map(is_, parts, self._parts))
            and not any(d["training"] for d in self._attributes)
            and not any(self._hooks)
            # The spans are safe to read only where the tensors still lie there.
            and self._current_addresses() == self._addresses
            and self._current_fingerprint() == self._fingerprint
        )


_kept: WeakKeyDictionary[nn.Module, tuple[_Watch, Plan]] = WeakKeyDictionary()


def plan_of(model: nn.Module) -> Plan:
    """The model's plan, lowered anew where the model has changed since.

    Raises:
        LoweringError: the model does not fit.
    """
    kept = _kept.get(model)
    if kept is None or model.training or not kept[0].unchanged():
        check_fit(model)
        # Watched before it is read: a change in between is found by the next comparison.
        watch = _Watch(model)
        kept = _kept[model] = watch, lower(model)
    return kept[1]
