"""A GPU's part played by the CPU: what runs inside a CUDA graph is written down with its memory, and replayed on it."""

import copy
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xalign.drawing import Draw
from xalign.nn.engine import Flags

META = torch.device("meta")
# what a step may not do: take a value, or a shape that depends on one, to the host; make a tensor of the host's numbers
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
UPLOADS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}


class Static(TorchDispatchMode):
    """Inside, an operation that a CUDA graph can't hold is a `RuntimeError`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indexing = str(func).startswith(("aten.index.", "aten.index_put"))  # by numbers the shape is known, by a mask it isn't
        masks = indexing and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        device = kwargs.get("device") if func is torch.ops.aten._to_copy.default else None
        moved = device is not None and torch.device(device).type != args[0].device.type
        if masks or moved or func in UPLOADS or (READS & set(func.tags) and not indexing):
            raise RuntimeError(f"{func} in a step")
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        return func(*args, **kwargs)


class Capture(Static):
    """The calls of a block, each with the very tensors it took and gave; afterwards all memory is as it was before."""

    def __init__(self, graph):
        super().__init__()
        self.calls, self.before = [], {}
        graph.replay = self.replay

    def run(self, func, args, kwargs):
        for value, argument in zip([*args, *kwargs.values()], func._schema.arguments, strict=False):
            if isinstance(value, torch.Tensor) and argument.alias_info is not None and argument.alias_info.is_write:
                memory = value.untyped_storage()
                self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for memory, held in self.before.values():
            memory.copy_(held)

    def replay(self):
        for func, args, kwargs, outs in self.calls:
            writes = [r.alias_info is None for r in func._schema.returns]
            if any(writes) or func._schema.is_mutable:  # a view needs no work
                for new, out in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(outs), strict=True):
                    if all(writes):
                        out.copy_(new)


def step_without_values(run, kind):
    """Run a step of a copy of the engine `run`, which is given; its tensors have no values: fake ones, or on "meta"."""
    mode = FakeTensorMode() if kind == "fake" else nullcontext()

    def emptied(tensor, memo):
        made = mode.from_tensor(tensor.detach()) if kind == "fake" else tensor.detach().to(META)
        return memo.setdefault(id(tensor), made)

    with mock.patch.object(torch.Tensor, "__deepcopy__", emptied), mock.patch.object(nn.Parameter, "__deepcopy__", emptied):
        other = copy.deepcopy(run)
    with torch.no_grad(), mode, Static():
        other.run_step()
    return other


class Quiet:
    """A stream or an event of a device that is never behind."""

    def __init__(self, *_):
        pass

    def wait_stream(self, _):
        pass

    record = synchronize = lambda self, *_: None


def no_short_draws():
    """Engines that are made inside draw as where the device is no CPU."""
    return mock.patch("xalign.nn.autoregressive.Draw", lambda options, filters, rows, _: Draw(options, filters, rows, META))


@contextmanager
def on_a_gpu(wrapper, graphs=True):
    """`wrapper` generates as on CUDA (by graphs, or eagerly): the list given holds a `Capture` for each graph."""
    captures, engine, empty = [], wrapper._engine, torch.empty

    def changed(*args, **kwargs):
        run = engine(*args, **kwargs)
        run.mode = "graph" if graphs and run.cached else "eager"
        run.flags = Flags(not run.lockstep)
        return run

    def graph(made, **_):
        captures.append(Capture(made))
        return captures[-1]

    fakes = {"Stream": Quiet, "Event": Quiet, "current_stream": Quiet, "stream": nullcontext, "graph": graph,
             "CUDAGraph": type("Graph", (), {})}
    with (mock.patch.multiple(torch.cuda, **fakes), mock.patch.object(wrapper, "_engine", changed), no_short_draws(),
          mock.patch.object(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))):
        yield captures
