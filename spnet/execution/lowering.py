"""Lowering: a routed network becomes a plan.

What a network computes is found by running it on zeros and noting the functions of PyTorch that it calls. So it does
not matter who wrote it: torchvision's and timm's are lowered as spnet's own, where they compute what a plan describes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from numbers import Integral
from threading import RLock
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as every
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.overrides import TorchFunctionMode

from spnet.analysis.macs import count_macs
from spnet.execution.device import check_device
from spnet.execution.plan import LoweringError, Plan
from spnet.execution.table import IDENTITY, PAD, POOLED, PROJECTION, Block, Convolution, Network, read_table
from spnet.models.resnet import PadShortcut, SPNet
from spnet.routing import (
    RoutedBlock,
    Router,
    Run,
    _BatchNorm1d,
    active,
    computes,
    own_weight,
    routed_blocks,
    uncompiled,
    unwrapped,
)


@uncompiled
def lower(model: nn.Module, input_shape: tuple[int, int, int] | None = None) -> Plan:
    """Lower a routed network in evaluation mode: BatchNorm folded, two router logits folded into one margin.

    Covers every network that computes: a stem of convolutions, with or without max-pooling; blocks, each a
    :class:`spnet.RoutedBlock`, with or without convolutions before a block and behind the last one; the average over
    all pixels; one linear layer. Those are the networks of :func:`spnet.create_model`, and after :func:`spnet.convert`
    the ResNets of torchvision and timm, plain, with deep stems, averaging shortcuts or squeeze-and-excitation, ResNeXt,
    RegNet, and pre-activation networks, Wide ResNets among them. Bodies are convolutions, shortcuts the identity,
    option A or a projection, of averages of pixels where it has a stride, activations ReLU or none. Convolutions have
    BatchNorm, ReLU and squeeze-and-excitation behind them or do not; a BatchNorm may also stand alone. Any depth,
    widths, groups and classes; float32, bfloat16 and float16. On CUDA, from compute capability 8.0: bodies of
    1x1 and 3x3 convolutions of stride 1 and 2; by ``walk`` basic blocks as those of CIFAR networks, where dtype and
    size allow that. The plan runs on the model's device.

    Args:
        model: the network; its forward is run on zeros.
        input_shape: (C, H, W) of the images that the plan takes. An :class:`spnet.SPNet` says it itself.

    Raises:
        LoweringError: a network that does not fit, where the message says why; an input_shape that is not of three
            whole numbers of at least 1, or missing where the network does not say it.
        TypeError: model is no module.
    """
    model = unwrapped(model)
    shape = shape_of(model) if input_shape is None else input_shape
    if shape is None:
        raise LoweringError(f"{type(model).__name__} does not say its input_shape (C, H, W)")
    fits = isinstance(shape, Sequence) and len(shape) == 3
    if not fits or not all(isinstance(n, Integral) and n > 0 for n in shape):
        raise LoweringError(f"input_shape: expected (C, H, W), got {shape}")
    return assemble(model, shape, read(model, shape))


def shape_of(model: nn.Module) -> tuple[int, int, int] | None:
    """(C, H, W) of the images that a network takes; None where it takes any size."""
    return (model.in_channels, model.input_size, model.input_size) if isinstance(model, SPNet) else None


def first_weight(model: nn.Module) -> Tensor:
    """The weight that tells device and dtype.

    Raises:
        LoweringError: there is none, or no plan of its dtype runs on its device.
    """
    weight = own_weight(model)
    if weight is None:
        raise LoweringError(f"{type(model).__name__} has no weights")
    try:
        check_device(weight.device, weight.dtype)
    except ValueError as e:
        raise LoweringError(str(e)) from e
    return weight


def is_watched() -> bool:
    """Whether a hook on all modules of the process expects them to be called."""
    return bool(every._global_forward_hooks or every._global_forward_pre_hooks)


def refuse_hidden(model: nn.Module) -> None:
    """Raise a LoweringError for TorchScript, whose modules show no attributes, and hooks, which may hold a model."""
    if is_watched():
        raise LoweringError("a forward hook on all modules expects them to be called")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise LoweringError(f"{name or 'the network'!r} is of TorchScript, which hides what it computes")
        if module._forward_hooks or module._forward_pre_hooks:
            raise LoweringError("a forward hook expects the modules to be called")


class ForwardError(LoweringError):
    """A network whose forward fails on this image, perhaps not the next time: for a lack of memory, say."""


class Step(NamedTuple):
    """One call of a forward."""

    kind: str
    of: dict[str, Any]  # its arguments but the first, which is what the step before has returned


# What a plan computes, by the parameters of PyTorch's functions.
def _convolution(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1): ...
def _batchnorm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5): ...
def _relu(input, inplace=False): ...
def _max_pool(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False): ...
def _average_by_mean(input, dim=None, keepdim=False, *, dtype=None): ...
def _average_by_size(input, output_size): ...
def _average_by_kernel(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
): ...
def _linear(input, weight, bias=None): ...
def _sigmoid(input): ...
def _scale(input, other): ...
def _expand(input, *sizes, **options): ...
def _same(input, *sizes, training=False, **options): ...


_SPELLINGS: dict[Callable, list[Callable]] = {
    _convolution: [F.conv2d],
    _batchnorm: [F.batch_norm],
    _relu: [F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_],
    _max_pool: [F.max_pool2d],
    _average_by_mean: [torch.mean, Tensor.mean],
    _average_by_size: [F.adaptive_avg_pool2d],
    _average_by_kernel: [F.avg_pool2d],
    _linear: [F.linear],
    _sigmoid: [F.sigmoid, torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_],
    _scale: [torch.mul, Tensor.mul, Tensor.mul_],
    _expand: [Tensor.expand, Tensor.expand_as],
    _same: [torch.flatten, torch.reshape, torch.squeeze, F.dropout, Tensor.flatten, Tensor.reshape, Tensor.view]
    + [Tensor.squeeze, Tensor.contiguous, Tensor.to],
}
_CALLS = {f: (meant.__name__[1:], inspect.signature(meant)) for meant, all_ in _SPELLINGS.items() for f in all_}
# What may be asked of a tensor: nothing that depends on its numbers.
_QUESTIONS = set("__get__ __len__ _assert dim is_contiguous is_floating_point numel promote_types size stride".split())


class _Notes(TorchFunctionMode, Run):
    """The steps of one forward, as a line: each takes what the one before has returned, and as that has left it.

    A mode belongs to its thread, so others may run their models meanwhile.
    """

    def __init__(self, model: nn.Module, x: Tensor):
        super().__init__()
        self.steps: list[Step] = []
        self._take(x)
        self._averaged: tuple[Tensor, int] | None = None  # the last map that was, and its version
        self._own = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._dtype, self._place, self._blocks, self._pauses = x.dtype, "the stem", 0, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if self._pauses or (name in _QUESTIONS and not isinstance(func(*args, **kwargs), Tensor)):
            return func(*args, **kwargs)
        if func not in _CALLS:
            raise LoweringError(f"{self._place} calls {name}, which no plan computes")
        kind, signature = _CALLS[func]
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as e:
            raise LoweringError(f"{self._place} calls {name} as no plan computes it: {e}") from e
        bound.apply_defaults()
        of, before = bound.arguments, bound.arguments.pop("input")
        if kind == "scale":
            before = self._last_of(name, before, of.pop("other"))
        if not self.is_last(before):
            raise LoweringError(f"{self._place} is no line of layers: {name} takes another tensor than the last one")
        if any(isinstance(t, Tensor) and id(t) not in self._own for t in of.values()):
            raise LoweringError(f"{self._place} calls {name} with a tensor that is no parameter or buffer of the model")
        after = self._take(func(*args, **kwargs))
        if torch.promote_types(after.dtype, self._dtype) != after.dtype:
            raise LoweringError(f"{self._place} calls {name}, which rounds {self._dtype} to {after.dtype}")
        if kind == "same":
            if of["training"] or not _is_same(before, after):
                raise LoweringError(f"{self._place} calls {name}, which does more than flatten a pooled vector")
            return after
        if kind.startswith("average"):
            in_shortcut = self._place.startswith("the shortcut")
            if in_shortcut and kind == "average_by_kernel" and _is_of_squares(of, before, after):
                kind = "means"
            elif _is_global(of, before, after):
                kind, self._averaged = "average", (before, before._version)
            else:
                or_squares = ", nor over squares side by side that leave no pixel out" if in_shortcut else ""
                raise LoweringError(f"{self._place} calls {name}, but not over all pixels of each channel{or_squares}")
        self.steps.append(Step(kind, of))
        return after

    def _last_of(self, name: str, a: Any, b: Any) -> Tensor:
        """Of the factors of squeeze-and-excitation, a map and a number for each of its channels, the numbers."""
        for scaled, scale in ((a, b), (b, a)):
            if self.is_last(scale) and self._averaged is not None and scaled is self._averaged[0]:
                fits = scale.shape in (scaled.shape, (*scaled.shape[:2], 1, 1))
                if fits and scaled._version == self._averaged[1]:
                    return scale
        raise LoweringError(f"{self._place} calls {name}, but not to scale a map by what its averages say")

    def _take(self, x: Tensor) -> Tensor:
        self._last, self._version = x, x._version
        return x

    def is_last(self, x: object) -> bool:
        """Whether x is what the last step has returned. A change in place that was not noted has raised its version."""
        return x is self._last and x._version == self._version

    def block(self, block: RoutedBlock, x: Tensor) -> Tensor:
        if not self.is_last(x):
            raise LoweringError(f"block {self._blocks} takes another tensor than the last one")
        steps, version = self.steps, x._version
        body, added = self._part("body", block.body, x)
        self._pauses = type(block.shortcut) is PadShortcut
        shortcut, y = self._part("shortcut", block.shortcut, x)
        self._pauses = False
        if x._version != version:
            raise LoweringError(f"block {self._blocks} changes its input")
        if added.shape != y.shape:  # a sum that PyTorch would spread over the larger one
            sizes = f"{list(added.shape[1:])} to a shortcut of {list(y.shape[1:])}"
            raise LoweringError(f"block {self._blocks} adds a body of {sizes}")
        activation, y = self._part("activation", block.activation, y)
        steps.append(Step("block", {"block": block, "body": body, "shortcut": shortcut, "activation": activation}))
        self.steps, self._place, self._blocks = steps, "the head", self._blocks + 1
        return y

    def _part(self, name: str, part: nn.Module, x: Tensor) -> tuple[list[Step], Tensor]:
        self._place, self.steps = f"the {name} of block {self._blocks}", []
        y = part(self._take(x))
        if not self._pauses and not self.is_last(y):
            raise LoweringError(f"{self._place} returns another tensor than its last layer")
        return self.steps, self._take(y)


def _is_same(before: Tensor, after: Tensor) -> bool:
    """Whether nothing changed but, of pooled vectors, the dtype and the axes of one pixel."""
    if after.shape == before.shape and after.dtype == before.dtype:
        return after.device == before.device
    pooled = before.shape[2:].numel() == after.shape[2:].numel() == 1
    return pooled and after.shape[:2] == before.shape[:2] and after.device == before.device


def _is_of_squares(of: dict[str, Any], before: Tensor, after: Tensor) -> bool:
    """Whether all pixels are averaged in squares side by side, cut off at the edge."""
    side = _side(of["kernel_size"])
    stride = side if of["stride"] is None else _side(of["stride"])
    if side is None or stride != side or _side(of["padding"]) != 0 or of["divisor_override"] is not None:
        return False
    return list(after.shape[2:]) == [-(-n // side) for n in before.shape[2:]]


def _is_global(of: dict[str, Any], before: Tensor, after: Tensor) -> bool:
    if before.dim() != 4:
        return False
    if "dim" in of:
        dims = of["dim"] if isinstance(of["dim"], (tuple, list)) else [of["dim"]]
        return sorted(d if d is None else d % 4 for d in dims) == [2, 3]
    if "output_size" in of:
        return after.shape[2:].numel() == 1
    kernel = of["kernel_size"] if isinstance(of["kernel_size"], (tuple, list)) else [of["kernel_size"]] * 2
    return list(kernel) == list(before.shape[2:]) and _side(of["padding"]) == 0 and of["divisor_override"] is None


_switching = RLock()


@contextmanager
def _eager() -> Iterator[None]:
    """What is compiled runs as it was written. The switch is the process's: one of two threads would leave it so."""
    with _switching, torch.compiler.set_stance("force_eager"):
        yield


