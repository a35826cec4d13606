"""Routers for residual networks of others: ``convert`` finds the blocks by the form of their forward.

A block's forward is traced with its submodules as units, so only what stands in that forward counts and no library
has to be known: it must be ``activation(shortcut(x) + body(x))``, with a convolution in the body. What the two
branches have in common (the first normalisation of a pre-activation block that changes the shape) goes before.
"""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spnet.models.resnet import SPNetOutput
from spnet.routing import RoutedBlock, RoutedSequential, Router, Routing, Run, active, routed_blocks

_SUMS = {
    ("call_function", operator.add),
    ("call_function", operator.iadd),
    ("call_function", torch.add),
    ("call_method", "add"),
    ("call_method", "add_"),
}
_IN_PLACE_SUMS = {operator.iadd, "add_"}
_RELUS = {("call_function", F.relu), ("call_function", torch.relu), ("call_method", "relu")}
_IN_PLACE = [getattr(operator, f"i{name}") for name in "add sub mul truediv floordiv mod pow and or xor".split()]
_CONVOLUTIONS = nn.modules.conv._ConvNd


class _Other(Exception):
    """A module that is no residual block of a convolutional network; the message says what it lacks."""


def convert(
    model: nn.Module,
    *,
    router_width: int = 128,
    router_dropout: float = 0.4,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Give every residual block of a convolutional network a router: torchvision's, timm's, or your own.

    The network is changed in place, and every Parameter stays the same object. A block becomes a
    :class:`spnet.RoutedBlock` (``layer1.0.conv1`` is called ``layer1.0.body.conv1``), and a stage that is a straight
    line of blocks a :class:`spnet.RoutedSequential`. With every block open ``model(x)`` is bit-equal to the
    original's, and in evaluation mode every block starts open; train the routers with :func:`forward_training`.

    Stochastic depth, attention, anti-aliasing and any activation are taken along as parts of the body, the shortcut or
    the activation. Where a network computes what :func:`spnet.lower` covers, ResNets with squeeze-and-excitation for
    one, :func:`spnet.fast_forward` runs it by a plan, else by "routed".

    To keep what has been trained, save the ``state_dict`` and load it into a network that was converted alike; to
    deploy it, save the plan, which needs no class: ``spnet.lower(model, input_shape).save(path)``.

    Args:
        model: a network of blocks that compute ``activation(shortcut(x) + body(x))``, or the same without
            activation. The shortcut is the branch without, or with fewer, convolutions.
        router_width, router_dropout: see :class:`spnet.Router`.
        where: called with name and module; only where it says True is a module looked at.

    Returns:
        The model; a new one where the model itself is a block or a ``nn.Sequential`` of blocks.

    Raises:
        TypeError: model is no module.
        ValueError: no residual block; RoutedBlocks already there; or a block, called by its name, that has the form
            but cannot be routed: it overwrites its input, computes another thing in training than in evaluation, has
            two branches of equally many convolutions, or branches that share more than one tensor, contains another
            block, stands in two places, or has a forward hook. ``where`` leaves such a block as it is.
    """
    if routed_blocks(model):
        raise ValueError(f"model: already routed, {next(iter(routed_blocks(model)))!r} is a RoutedBlock")
    new: dict[str, nn.Module] = {}
    others: dict[type, str] = {}
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.") or not any(True for _ in module.children()):
            continue
        if where is not None and not where(name, module):
            continue
        try:
            new[name] = _route(name, module, router_width, router_dropout)
        except _Other as e:
            others.setdefault(type(module), f"{name or 'the model'!r} ({type(module).__name__}) {e}")
    if not new:
        looked_at = "; ".join(others.values()) or "no module that has submodules of its own"
        raise ValueError(f"model: {type(model).__name__} has no residual block to route; looked at {looked_at}")
    _check_places(model, new)

    # Deepest first, so that a line inside a line is there when the outer one is made.
    for name in sorted({_parent(n) for n in new if n}, key=lambda n: n.count(".") + bool(n), reverse=True):
        stage = model.get_submodule(name)
        if (name or isinstance(stage, nn.Sequential)) and _is_line(stage):
            children = stage.named_children()
            line = RoutedSequential(OrderedDict((n, new.get(f"{name}.{n}".lstrip("."), c)) for n, c in children))
            line.training = stage.training
            new[name] = line
    for name, module in new.items():
        if name and _parent(name) not in new:
            model.get_submodule(_parent(name)).register_module(name.rpartition(".")[2], module)
    return new.get("", model)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _check_places(model: nn.Module, new: Iterable[str]) -> None:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for name in new:
        places = names[id(model.get_submodule(name))]
        if len(places) > 1:
            raise ValueError(f"model: block {name!r} also stands at {places[1]!r}, so it has no one path")
        inner = next((n for n in new if n != name and (n.startswith(f"{name}.") or not name)), None)
        if inner is not None:
            leave = f"lambda name, module: not name.endswith({inner.rpartition('.')[2]!r})"
            raise ValueError(
                f"model: block {name!r} contains block {inner!r}; choose by `where` which to route, the outer ones by "
                f"where={leave}"
            )


class _Proxy(fx.Proxy):
    """Tells ``x += y`` from ``x = x + y``, which a Proxy records alike."""


for _operator in _IN_PLACE:

    def _record(self, other, _operator=_operator):
        return self.tracer.create_proxy("call_function", _operator, (self, other), {})

    setattr(_Proxy, f"__{_operator.__name__}__", _record)


class _Tracer(fx.Tracer):
    """Records one forward with every submodule as a unit."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module) -> fx.Graph:
    if isinstance(module, torch.jit.ScriptModule):
        raise _Other("is of TorchScript")
    if len(inspect.signature(module.forward).parameters) != 1:
        raise _Other("takes more than one input")
    try:
        graph = _Tracer().trace(module)
    except Exception as e:  # a forward written for tensors may raise anything when it is given a stand-in
        raise _Other(f"cannot be traced ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})") from e
    graph.eliminate_dead_code(lambda node: node.target is not operator.getitem)
    return graph


def _is_line(module: nn.Module) -> bool:
    """Whether a module calls each of its children once, one after the other in their order, and does nothing else."""
    try:
        first, *calls, last = _trace(module).nodes
    except _Other:
        return False
    targets = [node.target for node in calls if node.op == "call_module"]
    follows = all(node.args == (before,) for before, node in zip([first, *calls], [*calls, last], strict=True))
    own = [name for name, _ in module.named_children()]
    return follows and len(targets) == len(calls) and targets == own


def _route(name: str, block: nn.Module, router_width: int, router_dropout: float) -> nn.Module:
    """The RoutedBlock with the parts of ``block``, after what its two branches have in common."""
    graph = _trace(block)
    x, *_, output = graph.nodes
    total = _sum_of(output.args[0]) or _sum_of(output.args[0].all_input_nodes[0] if _is_unary(output.args[0]) else None)
    if total is None:
        raise _Other("does not end in a sum of two tensors")
    branches = [_ancestors(operand) for operand in total.args]
    common = [n for n in graph.nodes if n.op != "get_attr" and all(n in branch for branch in branches)]
    if x not in common:
        raise _Other("adds something that does not depend on its input")
    if len(branches[0] | branches[1]) + 2 + (total is not output.args[0]) != len(graph.nodes):
        raise _Other("computes more than a sum and one function of it")
    cut = common[-1]
    convolutions = [_convolutions(block, branch - set(common)) for branch in branches]
    if max(convolutions) == 0:
        raise _Other("adds branches without a convolution")

    def refuse(why: str) -> ValueError:
        return ValueError(f"model: block {name!r} ({type(block).__name__}) {why}; `where` can leave it as it is")

    if cut not in total.args and convolutions[0] == convolutions[1]:
        raise refuse("has two branches of equally many convolutions, so neither is the shortcut")
    if any(user not in common for n in common[:-1] for user in n.users):
        raise refuse("has a shortcut and a body that share more than one tensor")
    body_is_second = total.args[0] is cut or (total.args[1] is not cut and convolutions[0] < convolutions[1])
    shortcut, body = total.args if body_is_second else reversed(total.args)
    if _has_channels_last(block, graph, cut, body):
        raise refuse("has maps [B, H, W, C], and a router expects [B, C, H, W]")
    if _overwrites(block, graph, cut, total) or _overwrites(block, graph, x, total):
        raise refuse("overwrites its input, which the shortcut still needs")
    if total.args[0] is x and total.target in _IN_PLACE_SUMS:
        raise refuse("overwrites its input by the sum, where others may hold it")
    if block._forward_hooks or block._forward_pre_hooks or block._backward_hooks or block._backward_pre_hooks:
        raise refuse("has a hook, which would be lost")
    block.training = not block.training
    try:
        changed = str(_trace(block)) != str(graph)
    finally:
        block.training = not block.training
    if changed:
        raise refuse("computes another thing in training mode than in evaluation mode")

    with torch.device("cpu"):  # whatever the default is: what is made on the meta device could not be moved
        router = Router(_channels(block, graph, cut, shortcut, body), router_width, router_dropout, init_std=0.0)
    router.to(next(p for n in graph.nodes for m in _modules(block, n) for p in m.parameters()))
    parts = [_extract(block, graph, *ends) for ends in ((cut, body), (cut, shortcut), (total, output.args[0]))]
    routed: nn.Module = RoutedBlock(parts[0], router, *parts[1:])
    if cut is not x:
        routed = RoutedSequential(OrderedDict(before=_extract(block, graph, x, cut), block=routed))
    for module in set(routed.modules()).difference(block.modules()):
        module.training = block.training
    return routed


def _sum_of(node: object) -> fx.Node | None:
    """The node, if it is the plain sum of two nodes."""
    if not isinstance(node, fx.Node) or (node.op, node.target) not in _SUMS or node.kwargs:
        return None
    return node if len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args) else None


