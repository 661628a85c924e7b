"""Masked text diffusion, on the weights of a causal model (MDLM, Sahoo et al. 2024, https://arxiv.org/abs/2406.07524).

Of the T targets of a window x_0 .. x_T, k are masked, t = k / T. Slot i predicts x_{i+1} in both uses of the weights:
    causal head  p(x_{i+1} | x_0 .. x_i)     attention looks back,       input n(E x)
    denoiser     q(x_{i+1} | z), z = x masked   attention looks both ways,  input n(E z) + W features(t)
    loss = w mean nats of p + (1 - w) NELBO / T,   w = DIFF_AR_WEIGHT,   w = 1 is gpt
    NELBO = E_{t, z} [1/t sum over masked i of -ln q(x_i | z)] >= -ln p_diffusion(x),   t = 1/T .. 1, equally likely
To mask each token with probability t in (0, 1) has the same mean and more noise (LLaDA, Nie et al. 2025,
https://arxiv.org/abs/2502.09992); p_diffusion reveals tokens one by one, in an order drawn at random. DIFF_BLOCK=b does
all this in each block of b targets, given the clean ones before it (BD3-LM, Arriola et al. 2025,
https://arxiv.org/abs/2503.09573), whose keys and values are those of the causal pass. The denoiser costs more than gpt,
for its attention reads twice as much, so it sees DIFF_SHARE of a batch's windows, one at least, and all of them with
w = 0. What is scored is exact:
    DIFF_EVAL=ar      p
    DIFF_EVAL=chain   q in the order of the text, all that is not yet predicted masked: T passes over a window
    DIFF_EVAL=block   the same in each block: DIFF_BLOCK passes over both streams
The NELBO, a bound for a mixture over orders, is no score of a token: `nelbo` estimates it, and no setting scores it.
Differs from the papers: the shift; exactly k masks, which follow from the batch itself; the last target of a window or
block has no slot, so no other is predicted from it; clean blocks are read causally.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.layers import (
    CausalSelfAttention,
    LanguageModel,
    Linear,
    ModelConfig,
    attention,
    causal_attention,
    rms_norm,
)
from architectures.masks import make_mask, masked_attention
from architectures.time_index import one_of, time_features


@dataclass
class Config(ModelConfig):
    env_prefix: ClassVar[str] = "DIFF_"
    neutral: ClassVar[dict | None] = {"diff_ar_weight": 1.0}

    diff_ar_weight: float = field(default=0.5, metadata={"other": 0.25})  # of the causal loss; the rest is the NELBO's
    diff_share: float = field(default=0.75, metadata={"other": 0.25})  # of the windows, which the denoiser sees too
    diff_weighting: str = field(default="elbo", metadata={"other": "flat"})  # flat: 1 instead of 1/t, which is no bound
    diff_time_freqs: int = 8  # of the features of t; 0 = the denoiser is not told t, nor that it is the denoiser
    diff_block: int | None = field(default=None, metadata={"other": 8})  # targets masked together; None = the window
    diff_until: float | None = field(default=None, metadata={"other": 0.5})  # of the run; then the causal loss alone
    diff_eval: str = field(default="ar", metadata={"other": "chain"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diff_eval == "nelbo":
            raise ValueError("DIFF_EVAL=nelbo is a bound and cannot be a score; choose ar, chain or block")
        one_of(self, "diff_eval", ("ar", "chain", "block"))
        one_of(self, "diff_weighting", ("elbo", "flat"))
        if not 0 < self.diff_share <= 1:
            raise ValueError(f"DIFF_SHARE={self.diff_share} must be above 0 and at most 1")
        if not 0 <= self.diff_ar_weight <= 1:
            raise ValueError(f"DIFF_AR_WEIGHT={self.diff_ar_weight} must be between 0 and 1")
        if self.diff_time_freqs < 0:
            raise ValueError(f"DIFF_TIME_FREQS={self.diff_time_freqs} must be at least 0, which is off")
        if self.diff_block is not None and (self.diff_block < 2 or self.train_seq_len % self.diff_block):
            least = f"must be at least 2 and divide TRAIN_SEQ_LEN={self.train_seq_len}, or none for the whole window"
            raise ValueError(f"DIFF_BLOCK={self.diff_block} {least}")
        if self.diff_until is not None and not 0 < self.diff_until < 1:
            raise ValueError(f"DIFF_UNTIL={self.diff_until} must be above 0 and below 1, or none for all of the run")
        if self.diff_eval == ("chain" if self.diff_block else "block"):
            fitting = f"ar or {'block' if self.diff_block else 'chain'} with DIFF_BLOCK={self.diff_block}"
            raise ValueError(f"DIFF_EVAL={self.diff_eval} must be {fitting}")
        if self.diff_eval == "ar" and self.diff_ar_weight == 0 and self.diff_until is None:
            raise ValueError("DIFF_AR_WEIGHT=0 must be above 0, or there is no causal head for DIFF_EVAL=ar to score")
        if self.diff_eval != "ar" and (not self.denoises or self.diff_until):
            weight = f"DIFF_AR_WEIGHT={self.diff_ar_weight} must be below 1 and DIFF_UNTIL={self.diff_until} none"
            raise ValueError(f"{weight}, or the denoiser of DIFF_EVAL={self.diff_eval} is not trained to the end")

    @property
    def denoises(self) -> bool:
        return self.diff_ar_weight < 1

    @property
    def num_features(self) -> int:
        """Numbers that the denoiser is told of t."""
        return 2 * self.diff_time_freqs + 2 if self.diff_time_freqs else 0

    def num_params(self) -> int:
        return super().num_params() + self.denoises * (1 + self.num_features) * self.model_dim


class Streams:
    """Who sees whom in a pass whose first `clean` rows are causal and the rest noisy; None: all are causal."""

    def __init__(self, block: int | None, flex: bool | None = None):
        self.block, self.flex = block, flex  # flex: blocks by FlexAttention; None: on CUDA
        self.clean: int | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention of q (B, H, T, K) over k, v (B, H or fewer, T, K), in q's dtype."""
        if (n := self.clean) is None:
            return causal_attention(q, k, v)
        seen = self.attend_both_ways(q[n:], k, v)
        return torch.cat((causal_attention(q[:n], k[:n], v[:n]), seen)) if n else seen

    def attend_both_ways(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The noisy rows over themselves; with blocks, over their own block and the blocks before it of the first rows,
        which are the same clean."""
        n, _, T, _ = q.shape
        block = self.block
        if not block or block >= T:
            return attention(q, k[-n:], v[-n:])

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own, other = query // block, key % T // block
            return torch.where(key < T, other < own, other == own)

        k, v = (torch.cat((x[:n], x[-n:]), dim=2) for x in (k, v))  # (n, G, 2 T, K): clean, then noisy
        return masked_attention(q, k, v, make_mask(visible, None, T, 2 * T, q.device, self.flex))


def mixed(x: Tensor) -> Tensor:
    """int64 numbers below 2^32, scrambled among themselves."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


def hashed(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(a number below 2^32 per token of ids (B, T), one from 0 to 1), from the ids alone: every batch has its masks."""
    place = mixed(torch.arange(1, ids.size(1) + 1, device=ids.device))
    rows = mixed(mixed(place ^ ids).sum(1) % 2**32)
    return mixed(rows[:, None] ^ place), mixed(rows.sum() % 2**32) / 2**32


def counts_at(levels: Tensor, b: int) -> Tensor:
    """Of b targets the masked ones, 1 to b, equally likely for levels that are uniform between 0 and 1."""
    return (levels * b).long().clamp(max=b - 1) + 1


def mask_counts(blocks: int, b: int, phase: Tensor) -> Tensor:
    """How many of each block's b targets are masked, (blocks,): one level in each of so many parts of 0 to 1.

    The last block's count and the first's add up to b + 1, and so on inwards: if blocks is even, the sum is fixed.
    """
    low = counts_at((torch.arange(-(-blocks // 2), device=phase.device) + phase) / blocks, b)
    return torch.cat((low, b + 1 - low[: blocks // 2].flip(0)))


def most_masked(blocks: int, b: int) -> int:
    """The most that mask_counts can add up to."""
    return blocks // 2 * (b + 1) + blocks % 2 * b


class Model(LanguageModel):
    def __init__(self, config: Config):
        self.streams = Streams(config.diff_block)
        super().__init__(config)
        self.mask = self.time = None
        if config.denoises:
            self.mask = nn.Embedding(1, config.model_dim)
            nn.init.normal_(self.mask.weight, std=config.tied_embed_init_std if config.tie_embeddings else 1.0)
        if config.denoises and config.num_features:
            self.time = Linear(config.num_features, config.model_dim, zero_init=True)
        self.on_progress(1.0)

    @property
    def gauge_names(self) -> tuple[str, ...]:
        """What the loss is made of; with w = 0 it is the denoiser's alone."""
        return ("nats", "diff_nats") if 0 < self.config.diff_ar_weight < 1 else ()

    def make_mixer(self, layer_idx: int) -> nn.Module:
        mixer = CausalSelfAttention(self.config)
        mixer.attend = self.streams.attend
        return mixer

    @property
    def progress_switches(self) -> tuple[float, ...]:
        return (self.config.diff_until,) if self.config.denoises and self.config.diff_until else ()

    def on_progress(self, fraction: float) -> None:
        self.denoising = self.config.denoises and not (self.config.diff_until and fraction >= self.config.diff_until)

    def head_inputs(self, input_ids: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        if self.config.diff_eval == "ar":
            return super().head_inputs(input_ids, start)
        return self.in_order(input_ids, start), self.head_weight

    def denoised(self, input_ids: Tensor, hidden: Tensor, t: Tensor, clean: bool, noisy: int | None = None) -> Tensor:
        """Normed activations (n or B + n, T, D) of the first n = `noisy` rows, masked, by default all, behind those of
        all clean rows, if asked for; hidden (n or 1, T): the slots whose token is masked; t (n or 1, T or 1): the part
        of the targets that is.
        """
        embedded = self.embed(input_ids)  # (B, T, D)
        x = torch.where(hidden[..., None], self.mask.weight, embedded[:noisy])
        x = rms_norm(x.to(self.compute_dtype))
        if self.time is not None:
            features = rms_norm(time_features(t.flatten(), "fourier", self.config.diff_time_freqs))
            x = x + self.time(features.to(x.dtype)).view(*t.shape, -1)
        if clean:
            x = torch.cat((rms_norm(embedded.to(self.compute_dtype)), x))
        self.streams.clean = len(embedded) if clean else 0
        x = rms_norm(self.backbone(x))
        self.streams.clean = None
        return x

    @torch.compiler.disable  # which would unroll the passes
    def in_order(self, input_ids: Tensor, start: int) -> Tensor:
        """Normed activations (B, T - start, D), from which the denoiser predicts each target with all later masked."""
        B, T = input_ids.shape
        block = min(self.config.diff_block or T, T)
        out = torch.empty(B, T - start, self.config.model_dim, dtype=self.compute_dtype, device=input_ids.device)
        place = torch.arange(T, device=input_ids.device)[None] % block
        for offset in range(block):
            first = start + (offset - start) % block
            if first < T:
                t = torch.full((1, 1), 1 - offset / block, device=input_ids.device)
                x = self.denoised(input_ids, place > offset, t, clean=block < T)
                out[:, first - start :: block] = x[-B:, first::block]
        return out

    def draw(self, keys: Tensor, count: Tensor) -> Tensor:
        """The masked targets, bool (B, N, b): of each block as many as count (B, N) says, first in the order of keys
        (B, T)."""
        keys = keys.view(*count.shape, -1)
        chosen = torch.arange(keys.size(2), device=keys.device) < count[..., None]
        return torch.zeros_like(chosen).scatter(2, keys.argsort(dim=2), chosen)

    def under(self, masked: Tensor, input_ids: Tensor, clean: bool = False) -> Tensor:
        """Normed activations (n or B + n, T, D) of the first n rows under masked (n, N, b), behind those of all clean
        rows, if asked for or if there are blocks."""
        n, N, b = masked.shape
        hidden = F.pad(masked[..., :-1], (1, 0)).flatten(1)  # slot i holds the target before the one it predicts
        t = masked.float().mean(dim=2)
        return self.denoised(input_ids, hidden, t if N == 1 else t.repeat_interleave(b, dim=1), clean or N > 1, n)

    def nats_of(self, x: Tensor, target_ids: Tensor) -> Tensor:
        """-ln p of target_ids (M) by the head on activations x (M, D), fp32 (M)."""
        return F.cross_entropy(self.head_logits(x, self.head_weight), target_ids, reduction="none")

    def nats_under(self, masked: Tensor, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """fp32 nats (B, T) by the denoiser under masked (B, N, b), of visible targets too."""
        x = self.under(masked, input_ids)[-len(input_ids) :]
        return self.nats_of(x.flatten(0, 1), target_ids.flatten()).view_as(target_ids)

    def training_loss(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """w mean nats of the causal head + (1 - w) mean weighted nats of the denoiser, stratified over t."""
        if not self.denoising:
            return super().training_loss(input_ids, target_ids)
        w, (B, T) = self.config.diff_ar_weight, input_ids.shape
        b, n = self.config.diff_block or T, max(1, round(self.config.diff_share * B)) if w else B
        keys, phase = hashed(input_ids[:n])
        count = mask_counts(n * T // b, b, phase).view(n, -1)
        masked = self.draw(keys, count)
        weight = masked / (count[..., None] * count.numel() if self.config.diff_weighting == "elbo" else count.sum())
        x = self.under(masked, input_ids, clean=w > 0)
        # Only a masked target has a loss: the head reads their slots alone, about half of them.
        slots = masked.flatten().logical_not().byte().argsort(stable=True)[: most_masked(count.numel(), b)]
        noisy = self.nats_of(x[-n:].flatten(0, 1)[slots], target_ids[:n].flatten()[slots])
        noisy = (weight.flatten()[slots] * noisy).sum()
        if not w:
            return noisy
        nats = self.nats_of(x[:B].flatten(0, 1), target_ids.flatten()).mean()
        self.show(nats, noisy)
        return (1 - w) * noisy + w * nats

    @torch.no_grad()
    def nelbo(self, input_ids: Tensor, target_ids: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """Unbiased estimates of the NELBO of each row in nats, fp64 (B,), from so many masks, stratified over t."""
        B, T = input_ids.shape
        b = self.config.diff_block or T
        total = torch.zeros(B, dtype=torch.float64, device=input_ids.device)
        for sample in range(samples):
            keys, levels = (torch.rand(B, n, generator=generator, device=input_ids.device) for n in (T, T // b))
            count = counts_at((sample + levels) / samples, b)
            masked = self.draw(keys, count)
            nats = self.nats_under(masked, input_ids, target_ids).view_as(masked).double()
            total += ((nats * masked).sum(2) * b / count).sum(1)
        return total / samples

    @torch.no_grad()
    def folded(self) -> LanguageModel:
        """Without the denoiser's own weights where the causal head is scored."""
        if self.config.diff_eval != "ar" or not self.config.denoises:
            return self
        return self.rebuilt(dataclasses.replace(self.config, diff_ar_weight=1.0))
