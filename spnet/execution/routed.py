"""``routed``: eager PyTorch that gathers the samples routed to a body, runs it on them, and writes them back.

Skipped samples of identity blocks are neither read nor written where the state belongs to the run
(inside a RoutedSequential), and their pooled vectors are reused by the next router. What a module of another library
takes or returns belongs to the run only in a copy: the module may have kept it. A body that no sample executes is run
on one where the dtype of what it returns is not known, for the sum has that dtype.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spnet.execution import ops
from spnet.execution.masked import MaskedRun
from spnet.routing import RoutedBlock, RoutedSequential, Router, added, computes

# Applied twice they change nothing, so a sample that passed one need not pass the same one again.
_IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Identity)

# The dtypes that bodies returned, by what they were given: the sum has the same one where no sample executes.
_dtypes: WeakKeyDictionary[nn.Module, dict[tuple, torch.dtype]] = WeakKeyDictionary()


class _State(NamedTuple):
    """The batch between two modules of a RoutedSequential."""

    x: Tensor  # [B, C, ...]
    owned: bool = False  # nobody else holds x: it may be written
    activation: type | None = None  # the idempotent activation that made x
    pooled: Tensor | None = None  # [B, C], Router.pool(x) where known


class RoutedRun(MaskedRun):
    """One forward that runs each body on the samples routed to it.

    Args:
        blocks, paths, threshold: as in MaskedRun.
        in_place: False where a forward hook may keep an intermediate tensor, so that none may be overwritten, or
            change one, so that every module is called.
    """

    def __init__(
        self, blocks: list[RoutedBlock], paths: Tensor | None = None, threshold: float = 0.0, *, in_place: bool = True
    ):
        super().__init__(blocks, paths, threshold)
        self._in_place = in_place

    def block(self, block: RoutedBlock, x: Tensor) -> Tensor:
        return self._step(block, _State(x)).x

    def sequential(self, sequential: RoutedSequential, x: Tensor) -> Tensor:
        if not self._in_place:
            return super().sequential(sequential, x)
        return self._chain(sequential, _State(x)).x

    def _chain(self, sequential: RoutedSequential, state: _State) -> _State:
        for module in sequential:
            if computes(module, RoutedSequential):
                state = self._chain(module, state)
            elif computes(module, RoutedBlock):
                state = self._step(module, state)
            else:
                y = module(state.x)
                state = _State(y, keeps_nothing(module) and not _shares_memory(y, state.x), _idempotent(_last(module)))
        return state

    def _step(self, block: RoutedBlock, state: _State) -> _State:
        x, pooled = state.x, state.pooled
        if overrides_masked(block):
            return _State(super().block(block, x))
        if type(block.router) is not Router or not computes(block.router, Router) or not self._in_place:
            pooled = None  # another router looks at x itself, and a hook on a router expects its call
        elif pooled is None and self._forced is None:
            pooled = Router.pool(x)
        index = ops.compact(self.decisions(block, x, pooled))
        activation = _idempotent(block.activation)
        made = activation is not None or keeps_nothing(block.activation)  # for this run alone
        if len(index) == len(x):
            y = block.shortcut(x)
            return _State(block.activation(y + added(block.body, x, y)), made, activation)

        identity = computes(block.shortcut, nn.Identity)
        settled, owned = self._settles(block, state), _owned(block, state)
        known = _dtypes.setdefault(block.body, {})
        given = x.dtype, torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
        if settled and owned and len(index) == 0 and known.get(given) is x.dtype:
            return state._replace(pooled=pooled)
        y = block.shortcut(x)
        if len(index) or given not in known:
            body = added(block.body, ops.gather_rows(x, index) if len(index) else x[:1], y)
            known[given] = body.dtype
        if not owned if identity else _shares_memory(y, x) or not keeps_nothing(block.shortcut):
            y = y.clone()
        # As the sum of masked: a body may be one number per channel, or, under autocast, of another dtype.
        dtype = torch.promote_types(y.dtype, known[given])
        y = y.to(dtype)
        if len(index):
            body = body.to(dtype).expand(len(index), *y.shape[1:])
            if dtype.is_complex or (settled and activation not in (nn.ReLU, nn.Identity)):
                sums = ops.gather_rows(y, index) + body
                y.index_copy_(0, index, block.activation(sums) if settled else sums)
            else:
                ops.scatter_add_rows_(y, index, body, settled and activation is nn.ReLU)
        if not settled:
            return _State(block.activation(y), made, activation)
        if y.dim() == 2 or dtype != x.dtype:
            pooled = None  # is y itself, or of another dtype
        if pooled is not None:
            pooled = pooled.index_copy(0, index, Router.pool(ops.gather_rows(y, index)))
        return _State(y, True, activation, pooled)

    def _settles(self, block: RoutedBlock, state: _State) -> bool:
        """Whether a skipped sample is unchanged: what made it has applied the block's activation before."""
        activation = _idempotent(block.activation)
        before = activation in (nn.Identity, state.activation or nn.Identity)
        return before and computes(block.shortcut, nn.Identity) and self._in_place  # a hook on one expects its call


def _owned(block: RoutedBlock, state: _State) -> bool:
    """Whether the block may write to its input, which its router has seen."""
    return state.owned and (type(block.router) is Router or keeps_nothing(block.router))


class Observation(NamedTuple):
    """What every skip of a block costs, whoever skips."""

    settled: bool  # the activation need not be computed for skipped samples
    given: bool  # the block's input belongs to the run
    owned: bool  # also after its router has seen it, so it is not copied


class ObservedRun(RoutedRun):
    """Also observes every RoutedBlock that runs, by its id."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.observed: dict[int, Observation] = {}

    def _step(self, block: RoutedBlock, state: _State) -> _State:
        self.observed[id(block)] = Observation(self._settles(block, state), state.owned, _owned(block, state))
        return super()._step(block, state)


def overrides_masked(block: RoutedBlock) -> bool:
    """Whether a block computes another thing than :meth:`RoutedBlock.masked` does."""
    return type(block).masked is not RoutedBlock.masked or "masked" in vars(block)


def _idempotent(module: nn.Module) -> type | None:
    return type(module) if type(module) in _IDEMPOTENT and computes(module, type(module)) else None


def _last(module: nn.Module) -> nn.Module:
    while computes(module, nn.Sequential) and len(module):
        module = module[-1]
    return module


def keeps_nothing(module: nn.Module) -> bool:
    """Whether nobody else holds what a module takes and returns: a forward that a user wrote may have kept either."""
    return not any(
        "forward" in vars(m) or not type(m).__module__.startswith(("torch.nn.", "spnet.")) for m in module.modules()
    )


def _shares_memory(a: object, b: object) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return True  # a tuple of tensors, say, of which nothing is known
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
