"""What a training run needs of a device's memory, from the model's shape and the settings, before anything is allocated.

Letters, besides docs/design.md's: T tokens of a forward pass, L layers, f the feed-forward width, H = h * e and K = k * e
the widths of queries and of keys, P parameters, M those that are matrices, w the bytes of a weight, c those of an activation
(2 with bf16 autocast or bfloat16 weights, else 4), a those in attention (on a CPU always 4, else c). Bytes:

    weights, gradients, reference   P w each; optimizer (AdamW's two moments, in the weights' dtype) 2 P w
    bfloat16 copies of weights      2 M under autocast (they live from the forward pass to the backward pass)
    activations of a layer          T (4 * 4 d + 4 h + c (x d + H + 4 f) + a (2 H + 2 K)): two norms keep fp32 input and output,
                                    attention its input and output; x = 2 inputs of projections (5 under autocast, which
                                    casts for each of q, k, v, gate, up); without a gate 2 f and one input less
    with gradient checkpointing     T d w for each layer's input, and all of the above for one layer at a time
    logits                          2 c each for T v of them, at most HELD: the head makes no more at a time; and gradients
    scoring (no gradients)          c v a token of 32 rows of each side, at most SCORED_LOGITS a side, at most HELD in all
    sampling                        keys and values of SAMPLED rows, 2 K L a a token (without autocast); on a CPU the weights
                                    in another layout, P w

    adapters (fp32)                 they alone have gradients, 4 bytes a number, and optimizer state, 8; r c a token of
                                    activations for each, with dropout also c an input, and for its mask c (CUDA: 1); the
                                    reference is the model without them, until the evaluation at the end, which loads policy
                                    and reference whole
    quantised weights               b / 8 a weight, and 2 an output (int8) or 4 a group (int4); the rest 2 a number; in a
                                    product the largest matrix is unpacked, 4 a number

At the peak of training live weights, optimizer, reference and the larger of gradients alone (the backward pass has ended)
and activations with logits (it begins; gradients are there as well if they accumulate). T counts both sides of pairs at the
longest length that is allowed; inputs of frozen layers count as if they were kept. Left out: the buffers of collective
operations (128 MiB), and what an allocator wastes: glibc's keeps freed blocks of less than 32 MB, which was up to .3 GB in
our measurements.
"""

from dataclasses import dataclass

import torch
from torch import nn

from xalign.evaluation.metrics import SCORED_LOGITS
from xalign.nn.linear import Linear
from xalign.nn.lora import LoRALinear
from xalign.nn.products import HELD
from xalign.nn.quantize import WIDTH
from xalign.nn.transformer import TransformerWrapper

PROGRAM = {"cpu": 400_000_000, "cuda": 1_000_000_000}  # torch and its libraries; the CUDA context (not measured here)
SCORED, SAMPLED = 64, 128  # rows that evaluation scores, and samples, at a time
CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Workload:
    """What a run does in one forward pass: `rows` sequences of at most `length` tokens (a pair is two rows)."""

    rows: int
    length: int
    accumulates: bool = False
    bf16: bool = False
    checkpointing: bool = False
    # or "idle" (all its log-probabilities are known before training), "asked" (at every step), "late" (after training alone)
    reference: str = "none"
    bits: int = 0  # of the frozen weights where they are quantised, 8 or 4
    group: int = 32  # weights that share a scale in 4 bits
    other: nn.Module | None = None  # the reference, where it is no copy of the policy
    device: str = "cpu"


@dataclass(frozen=True)
class Need:
    """Bytes by what they are for; the most that is alive at one time in training and in evaluation, and `peak` of both."""

    parts: dict[str, float]
    training: float
    evaluation: float

    @property
    def peak(self) -> float:
        """The larger of both, and torch itself."""
        return max(self.training, self.evaluation) + self.parts["torch itself"]

    def table(self, available: float, where: str) -> str:
        """The parts, the peak and what the device has, in GB of 10^9 bytes, for a person."""
        lines = [f"  {name:34}{number / 1e9:10.2f}" for name, number in self.parts.items() if number]
        fits = "" if self.peak <= available else (
            "\n  It does not fit. What helps, the cheapest first: --gradient-checkpointing; a smaller --batch-size with"
            "\n  more --gradient-accumulation-steps; a shorter --max-length; --bf16; adapters (--lora-r 16)")
        lines += [f"  {'at the peak':34}{self.peak / 1e9:10.2f}  of {available / 1e9:.1f} ({where})"]
        return "\n".join(lines) + fits


def size(model: nn.Module) -> float:
    """Bytes of a model's parameters."""
    return float(sum(p.numel() * p.element_size() for p in model.parameters()))


