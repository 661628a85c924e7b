"""GPT with U-Net skips, upstream's published baseline (openai/parameter-golf 2026, https://github.com/openai/parameter-golf).

Per block, with n = RMS norm and per-channel gains a, m and mixes c0, c1:
    x <- c0 x + c1 x0        x <- x + a Attention(n(x))        x <- x + m W_2 relu(W_1 n(x))^2
Attention is causal softmax (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), grouped-query, QK-norm, RoPE.
The second half of the stack adds the first half's outputs in mirror order; logits are 30 tanh(E n(x) / 30), E tied.
Differs from upstream: the arithmetic is the same; activations are cast once instead of under autocast.
"""

from dataclasses import dataclass

from torch import nn

from architectures.layers import CausalSelfAttention, LanguageModel, ModelConfig


@dataclass
class Config(ModelConfig):
    pass


class Model(LanguageModel):
    def make_mixer(self, layer_idx: int) -> nn.Module:
        return CausalSelfAttention(self.config)
