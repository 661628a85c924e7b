"""DOC_MASK: a document's scores do not depend on what stands before it, in any form of the mask."""

import pytest
import torch
from test_architectures import shake, some_tokens, tiny

from architectures.documents import BOS_ID, Documents
from data.tokenizers import ByteTokenizer
from train_gpt import read_shard


def batch_of_documents() -> torch.Tensor:
    tokens = some_tokens(2, 64).clamp(min=2)
    tokens[0, 20] = tokens[0, 41] = tokens[1, 33] = BOS_ID
    return tokens


def test_a_document_scores_the_same_whatever_stands_before_it():
    tokens = batch_of_documents()
    other = tokens.clone()
    other[0, :20] = other[1, :33] = 7
    for masked in (True, False):
        model = shake(tiny("gpt", doc_mask=masked))
        changed = (model.logits(tokens) - model.logits(other)).abs().amax(-1)
        assert torch.equal(changed[0, 20:] == 0, torch.full((44,), masked))
        assert torch.equal(changed[1, 33:] == 0, torch.full((31,), masked))


def test_a_row_of_one_document_scores_as_without_the_mask():
    tokens = some_tokens(2, 64).clamp(min=2)
    masked, plain = shake(tiny("gpt", doc_mask=True)), shake(tiny("gpt"))
    torch.testing.assert_close(masked.logits(tokens), plain.logits(tokens), rtol=1e-4, atol=1e-4)


def test_a_document_in_the_middle_scores_as_at_the_left_end_up_to_its_positions():
    """RoPE turns by distance alone, so a document moved to the left end has the same scores."""
    tokens = batch_of_documents()
    model = shake(tiny("gpt", doc_mask=True))
    alone = model.logits(tokens[:1, 41:])
    torch.testing.assert_close(model.logits(tokens[:1])[:, 41:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_both_forms_of_the_mask_are_one_attention(kv_heads):
    """Forward alone: on CPU FlexAttention, the form for CUDA, has no backward."""
    tokens, made = batch_of_documents(), torch.Generator().manual_seed(0)
    qkv = [torch.randn(2, heads, 64, 16, generator=made) for heads in (4, kv_heads, kv_heads)]
    found = []
    for flex in (True, False):
        documents = Documents(flex)
        documents.read(tokens)
        found.append(documents.attend(*qkv))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_masked_step_compiles_without_graph_breaks():
    torch._dynamo.reset()
    model, tokens = tiny("gpt", doc_mask=True), batch_of_documents()
    want = model(tokens[:, :-1], tokens[:, 1:])
    loss = torch.compile(model, fullgraph=True, dynamic=False)(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, want)
    loss.backward()
    other = tokens.roll(1, dims=1)  # the second batch has its own documents, not those of the first
    again = torch.compile(model, fullgraph=True, dynamic=False)(other[:, :-1], other[:, 1:])
    torch.testing.assert_close(again, model(other[:, :-1], other[:, 1:]))


def test_documents_begin_with_the_token_that_the_mask_looks_for(data):
    tokens = read_shard(next(data.glob("fineweb_train_*.bin")))
    assert tokens[0] == BOS_ID == ByteTokenizer.bos_id
