"""``fast_forward`` and ``explain``: validate, choose an execution, run it."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spnet.analysis.macs import count_macs
from spnet.execution.kept import plan_of, run_plan
from spnet.execution.lowering import is_watched, shape_of
from spnet.execution.masked import MaskedRun
from spnet.execution.paths import Paths
from spnet.execution.plan import LoweringError, Plan, checked_threshold, refuse_recorded
from spnet.execution.routed import ObservedRun, RoutedRun, overrides_masked
from spnet.routing import RoutedBlock, RoutedSequential, Router, Run, active, own_weight, uncompiled, unwrapped

IMPLEMENTATIONS = ("masked", "routed", "batch", "walk")


class _Scan(NamedTuple):
    """What one walk over the modules of a model finds."""

    blocks: dict[str, RoutedBlock]
    inner: str  # the name of a block inside another, if there is one
    mixing: str  # the name of a module in a body whose answer for a sample depends on the others, if there is one
    in_line: set[int]  # ids of the blocks that stand in a RoutedSequential
    hooked: bool
    weight: Tensor | None  # a weight that says the model's device and dtype (routers keep float32)


def _scan(model: nn.Module) -> _Scan:
    blocks, inner, mixing, in_line, hooked = {}, "", "", set(), is_watched()
    training = None  # the name of a module in training mode, if there is one
    outer = None  # what the names inside the last block begin with
    for name, module in model.named_modules():
        if training is None and getattr(module, "training", False):  # what TorchScript has frozen has no mode
            training = repr(name) if name else "it"
        compiled = module._compiled_call_impl is not None and module is not model or "_orig_mod" in module._modules
        if compiled and any(isinstance(m, RoutedBlock) for m in module.modules()):
            raise ValueError(f"model: {name!r} is compiled, which hides its RoutedBlocks; compile bodies instead")
        if isinstance(module, torch.jit.ScriptModule) and module.original_name == RoutedBlock.__name__:
            raise ValueError(f"model: {name!r} is of TorchScript, which hides that it is a RoutedBlock; script bodies")
        if isinstance(module, RoutedBlock):
            blocks[name] = module
            if outer is not None and name.startswith(outer):
                inner = name
            else:
                outer = f"{name}." if name else ""
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            mixing = name if outer is not None and f"{name}.".startswith(f"{outer}body.") else mixing
        elif isinstance(module, RoutedSequential):
            in_line.update(id(child) for child in module)
        hooked = hooked or bool(module._forward_hooks or module._forward_pre_hooks)
    if not blocks:
        raise ValueError(f"model: expected RoutedBlocks, but {type(model).__name__} contains none")
    if training is not None:  # only now: what torch.export gives, which has no blocks, has no model.eval() either
        raise ValueError(f"model: expected evaluation mode, but {training} is in training mode; call model.eval()")
    return _Scan(blocks, inner, mixing, in_line, hooked, own_weight(model))


def _by_plan(
    model: nn.Module, x: Tensor, impl: str, paths: Tensor | None, threshold: float
) -> tuple[Plan, Tensor, Tensor] | None:
    """Plan, logits and decisions where ``impl`` asks for a plan and the model fits."""

    def run(plan: Plan) -> tuple[Tensor, Tensor]:
        _check_input(model, plan, x)
        if paths is not None:
            _check_paths(paths, len(x), plan.num_blocks, x.device)
        return plan.run(x, paths, threshold, impl)

    if impl not in ("auto", "walk", "batch"):
        return None
    try:
        return run_plan(model, x, run)
    except LoweringError as e:
        if impl == "auto":
            return None
        _scan(model)  # a model that no execution takes is told so first
        raise ValueError(f"impl: {impl!r} does not fit this model: {e}") from e


def _check_input(model: nn.Module, weight: Tensor | Plan | None, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    shape = shape_of(model)
    if shape is not None and tuple(x.shape[1:]) != shape:
        raise ValueError(f"x: expected [B, {', '.join(map(str, shape))}], got {list(x.shape)}")
    if x.dim() < 2:
        raise ValueError(f"x: expected a batch [B, ...], got {list(x.shape)}")
    if weight is not None:
        if x.device != weight.device:
            raise ValueError(f"x: expected device {weight.device} (the model's), got {x.device}")
        if x.is_meta:
            raise ValueError("x: on the meta device, where no decision has a value; for shapes call model(x)")
        if x.dtype not in (weight.dtype, torch.int32, torch.int64):  # integers are indices, of tokens say
            raise ValueError(f"x: expected {weight.dtype} (the model's), got {x.dtype}")


def _check_paths(paths: Tensor, batch: int, blocks: int, device: torch.device) -> None:
    fits = isinstance(paths, Tensor) and paths.dtype == torch.bool and paths.layout == torch.strided
    if not fits or tuple(paths.shape) != (batch, blocks):
        got = f"{paths.dtype} {list(paths.shape)}" if isinstance(paths, Tensor) else type(paths).__name__
        got += f" of {paths.layout}" if isinstance(paths, Tensor) and paths.layout != torch.strided else ""
        raise ValueError(f"paths: expected torch.bool [{batch}, {blocks}], got {got}")
    if paths.device != device:
        raise ValueError(f"paths: expected device {device} (the input's), got {paths.device}")


def _check_mixing(scan: _Scan) -> None:
    if scan.mixing:
        raise ValueError(
            f"model: {scan.mixing!r} normalises a sample by the others of its batch; impl='masked' runs it"
        )


def _check_impl(impl: str) -> None:
    known = ("auto", *IMPLEMENTATIONS)
    if impl not in known:
        near = difflib.get_close_matches(str(impl), known, n=1, cutoff=0.5) or known
        raise ValueError(f"impl: unknown {impl!r}; did you mean {', '.join(map(repr, near))}?")


def _forward(model: nn.Module, x: Tensor, run: Run) -> Tensor:
    # Not the code of model.compile(), which knows of no run.
    forward = model if model._compiled_call_impl is None else model._call_impl
    with torch.no_grad(), active(run):
        return forward(x)


@uncompiled
def fast_forward(
    model: nn.Module,
    x: Tensor,
    *,
    impl: str = "auto",
    paths: Tensor | None = None,
    threshold: float = 0.0,
    return_paths: bool = False,
) -> Tensor | tuple[Tensor, Paths]:
    """Run a routed network in evaluation mode, executing only what its routers ask for.

    The call must not be traced, exported or transformed (``torch.jit.trace``, ``torch.onnx.export``,
    ``torch.export.export``, ``make_fx``, ``torch.func``): what it decides holds for this x alone. Export ``model(x)``,
    which computes every block and selects. In a function that torch.compile compiles it runs as it is.

    Args:
        model: any module that contains :class:`spnet.RoutedBlock`, in evaluation mode.
        x: input batch [B, ...] in the model's dtype and on its device, any memory layout; B may be 0.
        impl: "masked" computes everything and selects (the specification); "routed" gathers the samples routed
            to each body; "batch" does so with folded weights and fused operators; "walk" carries each sample through
            the whole network in native code. "auto" takes "walk" where it fits, else "batch" where :func:`spnet.lower`
            takes the model, else "routed", as also for images of a fifth shape: a model that takes any keeps its plans
            for the first four. A named one runs or raises, it never falls back. "batch" and "walk" follow
            every change of the model's parameters, buffers, attributes and forwards, on CUDA all but what is written
            into a weight through its ``.data``, which PyTorch does not count; a forward that reads anything else that
            changes, a global variable say, needs "routed".
        paths: bool [B, L], forces the decisions of the L RoutedBlocks (``Paths.blocks`` gives their order).
        threshold: a sample executes a block where its router's z_execute - z_skip > threshold. 0 is what was trained;
            more executes less, so that one network offers a range of accuracies and times. Of no effect with paths.
        return_paths: also return :class:`Paths`.

    Returns:
        The model's output, or ``(output, Paths)``. "batch" and "walk" compute in the model's dtype or, where the CPU
        does not multiply that, in float32, also in an autocast region.

    Raises:
        ValueError: a model in training mode, without RoutedBlocks, with compiled parts around them, with a BatchNorm
            without running statistics in a body, with a block that runs twice or, where paths are given or returned,
            with one block inside another or on another batch than x; a router or a body that returns another shape, or
            a body that writes to its input (see :class:`spnet.RoutedBlock`); x of another shape, dtype or device than
            the model's, or requiring grad; paths of another shape; a threshold that is NaN; an unknown impl, or one
            that does not fit; a call that is traced or transformed.
        TypeError: model is no module, x no tensor, threshold no number, or what a body returns no tensor.
    """
    refuse_recorded(x)
    _check_impl(impl)
    threshold = checked_threshold(threshold)
    model = unwrapped(model)
    found = _by_plan(model, x, impl, paths, threshold)
    if found is not None:
        plan, logits, decisions = found
        return (logits, plan.paths_of(decisions)) if return_paths else logits
    scan = _scan(model)
    _check_input(model, scan.weight, x)
    blocks = list(scan.blocks.values())
    if impl != "masked":
        _check_mixing(scan)
    if scan.inner and (return_paths or paths is not None):
        raise ValueError(f"model: RoutedBlock {scan.inner!r} stands inside another, so samples have no path of theirs")
    if paths is not None:
        _check_paths(paths, len(x), len(blocks), x.device)
    if impl == "masked":
        run = MaskedRun(blocks, paths, threshold)
    else:
        run = RoutedRun(blocks, paths, threshold, in_place=not scan.hooked)
    output = _forward(model, x, run)
    if not return_paths:
        return output
    decisions = run.paths(len(x), x.device)
    macs = count_macs(model, x.shape[1:], x.dtype)
    return output, Paths(decisions, macs.of_paths(decisions), macs.dense, tuple(scan.blocks))


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``str()`` is the text for a person."""

    impl: str
    reason: str
    blocks: dict[str, str] = field(repr=False)  # per RoutedBlock: what happens to its skipped samples

    def __str__(self) -> str:
        lines = [f"impl = {self.impl}: {self.reason}"]
        width = max(map(len, self.blocks))
        lines += [f"  {name:<{width}}  {what}" for name, what in self.blocks.items()]
        return "\n".join(lines)


