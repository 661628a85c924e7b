"""H-Net: tokens chunked where neighbours differ, and modelled chunk by chunk (Hwang et al. 2025, https://arxiv.org/abs/2507.07955).

An encoder's state h_t begins a chunk, b_t = 1, where it is unlike the one before it; the main network runs over the
first states of the chunks alone; every position reads the chunk that it is in, c(t) = b_1 + .. + b_t:
    p_t = (1 - cos(W_q h_t, W_k h_{t-1})) / 2,   p_1 = 1,   b_t = [p_t >= 1/2]
    z = n(Main(n(h) where b = 1)),   s_c = P_c z_c + (1 - P_c) s_{c-1},   P_c = p where chunk c begins
    decoder's input_t = conf_t s_{c(t)} + W n(h_t),   conf_t = 1, with the gradient of p_t if b_t = 1, else of 1 - p_t
    training loss = nats + HNET_RATIO_W N / (N - 1) ((N - 1) F G + (1 - F) (1 - G)),   F = mean b,  G = mean p
which is least, nats aside, when one position in N = HNET_TARGET begins a chunk. Main has HNET_CAP T / N slots. They are
earned at a steady rate along the window, and a boundary that finds none left begins no chunk: what becomes of it
depends on the past alone, and on neither the window's length nor other rows. Slots stay empty at the end, behind causal
attention. NUM_LAYERS counts all layers; those of encoder and decoder have attention and a narrow MLP.
Differs from the paper: attention in encoder and decoder too; slots, for shapes that never change; the kit's block,
whose x0 is the embedding (in Main, the chunks); one learning rate for all.
"""

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.kernels.scan import chunked_scan
from architectures.layers import Block, CausalSelfAttention, LanguageModel, Linear, ModelConfig, control, rms_norm

MAX_P = 1 - 1e-4  # keeps the logarithm of 1 - P finite
RATE_ONE = 2**20  # slot rates are integers, in units of 1 / RATE_ONE: rounding must be the same on every device


