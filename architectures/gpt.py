"""GPT with U-Net skips, upstream's published baseline (openai/parameter-golf 2026, https://github.com/openai/parameter-golf).

Per block, with n = RMS norm and per-channel gains a, m and mixes c0, c1:
    x <- c0 x + c1 x0        x <- x + a Attention(n(x))        x <- x + m W_2 relu(W_1 n(x))^2
Attention is causal softmax (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), grouped-query, QK-norm, RoPE.
The second half of the stack adds the first half's outputs in mirror order; logits are 30 tanh(E n(x) / 30), E tied.
Differs from upstream: the arithmetic is the same; activations are cast once instead of under autocast. DOC_MASK=1, off
in upstream, keeps attention inside documents.
"""

from dataclasses import dataclass
from typing import ClassVar

from architectures.documents import DocumentConfig, DocumentModel


@dataclass
class Config(DocumentConfig):
    env_prefix: ClassVar[str] = "DOC_"


class Model(DocumentModel):
    pass
