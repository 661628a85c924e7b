"""Two communicating agents with a message bottleneck (Foerster et al. 2016, https://arxiv.org/abs/1605.06676).

The speaker, a GPT of NUM_LAYERS, reads the whole prefix and says AGENT_MSG_DIM numbers per token; the listener, whose
AGENT_LAYERS see only a window of AGENT_WINDOW tokens each, predicts. With n the RMS norm and E the embedding:
    m_t = n(W_say Speaker(E x)_t)          p(x_{t+1} | x_{<=t}) = softmax(E n(Listener(E x + W_hear m)_t))
AGENT_LEVELS = L makes each number one of L levels, round-trip gradient straight through: at most 2^(AGENT_MSG_DIM
log2 L) messages (Mentzer et al. 2023, https://arxiv.org/abs/2309.15505).
Without messages the listener knows the last 1 + AGENT_LAYERS (AGENT_WINDOW - 1) tokens and nothing else.
Differs from the paper: both agents train on one loss of next-token prediction, not on rewards; one of them speaks, at
every position; they share the embedding.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.layers import Block, CausalSelfAttention, LanguageModel, Linear, ModelConfig, rms_norm


@dataclass
class Config(ModelConfig):
    env_prefix: ClassVar[str] = "AGENT_"

    num_layers: int = 6  # of the speaker
    agent_layers: int = 2  # of the listener
    agent_window: int = 16  # tokens that a layer of the listener sees, the present one included
    agent_msg_dim: int = 64
    agent_levels: int | None = field(
        default=None, metadata={"other": 5}
    )  # that a number of a message takes; None = any

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("agent_layers", "agent_window", "agent_msg_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.upper()}={getattr(self, name)} must be at least 1")
        if self.agent_levels is not None and self.agent_levels < 2:
            raise ValueError(f"AGENT_LEVELS={self.agent_levels} must be at least 2, or none for no levels")

    def num_params(self) -> int:
        messages = 2 * self.agent_msg_dim * self.model_dim
        return super().num_params() + self.agent_layers * self.block_params() + messages


def naive_local_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention of q (B, H, T, K) over the last `window` of k, v (B, H, T, K), one position after another."""
    outputs = []
    for t in range(q.size(2)):
        near = slice(max(0, t - window + 1), t + 1)
        scores = (q[:, :, t : t + 1] @ k[:, :, near].mT / q.size(-1) ** 0.5).softmax(-1)  # (B, H, 1, window)
        outputs.append(scores @ v[:, :, near])
    return torch.cat(outputs, dim=2)


def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """naive_local_attention in blocks of `window` tokens, each of which sees itself and the block before it.

    k and v may have fewer heads; neighbouring heads of q share them.
    """
    (_, H, T, K), G, W = q.shape, k.size(1), window
    missing = -T % W
    q = F.pad(q, (0, 0, 0, missing)).unflatten(2, (-1, W)).unflatten(1, (G, H // G))  # (B, G, H / G, C, W, K)
    C = q.size(3)
    # The block before the first one is nothing; windows of 2 W keys start at every block.
    k, v = (F.pad(x, (0, 0, W, missing)).unfold(2, 2 * W, W).mT.unsqueeze(2) for x in (k, v))  # (B, G, 1, C, 2 W, K)
    ahead = torch.arange(2 * W, device=q.device) - torch.arange(W, 2 * W, device=q.device)[:, None]  # (W, 2 W)
    hidden = (ahead > 0) | (ahead <= -W)
    begin = torch.arange(C, device=q.device)[:, None, None] * W + torch.arange(-W, W, device=q.device)  # (C, 1, 2 W)
    scores = q @ k.mT / K**0.5
    scores = scores.masked_fill(hidden | (begin < 0), -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
    return (scores @ v).flatten(3, 4)[:, :, :, :T].flatten(1, 2)


class LocalSelfAttention(CausalSelfAttention):
    """CausalSelfAttention over a window of the last tokens (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150)."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.window = config.agent_window

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Position t sees positions t - window + 1 up to t."""
        return local_attention(q, k, v, min(self.window, q.size(2)))


class Messages(nn.Module):
    """What the speaker's state (B, T, D) says, and what the listener hears of it, (B, T, D)."""

    def __init__(self, config: Config):
        super().__init__()
        self.levels = config.agent_levels
        self.say = Linear(config.model_dim, config.agent_msg_dim)
        self.hear = Linear(config.agent_msg_dim, config.model_dim)

    def message(self, x: Tensor) -> Tensor:
        """The message of every position, (B, T, AGENT_MSG_DIM)."""
        m = rms_norm(self.say(rms_norm(x)))
        if self.levels is None:
            return m
        smooth = torch.tanh(m)
        steps = (smooth + 1) * ((self.levels - 1) / 2)  # from 0 to levels - 1
        return smooth + (steps.round() * (2 / (self.levels - 1)) - 1 - smooth).detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.hear(self.message(x))


class Model(LanguageModel):
    def __init__(self, config: Config):
        super().__init__(config)
        self.messages = Messages(config)
        self.listener = nn.ModuleList(Block(LocalSelfAttention(config), config) for _ in range(config.agent_layers))

    def make_mixer(self, layer_idx: int) -> nn.Module:
        return CausalSelfAttention(self.config)

    def backbone(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D): the speaker's stack and its messages, then the listener's."""
        heard = x + self.messages(super().backbone(x))
        x0 = x
        for block in self.listener:
            heard = block(heard, x0)
        return heard
