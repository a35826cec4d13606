"""What a user would run instead of spnet, each set up as well as its users would.

Everyone runs one network with one set of forced paths. Engines get :class:`FoldedNetwork`, without routers and with
BatchNorm folded: generous to them, since the masked network would also pay for its routers. Converting the inputs
to an engine's own form is not part of its time either.
"""

from __future__ import annotations

import copy
import io
import timeit
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import spnet
from spnet.routing import ResidualBlock, RoutedBlock, routed_blocks

Call = Callable[[], Tensor]  # () -> logits [B, classes]
Bind = Callable[[Tensor, Tensor], Call]  # (x [B, C, H, W], paths bool [B, L]) -> a call to time


class Competitor(NamedTuple):
    """One rival. ``bind(x, paths)`` gives the call that is timed."""

    bind: Bind
    # "masked" computes everything and masks; "dense" leaves out even the masks; "skips" skips; "static" is another
    # network, with logits of its own
    kind: str


class FoldedNetwork(nn.Module):
    """A routed network as its deployers would export it: BatchNorm folded, no routers.

    Args:
        model: an SPNet in evaluation mode.
        dtype: of the weights; they are folded in float32 first.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.stem = _folded(model.features.stem).to(dtype)
        self.steps = nn.ModuleList(_step(module).to(dtype) for stage in model.stages for module in stage)
        self.head = copy.deepcopy(model.heads[-1]).to(dtype)

    def forward(self, x: Tensor, decisions: Tensor | None = None) -> Tensor:
        """Masked with decisions [B, L] of 0 and 1 in the dtype of x; dense, as if all were 1, without."""
        return self.run(x, *(() if decisions is None else masks_of(decisions)))

    def run(self, x: Tensor, *masks: Tensor) -> Tensor:
        """The same, with a mask [B, 1, 1, 1] of each block."""
        x, left = self.stem(x), iter(masks)
        for step in self.steps:
            if masks and isinstance(step, ResidualBlock):
                x = step.activation(step.shortcut(x) + next(left) * step.body(x))
            else:
                x = step(x)
        return self.head(x.mean((2, 3)))


def masks_of(decisions: Tensor) -> tuple[Tensor, ...]:
    return decisions.T[:, :, None, None, None].unbind(0)


def _step(module: nn.Module) -> nn.Module:
    folded = _folded(module)
    if isinstance(folded, RoutedBlock):
        return ResidualBlock(folded.body, folded.shortcut, folded.activation)
    return folded


def _folded(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module).float()
    for sequential in [m for m in module.modules() if isinstance(m, nn.Sequential)]:
        children = list(sequential.named_children())
        for (conv_name, conv), (norm_name, norm) in zip(children, children[1:], strict=False):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                sequential._modules[conv_name] = fuse_conv_bn_eval(conv, norm)
                sequential._modules[norm_name] = nn.Identity()
    return module


def competitors(
    model: nn.Module, batch: int, dtype: torch.dtype, only: tuple[str, ...] | None = None, quick: bool = False
) -> tuple[dict[str, Competitor], dict[str, str]]:
    """Set up every rival for batches of one size, on the model's device.

    Args:
        model: an SPNet of the CIFAR form in evaluation mode, of ``dtype``.
        batch: B.
        dtype: float32 or bfloat16; on CUDA also float16.
        only: names of the rivals to set up; all by default.
        quick: leave out those that take minutes to set up.

    Returns:
        (rivals by name, why the absent ones are absent by name).

    Raises:
        ValueError: ``only`` has an unknown name, or nobody who computes everything and masks.
    """
    found = {
        "eager": Competitor(_execution(model, "masked", torch.contiguous_format), "masked"),
        "channels_last": Competitor(_execution(model, "masked", torch.channels_last), "masked"),
        "routed": Competitor(_execution(model, "routed", torch.channels_last), "skips"),
        "naive": Competitor(_naive(model, dtype), "skips"),
    }
    absent = {}
    makers = {
        "CUDA graph": (cuda_graph, True),
        "CUDA graph dense": (cuda_graph, False),
        "compile": (_compiled, True),
        "compile dense": (_compiled, False),
        "openvino": (_openvino, True),
        "openvino dense": (_openvino, False),
        "onnxruntime": (_onnxruntime, True),
        "onnxruntime dense": (_onnxruntime, False),
    }
    if only is not None:
        if unknown := set(only) - {*found, *makers, "batch"}:
            raise ValueError(f"rivals: {', '.join(sorted(unknown))} unknown; there are {', '.join([*found, *makers])}")
        found, makers = ({name: each[name] for name in each if name in only} for each in (found, makers))
        if not any(masked for _, masked in makers.values()) and not {"eager", "channels_last"} & found.keys():
            raise ValueError("rivals: expected one that computes everything and masks")
    for name, (make, masked) in makers.items():
        try:
            # On a CPU it is never the best here: one batch size shows that. On a GPU the dense one is to be beaten.
            affordable = masked and batch == 16 if _device(model).type == "cpu" else not masked
            if quick and make is _compiled and not (affordable and model.input_size <= 64):
                raise Absent("it takes minutes to compile: --full has it")
            found[name] = Competitor(make(model, batch, dtype, masked), "masked" if masked else "dense")
        except Absent as reason:
            absent[name] = str(reason)
        except Exception as error:  # a cell has others, and setting them up again would take minutes
            absent[name] = f"it failed: {error!r}"
    return found, absent


# Pairs of networks of which the second costs what half of the first's blocks cost.
_HALF = {"resnet110_cifar": "resnet56_cifar"}


def static_of_half_the_cost(
    name: str, batch: int, dtype: torch.dtype, only: tuple[str, ...] | None = None, quick: bool = False
) -> dict[str, Competitor]:
    """The static network that a user could deploy instead of skipping half of ``name``, by the compiled engines.

    quick: by the first engine that is there, the one of less set-up.
    """
    if name not in _HALF:
        return {}
    model = spnet.create_model(_HALF[name]).eval().to("cuda" if torch.cuda.is_available() else "cpu", dtype)
    found = {}
    for engine, make in {"openvino": _openvino, "compile": _compiled}.items():
        if (only is not None and engine not in only) or (quick and found):
            continue
        try:
            found[f"{engine} {_HALF[name]}"] = Competitor(make(model, batch, dtype, False), "static")
        except Absent:
            continue
    return found


class Absent(Exception):
    """A rival that cannot run here; the message says why."""


def _execution(model: nn.Module, impl: str, memory_format: torch.memory_format) -> Bind:
    """One of spnet's own eager executions, with weights and input in one memory format."""
    model = copy.deepcopy(model).to(memory_format=memory_format)

    def bind(x: Tensor, paths: Tensor) -> Call:
        call = partial(spnet.fast_forward, model, x.contiguous(memory_format=memory_format), impl=impl, paths=paths)
        if impl == "masked" and x.is_cuda:
            with _cudnn_chooses_by_time():
                call()
        return call

    return bind