def _is_unary(node: object) -> bool:
    return isinstance(node, fx.Node) and len(node.all_input_nodes) == 1


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and everything that it is computed from."""
    found, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _modules(block: nn.Module, node: fx.Node) -> list[nn.Module]:
    """The module that a node calls and all inside it."""
    return list(block.get_submodule(node.target).modules()) if node.op == "call_module" else []


def _convolutions(block: nn.Module, nodes: Iterable[fx.Node]) -> int:
    return sum(isinstance(m, _CONVOLUTIONS) for node in nodes for m in _modules(block, node))


def _channels(block: nn.Module, graph: fx.Graph, x: fx.Node, shortcut: fx.Node, body: fx.Node) -> int:
    """The channels of x, from what the modules behind it state."""

    def stated(end: fx.Node, *names: str) -> list[int]:
        branch = _ancestors(end) - _ancestors(x)
        modules = [m for n in graph.nodes if n in branch for m in _modules(block, n)]
        return [getattr(m, name) for m in modules for name in names if hasattr(m, name)]

    first_in = [stated(end, "in_channels", "num_features", "num_channels")[:1] for end in (body, shortcut)]
    # A body may begin with a module that takes half of the channels, or end with one that counts no channels.
    names = "out_channels", "num_features", "num_channels", "out_features"
    last_out = stated(body, *names)[-1:] if not first_in[1] else []
    return max([*first_in[0], *first_in[1], *last_out])


def _has_channels_last(block: nn.Module, graph: fx.Graph, x: fx.Node, body: fx.Node) -> bool:
    """Whether the body begins with a linear layer, alone or behind a normalisation: that reads the last axis."""
    branch = _ancestors(body) - _ancestors(x)
    before = x
    for node in (n for n in graph.nodes if n in branch):
        if node.op != "call_module" or node.args != (before,) or _convolutions(block, [node]):
            return False
        if isinstance(block.get_submodule(node.target), nn.Linear):
            return True
        before = node
    return False


def _overwrites(block: nn.Module, graph: fx.Graph, x: fx.Node, total: fx.Node) -> bool:
    """Whether an operation writes to the memory of x: in place, and reached through nothing that has weights."""
    aliases = {x}
    for node in graph.nodes:
        if node is total or aliases.isdisjoint(node.all_input_nodes):
            continue
        modules = _modules(block, node)
        weighted = next((i for i, m in enumerate(modules) if m._parameters), len(modules))
        called = getattr(node.target, "__name__", str(node.target))
        named = node.op != "call_module" and (called.endswith("_") or node.target in _IN_PLACE)
        if named or node.kwargs.get("inplace") or any(getattr(m, "inplace", False) for m in modules[:weighted]):
            return True
        if weighted == len(modules):
            aliases.add(node)
    return False


def _extract(block: nn.Module, graph: fx.Graph, start: fx.Node, end: fx.Node) -> nn.Module:
    """The module that computes ``end`` from ``start`` with the submodules of ``block``, in the plainest form."""
    needed = _ancestors(end) - _ancestors(start)
    nodes = [n for n in graph.nodes if n in needed]
    line = OrderedDict()
    for node, before in zip(nodes, [start, *nodes], strict=False):
        plain = node.args == (before,) and not node.kwargs
        if plain and node.op == "call_module" and "." not in node.target:
            line[node.name if node.target in line else node.target] = block.get_submodule(node.target)
        elif node.args == (before,) and (node.op, node.target) in _RELUS:
            line[node.name] = nn.ReLU(node.kwargs.get("inplace", False))
    if len(line) == len(nodes):
        modules = list(line.values())
        if all(isinstance(m, nn.Identity) or (type(m) is nn.Sequential and not len(m)) for m in modules):
            return nn.Identity()
        return modules[0] if len(modules) == 1 else nn.Sequential(line)
    copied = fx.Graph()
    made = {start: copied.placeholder("x")}
    for node in nodes:
        made[node] = copied.node_copy(node, made.__getitem__)
    copied.output(made[end])
    return fx.GraphModule(block, copied, type(block).__name__)


class _TrainingRun(Run):
    """One forward in training mode that keeps what each routed block computed."""

    def __init__(self, names: dict[RoutedBlock, str]):
        self._names = names
        self.routings: dict[RoutedBlock, Routing] = {}

    def block(self, block: RoutedBlock, x: Tensor) -> Tensor:
        if block in self.routings:
            name = self._names[block]
            raise ValueError(f"model: RoutedBlock {name!r} ran twice in one forward, so it has no one path")
        self.routings[block] = block.masked(x)
        return self.routings[block].output


def forward_training(model: nn.Module, x: Tensor) -> SPNetOutput:
    """Run any network of RoutedBlocks in training mode and return what the losses of SP-Net read.

    ``output.stage_logits`` is the model's output alone, as one stage (``SPNetLoss(stage_weights=[1.0], ...)``): earlier
    stage heads exist in :class:`spnet.SPNet` only. Blocks in a row that have outputs of one width count as a stage in
    ``features``, so L_evo "within" can be computed; "across" needs stages that are aligned to one width. For L_path and
    L_logits run the auxiliary module's copy in the same way, ``forward_training(auxiliary.module, x)`` in
    ``torch.no_grad()``.

    In the code that torch.compile makes of a whole network nobody sees its blocks: compile the body of each block.

    Args:
        model: in training mode; its output is a tensor [B, classes].
        x: input batch [B, ...].

    Raises:
        TypeError: model is no module.
        ValueError: a model without RoutedBlocks, in evaluation mode, or with a block that its forward does not call,
            calls twice, calls in compiled code, or calls without gradient though its router trains, as
            ``torch.utils.checkpoint`` does with ``use_reentrant=True``: with ``use_reentrant=False`` it calls it as
            ever.
    """
    blocks = routed_blocks(model)
    if not blocks or not model.training:
        wrong = "contains none" if not blocks else "is in evaluation mode"
        raise ValueError(f"model: expected RoutedBlocks in training mode, but {type(model).__name__} {wrong}")
    with active(_TrainingRun({block: name for name, block in blocks.items()})) as run:
        output = model(x)
    idle = [name for name, block in blocks.items() if block not in run.routings]
    if idle:
        raise ValueError(
            f"model: the forward of {type(model).__name__} did not call block {idle[0]!r}, or calls it in compiled code"
        )
    for name, block in blocks.items():
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in block.router.parameters())
        if trains and not run.routings[block].router_logits.requires_grad:
            raise ValueError(
                f"model: the forward of {type(model).__name__} calls block {name!r} without gradient, so the losses "
                "would not train its router; checkpoint it with use_reentrant=False"
            )
    routings = [run.routings[block] for block in blocks.values()]
    pooled = [Router.pool(r.output) for r in routings]
    features = tuple(torch.stack(list(stage), 1) for _, stage in groupby(pooled, key=lambda p: p.shape[1]))
    return SPNetOutput(
        (output,),
        torch.stack([r.router_logits for r in routings], 1),
        torch.stack([r.decisions for r in routings], 1),
        features,
        tuple(f[:, -1] for f in features),
    )
