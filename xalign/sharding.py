"""Weights, gradients and AdamW's moments in shards, one a process (FSDP2: `torch.distributed.fsdp.fully_shard`).

Each layer is gathered for as long as it runs, embedding and head for a whole pass: any pass of a sharded model is one of all
processes together. Gradients are summed, not averaged, in fp32: losses are weighted by their share of the step already.
With one process nothing is sharded, and every function below does the same for whole tensors. Left out: offloading to the
host, meshes of more than one dimension, and half-precision gathering (autocast casts what was gathered, as it does whole).
torch's modules for all that take more than a second to import: each function does so when it needs them.
"""

import contextlib
import copy
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xalign import distributed
from xalign.checkpoint import STATE, atomic_folder
from xalign.disk import writing
from xalign.errors import CheckpointError
from xalign.nn.transformer import Block
from xalign.weights import one_reason

SHARDS = Path(STATE).with_name("shards")


# -- models ---------------------------------------------------------------------------------------------------------


class Sharded:
    """Shards models in place; they stay the same objects, for whoever holds them, and can be made whole again."""

    def __init__(self, *models: nn.Module):
        self.models = [(model, _shard(model)) for model in models]

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """For the block the models are whole and plain, on rank 0; the others take part, and must not use them inside."""
        sharded = [(model.__class__, model.__dict__) for model, _ in self.models]
        self.join()
        try:
            yield
        finally:
            for (model, _), (kind, content) in zip(self.models, sharded, strict=True):
                model.__class__, model.__dict__ = kind, content

    @torch.no_grad()
    def join(self) -> None:
        """Make the models whole for good on rank 0; on the others they are on the meta device from then on."""
        for model, skeleton in self.models:
            twin = copy.deepcopy(skeleton).train(model.training)
            for name, tensor in model.state_dict().items():
                full = whole(tensor)
                if distributed.rank() == 0:
                    twin.load_state_dict({name: full}, strict=False, assign=True)
            # a twin of its own, and not its weights here: FSDP's hooks and the buffers that it gathers into stay behind
            model.__class__, model.__dict__ = twin.__class__, twin.__dict__


def _shard(model: nn.Module) -> nn.Module:
    """Shard a model, in place; gives what it was, on the meta device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in tensors}
    memo |= {id(p): nn.Parameter(memo[id(p)], p.requires_grad) for p in model.parameters()}
    skeleton = copy.deepcopy(model, memo)
    mesh = init_device_mesh(tensors[0].device.type, (distributed.size(),))
    for part in (*(m for m in model.modules() if isinstance(m, Block)), model):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    for method in ("branch_logprobs", "branch_rewards"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    return skeleton


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, by all processes together; another one as it is."""
    if not hasattr(tensor, "full_tensor"):  # then it is no DTensor
        return tensor
    with distributed.talking():
        return tensor.full_tensor()


def clip(model: nn.Module, most: float) -> float:
    """Scale gradients down to the norm `most` over all of them together (0: never); gives the norm that they had."""
    trained = [p for p in model.parameters() if p.grad is not None]
    with distributed.talking(only=False):
        norm = whole(nn.utils.get_total_norm([p.grad for p in trained]))  # type: ignore[misc]
    nn.utils.clip_grads_with_norm_(trained, most or float("inf"), norm)
    return float(norm)


# -- optimizers in full checkpoints ---------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`state_dict()` with whole tensors on the host; of rank 0 alone, the others take part and get none."""
    def gather(tensor: Tensor) -> Tensor | None:
        full = whole(tensor)
        return full.cpu() if distributed.rank() == 0 else None

    state = optimizer.state_dict()
    return {**state, "state": {i: {key: gather(t) for key, t in moments.items()} for i, moments in state["state"].items()}}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take such a state over, each process its shards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    mine = {i: {key: _like(parameters[i], t) if key != "step" else t for key, t in moments.items()}
            for i, moments in state["state"].items()}
    optimizer.load_state_dict({**state, "state": mine})


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


# -- sharded checkpoints --------------------------------------------------------------------------------------------


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write what is trained, each process its shards, and `state`: whole or not at all; see `load_shards`."""
    from torch.distributed import checkpoint as dcp

    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{key}.{name}": t for key, t in optimizer.state.get(parameter, {}).items()}
    with contextlib.ExitStack() as stack:
        # rank 0 alone makes the folder and gives it its name, after all have written
        made = distributed.once(lambda: str(stack.enter_context(atomic_folder(folder))))
        place, number = Path(made) / SHARDS, distributed.rank()
        with _told(f"{folder} can't be written"):
            dcp.save(tensors, checkpoint_id=place, no_dist=distributed.size() == 1)
        files = [*place.glob(f"__{number}_*.distcp"), *([place / ".metadata"] if number == 0 else [])]
        sums = distributed.collected({file.name: _checksum(file) for file in files})
        if number == 0:
            everything = {**state, "tensors": sorted(tensors), "files": {k: v for one in sums for k, v in one.items()}}
            with writing(folder / STATE), open(Path(made) / STATE, "wb") as opened:
                torch.save(everything, opened)


def check_shards(folder: Path, state: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless all files of a sharded checkpoint are as they were written."""
    for name, expected in state["files"].items():
        try:
            found = _checksum(folder / SHARDS / name)
        except OSError as error:
            raise CheckpointError(f"{folder / SHARDS / name} can't be read ({error.strerror})") from error
        if found != expected:
            raise CheckpointError(f"{folder / SHARDS / name} is damaged (its checksum is {found:08x}, not {expected:08x})")


def load_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Fill a model, whole or sharded over any number of processes, and its optimizer, which has done no step yet."""
    from torch.distributed import checkpoint as dcp

    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        if f"exp_avg.{name}" in state["tensors"]:
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p, requires_grad=False),
                                  "exp_avg_sq": torch.zeros_like(p, requires_grad=False)}
            tensors |= {f"{key}.{name}": t for key, t in optimizer.state[p].items()}
    with _told(f"{folder}: its shards are no state of this training"):
        dcp.load(tensors, checkpoint_id=folder / SHARDS, no_dist=distributed.size() == 1)


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Say in a line what went wrong on the first process that tells; torch's advice about a single process is no news."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings(), distributed.talking(only=False):
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        reason = first.strerror if isinstance(first, OSError) else one_reason(Exception(first))
        raise CheckpointError(f"{what} ({reason})") from error
