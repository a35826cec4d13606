"""Plans that are kept with their models and lowered anew where a model has changed since.

Lowering copies the weights, so a kept plan is compared with its model at every use: a stale answer is a defect.
``spnet.lower(model)`` is for who wants a plan without the comparison.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import zip_longest
from numbers import Number
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from spnet.execution.lowering import (
    ForwardError,
    assemble,
    first_weight,
    is_watched,
    read,
    refuse_hidden,
    shape_of,
    tensors_of,
)
from spnet.execution.plan import LoweringError, Plan
from spnet.native import core
from spnet.routing import routed_blocks

# The dictionaries of a module that say what it consists of and whether it may be passed over.
_PARTS = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_EVERY_MODULE = {*vars(nn.Module()), "_compiled_call_impl"}
# Decisions of no block, so that every part is compared.
_ALL = torch.empty(0, 0, dtype=torch.bool, device="cpu")
# What every path reads is compared in parts of so many tensors: while one thread asks for the layouts of the next
# part, the others compare the bytes of those before.
_FEW = 64


class _Attributes:
    """Classes and all attributes of a model's modules, in a form that is quick to compare."""

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._class = ref(type(model))
        # What a class computes may be replaced too, or edited in place as notebooks do that load their modules anew.
        kinds = set(map(type, modules))
        self._forwards = [(ref(kind), _code(kind)) for kind in kinds]
        own = {each for kind in kinds for each in kind.__mro__ if _is_own(each)}
        self._classes = [(ref(each), _contents(each)) for each in own]
        lists = [v for each in own for v in vars(each).values() if not _is_plain(v) and _is_list(v)]
        # In lists, of which each thread takes the next.
        self._facts = core.Facts([list(_facts(modules[i : i + 64], model)) for i in range(0, len(modules), 64)])
        self._lists = lists + [v for m in modules for name, v in vars(m).items() if not _is_fixed(m, name, v)]
        self._copies = copy.deepcopy(self._lists)

    def unchanged(
        self,
        model: nn.Module,
        layouts: core.Layouts | None = None,
        fingerprint: core.Fingerprint | None = None,
        decisions: Tensor = _ALL,
    ) -> bool:
        """Also of the layouts and bytes of the parts that the decisions, contiguous bool [B, L], choose."""
        if self._class() is not type(model) or self._lists != self._copies:
            return False
        if any(_code(kind()) is not code for kind, code in self._forwards):
            return False
        for kind, before in self._classes:
            now = _contents(kind())
            if len(now) != len(before) or not all(map(is_, now, before)):
                return False
        own, threads = vars(model), torch.get_num_threads()
        return core.unchanged(self._facts, own, layouts, fingerprint, decisions.data_ptr(), *decisions.shape, threads)


class _Watch:
    """Everything about a model that its plan depends on, in a form that is quick to compare.

    Args:
        model: the network.
        attributes: of the model, taken before anything was read.
        read: ids of the parameters and buffers that lowering reads: not those of what serves training alone, a quarter
            of the weights of a ResNet-50.
    """

    def __init__(self, model: nn.Module, attributes: _Attributes, read: set[int]):
        self._attributes = attributes
        blocks = {id(m): number for number, m in enumerate(routed_blocks(model).values())}
        # By address and bytes of the memory: the block whose body alone reads it, or L, and the tensors in it by id.
        readers: dict[tuple[int, int], int] = {}
        tensors: dict[tuple[int, int], dict[int, Tensor]] = {}
        elsewhere: dict[int, Tensor] = {}
        # Held: they are read without Python's lock, and while they live no shorter memory takes their address.
        self._storages: list[torch.UntypedStorage] = []
        for module, part in _readers(model, blocks, len(blocks)):
            own = {**module._parameters, **module._buffers}
            if read.isdisjoint(map(id, own.values())):
                continue
            for name, t in own.items():
                on_cpu = t is not None and t.device.type == "cpu"
                # Inference does not read BatchNorm's count of batches. Where versions are all there is to compare, it
                # is watched in place of the running statistics, which training writes without counting a version.
                if t is None or (on_cpu and name == "num_batches_tracked"):
                    continue
                if not on_cpu:
                    elsewhere[id(t)] = t
                    continue
                storage = t.untyped_storage()
                self._storages.append(storage)
                span = storage.data_ptr(), storage.nbytes()
                readers[span] = part if readers.get(span, part) == part else len(blocks)
                tensors.setdefault(span, {})[id(t)] = t
        # The bodies', in the order of the decisions, and those of what is always read.
        parts: list[list[Tensor]] = [*([] for _ in blocks), [*elsewhere.values()]]
        table = []
        for span, part in readers.items():
            if part == len(blocks):
                if len(parts[-1]) >= _FEW:
                    parts.append([])
                part = len(parts) - 1
            # All tensors of a span are in one part: its bytes are read once they are found where they lay.
            parts[part] += tensors[span].values()
            table.append((part, *span))
        exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
        self._layouts = None if exchange is None else core.Layouts(parts, exchange)
        self._moved = [_moved(part) for part in parts] if exchange is None else []
        self._elsewhere = [*elsewhere.values()]
        if any(t.is_inference() for t in self._elsewhere):
            raise LoweringError("weights made in inference mode have no version to compare with the plan's")
        self._versions = [t._version for t in self._elsewhere]
        # The version counter of PyTorch misses what is written through .data: the bytes themselves do not.
        table = [(address, size, part) for part, address, size in sorted(table)]
        table = torch.tensor(table, dtype=torch.int64, device="cpu")
        self._fingerprint = core.Fingerprint(table.data_ptr(), len(table), len(parts), torch.get_num_threads())

    def unchanged(self, model: nn.Module, decisions: Tensor | None = None) -> bool:
        """Whether the plan is that of the model, for samples that take these paths, bool [B, L]; by default for all."""
        if decisions is None or not decisions.is_cpu or decisions.dtype != torch.bool:
            decisions = _ALL  # those on a device are not waited for
        decisions = decisions.contiguous()
        return (
            not is_watched()
            and [t._version for t in self._elsewhere] == self._versions
            and not (self._moved and self._has_moved(decisions))
            and self._attributes.unchanged(model, self._layouts, self._fingerprint, decisions)
        )

    def _has_moved(self, decisions: Tensor) -> bool:
        """What ``core.unchanged`` tells of the layouts, where PyTorch is older than that."""
        chosen = zip_longest(self._moved, decisions.any(0).tolist(), fillvalue=True)
        return any(moved() for moved, needed in chosen if needed)


