"""The decoder: `TransformerWrapper(attn_layers=Decoder(...))`, with x-transformers' names where it has them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xalign.errors import ConfigError, reject_unknown
from xalign.nn.attention import Attention, Context, alibi_slopes
from xalign.nn.branches import BranchContext, Branches, attend_branches
from xalign.nn.cache import Cache, DecodeBuffer, Prefix
from xalign.nn.linear import Linear, product, products
from xalign.nn.products import target_logprobs
from xalign.nn.rotary import check_scaling, rotary_angles

# Initial standard deviations: of matrices 1 / sqrt(inputs), of the layers' last ones / sqrt(2 depth) more (Radford et
# al. 2019), of embeddings this over sqrt(dim): large enough to be heard beside what the layers add, so that copying from
# the prompt is learnt early (docs/log.md: 0.3 against the usual 0.02 at dim 128 is worth three times as many steps).
EMBEDDING_SCALE = 3.4
_WHOLE = {"num_tokens", "max_seq_len", "dim", "depth", "heads", "attn_kv_heads", "attn_dim_head", "attn_sliding_window",
          "ff_inner_dim", "rotary_dim"}


def _checked(where: str, values: dict[str, Any]) -> dict[str, Any]:
    """Take the caller's locals() as a configuration: reject unknown options, drop what is no option."""
    options = {k: v for k, v in values.items() if k not in ("self", "unknown", "__class__")}
    reject_unknown(where, values["unknown"], options)
    for name, value in options.items():
        if name.endswith("dropout") and not 0 <= value < 1:
            raise ConfigError(f"{where}: {name} is {value!r}, allowed is a number in [0, 1)")
        if name in _WHOLE and value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{where}: {name} is {value!r}, allowed is a whole number >= 1")
        if name in ("ff_mult", "norm_eps", "rotary_base") and not 0 < value < math.inf:
            raise ConfigError(f"{where}: {name} is {value!r}, allowed is a finite number > 0")
    return options


