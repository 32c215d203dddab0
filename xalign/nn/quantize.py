"""Weight-only quantisation of a loaded model, for generation: a checkpoint never mentions it.

int8 has a scale for each output, w = q * scale; int4 a scale and a zero for each group of an output's inputs,
w = (q - 8) * scale + zero. torch's packed kernels take bf16 activations, scales and zeros. The numbers q are rounded against
scales that are bf16 already, so that this costs nothing more. NF4 (Dettmers et al. 2023, arXiv 2305.14314) is bitsandbytes'.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xalign.errors import CheckpointError, ConfigError
from xalign.nn.linear import Linear, _stacked
from xalign.nn.transformer import TransformerWrapper

M = TypeVar("M", bound=TransformerWrapper)
GROUPS = (32, 64, 128, 256)  # inputs of a group that the int4 kernels know
NF4_GROUPS = (64, 128, 256, 512, 1024, 2048, 4096)
WIDTH = 32  # inputs come in multiples of it: the int8 kernel reads past the end of other rows, without a word
PACKED = 64  # outputs that are packed together, at most (on AVX512)
CHUNK = 4 * PACKED  # outputs that are quantised at a time, to need little memory
FEW = 16  # rows up to which the int8 kernel takes less time than a copy of the weight in bf16 and its product
TINY = torch.finfo(torch.bfloat16).tiny


class QuantizedLinear(nn.Module):
    """x (..., i) -> (..., o) in x's dtype, computed in bf16, with frozen weights: int8, or int4 in groups of `group`.

    `packed` and `scales` are (o, i) int8 and (o,); or int4 as torch packs it for the device, and (i / group, o, 2) scales and
    zeros, with o padded to a multiple of 16. They keep their dtype when a model is cast.
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, packed: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, group: int = 0):
        super().__init__()
        for name, tensor in (("packed", packed), ("scales", scales), ("bias", bias)):
            self.register_buffer(name, tensor)
        self.in_features = scales.shape[0] * group if group else packed.shape[1]
        self.out_features, self.group = out_features, group

    @classmethod
    def of(cls, linear: nn.Linear, bits: int, group: int = GROUPS[0]) -> "QuantizedLinear":
        """A layer's weight quantised; int4 in groups of `group`, or the next smaller size that divides its inputs."""
        group = max(g for g in GROUPS if g <= group and linear.in_features % g == 0) if bits == 4 else 0
        parts = [_int4(rows.float(), group) if group else _int8(rows.float()) for rows in linear.weight.detach().split(CHUNK)]
        packed, scales = torch.cat([p for p, _ in parts]), torch.cat([s for _, s in parts], 1 if group else 0)
        return cls(packed, scales, None if linear.bias is None else linear.bias.detach(), linear.out_features, group)

    def forward(self, x: Tensor) -> Tensor:
        # what would change nothing isn't called: a call costs a microsecond, and a small product takes ten
        held: Any = self._buffers  # a buffer by its name costs another
        few = not self.group and x.numel() <= FEW * self.in_features
        if few and x.dtype == torch.bfloat16 and held["bias"] is None and x.is_cpu:
            flat = x.reshape(-1, self.in_features).contiguous()
            return torch._weight_int8pack_mm(flat, held["packed"], held["scales"]).view(*x.shape[:-1], self.out_features)
        flat = x.reshape(-1, self.in_features).contiguous()
        rows, flat = flat.shape[0], flat if flat.dtype == torch.bfloat16 else flat.to(torch.bfloat16)
        if self.group and rows <= 2 * self.in_features:
            out = self._int4(flat)
        elif self.group:  # the kernel unpacks the weight as a product with 1, and a bf16 product takes less time than its own
            out = flat @ self._int4(torch.eye(self.in_features, dtype=flat.dtype, device=flat.device))
        elif rows <= FEW and flat.is_cpu:
            out = torch._weight_int8pack_mm(flat, self.packed, self.scales)
        else:
            out = F.linear(flat, self.packed.to(flat.dtype)) * self.scales
        out = out if out.shape[1] == self.out_features else out[:, : self.out_features]
        out = out if self.bias is None else out + self.bias
        return (out if out.dtype == x.dtype else out.to(x.dtype)).reshape(*x.shape[:-1], self.out_features)

    def _int4(self, x: Tensor) -> Tensor:
        product = torch._weight_int4pack_mm_for_cpu if x.is_cpu else torch._weight_int4pack_mm
        return product(x, self.packed, self.group, self.scales)

    @staticmethod
    def joined(parts: list["QuantizedLinear"]) -> Callable[[Tensor], Tensor]:
        """The layer whose outputs are those of all `parts`, one after the other; their weights become views of its own.

        Where int4 parts don't end where a packed block does, what runs them one by one.
        """
        group, bias = parts[0].group, [p.bias for p in parts if p.bias is not None]
        if group and any(p.out_features % PACKED for p in parts[:-1]):
            return lambda x: torch.cat([p(x) for p in parts], -1)
        packed: Any = [p.packed for p in parts]
        scales = torch.cat([p.scales for p in parts], 1 if group else 0)
        count = sum(p.out_features for p in parts)
        return QuantizedLinear(_stacked(packed), scales, torch.cat(bias) if bias else None, count, group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        scales, device = self.scales, fn(self.scales[:0]).device
        if self.group and device.type != scales.device.type:
            raise ConfigError(f"int4 weights are packed for {scales.device.type} and can't go to {device.type}, allowed is to "
                              "move the model before it is quantised")
        super()._apply(fn, recurse)
        self.scales = scales.to(device)
        return self

    def train(self, mode: bool = True) -> "QuantizedLinear":
        if mode:
            raise ConfigError("a quantised model can't be trained, allowed is to train first and to quantise what is loaded")
        return super().train(mode)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(o, i) fp32 -> (o, i) int8 and scales (o,): symmetric, the largest of an output is 127."""
    scales = (weight.abs().amax(1) / 127).clamp(min=TINY).to(torch.bfloat16)
    return (weight / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def _int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(o, i) fp32 -> int4 packed for its device, and scales and zeros (i / group, o, 2).

    A group's numbers first span its extremes; then, four times, scale and zero are fitted to the numbers by least squares and
    the numbers rounded anew: on normal weights that takes away 14 % of the squared error.
    """
    w = weight.unflatten(1, (-1, group))
    low, high = w.amin(-1, True), w.amax(-1, True)
    number, scale, zero = w, (high - low) / 15, (8 * high + 7 * low) / 15
    for turn in range(5):
        if turn:
            off, mean = number - number.mean(-1, True), w.mean(-1, True)
            scale = (off * (w - mean)).sum(-1, True) / off.square().sum(-1, True).clamp(min=TINY)
            zero = mean - scale * number.mean(-1, True)
        scale, zero = scale.clamp(min=TINY).to(torch.bfloat16).float(), zero.to(torch.bfloat16).float()
        number = ((w - zero) / scale).round().clamp(-8, 7)
    padding = (0, 0, 0, -len(w) % 16)  # the kernels want outputs in multiples of it
    q = F.pad(number.flatten(1).int() + 8, padding)
    scales = F.pad(torch.cat((scale, zero), -1).to(torch.bfloat16), (0, 0, *padding)).transpose(0, 1).contiguous()
    if weight.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(q, 1), scales
    tiles = max(t for t in (2, 4, 8) if q.shape[1] % (16 * t) == 0)
    return torch._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8), tiles), scales