def _readers(module: nn.Module, blocks: dict[int, int], part: int) -> Iterator[tuple[nn.Module, int]]:
    """Every module in every place where it stands, and the number of the block whose body that is in; else ``part``."""
    yield module, part
    for name, child in module._modules.items():
        if child is not None:
            yield from _readers(child, blocks, blocks[id(module)] if name == "body" and id(module) in blocks else part)


def _code(kind: type[nn.Module] | None) -> object:
    """What a class's forward runs; not the function, which may hold the model."""
    return getattr(getattr(kind, "forward", None), "__code__", None)


def _is_own(kind: type) -> bool:
    """Whether a class is a user's, who may change more of it than its forward."""
    return kind.__module__.partition(".")[0] not in ("spnet", "torch", "builtins")


def _contents(kind: type | None) -> list:
    """What the methods of a class run, and its attributes that are plain or lists of plain values."""
    found = []
    for value in vars(kind).values() if kind is not None else ():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(function, FunctionType):
            defaults = function.__defaults__, *(function.__kwdefaults__ or {}).values()
            found += [function.__code__, *(each if _is_plain(each) else ... for each in defaults)]
        elif _is_plain(value) or _is_list(value):
            found.append(value)
    return found


def _facts(modules: list[nn.Module], model: nn.Module) -> Iterator:
    """The entries of the modules' dictionaries, as ``core.Facts`` takes them.

    Held by the watch and so never mistaken for others that were given their addresses. But what might lead back to
    the model is not held, or it would live on in the cache: its own dictionary, and attributes that lowering would
    not understand. In the dictionaries of its parts nothing leads back: see :func:`_elusive`.
    """
    for m in modules:
        attributes = vars(m)
        yield None if m is model else attributes
        for name, value in attributes.items():
            held = name in _PARTS or name in _HOOKS or _is_plain(value)
            held = held or (not _is_fixed(m, name, value) and _is_list(value))
            yield from (name, value if held else ...)
        for name in _PARTS:
            # Without weights it belongs to a module that asks for none; a Sequential may get children.
            if attributes[name] or name == "_modules":
                yield attributes[name]
                for entry in attributes[name].items():
                    yield from entry
        for name in _HOOKS:
            yield attributes[name]


def _is_fixed(module: nn.Module, name: str, value: object) -> bool:
    """Whether what a forward may read of an attribute changes only with its identity.

    Modules of PyTorch and spnet read nothing else of theirs but sizes, which may be lists; of others, it depends on
    the value.
    """
    if name in _OF_EVERY_MODULE or _is_plain(value):
        return True
    known = type(module).__module__.partition(".")[0] in ("spnet", "torch")
    return known and not (type(value) is list and _is_list(value))