@uncompiled
def explain(model: nn.Module, x: Tensor) -> Explanation:
    """Say which execution ``fast_forward(model, x)`` takes and why, and what a skip costs at each block.

    Args and errors as in :func:`fast_forward`: where that takes "routed", the first sample of x is run and executes
    every block.
    """
    refuse_recorded(x)
    model = unwrapped(model)
    scan = _scan(model)
    _check_input(model, scan.weight, x)
    choices: tuple[str, ...] = ("routed",) * len(scan.blocks)
    run = ObservedRun(list(scan.blocks.values()), threshold=-math.inf, in_place=not scan.hooked)
    try:
        plan = plan_of(model, x)
        on_gpu = plan.device.type == "cuda"
        worker = "block of threads carries samples" if on_gpu else "thread carries a few samples at a time"
        impl, reason = plan.impl, f"native code, in which each {worker} through all blocks"
        if plan.impl == "batch":
            how = "one CUDA graph of kernels" if on_gpu else "fused operators"
            choices, reason = (
                plan.choices,
                f"{how} on the samples routed to each body; walk does not fit: {plan.reason}",
            )
    except LoweringError as e:
        impl, reason = "routed", f"gathers the samples routed to each body; walk and batch do not fit: {e}"
        _check_mixing(scan)
        _forward(model, x[:1], run)  # by its threshold blocks inside others run too

    def skipped(block: RoutedBlock, choice: str) -> str:
        if choice == "dense":
            return "computed with all others, which calibration found to be faster"
        if overrides_masked(block):
            return f"computed with all others, as the masked of a {type(block).__name__} does"
        if type(block.shortcut) is not nn.Identity:
            return f"shortcut {type(block.shortcut).__name__} computed for every sample"
        if impl == "walk":
            return "a branch not taken"
        if impl == "batch":
            return "untouched"
        seen = run.observed.get(id(block))
        if seen is None:
            return "the model's forward does not run it"
        costs = []
        if not seen.owned:
            costs.append(f"copied: {why_copied(block, seen.given)}")
        if not seen.settled:
            costs.append(f"activation {type(block.activation).__name__} computed for every sample")
        if type(block.router) is not Router:
            costs.append("not a spnet.Router: it reads every sample")
        return "; ".join(costs if not (seen.owned and seen.settled) else ["untouched", *costs])

    def why_copied(block: RoutedBlock, given: bool) -> str:
        if scan.hooked:
            return "a forward hook on the model may keep intermediate tensors"
        if id(block) not in scan.in_line:
            return "not a child of a RoutedSequential, so others may hold its input"
        if given:
            return "its router may keep its input"
        return "no layer of PyTorch or spnet in a RoutedSequential made its input, so others may hold it"

    named = zip(scan.blocks.items(), choices, strict=True)
    return Explanation(impl, reason, {name: skipped(block, choice) for (name, block), choice in named})
