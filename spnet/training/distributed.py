"""One training run by several processes, a rank each: joining the job, means over the ranks, synchronised BatchNorm.

Without a job everything here is the identity, so that the trainer is one for both.
"""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from spnet.models.files import write_whole

JOB = "job.txt"  # in a run's folder: by which torchrun processes, one per node, it was begun or resumed last


def usable_device(name: str | torch.device) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: there is none, or this PyTorch cannot use it.
    """
    try:
        torch.zeros(1, device=name).item()  # which "meta" has not
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:  # of a PyTorch without CUDA the second
        raise ValueError(f"device: cannot use {name!r} here ({str(e).splitlines()[0]})") from e


def in_job() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if in_job() else 0


def world_size() -> int:
    return dist.get_world_size() if in_job() else 1


def restarted() -> bool:
    """Whether torchrun started the job again after a rank had died."""
    # Each node's torchrun counts only the deaths among its own ranks.
    return any_rank(_attempt() > 0)


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def note_job(run: Path) -> None:
    """Write into a run's folder which job trains it, for :func:`noted_job`; nothing without torchrun."""
    if dist.is_torchelastic_launched():
        agents = sorted(set(gather_over_ranks(_agent())))
        if rank() == 0:
            write_whole(run / JOB, "\n".join(agents).encode())


def noted_job(run: Path) -> bool:
    """Whether an earlier attempt of this job trained the run."""
    # One of its nodes is enough: after a restart others may be new.
    agents = gather_over_ranks(_agent())
    return (run / JOB).exists() and not set(agents).isdisjoint((run / JOB).read_text().splitlines())


def _agent() -> str:
    """The torchrun process that started this rank, unlike any other; --rdzv-id may be the same for all jobs."""
    pid, proc = os.getppid(), Path("/proc")
    if not proc.is_dir():  # no Linux: the next best
        return str(pid)
    boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
    ticks = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[19]  # from the boot to its start
    return f"{boot} {pid} {ticks}"


@contextmanager
def job(device: str) -> Iterator[None]:
    """Be one rank of the job that torchrun started, or alone without it.

    Args:
        device: "cpu" joins by gloo; "cuda" by NCCL, and takes the GPU of the local rank, so it has no number.

    A job on several nodes restarts only with ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` set for torchrun and
    ``--rdzv-backend c10d``.

    Raises:
        ConnectionError: another rank died, was lost, or the ranks did not meet.
        ValueError: no GPU for this rank, or one by its number for all.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    cuda = device.startswith("cuda")
    if cuda and device != "cuda":
        raise ValueError(
            f"device: expected 'cuda' in a job, in which every rank takes a GPU of its own, got {device!r}"
        )
    if cuda:
        torch.cuda.set_device(usable_device(f"cuda:{os.environ['LOCAL_RANK']}"))
    clean = False
    try:
        # gloo on a GPU too: what is on the host (the wish to stop, sums of the evaluation) waits for no kernel there.
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
            # torchrun keeps one store for all attempts, where a restarted rank would read the addresses of dead ones
            # (pytorch issue 135712). On several nodes the attempts have no common number.
            store = dist.PrefixStore(f"attempt-{_attempt()}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
        yield
        clean = True
    except SystemExit as e:
        clean = not e.code
        raise
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or "gloo" in str(e).lower():
            cause = str(e).splitlines()[0].split(". ")[0]
            what = "lost another rank" if in_job() else "could not join the others"
            raise ConnectionError(
                f"rank {os.environ['RANK']}: {what}, whose own message says why; the last checkpoint stays ({cause})"
            ) from e
        raise
    finally:
        if cuda and in_job() and not clean:
            # NCCL's end waits for the peers, who may wait for this rank: neither they nor torchrun would learn of it.
            atexit.register(_exit_at_once)
        elif in_job():
            dist.destroy_process_group()


def _exit_at_once() -> None:
    """End the process after its error was printed, before the interpreter destroys what is left of NCCL."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


def any_rank(wish: bool) -> bool:
    """Whether any rank wishes it: the same answer on every rank."""
    if world_size() == 1:
        return wish
    flag = torch.tensor(int(wish))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def sum_over_ranks(numbers: Sequence[float]) -> list[float]:
    """The sum of each number, in float64."""
    if world_size() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def gather_over_ranks(value: Any) -> list[Any]:
    """Every rank's value, on every rank, in the order of the ranks; tensors in it must lie on the CPU."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace float tensors of one device by their means over the ranks, in one collective.

    The results are the same bits on every rank.
    """
    if world_size() == 1 or not sum(t.numel() for t in tensors):
        return
    flat = torch.cat([t.flatten().float() for t in tensors])
    dist.all_reduce(flat)
    means = (flat / world_size()).split([t.numel() for t in tensors])
    # One kernel for many tensors, where a copy each was one for every buffer.
    torch._foreach_copy_(list(tensors), [mean.view_as(t) for mean, t in zip(means, tensors, strict=True)])


def data_parallel(model: nn.Module, x: Tensor) -> nn.Module:
    """The model, with gradients averaged over the ranks; its buffers are left to :func:`average_over_ranks`.

    Args:
        model: in training mode, it returns tensors and tuples of them.
        x: an input; the model and its buffers stay as they are.
    """
    if world_size() == 1:
        return model
    with warnings.catch_warnings():  # torch 2.13 prefers a name that torch 2.9 does not know
        warnings.simplefilter("ignore", FutureWarning)
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
    # After its first backward it packs the gradients in another order, and where one lies decides in which order three
    # or more ranks are summed: the first step after a resume would have other bits. So the first backward is none's.
    before = {name: t.clone() for name, t in model.state_dict().items()}
    outputs = tree_leaves(parallel(x))
    sum(output.sum() for output in outputs if output.requires_grad).backward()
    model.zero_grad()
    model.load_state_dict(before)
    return parallel


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks; every rank's loss depends on it, so its gradient is summed over the ranks too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _SumOverRanks.forward(ctx, gradient)


def synchronise_batchnorm(model: nn.Module) -> None:
    """Let every BatchNorm of the model take its training statistics from the samples of all ranks.

    The ranks must have equally many. ``nn.SyncBatchNorm`` has no CPU form, and it is a type that the lowering to a
    plan would not know: here the modules stay what they are, and only their forward in training mode changes.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = MethodType(_synchronised, module)


def _synchronised(bn: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
    if not bn.training or world_size() == 1:
        return type(bn).forward(bn, x)
    v = x.float()  # [B, C, ...]; statistics are float32 under autocast too
    axes, shape = [i for i in range(x.dim()) if i != 1], [-1] + [1] * (x.dim() - 2)
    n = v.numel() // v.shape[1] * world_size()
    mean = _SumOverRanks.apply(v.sum(axes)) / n
    centred = v - mean.view(shape)
    # From the centred values: the mean of the squares less the square of the mean would cancel.
    var = _SumOverRanks.apply(centred.square().sum(axes)) / n
    with torch.no_grad():
        bn.num_batches_tracked.add_(1)
        bn.running_mean.lerp_(mean, bn.momentum)
        bn.running_var.lerp_(var * (n / max(n - 1, 1)), bn.momentum)
    scale = bn.weight * torch.rsqrt(var + bn.eps)
    return (centred * scale.view(shape) + bn.bias.view(shape)).to(x.dtype)


_synchronised.same_in_evaluation = True  # so that the lowering to a plan may pass it over