@dataclass
class Config(ModelConfig):
    env_prefix: ClassVar[str] = "HNET_"

    hnet_target: float = 6.0  # N: tokens of a chunk
    hnet_cap: float = 1.5  # slots for so many times the chunks aimed at
    hnet_ratio_w: float = 0.05  # nats
    hnet_enc: int | None = field(default=None, metadata={"other": 2})  # layers; None = a quarter of NUM_LAYERS
    hnet_dec: int | None = field(default=None, metadata={"other": 2})
    hnet_outer_mlp: int = 1  # MLP_MULT of the encoder and the decoder
    hnet_main_dim: int | None = field(default=None, metadata={"other": 64})  # None = MODEL_DIM
    hnet_ste: bool = True  # conf

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hnet_target <= 1:
            raise ValueError(f"HNET_TARGET={self.hnet_target} must be above 1 token per chunk")
        if self.hnet_cap < 1:
            raise ValueError(f"HNET_CAP={self.hnet_cap} must be at least 1: the target itself needs so many slots")
        if self.hnet_ratio_w < 0:
            raise ValueError(f"HNET_RATIO_W={self.hnet_ratio_w} must be at least 0")
        if self.hnet_outer_mlp < 1:
            raise ValueError(f"HNET_OUTER_MLP={self.hnet_outer_mlp} must be at least 1")
        if min(self.enc, self.dec) < 0 or self.main_layers < 1:
            sizes = f"HNET_ENC={self.enc} and HNET_DEC={self.dec} must be at least 0"
            raise ValueError(f"{sizes} and leave at least one of NUM_LAYERS={self.num_layers} to the main network")
        if self.main_dim < self.model_dim or self.main_dim % (2 * self.num_heads):
            multiple = f"a multiple of 2 x NUM_HEADS={self.num_heads}"
            raise ValueError(f"HNET_MAIN_DIM={self.main_dim} must be {multiple}, at least MODEL_DIM={self.model_dim}")

    @property
    def enc(self) -> int:
        return self.num_layers // 4 if self.hnet_enc is None else self.hnet_enc

    @property
    def dec(self) -> int:
        return self.num_layers // 4 if self.hnet_dec is None else self.hnet_dec

    @property
    def main_layers(self) -> int:
        return self.num_layers - self.enc - self.dec

    @property
    def main_dim(self) -> int:
        return self.hnet_main_dim or self.model_dim

    @property
    def slot_rate(self) -> int:
        """Slots earned per position, times RATE_ONE."""
        return math.ceil(min(1.0, self.hnet_cap / self.hnet_target) * RATE_ONE)

    def slots(self, seq_len: int) -> int:
        """The main network's length for a window of seq_len tokens."""
        return -(-seq_len * self.slot_rate // RATE_ONE)

    def part(self, **changes: int) -> ModelConfig:
        """The settings of a part of the model: these, without what is H-Net's own, and with changes."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)} | changes)

    @property
    def outer(self) -> ModelConfig:
        return self.part(mlp_mult=self.hnet_outer_mlp)

    @property
    def main(self) -> ModelConfig:
        return self.part(model_dim=self.main_dim, train_seq_len=self.slots(self.train_seq_len))

    def num_params(self) -> int:
        D, outer = self.model_dim, (self.enc + self.dec) * self.outer.block_params()
        main = self.main_layers * self.main.block_params() + self.main_layers // 2 * self.main_dim
        return self.embed_params() + outer + main + 3 * D * D + self.main_dim - D  # router, residual, widening


def naive_chunks(wanted: Tensor, config: Config) -> Tensor:
    """The definition of chunks_begun, one position after another."""
    begun = torch.zeros_like(wanted, dtype=torch.long)
    for row in range(wanted.size(0)):
        used = 0
        for t in range(wanted.size(1)):
            used += int(wanted[row, t] and used < config.slots(t + 1))
            begun[row, t] = used
    return begun


def chunks_begun(wanted: Tensor, slot_rate: int) -> Tensor:
    """How many chunks have begun up to each position, int64 (B, T), for wanted boundaries, bool (B, T).

    used_t = min(used_{t-1} + wanted_t, earned_t), which is the count of the wanted ones less the most by which they
    have ever outrun what was earned.
    """
    positions = torch.arange(1, wanted.size(1) + 1, device=wanted.device)
    earned = (positions * slot_rate + RATE_ONE - 1) // RATE_ONE
    count = wanted.cumsum(dim=1)
    return count - (count - earned).cummax(dim=1).values.clamp(min=0)


def naive_smooth(z: Tensor, p: Tensor) -> Tensor:
    """The definition of smooth, one chunk after another."""
    state, states = torch.zeros_like(z[:, 0]), []
    for c in range(z.size(1)):
        state = p[:, c, None] * z[:, c] + (1 - p[:, c, None]) * state
        states.append(state)
    return torch.stack(states, dim=1)


def smooth(z: Tensor, p: Tensor) -> Tensor:
    """s_c = p_c z_c + (1 - p_c) s_{c-1}, s_0 = 0: chunks z (B, C, D), p below 1, fp32 (B, C)."""
    ones = z.new_ones(*p.shape, 1, 1)  # (B, C, G, N)
    p = p[..., None]  # of the one head
    return chunked_scan(ones, ones, z[:, :, None], torch.log1p(-p), p)[:, :, 0]


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]] for x (B, T, D), index (B, I): (B, I, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.size(-1)))


class Router(nn.Module):
    """How probable it is that a chunk begins: p_t of normalised states (B, T, D), fp32 (B, T)."""

    def __init__(self, model_dim: int):
        super().__init__()
        self.query, self.key = Linear(model_dim, model_dim), Linear(model_dim, model_dim)
        nn.init.eye_(self.query.weight)  # at first, states are compared as they are
        nn.init.eye_(self.key.weight)

    def forward(self, x: Tensor) -> Tensor:
        likeness = F.cosine_similarity(self.query(x[:, 1:]).float(), self.key(x[:, :-1]).float(), dim=-1)
        return F.pad((1 - likeness) / 2, (1, 0), value=1.0)


class Model(LanguageModel):
    def __init__(self, config: Config):
        super().__init__(config)
        D, outer, extra = config.model_dim, config.outer, config.main_dim - config.model_dim
        self.encoder = nn.ModuleList(Block(CausalSelfAttention(outer), outer) for _ in range(config.enc))
        self.router = Router(D)
        self.widening = control(nn.Parameter(torch.zeros(extra))) if extra else None
        if extra and self.num_skips:
            self.skip_weights = control(nn.Parameter(torch.ones(self.num_skips, config.main_dim)))
        self.residual = Linear(D, D, zero_init=True)
        self.decoder = nn.ModuleList(Block(CausalSelfAttention(outer), outer) for _ in range(config.dec))
        self.routed: tuple[Tensor, ...] | None = None  # p, b wanted, c(t), on their way from backbone to training_loss

    @property
    def gauge_names(self) -> tuple[str, ...]:
        """Also the tokens of a chunk, and the part of the boundaries that found no slot."""
        return "nats", "hnet_chunk_tokens", "hnet_refused"

    def make_blocks(self) -> nn.ModuleList:
        """The main network's."""
        main = self.config.main
        return nn.ModuleList(Block(CausalSelfAttention(main), main) for _ in range(self.config.main_layers))

    def run_main(self, chunks: Tensor) -> Tensor:
        """Chunks (B, C, D) to (B, C, D): the blocks with their U-Net skips, HNET_MAIN_DIM wide."""
        if self.widening is not None:
            chunks = torch.cat((chunks, self.widening.to(chunks.dtype).expand(*chunks.shape[:2], -1)), dim=-1)
        return rms_norm(super().backbone(chunks)[..., : self.config.model_dim])

    def ratio_loss(self, wanted: Tensor, p: Tensor) -> Tensor:
        """1 when one position in N begins a chunk and p says so; all positions of the batch count alike."""
        N, share, mean = self.config.hnet_target, wanted.float().mean(), p.mean()
        return N / (N - 1) * ((N - 1) * share * mean + (1 - share) * (1 - mean))

    def backbone(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D): encoder, main network over chunks, decoder."""
        x0, T = x, x.size(1)
        for block in self.encoder:
            x = block(x, x0)
        x = rms_norm(x)
        p = self.router(x)
        wanted = p >= 0.5
        begun = chunks_begun(wanted, self.config.slot_rate)
        self.routed = (p, wanted, begun) if self.training else None

        slot = torch.arange(1, self.config.slots(T) + 1, device=x.device).expand(len(x), -1).contiguous()
        starts = torch.searchsorted(begun, slot).clamp(max=T - 1)  # (B, C); an empty slot's is the last position
        chunks = self.run_main(rows_at(x, starts))
        chunks = smooth(chunks, p.gather(1, starts).clamp(max=MAX_P))
        y = rows_at(chunks, begun - 1)
        if self.config.hnet_ste:
            confidence = torch.where(begun > F.pad(begun[:, :-1], (1, 0)), p, 1 - p)
            y = y * (confidence + (1 - confidence).detach()).to(y.dtype)[..., None]

        x = y + self.residual(x)
        for block in self.decoder:
            x = block(x, x0)
        return x

    def training_loss(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Mean nats, and in training the ratio loss."""
        nats, routed = super().training_loss(input_ids, target_ids), self.routed
        self.routed = None
        if routed is None:
            return nats
        p, wanted, begun = routed
        chunks = begun[:, -1].sum()
        self.show(nats, wanted.numel() / chunks, 1 - chunks / wanted.sum())
        return nats + self.config.hnet_ratio_w * self.ratio_loss(wanted, p)