def _nf4(linear: nn.Linear, group: int) -> nn.Module:
    """bitsandbytes' layer with a layer's weight."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(linear.in_features, linear.out_features, False, torch.bfloat16, quant_type="nf4", device="meta")
    layer.weight = Params4bit(linear.weight.detach(), False, blocksize=group, compress_statistics=False, quant_type="nf4",
                              module=layer)
    layer.bias = linear.bias
    return layer.to(linear.weight.device)  # which quantises


def checked(bits: int, group_size: int | None = None, method: str | None = None, device: torch.device | None = None) -> int:
    """The group size that `quantize` takes for these options; raises as it does, also before anything is loaded."""
    if bits not in (4, 8):
        raise ConfigError(f"bits is {bits!r}, allowed is 4 or 8")
    if method not in (None, "nf4") or (method and bits == 8):
        raise ConfigError(f"method is {method!r} for {bits} bits, allowed is None, or 'nf4' for 4 bits")
    groups = NF4_GROUPS if method else GROUPS
    group = groups[0] if group_size is None else group_size
    if group not in groups:
        raise ConfigError(f"group_size is {group!r}, allowed is {', '.join(map(str, groups))}")
    if method:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ConfigError("NF4 needs bitsandbytes: pip install 'xalign[4bit]'") from error
    elif bits == 4 and device is not None and device.type != "cpu" and (
            device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise ConfigError(f"the device is {device}, allowed for int4 is cpu, or cuda of compute capability 8 or more")
    return group


@torch.no_grad()
def quantize(model: M, bits: int, *, group_size: int | None = None, head: bool = True, method: str | None = None) -> M:
    """Quantise the weights of a model's layers in place, and of its head where it has its own and `head`; give it back.

    `bits` 8 is int8; 4 is int4 in groups of `group_size` inputs (None: 32), or with `method="nf4"` bitsandbytes' (None: 64).
    The rest becomes bf16: embeddings, norms, a tied head, layers whose inputs are no multiple of 32; so do the logits.
    Each layer lets its old weight go before the next, so that hardly more memory is needed than the model has. It is frozen,
    in eval mode, and refuses to be trained or saved. Raises `ConfigError` for other bits, groups, methods and devices, a
    missing package, and a model that is quantised already.
    """
    group = checked(bits, group_size, method, model.token_emb.weight.device)
    if model._state_dict_pre_hooks:
        raise ConfigError("the model is quantised already, allowed is to load it anew")
    for parent in chain[nn.Module](model.attn_layers.modules(), [model] * head):  # no list: it would keep what is replaced
        for name, layer in parent.named_children():
            if isinstance(layer, Linear) and layer.in_features % WIDTH == 0:
                setattr(parent, name, _nf4(layer, group) if method else QuantizedLinear.of(layer, bits, group))
    model.register_state_dict_pre_hook(_refuse)
    return model.to(torch.bfloat16).requires_grad_(False).eval()


def _refuse(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise CheckpointError("a quantised model can't be saved, allowed is the model as it was before it was quantised")