def _naive(model: nn.Module, dtype: torch.dtype) -> Bind:
    """What is written first: nonzero, index_select, index_copy; at B=1 a Python `if` in front of every body."""
    network = FoldedNetwork(model, dtype).eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def run(x: Tensor, paths: Tensor) -> Tensor:
        x, left = network.stem(x), iter(paths.T)
        for step in network.steps:
            if not isinstance(step, ResidualBlock):
                x = step(x)
                continue
            y, decisions = step.shortcut(x), next(left)
            if len(x) == 1:
                if decisions.item():
                    y = y + step.body(x)
            else:
                index = decisions.nonzero().squeeze(1)
                y = y.index_copy(0, index, y.index_select(0, index) + step.body(x.index_select(0, index)))
            x = step.activation(y)
        return network.head(x.mean((2, 3)))

    def bind(x: Tensor, paths: Tensor) -> Call:
        return partial(run, x.contiguous(memory_format=torch.channels_last), paths)

    return bind


def _compiled(model: nn.Module, batch: int, dtype: torch.dtype, masked: bool) -> Bind:
    """torch.compile with the weights frozen into the graph, which lets Inductor pack them for oneDNN."""
    network = FoldedNetwork(model, dtype).eval()
    # Masks are inputs of their own: as slices of one tensor each would make Inductor build another C++ kernel.
    on_gpu = _device(model).type == "cuda"
    options = {"freezing": True, "max_autotune": on_gpu, "triton.cudagraphs": on_gpu}
    compiled = torch.compile(network.run, dynamic=False, fullgraph=True, options=options)

    def run(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return compiled(*inputs)

    def bind(x: Tensor, paths: Tensor) -> Call:
        masks = masks_of(paths.to(dtype)) if masked else ()
        return partial(run, x.contiguous(), *(m.clone(memory_format=torch.contiguous_format) for m in masks))

    x, paths = _example(model, batch, True)
    call = bind(x.to(dtype), paths)
    # Every network and batch is a graph of its own of one function, more than the default limit allows.
    with torch._dynamo.config.patch(recompile_limit=64), _cudnn_chooses_by_time():
        for _ in range(3 if on_gpu else 1):
            call()  # compiles and warms up, records the CUDA graph, replays it
    return bind


@contextmanager
def _cudnn_chooses_by_time() -> Iterator[None]:
    """Among its algorithms for each shape that is new, and remembers them: where shapes stay, its users let it."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def cuda_graph(model: nn.Module, batch: int, dtype: torch.dtype, masked: bool) -> Bind:
    """The eager network's kernels, launched together."""
    if _device(model).type != "cuda":
        raise Absent("there is no GPU")
    network = FoldedNetwork(model, dtype).eval().to(memory_format=torch.channels_last)

    def bind(x: Tensor, paths: Tensor) -> Call:
        inputs = x.contiguous(memory_format=torch.channels_last), paths.to(dtype) if masked else None
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), _cudnn_chooses_by_time():
            network(*inputs)  # cuDNN and cuBLAS take their workspaces before the capture
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                logits = network(*inputs)

        def replay(_held=inputs) -> Tensor:  # the graph reads them where they lie
            graph.replay()
            return logits

        return replay

    return bind


