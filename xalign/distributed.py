"""The processes that torchrun starts for one run: who this one is, sums over all of them, and how they end together.

Every process takes its shard of each step's rows, and holds the whole model, unless `sharding` shards that too. A program
without torchrun is one process: no process group exists then, and every function gives back what it was given, bit for bit.
What lies on the CPU travels by gloo, what lies on a GPU by NCCL. Processes end by `os._exit`: gloo's threads may still
hold tensors, and then Python's way to end would now and then be an abort.
"""

import contextlib
import os
import pickle
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xalign.errors import CheckpointError, ConfigError, ProcessLost

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # for what rank 0 does alone, encoding or evaluation; a process that died is seen at once
BUCKET = 1 << 24  # numbers summed at a time: copies of 64 MiB, so that the gradients as a whole never lie in memory twice


def rank() -> int:
    """This process's number, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the other processes of torchrun's environment for the block; only rank 0 prints in it.

    An error anywhere ends them all: the process that meets it first raises it from here, the others exit in silence.
    Raises `ConfigError` where the environment is not torchrun's.
    """
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')} but {missing[0]} is not set, allowed is a start by "
                          "torchrun, or none of these variables")
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=number,
                                world_size=count, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes can't find one another at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                          f"({_why(error)})") from error
    try:
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as silence:
            if number:
                silence.enter_context(contextlib.redirect_stdout(nowhere))
                silence.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    except (Exception, KeyboardInterrupt) as error:
        if dist.is_initialized() and not _first_to_fail(store, number):
            time.sleep(1)  # torchrun ends all as soon as one has failed: let the one speak that knows why
            os._exit(130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_status", 1))
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _first_to_fail(store: dist.Store, number: int) -> bool:
    try:  # the store outlives a restart by torchrun, hence its count
        return store.add(f"failed {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except RuntimeError:  # whoever kept the store is gone too
        return number == 0


def _why(error: BaseException) -> str:
    """The first sentence of an error by torch or gloo, without the place in their source."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S*\] ", "", first).split(". ")[0]


@contextlib.contextmanager
def talking(only: bool = True) -> Iterator[None]:
    """Raise `ProcessLost` where another process is gone; in blocks that do not `only` talk, RuntimeErrors may be others'."""
    try:
        yield
    except RuntimeError as error:
        if not (only or isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise ProcessLost(f"rank {rank()} lost another of the {size()} processes ({_why(error)}); the same command goes "
                          "on from the last checkpoint") from error


def own_device(name: str | None) -> torch.device:
    """`name`, or the GPU where there is one, else the CPU; of several processes on a machine each has its own GPU.

    Raises `ConfigError` for one GPU by its number while there are several processes.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if size() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ConfigError(f"--device is {name} for {size()} processes, allowed is cuda (each takes its own) or cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def once(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 alone, while the others wait, and give its result (anything that pickles) to all."""
    if size() == 1:
        return work()
    box = [work() if rank() == 0 else None]
    try:
        with talking():
            dist.broadcast_object_list(box, src=0)
    except pickle.PicklingError as error:
        raise AssertionError(f"{type(box[0]).__name__} can't be sent to the other processes") from error
    return box[0]  # type: ignore[return-value]


def leave_to_first() -> None:
    """The rest is rank 0's alone: it goes on as the only process, the others end here with status 0."""
    if size() == 1:
        return
    number = rank()
    total(torch.zeros(1))  # all have come here
    dist.destroy_process_group()
    if number:
        os._exit(0)


def totals(values: Sequence[float]) -> list[float]:
    """Each value summed over all processes, in float64."""
    return list(values) if size() == 1 else total(torch.tensor(values, dtype=torch.float64)).tolist()


def total(values: Tensor) -> Tensor:
    """A tensor summed over all processes, in place; all get the same bits."""
    if size() > 1:
        with talking():
            dist.all_reduce(values)
    return values


def most(count: int) -> int:
    """The largest of the processes' counts."""
    largest = torch.tensor(count)
    if size() > 1:
        with talking():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def collected(value: T) -> list[T]:
    """Each process's value (anything that pickles), by rank, for all."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    with talking():
        dist.all_gather_object(values, value)
    return values


def gathered(values: Tensor) -> Tensor:
    """The processes' tensors of one shape (on the CPU), stacked by rank: (size, ...)."""
    if size() == 1:
        return values[None]
    rows = [torch.empty_like(values) for _ in range(size())]
    with talking():
        dist.all_gather(rows, values.contiguous())
    return torch.stack(rows)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum `.grad` over all processes in fp32, many small tensors in one message; a missing one counts as zero."""
    if size() == 1:
        return
    bucket: list[nn.Parameter] = []
    trained = [p for p in parameters if p.requires_grad]
    for i, parameter in enumerate(trained):
        bucket.append(parameter)
        if i + 1 == len(trained) or sum(p.numel() for p in bucket) + trained[i + 1].numel() > BUCKET:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            if len(bucket) == 1 and gradients[0].dtype == torch.float32 and gradients[0].is_contiguous():
                total(gradients[0])  # mostly an embedding, too large to be copied
            else:
                flat = total(torch.cat([g.flatten().float() for g in gradients]))
                for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                    g.copy_(part.view_as(g))
            for p, g in zip(bucket, gradients, strict=True):
                p.grad = g
            bucket = []


def checksum(tensors: Iterable[Tensor]) -> int:
    """A sum over the bits of tensors; 0 of none."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [t.detach().flatten().view(whole[t.element_size()]).sum(dtype=torch.int64).cpu() for t in tensors]
    return sum(i * int(s) for i, s in enumerate(sums, 1)) % 2**63  # by place, so that two tensors that changed theirs are seen


def check_same_weights(model: nn.Module, when: str) -> None:
    """Raise `CheckpointError` unless all processes hold the same weights, bit for bit (judged by a sum over the bits)."""
    if size() == 1:
        return
    checks = gathered(torch.tensor(checksum(model.parameters()))).tolist()
    odd = [i for i, check in enumerate(checks) if check != checks[0]]
    if odd:
        raise CheckpointError(f"{when} rank {odd[0]} has other weights than rank 0: allowed are the same files, seed and "
                              "versions for all processes (is the run's folder shared by all machines?)")
