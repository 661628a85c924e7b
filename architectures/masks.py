"""Shelf: attention under a rule who sees whom, by FlexAttention on CUDA and by PyTorch's kernel elsewhere."""

from collections.abc import Callable

import torch
from torch import Tensor

from architectures.layers import attention


def make_mask(visible: Callable[..., Tensor], B: int | None, T: int, S: int, device: torch.device, flex: bool | None):
    """The mask of T queries and S keys of B rows (None: one mask for all), for masked_attention.

    visible(row, head, query, key), of index tensors, is true where a query sees a key. flex: a block mask, by which
    whole blocks of keys that no query sees are skipped; None: on CUDA.
    """
    if device.type == "cuda" if flex is None else flex:
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(visible, B, None, T, S, device=device)
    key = torch.arange(S, device=device)
    if B is None:
        return visible(0, 0, key[:T, None], key)  # (T, S)
    return visible(torch.arange(B, device=device)[:, None, None], 0, key[:T, None], key)[:, None]  # (B, 1, T, S)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    """Softmax attention of q (B, H, T, K) over k, v (B, H or fewer, S, K) under a mask of make_mask, in q's dtype."""
    if isinstance(mask, Tensor):
        return attention(q, k, v, mask)
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))
