"""Blocks shared over depth, without a time index (ALBERT, Lan et al. 2019, https://arxiv.org/abs/1909.11942).

    x <- Block_g(i)(x),  i = 1 .. L,  with g(i) one of TI_BLOCKS blocks: neighbours share one, or the blocks take turns.
The control of the time-indexed architectures: what they do with TI_FEAT=none. TI_BLOCKS=none is gpt.
Differs from the paper: a causal model with the kit's block; a few blocks instead of one; U-Net skips, whose weights,
unlike those of the blocks, belong to a layer (UNET_SKIPS=0 leaves nothing that tells one layer from another).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from architectures.layers import CausalSelfAttention
from architectures.time_index import SharedConfig, SharedStack


@dataclass
class Config(SharedConfig):
    env_prefix: ClassVar[str] = "TI_"
    neutral: ClassVar[dict | None] = {"ti_blocks": None}


class Model(SharedStack):
    def make_mixer(self, layer_idx: int) -> nn.Module:
        return CausalSelfAttention(self.config)
