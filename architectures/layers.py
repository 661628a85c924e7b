"""Building blocks shared by two or more architectures, and the model that they hang in.

Letters in shape comments, for the whole kit:
    B batch   T time   D model_dim   H num_heads   K key dim and V value dim per head (V also vocab_size)   N state dim
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.kernels.cross_entropy import MAX_SOFTCAP, softcapped_cross_entropy

MAX_BLOCKED_SEQ_LEN = 1536  # of blocked attention, 1024 and room for pauses: what it keeps for backward grows with T^2
FUSED_VOCAB_SIZE = 4096  # from here on the streamed loss beats what torch.compile makes of the plain one


@dataclass
class ModelConfig:
    """What every architecture has; a subclass adds fields. Each field is an environment variable in capitals."""

    env_prefix: ClassVar[str] = ""  # "TI_": every variable that starts so must be a field of this Config
    neutral: ClassVar[dict | None] = None  # the settings, if any, with which the model equals gpt bit for bit

    vocab_size: int = 1024
    train_seq_len: int = 1024  # tokens of context in training, and in scoring unless EVAL_SEQ_LEN says otherwise
    num_layers: int = 9
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: int = 2  # hidden width of the MLP over model_dim
    tie_embeddings: bool = True
    tied_embed_init_std: float = 0.005
    logit_softcap: float = 30.0
    rope_base: float = 10_000.0
    qk_gain_init: float = 1.5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "train_seq_len", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 1")
        if self.model_dim % (2 * self.num_heads):
            raise ValueError(
                f"MODEL_DIM={self.model_dim} must be a multiple of 2 x NUM_HEADS={self.num_heads}: RoPE turns pairs"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"NUM_HEADS={self.num_heads} must be a multiple of NUM_KV_HEADS={self.num_kv_heads}")
        if self.logit_softcap <= 0:
            raise ValueError(f"LOGIT_SOFTCAP={self.logit_softcap} must be above 0")

    def num_params(self) -> int:
        """The closed form of the model's parameter count; an architecture with other weights says its own."""
        return self.embed_params() + self.num_layers * self.block_params() + (self.num_layers // 2) * self.model_dim

    def embed_params(self) -> int:
        return self.vocab_size * self.model_dim * (1 if self.tie_embeddings else 2)

    def attention_params(self) -> int:
        D = self.model_dim
        return 2 * D * D + 2 * D * self.num_kv_heads * self.head_dim + self.num_heads  # query, out; key, value; q_gain

    def block_params(self) -> int:
        D = self.model_dim  # two matrices of the MLP, two scales and a pair of mixes per channel
        return self.attention_params() + 2 * self.mlp_mult * D * D + 4 * D

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads


def control(param: nn.Parameter) -> nn.Parameter:
    """The same parameter, marked delicate: trained by Adam, kept in fp32, never quantised."""
    param.is_control = True
    return param


def is_control(param: Tensor) -> bool:
    """True for what `control` has marked and for vectors: gains, biases, decays."""
    return getattr(param, "is_control", False) or param.ndim < 2


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 inside, where weights are made: a model rebuilt on another device must have the same."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rms_norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
    """x over its root mean square along the last dimension (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467),
    times a gain (..., 1), which changes what a row is divided by: its gradient comes with that of the norm.
    """
    if gain is None:
        return F.rms_norm(x, (x.size(-1),))
    wide = x.to(torch.promote_types(x.dtype, gain.dtype))
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + torch.finfo(wide.dtype).eps)
    return (wide * (scale * gain)).to(x.dtype)