class FeedForward(nn.Module):
    """`down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv 2002.05202), or `down(act(up(x)))` without a gate."""

    def __init__(self, dim: int, inner: int, *, glu: bool, act: Callable[[Tensor], Tensor], bias: bool, dropout: float):
        super().__init__()
        self.gate = Linear(dim, inner, bias=bias) if glu else None
        self.up = Linear(dim, inner, bias=bias)
        self.down = Linear(inner, dim, bias=bias)
        self.act = act
        self.dropout = nn.Dropout(dropout)

    def grouped(self) -> list[list[nn.Module]]:
        return [[self.up] if self.gate is None else [self.gate, self.up], [self.down]]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            hidden = self.act(self.up(x))
        else:
            gate, up = products(x, (self.gate, self.up))
            hidden = self.act(gate) * up
        return self.down(self.dropout(hidden))


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` (Zhang & Sennrich 2019, arXiv 1910.07467); of a single row on a CPU by fewer calls, equal but for rounding.

    There torch's own is ten small operations. x and -x together have mean 0, so that their layer norm, one operation,
    divides x by its root mean square.
    """

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() == x.shape[-1] and x.device.type == "cpu" and self.eps is not None
        if not few or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        both = torch.stack((x, -x), -2)
        return F.layer_norm(both, both.shape[-2:], self.weight.expand(2, -1), None, self.eps or 0)[..., 0, :]


class Block(nn.Module):
    """One pre-norm layer; with `parallel` both halves read the same input (as GPT-NeoX does)."""

    def __init__(self, attn_norm: nn.Module, attn: Attention, ff_norm: nn.Module, ff: FeedForward, parallel: bool):
        super().__init__()
        self.attn_norm, self.attn, self.ff_norm, self.ff, self.parallel = attn_norm, attn, ff_norm, ff, parallel

    def forward(self, x: Tensor, context: Context, unused: int = 0) -> Tensor:
        """x (b, n, d) -> (b, n, d); the first `unused` positions are only attended to, and get no output."""
        normed = self.attn_norm(x)
        if isinstance(context, BranchContext):
            attended, x = attend_branches(self.attn, normed, context, unused), x[:, unused:]
        else:
            attended = self.attn(normed, context)
        attended = x + attended
        return attended + self.ff(self.ff_norm(x if self.parallel else attended))


class Decoder(nn.Module):
    """A stack of causal pre-norm layers with a final norm; x (b, n, d) -> (b, n, d).

    Defaults are x-transformers': `attn_kv_heads = heads`, `attn_dim_head = 64`, no rotary, LayerNorm, GELU
    without a gate, biases in the feed-forward. Beyond them: `norm_eps`, `attn_qkv_bias`, `attn_out_bias`,
    `ff_inner_dim` (the exact feed-forward width), `ff_gelu_tanh` (GELU by its tanh formula), `rotary_dim` (rotate only
    the first features of a head), `rotary_scaling` (a dict with Hugging Face's fields: `rope_type` linear, llama3, yarn or
    dynamic, and what it needs: `xalign.nn.rotary`), `attn_sliding_window` (a token sees itself and the window - 1 positions
    before it), `parallel_residual`. Where x-transformers rotates half of each head, all of it is rotated here.
    """

    def __init__(self, *, dim: int, depth: int, heads: int = 8, attn_dim_head: int = 64, attn_kv_heads: int | None = None,
                 attn_dropout: float = 0.0, attn_flash: bool = False, attn_qk_norm: bool = False,
                 attn_qkv_bias: bool = False, attn_out_bias: bool = False, alibi_pos_bias: bool = False,
                 rotary_pos_emb: bool = False, rotary_base: float = 10000.0, rotary_dim: int | None = None,
                 rotary_scaling: dict[str, Any] | None = None, attn_sliding_window: int | None = None,
                 use_rmsnorm: bool = False, norm_eps: float = 1e-5, ff_mult: float = 4, ff_inner_dim: int | None = None,
                 ff_glu: bool = False, ff_swish: bool = False, ff_gelu_tanh: bool = False, ff_no_bias: bool = False,
                 ff_dropout: float = 0.0, parallel_residual: bool = False, **unknown: Any):
        self.config = _checked("Decoder", locals())
        super().__init__()
        kv_heads = heads if attn_kv_heads is None else attn_kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ConfigError(f"attn_kv_heads is {kv_heads}, allowed is a divisor of heads = {heads}")
        rotated = attn_dim_head if rotary_dim is None else rotary_dim
        if rotary_pos_emb and (rotated % 2 or not 0 < rotated <= attn_dim_head):
            raise ConfigError(f"rotary_dim is {rotated}, allowed is an even number up to attn_dim_head = {attn_dim_head}")
        if rotary_pos_emb and alibi_pos_bias:
            raise ConfigError("rotary_pos_emb and alibi_pos_bias are both True, allowed is one of them")
        self.dim, self.depth, self.heads, self.kv_heads, self.dim_head = dim, depth, heads, kv_heads, attn_dim_head
        if rotary_scaling is not None:
            if not rotary_pos_emb:
                raise ConfigError("rotary_scaling is given and rotary_pos_emb is False, allowed is both")
            check_scaling(rotary_scaling, rotary_base)
        if ff_swish and ff_gelu_tanh:
            raise ConfigError("ff_swish and ff_gelu_tanh are both True, allowed is one of them")
        self.rotary = (rotated, rotary_base, rotary_scaling) if rotary_pos_emb else None
        self.alibi, self.window = alibi_pos_bias, attn_sliding_window
        self.max_positions: int | None = None
        if rotary_scaling is not None and rotary_scaling["rope_type"] == "dynamic":
            self.max_positions = rotary_scaling["original_max_position_embeddings"]
        self.gradient_checkpointing = False

        act = F.silu if ff_swish else partial(F.gelu, approximate="tanh" if ff_gelu_tanh else "none")

        def norm() -> nn.Module:
            return RMSNorm(dim, eps=norm_eps) if use_rmsnorm else nn.LayerNorm(dim, eps=norm_eps)

        self.inner_dim = inner = int(dim * ff_mult) if ff_inner_dim is None else ff_inner_dim
        self.layers = nn.ModuleList(
            Block(
                norm(),
                Attention(dim, i, heads=heads, kv_heads=kv_heads, dim_head=attn_dim_head, dropout=attn_dropout,
                          flash=attn_flash, qk_norm=attn_qk_norm, qkv_bias=attn_qkv_bias, out_bias=attn_out_bias,
                          norm_eps=norm_eps),
                norm(),
                FeedForward(dim, inner, glu=ff_glu, act=act, bias=not ff_no_bias, dropout=ff_dropout),
                parallel_residual,
            )
            for i in range(depth)
        )
        self.final_norm = norm()
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                residual = name.endswith(("to_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=(parameter.shape[1] * (2 * depth if residual else 1)) ** -0.5)

    def context(self, positions: Tensor, mask: Tensor | None, cache: Cache | None) -> Context:
        """What the layers share: `positions` (b | 1, past + n) count real tokens, `mask` likewise is True on them."""
        behind, m = cache.length if cache is not None else 0, positions.shape[1]
        rotation = self._rotation(positions[:, behind:])
        windowed = self.window is not None and m > self.window  # else it holds all that came before
        plain = mask is None and not self.alibi and not windowed
        if plain and (behind == 0 or m - behind == 1):
            return Context(None, behind == 0, rotation, cache)
        slots = torch.arange(m, device=positions.device)
        allowed = (slots <= slots[behind:, None])[None, None]
        if mask is not None:
            # a padding query sees at least itself, so that no softmax is empty; nobody sees it
            allowed = allowed & (mask[:, None, None] | (slots == slots[behind:, None]))
        return Context(self._bias(allowed, positions[:, behind:], positions, windowed), False, rotation, cache)

    def step_context(self, buffer: DecodeBuffer) -> Context:
        """The same where each row goes on by one token, from its own length."""
        at, (mask, seen) = buffer.positions(), buffer.seen()
        windowed = self.window is not None and seen.shape[1] > self.window
        allowed = None if mask is None else mask[:, None, None]
        if self.alibi or windowed:
            allowed = at.new_ones((), dtype=torch.bool) if allowed is None else allowed
            allowed = self._bias(allowed, at, seen, windowed)
        return Context(allowed, False, self._rotation(at), buffer)

    def branch_context(self, branches: Branches) -> BranchContext:
        """The same for tokens (1, t) without padding."""
        rotation, device = self._rotation(branches.positions[None]), branches.positions.device
        # what begins at position 0: beginnings, or branches where there are none
        first = self.context(torch.arange((branches.heads or branches.tails).width, device=device)[None], None, None)
        if branches.heads is None:
            return BranchContext(first.bias, first.causal, rotation, None, branches, first)
        queries, keys, allowed = branches.seen()
        bias = self._bias(allowed, queries, keys, self.window is not None and keys.shape[1] > self.window)
        return BranchContext(bias, False, rotation, None, branches, first)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.rotary is None:
            return None
        cos, sin = rotary_angles(positions, *self.rotary)
        return cos[:, None], sin[:, None]

    def _bias(self, allowed: Tensor, queries: Tensor, keys: Tensor, windowed: bool) -> Tensor:
        """`allowed` (b | 1, 1, n, m) and what the window and ALiBi add, by positions (b | 1, n) and (b | 1, m)."""
        distance = queries[:, None, :, None] - keys[:, None, None, :]
        if windowed:
            allowed = allowed & (distance < (self.window or 0))
        if not self.alibi:
            return allowed
        slopes = alibi_slopes(self.heads, keys.device)[:, None, None]
        return (-slopes * distance.float()).masked_fill(~allowed, float("-inf"))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        for layer in self.layers:
            # of the last layer nobody reads what the branches' common beginnings give
            unused = context.branches.shared if isinstance(context, BranchContext) and layer is self.layers[-1] else 0
            if self.gradient_checkpointing and self.training and context.cache is None:
                x = checkpoint(layer, x, context, unused, use_reentrant=False)
            else:
                x = layer(x, context, unused)
        return self.final_norm(x)


class TransformerWrapper(nn.Module):
    """Token ids (b, n) -> logits (b, n, v): embedding, `attn_layers`, head.

    `mask` (b, n) is True on real tokens; positions count real tokens, so padding on either side changes
    nothing. Rotary positions or ALiBi in `attn_layers` switch the learnt absolute positions off.
    """

    def __init__(self, *, num_tokens: int, max_seq_len: int, attn_layers: Decoder, emb_dropout: float = 0.0,
                 use_abs_pos_emb: bool = True, tie_embedding: bool = False, **unknown: Any):
        self.config = _checked("TransformerWrapper", locals())
        del self.config["attn_layers"]
        super().__init__()
        dim = attn_layers.dim
        self.num_tokens, self.max_seq_len = num_tokens, max_seq_len
        self.generation: dict[str, Any] = {}  # the generation_config.json that it came with: saved again, not used
        self.token_emb = nn.Embedding(num_tokens, dim)
        absolute = use_abs_pos_emb and attn_layers.rotary is None and not attn_layers.alibi
        self.pos_emb = nn.Embedding(max_seq_len, dim) if absolute else None
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.attn_layers = attn_layers
        self.to_logits = None if tie_embedding else Linear(dim, num_tokens, bias=False)
        for module, scale in ((self.token_emb, EMBEDDING_SCALE), (self.pos_emb, EMBEDDING_SCALE), (self.to_logits, 1.0)):
            if module is not None:
                nn.init.normal_(module.weight, std=scale * dim**-0.5)

    def decode_buffer(self, rows: int, capacity: int, **shape: Any) -> DecodeBuffer:
        """An empty preallocated cache for `rows` rows of up to `capacity` tokens; `shape` as `DecodeBuffer` takes it."""
        layers, device = self.attn_layers, self.token_emb.weight.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.token_emb.weight.dtype
        # a CPU multiplies a few bf16 rows by bf16 keys no faster than fp32 ones (docs/log.md)
        dtype = torch.float32 if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else dtype
        return DecodeBuffer(layers.depth, rows, layers.kv_heads, capacity, layers.dim_head, dtype, device, **shape)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, *, cache: Prefix | None = None,
                input_not_include_cache: bool = False, return_intermediates: bool = False,
                return_embeddings: bool = False) -> Any:
        """Give logits (b, n, v), or with `return_intermediates` (logits, cache) to go on from.

        With a `cache` the tokens continue it (b may be a multiple of a prefix's rows) and only the new
        tokens' logits come back; unless `input_not_include_cache`, `tokens` and `mask` begin with the cached ones.
        `return_embeddings` gives the final hidden states (b, n, d) instead of logits.
        Raises `ValueError` for ids outside the vocabulary (on the CPU) and for more positions than the learnt ones or
        dynamic RoPE have.
        """
        if cache is not None and cache.keys and len(cache.keys) != self.attn_layers.depth:
            raise ValueError(f"the cache has {len(cache.keys)} layers, allowed is one of this model, {self.attn_layers.depth}")
        if cache is not None and not input_not_include_cache:
            if tokens.shape[1] < cache.length:
                raise ValueError(f"{tokens.shape[1]} tokens are fewer than the {cache.length} cached ones, allowed is all of "
                                 "them and the new ones, or input_not_include_cache=True")
            tokens = tokens[:, cache.length :]
            mask = None if mask is None else mask[:, cache.length :]
        b, n = tokens.shape
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, allowed is that of the tokens, {(b, n)}")
        self.check_ids(tokens)
        grown = cache.branch(b) if cache is not None else Prefix.empty() if return_intermediates else None
        behind = grown.length if grown is not None else 0
        positions, whole = self._positions(tokens, mask, grown.mask if grown is not None else None, behind)

        if self.attn_layers.max_positions is not None:
            self._check_positions(positions, whole, self.attn_layers.max_positions,
                                  "dynamic RoPE goes up to its original length, {}")
        x = self.token_emb(tokens)
        if self.pos_emb is not None:
            self._check_positions(positions, whole, self.max_seq_len, "max_seq_len is {} and the positions are absolute")
            x = x + self.pos_emb(positions[:, behind:])
        x = self.attn_layers(self.emb_dropout(x), self.attn_layers.context(positions, whole, grown))
        out = x if return_embeddings else self.logits(x)
        return (out, None if grown is None else grown.advance(whole, n)) if return_intermediates else out

    def step(self, tokens: Tensor, buffer: DecodeBuffer, live: Tensor | None = None) -> Tensor:
        """Go on from `buffer` by a token a row, (b,), under no_grad: logits (b, v) of the tokens that come next.

        Rows that are False in `live` (b,) don't grow. Nothing is read on the host, so neither ids nor positions are checked.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("a decode buffer is written in place: use it under torch.no_grad()")
        if tokens.shape != buffer.rows.shape:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, allowed is one for each row of this decode buffer, "
                             f"({len(buffer.rows)},)")
        x = self.token_emb(tokens[:, None])
        if self.pos_emb is not None:
            # a row that stands still may have filled its window: any position will do
            x = x + self.pos_emb(buffer.positions().clamp(max=self.max_seq_len - 1))
        x = self.attn_layers(x, self.attn_layers.step_context(buffer))
        buffer.advance(live)
        return self.logits(x[:, 0])

    def branch_logprobs(self, tokens: Tensor, begin: Tensor, end: Tensor, sides: int, rows: Tensor, columns: Tensor,
                        targets: Tensor, squares: bool = False) -> Any:
        """Log-probabilities (m,), nats, fp32, of the `targets` (m,) behind these `rows` and `columns` (m,) of tokens (b, n).

        With `squares` also the log of the sum of the squared probabilities at these places, (m,), as `target_logprobs`.

        `Branches` says what begin, end (b,) and `sides` mean; columns are those of branches. No padding runs through
        the layers, and never are more than `products.HELD` logits held. Raises `ValueError` as the model's call does.
        """
        self.check_ids(targets)
        hidden = self.branch_hidden(tokens, begin, end, sides, rows, columns)
        head: Any = self.token_emb if self.to_logits is None else self.to_logits
        if isinstance(head, (Linear, nn.Embedding)):
            return target_logprobs(hidden, head.weight, targets, squares=squares)
        with torch.no_grad():  # quantised: its product with 1 is the weight
            weight = head(torch.eye(hidden.shape[1], dtype=hidden.dtype, device=hidden.device)).t()
        return target_logprobs(hidden, weight, targets, squares=squares)

    def branch_hidden(self, tokens: Tensor, begin: Tensor, end: Tensor, sides: int, rows: Tensor, columns: Tensor) -> Tensor:
        """Final hidden states (m, d) at these `rows` and `columns` (m,) of tokens (b, n); arguments as in `branch_logprobs`."""
        branches = Branches(tokens, begin, end, sides)
        self.check_ids(branches.tokens)
        layers = self.attn_layers
        if layers.max_positions is not None:
            self._check_length(int(end.max()), layers.max_positions, "dynamic RoPE goes up to its original length, {}")
        x = self.token_emb(branches.tokens)
        if self.pos_emb is not None:
            self._check_length(int(end.max()), self.max_seq_len, "max_seq_len is {} and the positions are absolute")
            x = x + self.pos_emb(branches.positions.clamp(max=self.max_seq_len - 1))  # further there is only padding
        hidden = layers(self.emb_dropout(x)[None], layers.branch_context(branches))[0]
        return hidden.index_select(0, branches.places(rows, columns))

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: final hidden states (..., d) -> logits (..., v)."""
        return product(hidden, self.token_emb) if self.to_logits is None else self.to_logits(hidden)

    def grouped(self) -> list[list[nn.Module]]:
        return [[self.token_emb if self.to_logits is None else self.to_logits]]

    @staticmethod
    def _positions(tokens: Tensor, mask: Tensor | None, past: Tensor | None, behind: int) -> tuple[Tensor, Tensor | None]:
        b, n = tokens.shape
        if mask is None and past is None:
            return torch.arange(behind + n, device=tokens.device)[None], None
        parts = (past if past is not None else tokens.new_ones((b, behind), dtype=torch.bool),
                 mask.bool() if mask is not None else torch.ones_like(tokens, dtype=torch.bool))
        whole = torch.cat(parts, 1)
        return (whole.cumsum(1) - 1).clamp(min=0), whole

    def check_ids(self, tokens: Tensor) -> None:
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = (int(t) for t in tokens.aminmax())
            if low < 0 or high >= self.num_tokens:
                raise ValueError(f"token id {low if low < 0 else high}, allowed is 0 to {self.num_tokens - 1}")

    @staticmethod
    def _check_positions(positions: Tensor, mask: Tensor | None, limit: int, why: str) -> None:
        # only padding can make more slots than positions, and only then is the device asked
        n = positions.shape[1] if mask is None or positions.shape[1] <= limit else int(positions.max()) + 1
        TransformerWrapper._check_length(n, limit, why)

    @staticmethod
    def _check_length(n: int, limit: int, why: str) -> None:
        if n > limit:
            raise ValueError(f"{n} tokens, but {why.format(limit)}")