def _elusive(model: nn.Module) -> str:
    """The first attribute that may change unseen, or by which a part of the model may hold all of it; "" for none."""
    for m in model.modules():
        for name, value in vars(m).items():
            hidden = not _is_fixed(m, name, value) and not _is_list(value)
            if hidden or (m is not model and name not in _OF_EVERY_MODULE and _may_lead_back(value, m)):
                return f"attribute {name!r} of a {type(m).__name__}"
    return ""


def _may_lead_back(value: object, module: nn.Module) -> bool:
    """Whether an attribute of a module may lead to another that holds it."""
    if type(value) in (list, tuple, set, dict):
        return any(_may_lead_back(v, module) for v in (value.values() if type(value) is dict else value))
    if isinstance(value, MethodType):
        return value.__self__ is not module
    return isinstance(value, nn.Module) or getattr(value, "__closure__", None) is not None


def _is_plain(value: object) -> bool:
    """Whether nobody can change it in place: a number, a string, a class, a function, None or a tuple of these."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return getattr(value, "__closure__", None) is None
    kinds = str, torch.dtype, torch.device, torch.memory_format
    return value is None or type(value) in kinds or isinstance(value, type | Number)


def _is_list(value: object) -> bool:
    """Whether it holds nothing but plain values, in lists and the like, that can be changed in place."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return type(value) in (list, tuple, set) and all(_is_plain(v) or _is_list(v) for v in value)


def _moved(tensors: list[Tensor]) -> Callable[[], bool]:
    """Tells whether tensors lie otherwise than now, where PyTorch is older than the part of DLPack that does."""

    def layouts() -> list[tuple]:
        return [(t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for t in tensors]

    before = layouts()
    return lambda: layouts() != before


_kept: WeakKeyDictionary[nn.Module, dict[tuple, tuple[_Watch, Plan]]] = WeakKeyDictionary()
# Why the last image was refused, so that a model which does not fit is not run on zeros before every forward.
_refused: WeakKeyDictionary[nn.Module, tuple[tuple, _Attributes, str]] = WeakKeyDictionary()
MOST_SHAPES = 4


def plan_of(model: nn.Module, x: Tensor | None = None) -> Plan:
    """The model's plan for images like x [B, C, H, W], lowered anew where the model has changed since.

    Raises:
        LoweringError: the model does not fit.
    """
    shape, watch, plan = _found(model, x)
    return plan if watch is not None and watch.unchanged(model) else _lowered(model, shape)


def run_plan(model: nn.Module, x: Tensor, run: Callable[[Plan], tuple[Tensor, Tensor]]) -> tuple[Plan, Tensor, Tensor]:
    """The model's plan for images like x, and the logits and decisions that ``run`` returns for it.

    Run first and compared afterwards: the weights of a body that no sample executed need not be read, and a device
    computes meanwhile.

    Raises:
        LoweringError: the model does not fit.
    """
    shape, watch, plan = _found(model, x)
    if watch is not None:
        try:
            logits, decisions = run(plan)
        except Exception:
            if watch.unchanged(model):
                raise
        else:
            if watch.unchanged(model, decisions):
                return plan, logits, decisions
    plan = _lowered(model, shape)
    return plan, *run(plan)


def _found(model: nn.Module, x: Tensor | None) -> tuple[tuple[int, ...], _Watch | None, Plan | None]:
    """The shape of the images, and what is kept for it."""
    shape = shape_of(model)
    if shape is None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
        shape = tuple(x.shape[1:])
    return shape, *_kept.get(model, {}).get(shape, (None, None))


def _lowered(model: nn.Module, shape: tuple[int, ...]) -> Plan:
    weight = first_weight(model)
    image = *shape, weight.dtype, weight.device
    for_image, attributes, message = _refused.get(model, (None, None, ""))
    if for_image == image and attributes.unchanged(model):
        raise LoweringError(message)
    # Neither kept nor noted: either would let a model live on that holds itself.
    refuse_hidden(model)
    if elusive := _elusive(model):
        raise LoweringError(f"{elusive} may change unseen, so no plan can be kept; see spnet.lower")
    # Watched before it is read: a change in between is found by the next comparison.
    attributes = _Attributes(model)
    try:
        if len(shape) != 3:
            raise LoweringError(f"expected images [C, H, W], got {list(shape)}")
        plans = _kept.setdefault(model, {})
        if len(plans) == MOST_SHAPES and shape not in plans:
            raise LoweringError(f"plans for images of {MOST_SHAPES} other shapes are kept")
        steps = read(model, shape)
        if not attributes.unchanged(model):
            raise LoweringError(f"the forward of {type(model).__name__} changes its attributes")
        watch = _Watch(model, attributes, tensors_of(steps))
        plan = assemble(model, shape, steps)
    except ForwardError:
        raise
    except LoweringError as e:
        _refused[model] = image, attributes, str(e)
        raise
    plans[shape] = watch, plan
    return plan
