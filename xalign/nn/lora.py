"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = W x + s B A x, where W is frozen, quantised or not, and A and B are trained.

A (r, i) and B (o, r) are fp32; their products are in the input's dtype, as under autocast. s = alpha / r, or alpha / sqrt(r)
(rsLoRA, Kalajdzievski 2023, arXiv 2312.03732). B is 0 at first, and without adapters the model is its own reference:
`with adapters_off(model)`. Left out: adapters of embeddings and heads, and several adapters of one model.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xalign.errors import ConfigError, nearest
from xalign.nn.linear import Linear
from xalign.nn.products import linear
from xalign.nn.quantize import QuantizedLinear
from xalign.nn.transformer import TransformerWrapper

M = TypeVar("M", bound=nn.Module)


class Differentiable(QuantizedLinear):
    """A quantised layer in a model of which something else is trained: its input has a gradient."""

    @classmethod
    def of_quantized(cls, layer: QuantizedLinear) -> "Differentiable":
        """The same layer; the tensors are shared."""
        return cls(layer.packed, layer.scales, layer.bias, layer.out_features, layer.group)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (o, i); of int4 rounded to bf16, as the kernel's products of many rows have it."""
        if not self.group:
            return self.packed.to(dtype) * self.scales.to(dtype)[:, None]
        one = torch.eye(self.in_features, dtype=torch.bfloat16, device=self.packed.device)
        return self._int4(one)[:, : self.out_features].t().to(dtype)

    @property
    def weight(self) -> Tensor:
        """What a head is asked for."""
        return self.dequantized(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else super().forward(x)

    def train(self, mode: bool = True) -> "Differentiable":
        nn.Module.train(self, mode)
        return self


class _Product(torch.autograd.Function):
    """The packed product; dx = dy W in dy's dtype, with a weight that is unpacked for it and let go."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Differentiable) -> Tensor:
        ctx.layer = layer
        return QuantizedLinear.forward(layer, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.layer.dequantized(dy.dtype), None


class LoRALinear(nn.Module):
    """x (..., i) -> base(x) + s B A x (..., o); with `dropout` of the adapter's input alone; A, B are never half precision.

    `base` is an `nn.Linear`, a subclass of it or a `QuantizedLinear`; it is frozen.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ConfigError(f"rank is {rank!r}, allowed is a whole number >= 1")
        if not 0 < alpha < math.inf:
            raise ConfigError(f"alpha is {alpha!r}, allowed is a finite number > 0")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout is {dropout!r}, allowed is a number in [0, 1)")
        self.base = (Differentiable.of_quantized(base) if type(base) is QuantizedLinear else base).requires_grad_(False)
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        self.dropout, self.scale, self.off = dropout, alpha / (math.sqrt(rank) if rslora else rank), 0
        device = next(chain(base.parameters(), base.buffers())).device
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as peft and the paper's own code do

    def grouped(self) -> list[list[nn.Module]]:
        return [[self.base]]

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if self.off:
            return out
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        # weights that take the input's dtype: inputs that took theirs would be kept for the backward pass, once a layer
        return out + linear(linear(x, self.lora_a.to(x.dtype)) * self.scale, self.lora_b.to(x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALinear":
        def wide(t: Tensor) -> Tensor:
            cast = fn(t)
            return cast if cast.dtype.itemsize >= 4 else t.to(cast.device, torch.float32)

        self.base._apply(fn, recurse)
        super()._apply(wide, recurse=False)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "off": 0})  # a copy made while the adapters are off has its own on


def has_lora(model: nn.Module) -> bool:
    """Whether a model, or a wrapper of one, has adapters."""
    return any(isinstance(layer, LoRALinear) for layer in model.modules())


def apply_lora(model: M, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, targets: Iterable[str] | None = None,
               rslora: bool = False) -> M:
    """Put adapters on the layers named in `targets` ("to_q", "down", ...; None: every linear one), in place; give it back.

    `model` is a `TransformerWrapper`, quantised or not, or a wrapper of one, of whose network nothing else is trained then.
    A is drawn from torch's generator. Raises `ConfigError` for options out of range, unknown targets and a second time.
    """
    net = _network(model)
    linears = _linears(net)
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    chosen = known if targets is None else [targets] if isinstance(targets, str) else list(targets)
    for target in chosen or [""]:
        if target not in known:
            raise ConfigError(f"targets has {target!r}{nearest(target, known)}; allowed are {', '.join(known)}")
    _adapt(net, {name: LoRALinear(layer, rank, alpha, dropout, rslora) for name, layer in linears.items()
                 if name.rpartition(".")[2] in chosen})
    return model


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """For the time of the block the model computes what it did before `apply_lora`, to the bit; blocks may be nested.

    Raises `ConfigError` for a model without adapters, which would be its own reference for good.
    """
    layers = _adapters(model).values()
    for layer in layers:
        layer.off += 1
    try:
        yield
    finally:
        for layer in layers:
            layer.off -= 1


@torch.no_grad()
def merge(model: M) -> M:
    """Add s B A to the weights, in fp32 and then rounded to their dtype, and put plain layers back; give the model back.

    All its parameters are trainable again. Raises `ConfigError`, before anything is changed, for a model without adapters
    and for quantised weights: there `lora_state_dict` gives what `load_lora` puts on the model as it was.
    """
    net, layers = _network(model), _adapters(model)
    for name, layer in layers.items():
        if type(layer.base) is not Linear:
            raise ConfigError(f"{name} is a {type(layer.base).__name__} and can't be merged, allowed is {Linear.__name__}: "
                              "load the model anew, without quantisation, and take lora_state_dict and load_lora to it")
    for name, layer in layers.items():
        weight: Any = layer.base.weight
        a, b, w = (t.to(torch.promote_types(weight.dtype, torch.float32)) for t in (layer.lora_a, layer.lora_b, weight))
        with torch.autocast(weight.device.type, enabled=False):
            weight.copy_(torch.addmm(w, b, a, alpha=layer.scale))
        _put(net, name, layer.base)
    net.requires_grad_(True)
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters alone, by the network's names: `….lora_a` (r, i), `….lora_b` (o, r), the parameters themselves, and
    `….scale`, s in fp64. Also of a quantised model."""
    state: dict[str, Tensor] = {}
    for name, layer in _adapters(model).items():
        state |= {f"{name}.lora_a": layer.lora_a.detach(), f"{name}.lora_b": layer.lora_b.detach(),
                  f"{name}.scale": torch.tensor(layer.scale, dtype=torch.float64)}
    return state


@torch.no_grad()
def load_lora(model: M, state: dict[str, Tensor]) -> M:
    """Put the adapters of a `lora_state_dict` on a model without, or in the place of those that it has; give it back.

    Raises `ConfigError`, before anything is changed, where names or shapes are others than the model's.
    """
    net = _network(model)
    places: dict[str, Any] = _layers(net) or _linears(net)
    ranks = {name: len(place.lora_a) for name, place in places.items()} if has_lora(net) else {
        name: max(1, state[f"{name}.lora_a"].numel() // place.in_features) for name, place in places.items()
        if f"{name}.lora_a" in state}
    if not ranks:
        raise ConfigError("the state has no adapter of this model, allowed is what lora_state_dict gives")
    wanted: dict[str, tuple[int, ...]] = {}
    for name, rank in ranks.items():
        wanted |= {f"{name}.lora_a": (rank, places[name].in_features), f"{name}.lora_b": (places[name].out_features, rank),
                   f"{name}.scale": ()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in wanted or found.get(name) != wanted[name]:
            raise ConfigError(f"the adapters' tensor {name!r} is {found.get(name, 'missing')}, allowed is "
                              f"{wanted.get(name, 'none of this name')}")
    if not has_lora(net):
        _adapt(net, {name: LoRALinear(places[name], rank, 1.0) for name, rank in ranks.items()})
    for name, layer in _layers(net).items():
        layer.lora_a.copy_(state[f"{name}.lora_a"])
        layer.lora_b.copy_(state[f"{name}.lora_b"])
        layer.scale = float(state[f"{name}.scale"])
    return model


def _network(model: nn.Module) -> TransformerWrapper:
    for module in model.modules():
        if isinstance(module, TransformerWrapper):
            return module
    raise ConfigError(f"{type(model).__name__} can't have adapters, allowed is a TransformerWrapper or a wrapper of one")


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in _network(model).named_modules() if isinstance(layer, LoRALinear)}


def _adapters(model: nn.Module) -> dict[str, LoRALinear]:
    layers = _layers(model)
    if not layers:
        raise ConfigError("the model has no adapters, allowed is one after apply_lora or load_lora")
    return layers


def _linears(net: nn.Module) -> dict[str, nn.Module]:
    """What can have adapters, by name."""
    if has_lora(net):
        raise ConfigError("the model has adapters already, allowed is a model without, or to merge them first")
    return {name: layer for name, layer in net.named_modules()
            if name.startswith("attn_layers.") and isinstance(layer, nn.Linear | QuantizedLinear)}


def _adapt(net: nn.Module, adapters: dict[str, LoRALinear]) -> None:
    """Put adapters in their layers' places; from then on nothing else of the network is trained."""
    net.requires_grad_(False)
    for name, layer in list(net.named_modules()):
        if name in adapters:
            _put(net, name, adapters[name])
        elif type(layer) is QuantizedLinear:
            _put(net, name, Differentiable.of_quantized(layer))


def _put(net: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(net.get_submodule(parent), last, layer)
