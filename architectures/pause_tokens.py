"""Pause tokens: learned vectors between the tokens, to think before going on (Goyal et al. 2023, https://arxiv.org/abs/2310.02226).

    x_1 .. x_I p_1 .. p_P x_{I+1} .. x_{2I} p_1 .. p_P ...      I = PAUSE_INTERVAL, P = NUM_PAUSE
The stack runs over both, causally; only real tokens are scored, each once, in their order and number. PAUSE_READ=last
predicts the token after a pause from the last p_P before it, as in the paper; real predicts it from the token before
the pause, so that pauses serve later tokens only, as attention sinks or registers do. PAUSE_POS=real keeps the
distances between tokens as they are without pauses: a pause stands where the token before it does. The pattern begins
anew in each window, so there is none in a shorter one. NUM_PAUSE=0 is gpt.
Differs from the paper: pauses in fixed places rather than at random, P different vectors rather than one, and in
training from scratch alone; RoPE that can leave them out.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from architectures.layers import CausalSelfAttention, LanguageModel, ModelConfig, Rotary, rms_norm
from architectures.time_index import one_of


@dataclass
class Config(ModelConfig):
    env_prefix: ClassVar[str] = "PAUSE_"
    neutral: ClassVar[dict | None] = {"num_pause": 0}

    num_pause: int = 4  # vectors in a pause
    pause_interval: int = 64  # tokens between pauses
    pause_read: str = field(default="last", metadata={"other": "real"})
    pause_pos: str = field(default="real", metadata={"other": "inflated"})  # inflated: pauses count as positions

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "pause_read", ("last", "real"))
        one_of(self, "pause_pos", ("real", "inflated"))
        if self.num_pause < 0:
            raise ValueError(f"NUM_PAUSE={self.num_pause} must be at least 0, which is off")
        if self.pause_interval < 1:
            raise ValueError(f"PAUSE_INTERVAL={self.pause_interval} must be at least 1")

    def paused_len(self, seq_len: int) -> int:
        """How long a window of seq_len tokens is with its pauses."""
        return seq_len + seq_len // self.pause_interval * self.num_pause

    def num_params(self) -> int:
        return super().num_params() + self.num_pause * self.model_dim


class PausedRotary(Rotary):
    """Rotary positions of a paused window."""

    def __init__(self, config: Config):
        self.config = config  # which tables() needs
        super().__init__(config.head_dim, config.rope_base, config.paused_len(config.train_seq_len))

    def tables(self, seq_len: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """cos and sin for every place of a paused window of seq_len, each (seq_len, K / 2), fp32."""
        cos, sin = super().tables(seq_len, device)
        if self.config.pause_pos == "inflated":
            return cos, sin
        interval, place = self.config.pause_interval, torch.arange(seq_len, device=device)
        group, within = place // (interval + self.config.num_pause), place % (interval + self.config.num_pause)
        position = group * interval + within.clamp(max=interval - 1)
        return cos[position], sin[position]


class Model(LanguageModel):
    def __init__(self, config: Config):
        super().__init__(config)
        self.pause = None
        if config.num_pause:
            self.pause = nn.Embedding(config.num_pause, config.model_dim)
            nn.init.normal_(self.pause.weight, std=config.tied_embed_init_std if config.tie_embeddings else 1.0)

    def make_mixer(self, layer_idx: int) -> nn.Module:
        mixer = CausalSelfAttention(self.config)
        mixer.rotary = PausedRotary(self.config)
        return mixer

    def insert(self, x: Tensor) -> Tensor:
        """x (B, T, D) with a pause after every PAUSE_INTERVAL positions, (B, T', D)."""
        B, T, D = x.shape
        groups, interval = T // self.config.pause_interval, self.config.pause_interval
        pause = rms_norm(self.pause.weight.to(x.dtype)).expand(B, groups, -1, D)
        whole = x[:, : groups * interval].view(B, groups, interval, D)
        whole = torch.cat((whole, pause), dim=2).flatten(1, 2)
        return torch.cat((whole, x[:, groups * interval :]), dim=1)

    def strip(self, x: Tensor, num_tokens: int) -> Tensor:
        """(B, T', D) to (B, T, D): for each of the T = num_tokens, the place from which its successor is predicted."""
        groups, interval = num_tokens // self.config.pause_interval, self.config.pause_interval
        paused = groups * (interval + self.config.num_pause)
        whole = x[:, :paused].unflatten(1, (groups, -1))
        if self.config.pause_read == "last":
            whole = torch.cat((whole[:, :, : interval - 1], whole[:, :, -1:]), dim=2)
        return torch.cat((whole[:, :, :interval].flatten(1, 2), x[:, paused:]), dim=1)

    def backbone(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D): the stack runs over tokens and pauses."""
        if self.pause is None or x.size(1) < self.config.pause_interval:
            return super().backbone(x)
        return self.strip(super().backbone(self.insert(x)), x.size(1))
