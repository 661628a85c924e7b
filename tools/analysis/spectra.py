"""Eigenvalues of a head's products of weights (Elhage et al. 2021, https://transformer-circuits.pub/2021/framework).

    QK_h = W_q,h^T W_k,g   and   OV_h = W_o,h W_v,g,   D x D of rank K, with g the key-value head that head h reads
AB and BA have the same non-zero eigenvalues, so those of the K x K matrices W_k,g W_q,h^T and W_v,g W_o,h are all.
QK is at zero offset: RoPE turns queries against keys by the distance. QK-norm and q_gain change a score by a positive
factor, so they move no eigenvalue off its ray but its length is not that of a score. OV is the module's own, without
the block's scale of the mixer.
"""

import torch
from torch import Tensor

from architectures.layers import CausalSelfAttention, LanguageModel
from tools.analysis.calls import calls


def per_head(weight: Tensor, num_heads: int) -> Tensor:
    """The rows (H * K, D) of a projection as (H, K, D), float64."""
    return weight.detach().double().unflatten(0, (num_heads, -1))


def sorted_eigenvalues(products: Tensor) -> Tensor:
    """The eigenvalues of matrices (H, K, K), largest first, (H, K) complex."""
    values = torch.linalg.eigvals(products)
    return values.gather(-1, values.abs().argsort(dim=-1, descending=True))


def kv_head_of(attention: CausalSelfAttention) -> Tensor:
    """The key-value head that each query head reads, (H,)."""
    return torch.arange(attention.num_heads) * attention.num_kv_heads // attention.num_heads


def qk_eigenvalues(attention: CausalSelfAttention) -> Tensor:
    """Those of W_q^T W_k that may differ from zero, by head, (H, K) complex."""
    query = per_head(attention.query.weight, attention.num_heads)
    key = per_head(attention.key.weight, attention.num_kv_heads)[kv_head_of(attention)]
    return sorted_eigenvalues(key @ query.mT)


def ov_eigenvalues(attention: CausalSelfAttention) -> Tensor:
    """Those of W_o W_v that may differ from zero, by head, (H, K) complex."""
    out = per_head(attention.out.weight.T, attention.num_heads)  # (H, K, D): transposed
    value = per_head(attention.value.weight, attention.num_kv_heads)[kv_head_of(attention)]
    return sorted_eigenvalues(value @ out.mT)


def summary(values: Tensor, kind: str) -> dict:
    """Of one head's eigenvalues (K,): radius, share that is complex, share with positive real part, trace, and all."""
    return {
        f"{kind}_radius": values.abs().max().item(),
        f"{kind}_complex_share": (values.imag != 0).double().mean().item(),  # LAPACK gives real ones exactly
        f"{kind}_positive_share": (values.real > 0).double().mean().item(),
        f"{kind}_trace": values.real.sum().item(),
        f"{kind}_eigenvalues": torch.view_as_real(values).tolist(),
    }


def spectra(model: LanguageModel, input_ids: Tensor) -> list[dict]:
    """An entry per layer and head, in running order; none for a model without CausalSelfAttention."""
    entries = []
    for call in calls(model, input_ids, lambda module: isinstance(module, CausalSelfAttention)):
        qk, ov, kv_heads = qk_eigenvalues(call.module), ov_eigenvalues(call.module), kv_head_of(call.module)
        for head, kv_head in enumerate(kv_heads.tolist()):
            place = {"layer": call.layer, "module": call.name, "head": head, "kv_head": kv_head}
            entries.append(place | summary(qk[head], "qk") | summary(ov[head], "ov"))
    return entries
