"""Multi-head latent attention, MLA (DeepSeek-V2, DeepSeek-AI 2024, https://arxiv.org/abs/2405.04434).

Keys and values of all heads are made from one latent c of MLA_LATENT numbers, n the RMS norm, R_t RoPE:
    c_t = n(W_d x_t),   v_t = W_v c_t,   k_t = R_t n(W_k c_t),   q_t = R_t n(W_q x_t)
Keys are rotated after they are made, which is right as long as no cache of latents is kept. MLA_ROPE=decoupled, the
paper's, which MLA_ROPE_DIMS implies, keeps position out of c and of what is made of it:
    k_t = [n(W_k c_t) ; R_t n(W_r x_t)],   q_t = [q' ; R_t q''] for n(W_q x_t)
with position in the last MLA_ROPE_DIMS of a head alone and one rotated key W_r x for all heads. Here the latent saves
stored weights; the paper saves cache.
Differs from the paper: queries are not compressed; QK-norm with a gain per head in place of a fixed scale; the rotated
part is cut out of the head's width instead of added to it; NUM_KV_HEADS keys and values may serve more query heads.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from architectures.layers import LanguageModel, Linear, ModelConfig, Rotary, causal_attention, control, rms_norm, scaled
from architectures.time_index import one_of


@dataclass
class Config(ModelConfig):
    env_prefix: ClassVar[str] = "MLA_"

    mla_latent: int = 128  # numbers from which all keys and values are made
    mla_rope: str | None = field(default=None, metadata={"other": "decoupled"})  # post, unless MLA_ROPE_DIMS is set
    mla_rope_dims: int | None = field(default=None, metadata={"other": 2})  # of a head; a quarter, at least 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mla_rope is None:
            self.mla_rope = "post" if self.mla_rope_dims is None else "decoupled"
        one_of(self, "mla_rope", ("decoupled", "post"))
        if self.mla_latent < 1:
            raise ValueError(f"MLA_LATENT={self.mla_latent} must be at least 1")
        if self.mla_rope == "post" and self.mla_rope_dims is not None:
            raise ValueError(f"MLA_ROPE_DIMS={self.mla_rope_dims} has no meaning with MLA_ROPE=post; unset it")
        if self.mla_rope == "decoupled" and not (0 < self.rope_dims < self.head_dim and self.rope_dims % 2 == 0):
            raise ValueError(
                f"MLA_ROPE_DIMS={self.rope_dims} must be even and between 2 and {self.head_dim - 2}, "
                f"for a head has {self.head_dim}; or set MLA_ROPE=post"
            )

    @property
    def rope_dims(self) -> int:
        """Numbers of a head that are made from x and rotated; 0 = all are made from the latent and rotated."""
        if self.mla_rope == "post":
            return 0
        K = self.head_dim
        return min(max(4, K // 8 * 2), K - 2) if self.mla_rope_dims is None else self.mla_rope_dims

    def attention_params(self) -> int:
        D, K, R, latent = self.model_dim, self.head_dim, self.rope_dims, self.mla_latent
        return 2 * D * D + D * (latent + R) + latent * self.num_kv_heads * (2 * K - R) + self.num_heads


class LatentAttention(nn.Module):
    """Causal softmax attention whose keys and values share one latent."""

    takes_scale = True

    def __init__(self, config: Config):
        super().__init__()
        D, K, R = config.model_dim, config.head_dim, config.rope_dims
        self.num_heads, self.num_kv_heads, self.rope_dims = config.num_heads, config.num_kv_heads, R
        self.query = Linear(D, D)
        self.latent = Linear(D, config.mla_latent)
        self.key = Linear(config.mla_latent, config.num_kv_heads * (K - R))
        self.value = Linear(config.mla_latent, config.num_kv_heads * K)
        self.rotated_key = Linear(D, R) if R else None
        self.rotary = Rotary(R or K, config.rope_base, config.train_seq_len)
        self.q_gain = control(nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init)))
        self.out = Linear(D, D, zero_init=True)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); position t sees positions up to t."""
        B, T, D = x.shape
        c = rms_norm(self.latent(x))  # (B, T, latent)
        q = rms_norm(self.query(x).view(B, T, self.num_heads, -1), self.q_gain[:, None])  # (B, T, H, K)
        k = rms_norm(self.key(c).view(B, T, self.num_kv_heads, -1))
        v = self.value(c).view(B, T, self.num_kv_heads, -1)
        if self.rotated_key is None:
            q, k = self.rotary(q), self.rotary(k)
        else:
            still = q.size(-1) - self.rope_dims
            q = torch.cat((q[..., :still], self.rotary(q[..., still:])), dim=-1)
            turned = self.rotary(rms_norm(self.rotated_key(x))[:, :, None])  # (B, T, 1, R)
            k = torch.cat((k, turned.expand(-1, -1, self.num_kv_heads, -1)), dim=-1)
        y = causal_attention(*(heads.transpose(1, 2) for heads in (q, k, v)))
        return scaled(self.out, y.transpose(1, 2).reshape(B, T, D), scale)


class Model(LanguageModel):
    def make_mixer(self, layer_idx: int) -> nn.Module:
        return LatentAttention(self.config)