def stored(model: TransformerWrapper, work: Workload) -> float:
    """Bytes of a model's weights as they lie in memory while it is trained: adapters in fp32, frozen ones maybe quantised."""
    if not work.bits:
        return size(model)
    packed = [m.weight for m in model.attn_layers.modules() if type(m) is Linear and m.in_features % WIDTH == 0]
    scales = sum(4 * p.numel() / work.group if work.bits == 4 else 2 * len(p) for p in packed)
    ids = set(map(id, packed))
    rest = sum(p.numel() * (4 if p.requires_grad else 2) for p in model.parameters() if id(p) not in ids)
    return sum(p.numel() for p in packed) * work.bits / 8 + scales + rest


def training_memory(model: nn.Module, work: Workload) -> Need:
    """The memory of training `model` (on any device, the meta device as well); see this module's text."""
    assert isinstance(model, TransformerWrapper)
    options, layers = model.attn_layers.config, model.attn_layers
    parameters = list(model.parameters())
    held = stored(model, work)
    trained = float(sum(p.numel() * p.element_size() for p in parameters if p.requires_grad))
    adapters = [m for m in model.modules() if isinstance(m, LoRALinear)]
    whole = size(model) - trained if adapters else held  # as it is saved at the end
    w = 2 if work.bits else parameters[0].element_size()
    autocast = work.bf16 and w == 4
    c = 2 if autocast else w
    a, mask = (4, c) if work.device == "cpu" else (c, 1)
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    matrices = sum(p.numel() for p in parameters if p.ndim == 2 and not any(p is e for e in embeddings))
    if model.to_logits is None:
        matrices += model.token_emb.weight.numel()

    d, depth, v = layers.dim, layers.depth, model.num_tokens
    queries, keys = layers.heads * layers.dim_head, layers.kv_heads * layers.dim_head
    glu, norms = bool(options["ff_glu"]), 2 if options["use_rmsnorm"] else 1
    inputs = (3 if autocast else 1) + (2 if autocast and glu else 1)
    layer = (2 * norms * 4 * d + 4 * layers.heads + a * (2 * queries + 2 * keys)
             + c * (inputs * d + queries + (4 if glu else 2) * layers.inner_dim)
             + sum(c * len(m.lora_a) + (c + mask) * m.in_features * (m.dropout > 0) for m in adapters) / depth)
    tokens = work.rows * work.length
    end = tokens * (norms * 4 * d + c * d)
    activations = depth * tokens * (d * w if work.checkpointing else layer) + end
    again = tokens * layer if work.checkpointing else 0
    logits = min(tokens * v, HELD) * 2 * c  # once, and once more for the product that is the head's gradient

    reference = (whole if work.other is None else size(work.other)) if work.reference != "none" else 0.0
    beside = 0.0 if work.reference == "late" or (work.reference == "idle" and work.device != "cpu") else reference
    casts = 2.0 * matrices if autocast else 0.0
    where = {"none": "", "asked": "", "idle": " (in the host's memory)", "late": " (after training)"}
    parts = {"weights": held, "gradients": trained, "optimizer state": 2 * trained,
             "reference" + ("" if beside else where[work.reference]): reference,
             "weights in bfloat16": casts, "activations": float(activations + again), "logits": float(logits)}
    program = float(PROGRAM["cpu" if work.device == "cpu" else "cuda"])
    unpacked = 4.0 * max(p.numel() for p in parameters if p.ndim == 2 and p is not embeddings[0]) if work.bits else 0.0
    backward = activations + casts + max(logits, again + unpacked)
    training = held + 2 * trained + beside + (trained + backward if work.accumulates else max(trained, backward))
    scored = min(min(SCORED * work.length, max(2 * work.length, 2 * SCORED_LOGITS // v)) * v, HELD) * c
    cpu = work.device == "cpu"
    sampled = SAMPLED * work.length * 2 * keys * depth * (4 if cpu else w) + (whole if cpu else 0)
    evaluation = max(held + 2 * trained + reference * (beside > 0) + casts + scored, whole + reference + sampled)
    parts |= {"evaluation (scores, samples)": float(max(scored, sampled)), "torch itself": program}
    return Need(parts, training, evaluation)


def available(device: torch.device) -> tuple[float, str]:
    """Bytes of memory that a device has in all, and what it is called."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return float(properties.total_memory), properties.name
    import os

    limits = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    for file in CGROUP:  # a container's share of the machine
        try:
            with open(file) as f:
                limits.append(float(f.read()))
        except (OSError, ValueError):
            continue
    return min(limits), "RAM"
