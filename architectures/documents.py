"""Shelf: attention that does not look past the beginning of its document.

A batch is cut from one stream of tokens, in which every document begins with BOS. With DOC_MASK=1 a token attends to
the tokens of its own document alone, so that nothing is spent on text that has nothing to do with it, and a document
scores the same whatever stands before it.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from architectures.layers import CausalSelfAttention, LanguageModel, ModelConfig
from architectures.masks import make_mask, masked_attention

BOS_ID = 1  # of the kit's tokenizers and of upstream's


@dataclass
class DocumentConfig(ModelConfig):
    doc_mask: bool = False  # attention does not look past the beginning of its document


class Documents:
    """What the attention of all layers is told of a batch before it runs. flex: by FlexAttention; None: on CUDA."""

    def __init__(self, flex: bool | None = None):
        self.flex = flex

    def read(self, input_ids: Tensor) -> None:
        """Number the documents of each row of input_ids (B, T) from its left end."""
        B, T = input_ids.shape
        numbers = (input_ids == BOS_ID).cumsum(dim=1)

        def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (numbers[b, key] == numbers[b, query])

        self.mask = make_mask(visible, B, T, T, input_ids.device, self.flex)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention of q (B, H, T, K) over k, v (B, H or fewer, T, K), in q's dtype."""
        return masked_attention(q, k, v, self.mask)


class DocumentModel(LanguageModel):
    """A model whose attention heeds DOC_MASK."""

    def __init__(self, config: DocumentConfig):
        self.documents = Documents() if config.doc_mask else None
        super().__init__(config)

    def make_mixer(self, layer_idx: int) -> nn.Module:
        mixer = self.make_attention(layer_idx)
        if self.documents:
            mixer.attend = self.documents.attend
        return mixer

    def make_attention(self, layer_idx: int) -> CausalSelfAttention:
        return CausalSelfAttention(self.config)

    def head_inputs(self, input_ids: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        if self.documents:
            self.documents.read(input_ids)
        return super().head_inputs(input_ids, start)