def _example(model: nn.Module, batch: int, masked: bool) -> tuple[Tensor, ...]:
    x = torch.randn(batch, model.in_channels, model.input_size, model.input_size, device=_device(model))
    return (x, x.new_ones(batch, len(routed_blocks(model)))) if masked else (x,)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _check_cpu(model: nn.Module) -> None:
    if _device(model).type != "cpu":
        raise Absent("set up for the CPU only")


def _openvino(model: nn.Module, batch: int, dtype: torch.dtype, masked: bool) -> Bind:
    """OpenVINO, the fastest of: one request under the latency hint; one under the throughput hint; the batch split
    over one stream for each thread."""
    _check_cpu(model)
    try:
        import openvino
    except ImportError:
        raise Absent("openvino is not installed") from None
    core = openvino.Core()
    precision = "bf16" if dtype == torch.bfloat16 else "f32"
    if dtype == torch.bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Absent("OpenVINO has no bfloat16 on this processor")
    network, threads = FoldedNetwork(model).eval(), torch.get_num_threads()

    def convert(size: int) -> openvino.Model:
        example = _example(model, size, masked)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return openvino.convert_model(network, example_input=example, input=[tuple(t.shape) for t in example])

    def compile_for(graph: openvino.Model, **settings) -> openvino.CompiledModel:
        settings |= {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        return core.compile_model(graph, "CPU", settings)

    whole = convert(batch)
    choices = [_requests(compile_for(whole, PERFORMANCE_HINT=hint), 1, masked) for hint in ("LATENCY", "THROUGHPUT")]
    if threads > 1 and batch % threads == 0:
        part = compile_for(convert(batch // threads), PERFORMANCE_HINT="THROUGHPUT", NUM_STREAMS=threads)
        choices.append(_requests(part, threads, masked))
    example = _example(model, batch, True)
    return min(choices, key=lambda bind: _seconds(bind(*example)))


def _requests(compiled, count: int, masked: bool) -> Bind:
    """Run the batch in ``count`` equal parts at once."""
    requests = [compiled.create_infer_request() for _ in range(count)]

    def bind(x: Tensor, paths: Tensor) -> Call:
        values, masks = x.float().contiguous().chunk(count), paths.float().chunk(count)
        inputs = [[v.numpy(), m.numpy()] if masked else [v.numpy()] for v, m in zip(values, masks, strict=True)]

        def one() -> Tensor:
            outputs = requests[0].infer(inputs[0], share_inputs=True, share_outputs=True)
            return torch.from_numpy(outputs[0])

        def split() -> Tensor:
            for request, values in zip(requests, inputs, strict=True):
                request.start_async(values, share_inputs=True)
            for request in requests:
                request.wait()
            return torch.cat([torch.from_numpy(r.get_output_tensor(0).data) for r in requests])

        return one if count == 1 else split

    return bind


def _onnxruntime(model: nn.Module, batch: int, dtype: torch.dtype, masked: bool) -> Bind:
    _check_cpu(model)
    if dtype != torch.float32:
        raise Absent("its CPU kernels are float32 only")
    try:
        import onnx  # noqa: F401  (read by torch.onnx)
        import onnxruntime
    except ImportError as error:
        raise Absent(f"{error.name} is not installed") from None
    names, file = ["x", "decisions"][: 1 + masked], io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        example = _example(model, batch, masked)
        torch.onnx.export(FoldedNetwork(model).eval(), example, file, dynamo=False, input_names=names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(file.getvalue(), options, ["CPUExecutionProvider"])

    def bind(x: Tensor, paths: Tensor) -> Call:
        values = dict(zip(names, (x.contiguous().numpy(), paths.float().numpy()), strict=False))
        return lambda: torch.from_numpy(session.run(None, values)[0])

    return bind


def _seconds(call: Call) -> float:
    call()
    return min(timeit.repeat(call, number=1, repeat=5))
