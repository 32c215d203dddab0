"""Matrix products: torch's, and for the time of a generation those of weights that were laid out for it once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xalign.nn.products import linear


class Call:
    """A product of packed weights, which lies in its layer; a copy of the layer has none."""

    def __init__(self, run: Callable[[Tensor], Tensor]):
        self.run = run

    def __deepcopy__(self, memo: dict) -> None:
        return None


def product(x: Tensor, layer: nn.Module) -> Tensor:
    """x (..., i) times the layer's weight (o, i), with its bias where it has one: (..., o)."""
    packed: Call | None = layer.__dict__.get("packed")
    if packed is None or _plain():
        weight: Any = layer.weight
        return linear(x, weight, getattr(layer, "bias", None))
    return packed.run(x)


def products(x: Tensor, layers: Sequence[nn.Module], apart: bool = True) -> Sequence[Tensor]:
    """What each of the layers gives for x; in one product while they are packed, and if not `apart` as one tensor then."""
    joint: Call | None = layers[0].__dict__.get("joint")
    if joint is None or _plain():
        return [layer(x) for layer in layers]
    out, widths = joint.run(x), [layer.out_features for layer in layers]
    return out.split(widths, -1) if apart else [out]


def _plain() -> bool:
    return torch.is_grad_enabled() or torch.compiler.is_compiling()  # torch.compile lays weights out itself


class Linear(nn.Linear):
    """`nn.Linear` with that product."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self)


class Packed:
    """For the time of a `with` block, which may be entered again, a model's products run on weights in another layout.

    Every module with a method `grouped()` names its products: lists of layers that share an input and become one. On a CPU
    oneDNN lays the weights out anew, a copy: decoding is then up to three times as fast as with MKL's, which takes them as
    they are, and long inputs twice (docs/log.md). Elsewhere the layers of a list become views of one tensor, without a copy.
    Changes of the weights are not seen until the next `Packed`; where a gradient is asked for, nothing is different.
    """

    def __init__(self, model: nn.Module):
        self.calls: list[tuple[nn.Module, str, Call]] = []
        named: list[Any] = [m for m in model.modules() if hasattr(m, "grouped")]
        for layers in (group for m in named for group in m.grouped()):
            key = "joint" if len(layers) > 1 else "packed"
            run = None if layers[0].__dict__.get(key) is not None else _call(layers)
            if run is not None:
                self.calls.append((layers[0], key, Call(run)))

    def __enter__(self) -> None:
        for layer, key, call in self.calls:
            layer.__dict__[key] = call  # no submodule: the state dict stays as it is

    def __exit__(self, *_: Any) -> None:
        for layer, key, _call in self.calls:
            layer.__dict__.pop(key, None)


@torch.no_grad()
def _call(layers: list[nn.Module]) -> Callable[[Tensor], Tensor] | None:
    """The product of all these layers as a function; None where there is no better one than each layer's own."""
    kind: Any = type(layers[0])
    if any(type(layer) is not kind for layer in layers):
        return None
    if len(layers) > 1 and any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        return None  # they are to be called
    if hasattr(kind, "joined"):
        return kind.joined(layers) if len(layers) > 1 else None
    if kind not in (Linear, nn.Embedding):
        return None
    weights: list[Any] = [layer.weight for layer in layers]
    biases: list[Any] = [getattr(layer, "bias", None) for layer in layers]
    device, dtype = weights[0].device.type, weights[0].dtype
    if torch.is_autocast_enabled(device):
        return None
    if device == "cpu" and _onednn_takes(dtype):
        bias = None if biases[0] is None else torch.cat(biases)
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights) if len(weights) > 1 else weights[0].detach(), 1)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if len(layers) == 1:
        return None
    joint = _stacked(weights)
    bias = None if biases[0] is None else _stacked(biases)
    return lambda x: F.linear(x, joint, bias)


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.inference_mode(False)  # else a generation in inference mode would leave weights that can't be trained
def _stacked(parts: list[nn.Parameter]) -> Tensor:
    """One tensor of all rows; the parts become views of it, if they aren't yet."""
    first, size = parts[0].data, parts[0].element_size()
    ends = [p.data_ptr() + p.numel() * size for p in parts]
    same = all(p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and p.is_contiguous() for p in parts)
    if same and all(p.data_ptr() == end for p, end in zip(parts[1:], ends, strict=False)):
        return first.as_strided((sum(len(p) for p in parts), *first.shape[1:]), first.stride())
    whole = torch.cat([p.data for p in parts])
    for p, view in zip(parts, whole.split([len(p) for p in parts]), strict=True):
        p.data = view
    return whole
