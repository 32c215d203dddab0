"""Rotary positions (RoPE) and the ways to stretch them to longer texts."""

import math
from typing import Any

import torch
from torch import Tensor

from xalign.errors import ConfigError, nearest

# The fields of `rotary_scaling` by its `rope_type`, those that must be there and those that may; Hugging Face's names.
ROPE_TYPES: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor", "original_max_position_embeddings"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": ({"factor", "original_max_position_embeddings"},
             {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
}


def check_scaling(scaling: dict[str, Any], base: float) -> None:
    """Raise `ConfigError` for an unknown type and for a field that is missing, unknown or out of range."""
    kind = scaling.get("rope_type")
    if kind not in ROPE_TYPES:
        raise ConfigError(f"rotary_scaling: rope_type is {kind!r}, allowed is {', '.join(ROPE_TYPES)}")
    needed, optional = ROPE_TYPES[kind]
    given = scaling.keys() - {"rope_type"}
    for name in sorted(needed - given):
        raise ConfigError(f"rotary_scaling: {name} is missing, but rope_type {kind!r} needs it")
    for name in sorted(given - needed - optional):
        raise ConfigError(f"rotary_scaling: rope_type {kind!r} has no field {name!r}{nearest(name, needed | optional)}")
    for name in sorted(given):
        value, allowed = scaling[name], "a finite number > 0"
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name == "truncate":
            good, allowed = isinstance(value, bool), "True or False"
        elif name == "original_max_position_embeddings":
            good, allowed = isinstance(value, int) and number and value >= 1, "a whole number >= 1"
        elif name == "factor":
            good, allowed = number and 1 <= value < math.inf, "a finite number >= 1"
        else:
            good = number and 0 < value < math.inf
        if not good:
            raise ConfigError(f"rotary_scaling: {name} is {value!r}, allowed is {allowed}")
    for low, high, defaults in (("low_freq_factor", "high_freq_factor", (0, 1)), ("beta_slow", "beta_fast", (1, 32))):
        bounds = scaling.get(low, defaults[0]), scaling.get(high, defaults[1])
        if bounds[0] >= bounds[1]:
            raise ConfigError(f"rotary_scaling: {high} is {bounds[1]}, allowed is a number > {low} = {bounds[0]}")
    if kind == "yarn" and base <= 1:
        raise ConfigError(f"rotary_base is {base} where rope_type is 'yarn', allowed is a number > 1")


def frequencies(dim: int, base: float, scaling: dict[str, Any] | None, device: torch.device) -> Tensor:
    """Radians a position of each rotated pair, (dim / 2,), fp32.

    `linear` divides all by the factor (Chen et al. 2023, arXiv 2306.15595). `llama3` divides those that turn fewer than
    low_freq_factor times in the original length, keeps those above high_freq_factor, and blends between (Llama 3.1).
    `yarn` does so between beta_slow and beta_fast turns, along the pair's index (Peng et al. 2023, arXiv 2309.00071,
    eq. 19 - 23). `dynamic` is plain up to the original length, and the model goes no further: past it the frequencies
    would depend on the text's length, and cached keys would be wrong.
    """
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / base ** (steps / dim)
    kind = scaling["rope_type"] if scaling is not None else None
    if scaling is None or kind == "dynamic":
        return plain
    stretched = plain / scaling["factor"]
    if kind == "linear":
        return stretched
    original = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((original * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    else:
        # the (fractional) index of the pair that turns `t` times in the original length
        first, last = (dim * math.log(original / (t * 2 * math.pi)) / (2 * math.log(base))
                       for t in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)))
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        kept = 1 - ((steps / 2 - first) / (last - first or 1e-3)).clamp(0, 1)
    return kept * plain + (1 - kept) * stretched


def magnitude(scaling: dict[str, Any] | None) -> float:
    """What yarn multiplies queries and keys by, to sharpen attention over a longer text; 1 elsewhere."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if "attention_factor" in scaling:
        return scaling["attention_factor"]

    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling["factor"]) + 1.0

    both = "mscale" in scaling and "mscale_all_dim" in scaling
    return grown(scaling["mscale"]) / grown(scaling["mscale_all_dim"]) if both else grown(1.0)


def rotary_angles(positions: Tensor, dim: int, base: float, scaling: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (..., n, dim) of RoPE (Su et al. 2021, arXiv 2104.09864, eq. 34), always fp32.

    The sines of the first half are negative: those of the pair's first features, as `rotate` takes them.
    They come from Python numbers at every call and are no buffers, so that `model.bfloat16()` can't round them.
    """
    each = frequencies(dim, base, scaling, positions.device)
    angles = positions.float()[..., None] * torch.cat((-each, each))
    size = magnitude(scaling)
    return (angles.cos(), angles.sin()) if size == 1.0 else (angles.cos() * size, angles.sin() * size)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Turn the pairs (i, i + r / 2) of the first r features of `x` (b, h, n, e), in fp32; the rest passes through."""
    cos, sin = rotation
    r = cos.shape[-1]
    part = (x if r == x.shape[-1] else x[..., :r]).float()
    turned = (part * cos).add_(part.roll(r // 2, -1).mul_(sin)).to(dtype)  # few operations: a step waits for their calls
    return turned if r == x.shape[-1] else torch.cat((turned, x[..., r:].to(dtype)), -1)
