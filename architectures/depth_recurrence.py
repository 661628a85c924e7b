"""Depth recurrence: some layers of gpt run more than once (Dehghani et al. 2018, https://arxiv.org/abs/1807.03819).

With blocks f_0 .. f_{L-1} and RECUR_LAYERS = i .. j, RECUR_REPEATS = r, from a fraction RECUR_START of the run on:
    x_L = f_{L-1} o .. o f_{j+1} o (f_j o .. o f_i)^r o f_{i-1} o .. o f_0 (x0)
RECUR_ORDER=layer repeats each layer in its place instead: f_j^r o .. o f_i^r. The gradient of a weight is the sum over
its passes. Nothing is added to the artifact, whatever r is; a run that starts late trains most of its steps at gpt's
speed (https://github.com/openai/parameter-golf). RECUR_REPEATS=1 is gpt.
Differs from the paper: a few layers in the middle repeat, not all; nothing tells one pass from another; no halting.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from architectures.layers import CausalSelfAttention
from architectures.recurrence import RecurrenceConfig, RecurrentStack


@dataclass
class Config(RecurrenceConfig):
    env_prefix: ClassVar[str] = "RECUR_"
    neutral: ClassVar[dict | None] = {"recur_repeats": 1}


class Model(RecurrentStack):
    def make_mixer(self, layer_idx: int) -> nn.Module:
        return CausalSelfAttention(self.config)