@torch.inference_mode(False)  # where tensors have no versions
@torch.no_grad()
def read(model: nn.Module, shape: tuple[int, ...]) -> list[Step]:
    """The steps of a network's forward on an image of this shape: its functions outside of blocks, and its blocks.

    Raises:
        LoweringError: a plan has no such step, or the forward is no line of them.
        ForwardError: the forward raises another error than of a lack of memory.
    """
    weight = first_weight(model)
    blocks = list(routed_blocks(model).values())
    if not blocks:
        raise LoweringError(f"{type(model).__name__} contains no RoutedBlock")
    refuse_hidden(model)
    compiled = any(module._compiled_call_impl is not None for module in model.modules())  # by .compile()
    for module in model.modules():
        if module.training:
            raise LoweringError("the network is in training mode; call model.eval()")
        forward = vars(module).get("forward")
        if forward is not None and not getattr(forward, "same_in_evaluation", False):
            raise LoweringError(f"the forward of a {type(module).__name__} has been replaced")
    for t in (*model.parameters(), *model.buffers()):
        if type(t) not in (Tensor, nn.Parameter):  # quantized, say
            raise LoweringError(f"a weight is a {type(t).__name__}, whose functions may not be PyTorch's")
    x = torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device)
    notes = _Notes(model, x)
    try:
        eager = _eager() if compiled else nullcontext()
        with eager, torch.autocast(x.device.type, enabled=False), active(notes), notes:
            y = model(x)
    except (LoweringError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # whatever a model raises for an image that it does not take
        raise ForwardError(f"{type(model).__name__} does not run on an image {list(shape)}: {e}") from e
    if not notes.is_last(y):
        raise LoweringError(f"{type(model).__name__} returns another tensor than its last layer")
    if y.dim() != 2 or y.dtype != weight.dtype:
        raise LoweringError(f"{type(model).__name__} does not return logits [B, classes] of its weights' dtype")
    found = [step.of["block"] for step in notes.steps if step.kind == "block"]
    if len(set(map(id, found))) < len(found):
        raise LoweringError("a block stands in two places, so its executions have no one column in the paths")
    if list(map(id, found)) != list(map(id, blocks)):
        raise LoweringError("the blocks do not run one by one in the order in which the model has them")
    return notes.steps


def tensors_of(steps: Iterable[Step]) -> set[int]:
    """Ids of all parameters and buffers that a lowering of these steps reads."""
    found = set()
    for kind, of in steps:
        own = (*of["block"].parameters(), *of["block"].buffers()) if kind == "block" else of.values()
        found.update(id(t) for t in own if isinstance(t, Tensor))
    return found


@torch.no_grad()
def assemble(model: nn.Module, shape: tuple[int, int, int], steps: list[Step]) -> Plan:
    """The plan of a network with these steps.

    Raises:
        LoweringError: they are in another order or of other sizes than a plan's.
    """
    kinds = [step.kind for step in steps]
    head, of_head = None, []
    if kinds[-2:] in (["average", "linear"], ["average", "convolution"]):
        head, of_head = _fold("the head", steps[-1])
    if head is None or head != Convolution(head.cin, head.cout, 1):
        raise LoweringError("the network does not end with the average over all pixels and a linear layer")
    begin, pool = kinds.index("block"), (0, 0, 0)
    stem, rest = steps[:begin], steps[begin:-2]
    if "max_pool" in kinds[:begin]:
        place = kinds.index("max_pool")
        stem, rest, pool = steps[:place], steps[place + 1 : -2], _pool(steps[place].of)
    first, weights = _lower_chain("the stem", stem)
    rows, between = [], []
    for step in rest:
        if step.kind != "block":
            between.append(step)
            continue
        name = f"block {len(rows)}"
        before, of_before = _lower_between(f"what comes before {name}", between)
        row, folded = _lower_block(name, **step.of)
        rows.append(row._replace(before=tuple(before)))
        weights += of_before + folded
        between = []
    after, of_after = _lower_between("what follows the blocks", between)
    network = Network(*shape, head.cout, pool, tuple(first), tuple(rows), tuple(after))
    flat = torch.cat([w.detach().float().flatten() for w in (*weights, *of_after, *of_head)])
    table = network.table()
    try:
        read_table(table)  # what does not fit is named before the count of MACs runs into it
        return Plan(table, flat, count_macs(model, shape), first_weight(model).dtype, flat.device)
    except ValueError as e:
        raise LoweringError(str(e).removeprefix("plan: ")) from e


def _lower_between(name: str, steps: list[Step]) -> tuple[list[Convolution], list[Tensor]]:
    """As :func:`_lower_chain`, of no step too."""
    return _lower_chain(name, steps) if steps else ([], [])


def _lower_block(
    name: str, block: RoutedBlock, body: list[Step], shortcut: list[Step], activation: list[Step]
) -> tuple[Block, list[Tensor]]:
    """One block and the weights that belong to it."""
    router = block.router
    known = all(type(m) is kind and computes(m, kind) for m, kind in ((block, RoutedBlock), (router, Router)))
    if not known or [step.kind for step in activation] not in ([], ["relu"]):
        raise LoweringError(f"{name} is no RoutedBlock with a spnet.Router, and with a ReLU or no activation")
    convolutions, weights = _lower_chain(f"the body of {name}", body)
    if convolutions[-1].relu:
        raise LoweringError(f"the body of {name} ends with a ReLU")
    row = Block(tuple(convolutions), IDENTITY, 1, 0, 0, relu=len(activation))
    if type(block.shortcut) is PadShortcut:
        row = row._replace(shortcut=PAD, stride=block.shortcut.stride, pad_before=block.shortcut.pad[0])
    elif shortcut:
        kind = POOLED if shortcut[0].kind == "means" else PROJECTION
        [projection, *more], folded = _lower_chain(f"the shortcut of {name}", shortcut[kind == POOLED :])
        stride = _side(shortcut[0].of["kernel_size"]) if kind == POOLED else projection.stride
        row = row._replace(shortcut=kind, stride=stride)
        if more or projection != row.projection:
            raise LoweringError(f"the shortcut of {name} is not a 1x1 convolution, of averages where it has a stride")
        weights += folded
    parts = type(router.fc1), type(router.bn), type(router.dropout), type(router.fc2)
    if parts != (nn.Linear, _BatchNorm1d, nn.Dropout, nn.Linear) or router.fc2.out_features != 2:
        raise LoweringError(f"the router of {name} does not consist of what a spnet.Router does")
    if router.fc2.bias is None:
        raise LoweringError(f"the router of {name} has no bias")
    bn = router.bn
    statistics = _statistics(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    weights += fuse_linear_bn_weights(router.fc1.weight, router.fc1.bias, *statistics)
    # The two logits matter by their difference alone.
    (w_skip, w_execute), (b_skip, b_execute) = router.fc2.weight, router.fc2.bias
    weights += [w_execute - w_skip, b_execute - b_skip]
    return row._replace(router_width=router.fc1.out_features), weights


def _pool(of: dict[str, Any]) -> tuple[int, int, int]:
    stride = of["kernel_size"] if of["stride"] is None else of["stride"]
    sizes = [_side(of["kernel_size"]), _side(stride), _side(of["padding"])]
    if None in sizes or _side(of["dilation"]) != 1 or of["ceil_mode"] or of["return_indices"]:
        raise LoweringError("the stem has a max-pooling that is not square, undilated and rounded down")
    return tuple(sizes)


def _side(size: int | tuple[int, int]) -> int | None:
    """Of a square; None where it is none."""
    sides = set(size) if isinstance(size, (tuple, list)) else {size}
    return sides.pop() if len(sides) == 1 and all(isinstance(n, int) for n in sides) else None


_LINEAR = "(?:convolution|linear) "
_SQUEEZE = f"average {_LINEAR}relu {_LINEAR}sigmoid (?:expand )?scale "
_LAYER = re.compile(f"(convolution (?:batchnorm )?|batchnorm )(relu )?({_SQUEEZE})?")


def _lower_chain(name: str, steps: list[Step]) -> tuple[list[Convolution], list[Tensor]]:
    """The shapes and folded weights of convolutions with what follows them: BatchNorm, ReLU, squeeze-and-excitation.

    A BatchNorm right behind no convolution is one of its own.
    """
    kinds = "".join(f"{step.kind} " for step in steps)
    layers = list(_LAYER.finditer(kinds))
    if not layers or "".join(layer[0] for layer in layers) != kinds:
        raise LoweringError(f"{name} is not a chain of convolutions with BatchNorm, ReLU and squeeze-and-excitation")
    rest = iter(steps)
    shapes, weights = [], []
    for layer in layers:
        own, relu, squeeze = (list(islice(rest, (part or "").count(" "))) for part in layer.groups())
        shape, folded = _fold(name, *own)
        shape = shape._replace(relu=len(relu))
        weights += folded
        if squeeze:
            (first, of_first), (second, of_second) = _fold(name, squeeze[1]), _fold(name, squeeze[3])
            if first != Convolution(shape.cout, first.cout, 1) or second != Convolution(first.cout, shape.cout, 1):
                raise LoweringError(f"{name} has a squeeze-and-excitation that is not of two linear layers")
            shape = shape._replace(squeeze=first.cout)
            weights += of_first + of_second
        shapes.append(shape)
    return shapes, weights


def _fold(name: str, *layer: Step) -> tuple[Convolution, list[Tensor]]:
    """Of a convolution, or a linear layer; of one with a BatchNorm behind it; or of a BatchNorm alone."""
    *layers, bn = layer if layer[-1].kind == "batchnorm" else (*layer, None)
    statistics = None
    if bn is not None:
        if bn.of["training"]:
            raise LoweringError(f"{name} has a BatchNorm without running statistics")
        statistics = _statistics(*map(bn.of.get, ("running_mean", "running_var", "weight", "bias", "eps")))
    if layers:
        shape, weight, bias = _unfolded(name, *layers)
    else:
        mean = statistics[0]
        shape = Convolution(len(mean), len(mean), 1, groups=len(mean))
        weight, bias = torch.ones_like(mean)[:, None, None, None], torch.zeros_like(mean)
    return shape, [weight, bias] if bn is None else list(fuse_conv_bn_weights(weight, bias, *statistics))


def _unfolded(name: str, layer: Step) -> tuple[Convolution, Tensor, Tensor]:
    of, weight = layer.of, layer.of["weight"]
    if layer.kind == "linear":
        of, weight = of | {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}, weight[:, :, None, None]
    padding = of["padding"]
    if isinstance(padding, str):  # "valid" or "same", which an even kernel is not on both sides
        padding = 0 if padding == "valid" else [n // 2 if n % 2 else None for n in weight.shape[2:]]
    kernel, stride, padding = _side(weight.shape[2:]), _side(of["stride"]), _side(padding)
    if None in (kernel, stride, padding) or _side(of["dilation"]) != 1:
        raise LoweringError(f"{name} has a convolution that is not square, undilated and evenly zero-padded")
    bias = torch.zeros_like(weight[:, 0, 0, 0]) if of["bias"] is None else of["bias"]
    shape = Convolution(weight.shape[1] * of["groups"], len(weight), kernel, stride, padding, of["groups"])
    return shape, weight.float(), bias.float()


def _statistics(
    mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple:
    if mean is None or var is None:
        raise LoweringError("a BatchNorm has no running statistics")
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    # In float32 also for a half model: its rounding belongs at the end.
    return mean.float(), var.float(), eps, weight.float(), bias.float()