class Linear(nn.Linear):
    """Bias-free linear whose fp32 weight is cast to the activation's dtype at matmul time."""

    takes_scale = True

    def __init__(self, in_features: int, out_features: int, zero_init: bool = False):
        super().__init__(in_features, out_features, bias=False)
        if zero_init:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """x (..., in) to (..., out), the output's channels times scale (out)."""
        return F.linear(x, self.matrix(x.dtype, scale))

    def matrix(self, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        """What x is multiplied by, (out, in): the weight, its rows times scale, in dtype."""
        return (self.weight if scale is None else self.weight * scale[:, None]).to(dtype)


class Rotary(nn.Module):
    """Rotary position embedding, halves rotated (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

    def __init__(self, head_dim: int, base: float, seq_len: int):
        super().__init__()
        self.head_dim, self.base = head_dim, base
        cos, sin = self.tables(seq_len, None)
        self.register_buffer("cos", cos, persistent=False)  # (seq_len, K / 2)
        self.register_buffer("sin", sin, persistent=False)

    def tables(self, seq_len: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """cos and sin of every position times every frequency, each (seq_len, K / 2), fp32."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), self.base**-exponents)
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, H, K) with position t's pairs turned by t times their frequency."""
        T = x.size(1)
        cos, sin = (self.cos[:T], self.sin[:T]) if self.cos.size(0) >= T else self.tables(T, x.device)
        cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        first, second = x.chunk(2, dim=-1)  # each (B, T, H, K / 2)
        return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q (B, H, T, K) over k, v (B, H or fewer, T, K) up to its own position, in q's dtype."""
    return attention(q, k, v, is_causal=True)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Softmax attention of q (B, H, T, K) over k, v (B, H or fewer, S, K) where mask, (T, S) or more, is true, or over
    all, by the fastest kernel that there is, in q's dtype."""
    dtype = q.dtype
    if q.device.type == "cpu" and dtype == torch.bfloat16:
        steps = torch.compiler.is_compiling() and torch.is_grad_enabled()
        if steps and mask is None and k.size(-2) <= MAX_BLOCKED_SEQ_LEN:
            return blocked_attention(q, k, v, is_causal)
        q, k, v = q.float(), k.float(), v.float()  # PyTorch's backward in bf16 takes three times as long
    grouped = q.size(1) != k.size(1)
    if grouped and q.device.type == "cuda" and dtype == torch.float32:  # no kernel takes both but one that keeps scores
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped).to(dtype)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """The same, by matrix products of blocks of queries with the keys that they see, for a compiled bf16 step on CPU.

    Keeps for backward, beside its arguments and result, H S bytes of weights per token if causal, else twice that.
    """
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    q = (q * K**-0.5).reshape(B * G, H // G, T, K)  # the heads that share keys side by side
    k, v = k.reshape(B * G, S, K), v.reshape(B * G, S, -1)
    bias = later_keys(block_rows(T), T) if is_causal else None
    return BlockedAttention.apply(q, k, v, bias).view(B, H, T, -1)


def block_rows(T: int) -> int:
    """Queries of a block: enough to fill a matrix product, few enough that a causal one sees few keys in vain."""
    return min(T, max(64, -(-T // 8)))


class BlockedAttention(torch.autograd.Function):
    """Attention of scaled q (N, R, T, K) over k, v (N, S, K): R heads with the same keys. bias: later_keys, or None.

    With w = exp(scores - max) rounded to q's dtype and s = sum_j w_j, both ways go by w alone, not w / s: what is read
    is y = (w v) / s, the gradients of scores and values w (dy v^T - dy y^T) / s and w^T (dy / s). Written out, for
    derived from the forward pass it reads the scores again, and fills every block's gradient up to the whole.
    """

    @staticmethod
    def blocks(T: int, S: int, is_causal: bool) -> list[tuple[int, int, int]]:
        """(first query, last query + 1, keys seen) of every block."""
        starts = [*range(0, T, block_rows(T))]
        return [(start, end, end if is_causal else S) for start, end in zip(starts, [*starts[1:], T], strict=True)]

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        N, R, T, K = q.shape
        ctx.blocks = BlockedAttention.blocks(T, k.size(1), bias is not None)
        parts, kept = [], []
        for start, end, seen in ctx.blocks:
            keys, values = k[:, :seen].contiguous(), v[:, :seen].contiguous()  # else bmm makes copies, and slower ones
            scores = torch.bmm(q[:, :, start:end].reshape(N, -1, K), keys.mT)
            scores = scores.view(N, R, end - start, seen).float()
            if bias is not None:
                scores = scores + bias[start - end :, T - end :]
            weights = (scores - scores.amax(-1, keepdim=True)).exp().to(v.dtype)
            total = weights.sum(-1, keepdim=True, dtype=torch.float32)
            read = torch.bmm(weights.view(N, -1, seen), values).view(N, R, end - start, -1)
            parts.append((read / total).to(v.dtype))
            kept += weights, total
        y = torch.cat(parts, dim=2)
        ctx.save_for_backward(q, k, v, y, *kept)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *kept = ctx.saved_tensors
        N, R, _, K = q.shape
        along = (dy.float() * y.float()).sum(-1, keepdim=True)  # (N, R, T, 1)
        dq, dk, dv = [], [], []
        for (start, end, seen), weights, total in zip(ctx.blocks, kept[::2], kept[1::2], strict=True):
            keys, values = k[:, :seen].contiguous(), v[:, :seen].contiguous()
            dread = (dy[:, :, start:end] / total).to(v.dtype).reshape(N, -1, v.size(-1))
            dweights = torch.bmm(dread, values.mT).view_as(weights)
            dscores = (weights * (dweights - along[:, :, start:end] / total)).to(q.dtype).view(N, -1, seen)
            dq.append(torch.bmm(dscores, keys).view(N, R, end - start, K))
            # (q^T w)^T, not w^T q: the larger factor is read as it lies.
            dk.append(torch.bmm(q[:, :, start:end].reshape(N, -1, K).mT, dscores).mT)
            dv.append(torch.bmm(dread.mT, weights.view(N, -1, seen)).mT)
        return torch.cat(dq, dim=2), sum_of_blocks(dk), sum_of_blocks(dv), None


def sum_of_blocks(parts: list[Tensor]) -> Tensor:
    """The sum of parts (N, n, K) that are no shorter than the part before, where zeros follow the shorter ones."""
    begins = [0, *(part.size(1) for part in parts[:-1])]
    columns = [
        sum(part[:, begin : own.size(1)] for part in parts[i:])
        for i, (begin, own) in enumerate(zip(begins, parts, strict=True))
        if begin < own.size(1)
    ]
    return torch.cat(columns, dim=1)


def later_keys(rows: int, T: int) -> Tensor:
    """(rows, T) to add to the scores of the last of T queries: -inf where a key is later than the query, else 0.

    Without its first n columns it is right for the queries n earlier.
    """
    return LATER_KEYS[LATER_KEYS.size(0) - rows :, LATER_KEYS.size(1) - T :]


# At its largest, made once: computed inside a graph it would be made anew, slowly, in every softmax.
LATER_KEYS = torch.full((block_rows(MAX_BLOCKED_SEQ_LEN), MAX_BLOCKED_SEQ_LEN), -torch.inf).triu(
    1 + MAX_BLOCKED_SEQ_LEN - block_rows(MAX_BLOCKED_SEQ_LEN)
)


def short_conv(x: Tensor, taps: Tensor, before: Tensor | None = None) -> Tensor:
    """Each channel of x (B, T, n) convolved with its own taps (n, d_conv), the last of which meets the present.

    before (B, d_conv - 1, n) is what came before x; None: zeros.
    """
    if before is None and torch.compiler.is_compiling():
        return ShortConv.apply(x, taps)
    padded = F.pad(x, (0, 0, taps.size(1) - 1, 0)) if before is None else torch.cat((before, x), dim=1)
    return sum(padded[:, i : i + x.size(1)] * tap for i, tap in enumerate(taps.to(x.dtype).unbind(1)))


class ShortConv(torch.autograd.Function):
    """The convolution after zeros, for a compiler: a kernel of its making reads a shifted x as it lies, and the padded
    copy is never in memory. The gradients are written out, for those derived go by the copies that were made before.
    """

    @staticmethod
    def shifted(x: Tensor, steps: int) -> Tensor:
        """x (B, T, n) that many steps later, zeros where there is none."""
        return F.pad(x, (0, 0, steps, -steps)) if abs(steps) < x.size(1) else torch.zeros_like(x)

    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps)
        late = reversed(range(taps.size(1)))
        return sum(ShortConv.shifted(x, i) * tap for i, tap in zip(late, taps.to(x.dtype).unbind(1), strict=True))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, taps = ctx.saved_tensors
        earlier = [ShortConv.shifted(dy, -i) for i in reversed(range(taps.size(1)))]
        dx = sum(d * tap for d, tap in zip(earlier, taps.to(x.dtype).unbind(1), strict=True))
        # Not dy times a later x: what the forward pass has made already would be kept for it.
        return dx, torch.stack([(d * x).sum((0, 1), dtype=taps.dtype) for d in earlier], dim=1)


def inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))


def scaled(layer: nn.Module, x: Tensor, scale: Tensor | None) -> Tensor:
    """layer(x), (B, T, D), its channels times scale (D), if there is one.

    A layer with `takes_scale` ends in a Linear and has the scale multiply that matrix: then nothing is computed per
    token, and nothing is kept of the layer's output or read again for the gradient of the scale.
    """
    if scale is None:
        return layer(x)
    return layer(x, scale) if getattr(layer, "takes_scale", False) else scale.to(x.dtype) * layer(x)


class CausalSelfAttention(nn.Module):
    """Grouped-query softmax attention with QK-norm and RoPE (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245)."""

    takes_scale = True

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        kv_dim = config.num_kv_heads * config.head_dim
        self.query = Linear(config.model_dim, config.model_dim)
        self.key = Linear(config.model_dim, kv_dim)
        self.value = Linear(config.model_dim, kv_dim)
        self.rotary = Rotary(config.head_dim, config.rope_base, config.train_seq_len)
        self.q_gain = control(nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init)))
        self.out = Linear(config.model_dim, config.model_dim, zero_init=True)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); position t sees positions up to t."""
        y = self.attend(*self.heads(x))
        return scaled(self.out, y.transpose(1, 2).reshape(x.shape), scale)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, K), keys and values (B, num_kv_heads, T, K) of x (B, T, D)."""
        B, T, _ = x.shape
        # (B, T, H, K) up to attention: a compiler makes one kernel of norm and rotation if both go by the same order.
        q = rms_norm(self.query(x).view(B, T, self.num_heads, -1), self.q_gain[:, None])
        k = rms_norm(self.key(x).view(B, T, self.num_kv_heads, -1))
        v = self.value(x).view(B, T, self.num_kv_heads, -1)
        return self.rotary(q).transpose(1, 2), self.rotary(k).transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What is read, (B, H, T, K), by q (B, H, T, K) of k, v (B, num_kv_heads, T, K)."""
        return causal_attention(q, k, v)


class MLP(nn.Module):
    """relu^2 MLP (So et al. 2021, https://arxiv.org/abs/2109.08668)."""

    takes_scale = True

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = Linear(config.model_dim, config.mlp_mult * config.model_dim)
        self.down = Linear(config.mlp_mult * config.model_dim, config.model_dim, zero_init=True)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return scaled(self.down, F.relu(self.up(x)).square(), scale)


class Block(nn.Module):
    """Pre-norm residual block: one token mixer, one MLP, each scaled per channel; the embedding x0 is mixed back in."""

    def __init__(self, mixer: nn.Module, config: ModelConfig):
        super().__init__()
        self.mixer = mixer
        self.mlp = MLP(config)
        self.mixer_scale = control(nn.Parameter(torch.ones(config.model_dim)))
        self.mlp_scale = control(nn.Parameter(torch.ones(config.model_dim)))
        self.resid_mix = control(
            nn.Parameter(torch.stack((torch.ones(config.model_dim), torch.zeros(config.model_dim))))
        )

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        """x and x0 (B, T, D) to (B, T, D); x0 is the normalised embedding."""
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + scaled(self.mixer, rms_norm(x), self.mixer_scale)
        return x + scaled(self.mlp, rms_norm(x), self.mlp_scale)


class LanguageModel(nn.Module):
    """Tied embedding, a stack of blocks, softcapped head. An architecture overrides the smallest hook that says it.

    What the trainer relies on: `forward(input_ids, target_ids)` is the training loss, `nats(...)` scores each target,
    parameters carry their own treatment (`control`), and only the parameters and persistent buffers of `folded()` cost
    bytes.
    """

    progress_switches: ClassVar[tuple[float, ...]] = ()  # fractions of the run at which on_progress changes the graph
    gauge_names: ClassVar[tuple[str, ...]] = ()  # of numbers that say whether the idea is at work, for the log

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32  # of the activations; set by the trainer, followed by every Linear
        if self.gauge_names:  # a buffer, for a graph looks at an attribute when it is compiled and never again
            self.register_buffer("gauges", torch.full((len(self.gauge_names),), torch.nan), persistent=False)
        self.embed = nn.Embedding(config.vocab_size, config.model_dim)
        nn.init.normal_(self.embed.weight, std=config.tied_embed_init_std if config.tie_embeddings else 1.0)
        self.blocks = self.make_blocks()
        if self.num_skips:
            self.skip_weights = control(nn.Parameter(torch.ones(self.num_skips, config.model_dim)))
        self.head = None if config.tie_embeddings else Linear(config.model_dim, config.vocab_size, zero_init=True)

    def make_mixer(self, layer_idx: int) -> nn.Module:
        """A module that maps (B, T, D) to (B, T, D) and looks at no later position."""
        raise NotImplementedError(
            f"{type(self).__module__} must define make_mixer, make_block, make_blocks or backbone"
        )

    def make_block(self, layer_idx: int) -> nn.Module:
        """A module that maps x, x0, both (B, T, D), to (B, T, D)."""
        return Block(self.make_mixer(layer_idx), self.config)

    def make_blocks(self) -> nn.ModuleList:
        """The modules that hold the stack's weights, in forward order: one per layer unless layers share."""
        return nn.ModuleList(self.make_block(i) for i in range(self.config.num_layers))

    @property
    def num_skips(self) -> int:
        """How many of the first blocks' outputs are added to the inputs of the last blocks."""
        return len(self.blocks) // 2

    def backbone(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D): the blocks, the second half fed from the first in mirror order (U-Net skips)."""
        x0, skips, num_skips = x, [], self.num_skips
        for i, block in enumerate(self.blocks):
            if i >= num_skips and skips:
                x = self.join_skip(i - num_skips, x, skips.pop())
            x = block(x, x0)
            if i < num_skips:
                skips.append(x)
        return x

    def join_skip(self, i: int, x: Tensor, skip: Tensor) -> Tensor:
        """The stream x (B, T, D) with what the i-th skip brings, (B, T, D)."""
        return x + self.skip_weights[i].to(x.dtype) * skip

    def head_inputs(self, input_ids: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """What logits multiplies: normed activations (B, T - start, D) and the head's weight (V, D)."""
        x = self.embedded(input_ids)
        x = rms_norm(self.backbone(x)[:, start:])
        return x, self.head_weight

    def embedded(self, input_ids: Tensor) -> Tensor:
        """What the backbone begins with, (B, T, D)."""
        return rms_norm(self.embed(input_ids).to(self.compute_dtype))

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        return self.embed.weight if self.head is None else self.head.weight

    def head_logits(self, x: Tensor, head: Tensor) -> Tensor:
        """Softcapped fp32 logits (B, T, V) of what head_inputs gives: c tanh(x / c), by the faster sigmoid."""
        softcap, logits = self.config.logit_softcap, F.linear(x, head.to(x.dtype)).float()
        return 2 * softcap * torch.sigmoid(2 / softcap * logits) - softcap

    def logits(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """fp32 logits (B, T - start, V) of the positions from `start` on: the scored path."""
        return self.head_logits(*self.head_inputs(input_ids, start))

    def nats(self, input_ids: Tensor, target_ids: Tensor, start: int = 0) -> Tensor:
        """-ln p of the targets from position `start` on, fp32 (B, T - start). Not for overriding: logits is."""
        logits = self.logits(input_ids, start)
        return F.cross_entropy(logits.flatten(0, 1), target_ids[:, start:].flatten(), reduction="none").view(
            len(input_ids), -1
        )

    def has_fused_loss(self) -> bool:
        """Whether training_loss streams this head: logits is not overridden, and streaming is the faster way."""
        pays = self.config.vocab_size >= FUSED_VOCAB_SIZE or not torch.compiler.is_compiling()
        return pays and type(self).logits is LanguageModel.logits and self.config.logit_softcap <= MAX_SOFTCAP

    def training_loss(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """The scalar to minimise, mean nats by default; never used for scoring."""
        if self.has_fused_loss():
            x, head = self.head_inputs(input_ids)
            return softcapped_cross_entropy(x.flatten(0, 1), head, target_ids.flatten(), self.config.logit_softcap)
        return F.cross_entropy(self.logits(input_ids).flatten(0, 1), target_ids.flatten())

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        return self.training_loss(input_ids, target_ids)

    def materialize(self) -> dict[str, Tensor]:
        """Generated weights by the name of the non-persistent buffer they fill; called once per optimizer step.

        Every micro-batch runs on detached copies; their summed gradient goes through the generator once.
        """
        return {}

    def on_progress(self, fraction: float) -> None:
        """Told the fraction of the run (0 to 1) before each step. progress_switches lists what changes the graph."""

    def show(self, *values: Tensor) -> None:
        """In a pass in training: the gauges, scalars in the order of gauge_names, for the log of this step."""
        self.gauges.copy_(torch.stack([value.detach().float() for value in values]))

    def choose_kernels(self, rows: int, compiled: bool, agree: Callable[[Tensor], Tensor]) -> str:
        """Told, before training, the sequences of a pass and whether it is compiled: the time to race kernels.

        agree adds a tensor up over the ranks, which must choose alike. Returns what was chosen, for the log, or "".
        """
        return ""

    def observe(self, target_ids: Tensor) -> None:
        """Test-time training: told targets (1, T) once their scores are given away. Makes scoring sequential."""

    @property
    def can_carry(self) -> bool:
        """Whether there is a state that rows can hand on: carry does something."""
        return False

    def carry(self, on: bool) -> None:
        """On: from now on a row continues the one before it, across batches, the first from nothing. Off: none does."""

    def folded(self) -> "LanguageModel":
        """The model to store: this one, or a smaller one with equal logits that its own config rebuilds.

        Called when the artifact is made. What scoring does not need, such as a generator whose outputs are smaller than
        it, is left out; the trained model stays as it is.
        """
        return self

    def rebuilt(self, config: ModelConfig, state: dict[str, Tensor] | None = None) -> "LanguageModel":
        """A model of this kind by another config, for `folded`: ready to score, with those tensors of state, by default
        this model's, that it has by name. Random numbers of the run are left alone.
        """
        with torch.random.fork_rng(devices=[]):
            small = type(self)(config)
        state, needed = self.state_dict() if state is None else state, small.state_dict()
        small.load_state_dict({name: t for name, t in state.items() if name in needed})
        return small.to(self.embed.weight.device).eval()
