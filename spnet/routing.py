"""Routers and routed blocks: the module's own forward is the specification of every faster execution.

A routed block computes ``y = activation(shortcut(x) + d * body(x))`` where the router decides ``d``
per sample. This file computes everything and then selects (``masked``); the other executions in
``spnet.execution`` take over through ``_active_run`` and must give the same answers.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor


def straight_through_gumbel(router_logits: Tensor, tau: float = 1.0) -> Tensor:
    """Sample one hard decision per row, with the gradient of the soft one.

    Args:
        router_logits: float [..., 2], the logits of (skip, execute).
        tau: temperature of the Gumbel-softmax.

    Returns:
        [...] of the same dtype: 0 or 1 in the forward, the Gumbel-softmax probability in the backward.

    Source: Jang et al., "Categorical reparameterization with Gumbel-softmax", ICLR 2017, section 2.2.
    """
    return F.gumbel_softmax(router_logits, tau=tau, hard=True)[..., 1]


def decide(router_logits: Tensor, threshold: float = 0.0) -> Tensor:
    """Decide without noise: float [B, 2] logits of (skip, execute) -> bool [B].

    A sample executes where z_execute - z_skip > threshold; a tie or a NaN skips.
    """
    return router_logits[:, 1] - router_logits[:, 0] > threshold


class _BatchNorm1d(nn.BatchNorm1d):
    """Normalises a training batch of one sample, which has no statistics of its own, by the running ones."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class Router(nn.Module):
    """The two-way router of a residual block, always in float32 or better.

    ``Linear(width, 2)(Dropout(ReLU(BatchNorm1d(Linear(C, width)(GAP(x))))))``

    Args:
        channels: C, the channels of the block's input.
        width: hidden units.
        dropout: probability of dropping a hidden unit in training.
        bias: initial bias of the (skip, execute) logits; the default starts blocks open for ~85 % of samples
            in training.
        init_std: standard deviation of the last layer's initial weights; None means Kaiming-normal.

    Source: SP-Net (ECCV 2022), the dynamic router; ConvNet-AIG (ECCV 2018), section 3.2.
    """

    def __init__(
        self,
        channels: int,
        width: int = 128,
        dropout: float = 0.4,
        bias: tuple[float, float] = (0.1, 2.0),
        init_std: float | None = None,
    ):
        super().__init__()
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # the default may be a half one
        self.fc1 = nn.Linear(channels, width, dtype=dtype)
        self.bn = _BatchNorm1d(width, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(width, 2, dtype=dtype)
        nn.init.kaiming_normal_(self.fc1.weight)
        if init_std is None:
            nn.init.kaiming_normal_(self.fc2.weight)
        else:
            nn.init.normal_(self.fc2.weight, std=init_std)
        with torch.no_grad():
            self.fc1.bias.zero_()
            self.fc2.bias.copy_(torch.tensor(bias))

    def _apply(self, fn, recurse=True):
        # model.half() and model.bfloat16() move a router but keep its precision: decisions are made in float32.
        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if out.dtype in (torch.float16, torch.bfloat16) else out

        return super()._apply(keep_precision, recurse)

    @staticmethod
    def pool(x: Tensor) -> Tensor:
        """Global average: [B, C, ...] -> [B, C], in float32 for half-precision inputs."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.to(dtype) if x.dim() == 2 else x.mean(dim=tuple(range(2, x.dim())), dtype=dtype)

    def logits(self, pooled: Tensor) -> Tensor:
        """Router logits [B, 2] of the pooled vector [B, C], outside any autocast region.

        Raises:
            ValueError: another number of channels than the router was made for.
        """
        if not torch.jit.is_tracing() and pooled.shape[1] != self.fc1.in_features:
            raise ValueError(f"x: expected {self.fc1.in_features} channels (the router's), got {pooled.shape[1]}")
        # The meta device, on which shapes are inferred, has no autocast.
        with nullcontext() if pooled.is_meta else torch.autocast(pooled.device.type, enabled=False):
            h = self.fc1(pooled)
            return self.fc2(self.dropout(F.relu(self.bn(h))))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> router logits [B, 2] of (skip, execute)."""
        return self.logits(self.pool(x))


class ResidualBlock(nn.Module):
    """``activation(shortcut(x) + body(x))``: a block that every sample executes.

    Args:
        body: module whose output has the shape of ``shortcut(x)``, or is expanded to it.
        shortcut: module applied to every sample; None is the identity.
        activation: module applied to the sum; None is the identity.

    Raises:
        TypeError: a part that is no module.
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, activation: nn.Module | None = None):
        super().__init__()
        for name, part in (("body", body), ("shortcut", shortcut), ("activation", activation)):
            if not isinstance(part, nn.Module) and (part is not None or name == "body"):
                raise TypeError(f"{name}: expected a torch.nn.Module, got {type(part).__name__}")
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.activation = nn.Identity() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.shortcut(x) + self.body(x))


class Routing(NamedTuple):
    """What a routed block computed."""

    output: Tensor  # [B, C, ...]
    router_logits: Tensor | None  # [B, 2]; None where the decisions were forced
    decisions: Tensor  # [B]; bool in evaluation, straight-through 0/1 of the router's dtype in training


class RoutedBlock(ResidualBlock):
    """A residual block with a router: samples that it sends past the body keep their shortcut.

    ``y = activation(shortcut(x) + d * body(x))`` with d in {0, 1} per sample.

    In training mode d is a straight-through Gumbel-softmax sample; in evaluation mode ``d = z[execute] > z[skip]``
    and a skipped body contributes nothing at all, whatever it would have computed (also NaN).

    What a body gives for one sample must not depend on the others: the executions run it on those that are routed to
    it. Nor may it write to its input, as one that begins with ``nn.ReLU(inplace=True)`` does: the shortcut needs it. A
    path has one decision for each block, so in one forward a block runs once; and to force or to return paths, no block
    may stand inside the body of another.

    A subclass that overrides :meth:`masked` is computed by it in every execution, so its skips save nothing. One that
    overrides ``forward`` calls this class's, by which alone paths and a threshold reach it.

    Args:
        body, shortcut, activation: as in :class:`ResidualBlock`. The body returns as many dimensions as the shortcut,
            and the sum must have the shape of the shortcut, which is what a skipped sample gets.
        router: module from the block's input [B, C, ...] to logits [B, 2] of (skip, execute). With a
            :class:`Router` the executions pool only what changed since the block before.

    Raises:
        TypeError: a part that is no module; in a forward, a body that returns no tensor.
        ValueError: in a forward, a router or a body that returns another shape, or a body that writes to its input
            (which is not seen in compiled code and in vmap).

    Source: SP-Net (ECCV 2022); ConvNet-AIG (ECCV 2018), section 3.
    """

    def __init__(
        self,
        body: nn.Module,
        router: nn.Module,
        shortcut: nn.Module | None = None,
        activation: nn.Module | None = None,
    ):
        super().__init__(body, shortcut, activation)
        if not isinstance(router, nn.Module):
            raise TypeError(f"router: expected a torch.nn.Module, got {type(router).__name__}")
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            run = _active_run.get()
            if run is not None:
                return run.block(self, x)
        return self.masked(x).output

    def masked(self, x: Tensor, *, pooled: Tensor | None = None, decisions: Tensor | None = None) -> Routing:
        """Compute the body for every sample, then select by the decisions.

        Args:
            x: [B, C, ...].
            pooled: ``Router.pool(x)`` where the caller has it already.
            decisions: bool [B], forces the decisions; the router is then not run.
        """
        router_logits = None
        if decisions is None:
            router_logits = logits_of(self, x, pooled)
            decisions = straight_through_gumbel(router_logits) if self.training else decide(router_logits)
        shortcut = self.shortcut(x)
        body = added(self.body, x, shortcut)
        d = decisions.view(-1, *[1] * (body.dim() - 1))
        if d.dtype == torch.bool:
            y = torch.where(d, shortcut + body, shortcut)
        else:
            y = shortcut + d.to(body.dtype) * body
        return Routing(self.activation(y), router_logits, decisions)


def logits_of(block: RoutedBlock, x: Tensor, pooled: Tensor | None = None) -> Tensor:
    """A block's router logits [B, 2] of (skip, execute) for x [B, C, ...].

    Raises:
        ValueError: the router returns another shape.
    """
    z = block.router(x) if pooled is None else block.router.logits(pooled)
    if not torch.jit.is_tracing() and (z.dim() != 2 or z.shape[0] != x.shape[0] or z.shape[1] != 2):
        raise ValueError(f"router: expected logits [{len(x)}, 2] of (skip, execute), got {list(z.shape)}")
    return z


def added(body: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    """``body(x)``, which is added to some samples of the shortcut.

    Args:
        x: [n, C, ...], what the body is run on.
        shortcut: [B, ...].

    Returns:
        What expands to [n, ...], the samples' shape in the shortcut, and has as many dimensions.

    Raises:
        TypeError: the body returns no tensor.
        ValueError: it returns another shape, or writes to x.
    """
    # There a tensor has no version that tells of a write.
    unseen = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_functorch_wrapped_tensor(x)
    if not unseen and x.is_inference():
        x = x.resolve_conj().resolve_neg()
        with torch.inference_mode(False):
            x = x.new_empty(0).set_(x)  # the same memory, with the version that a tensor of inference mode lacks
    version = None if unseen else x._version
    y = body(x)
    name = type(body).__name__
    if not unseen and x._version != version:
        raise ValueError(f"body: expected a module that leaves its input as it is, got a {name} that writes to it")
    if not isinstance(y, Tensor):
        raise TypeError(f"body: expected a module that returns a Tensor, got a {name} of {type(y).__name__}")
    if torch.jit.is_tracing():
        return y
    given, expected = y.shape, (x.shape[0], *shortcut.shape[1:])
    if len(given) != len(expected) or any(g != 1 and g != e for g, e in zip(given, expected, strict=True)):
        raise ValueError(f"body: expected {list(expected)} (the shortcut's shape), got {list(given)}")
    return y


class RoutedSequential(nn.Sequential):
    """A straight line of modules whose intermediate state belongs to nobody else.

    Same meaning as ``nn.Sequential``. The difference is a promise: nothing outside holds the tensors between
    its children, so an execution may update them in place and a skipped sample of an identity block is neither
    read nor written. A RoutedBlock elsewhere must return a new tensor, which costs one copy of the batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            run = _active_run.get()
            if run is not None:
                return run.sequential(self, x)
        return super().forward(x)


class Run(ABC):
    """One forward of one model by one execution; see ``spnet.execution``."""

    @abstractmethod
    def block(self, block: RoutedBlock, x: Tensor) -> Tensor:
        """What a RoutedBlock returns."""

    def sequential(self, sequential: RoutedSequential, x: Tensor) -> Tensor:
        """What a RoutedSequential returns."""
        for module in sequential:
            x = module(x)
        return x


# A context variable and not module state: two threads may run one model at once.
_active_run: ContextVar[Run | None] = ContextVar("spnet_active_run", default=None)


@contextmanager
def active(run: Run) -> Iterator[Run]:
    """Let ``run`` execute every RoutedBlock called inside the ``with`` block, in this thread."""
    token = _active_run.set(run)
    try:
        yield run
    finally:
        _active_run.reset(token)


def uncompiled(function: Callable) -> Callable:
    """Keep a function out of torch.compile, which would keep what it has found once: addresses, weights, no run.

    Not ``torch.compiler.disable`` from the start: it imports the compiler, which takes two seconds.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def computes(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module computes what ``kind`` does: its class has no forward of its own, and the instance
    neither that nor another method of ``kind``."""
    own = not vars(kind).keys().isdisjoint(vars(module))
    return isinstance(module, kind) and type(module).forward is kind.forward and not own


def _checked(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of torch.compile and of the parallel trainings, in either order, which hide the
    blocks.

    Raises:
        TypeError: no module.
    """
    if "_orig_mod" in _checked(model)._modules:
        return unwrapped(model._orig_mod)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    return model


def routed_blocks(model: nn.Module) -> dict[str, RoutedBlock]:
    """The RoutedBlocks of a model by name, in the order of registration: the columns of every ``paths``.

    Raises:
        TypeError: no module.
    """
    return {name: m for name, m in _checked(model).named_modules() if isinstance(m, RoutedBlock)}


def own_weight(model: nn.Module) -> Tensor | None:
    """A real or complex parameter of no router, which tells the model's device and dtype: routers keep float32."""
    routers: set[int] = set()
    for module in model.modules():
        if isinstance(module, RoutedBlock):
            routers.update(map(id, module.router.modules()))
        if id(module) not in routers:
            for p in module._parameters.values():
                if p is not None and (p.is_floating_point() or p.is_complex()):
                    return p
    return None
