"""Time-indexed MLP: one block for several layers, its weights gated by functions of depth (https://github.com/zaphrode/qkvflow).

A matrix W of a shared block is, in layer i at time t = (i + 1) / L,
    W(t) = diag(g_out(t)) W diag(g_in(t)),   g(t) = 2 sigmoid(H e(t) - H' e'(t)),   e(t) = n(W_2 silu(W_1 features(t))),
with gates on the inputs of attention and MLP, on the MLP's hidden channels and on both outputs. H' e' is a twin, equal
at first, so that all gates begin at 1.
Differs from the study: causal attention over all earlier positions with RoPE, where the study's mixed the whole window
into one vector; the kit's block and MLP width; one time network for all gates; the artifact holds gates, not networks.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from architectures.layers import CausalSelfAttention
from architectures.time_gates import GateConfig, Gated, GatedStack, attention_gates, mlp_gates
from architectures.time_index import SharedConfig


@dataclass
class Config(GateConfig, SharedConfig):
    neutral: ClassVar[dict | None] = {"ti_blocks": None, "ti_feat": "none"}

    def gated(self, layer_idx: int) -> dict[str, Gated]:
        return attention_gates(self, "mixer") | mlp_gates(self, "mlp")

    def num_params(self) -> int:
        return super().num_params() + self.gate_params()


class Model(GatedStack):
    def make_mixer(self, layer_idx: int) -> nn.Module:
        return CausalSelfAttention(self.config)
