"""`nn.MultiheadAttention` with any number of heads, so that whole heads can be cut out of it.

torch computes the width of a head from the width of the input (`embed_dim // num_heads`), which is true only while all
heads are there. `CuttableAttention` is the same layer, with the same parameters under the same names, that reads the
number of heads off its weights. A layer becomes one in place, by its class alone.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CuttableAttention(nn.MultiheadAttention):
    """Multi-head attention whose weights have rows for `num_heads` heads of `head_dim` channels, however many.

    In all else, arguments, results and masks, it is `nn.MultiheadAttention`; without `bias_k`, `bias_v` and
    `add_zero_attn`.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see `nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal: expected an attn_mask with it, as nn.MultiheadAttention does")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        maps = zip((query, key, value), *self._maps(), strict=True)
        queries, keys, values = (self._split(F.linear(x, w, b)) for x, w, b in maps)
        mask = self._mask(key_padding_mask, attn_mask, queries)
        mixed, weights = self._attend(queries, keys, values, mask, need_weights)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, weights

    def _maps(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Weights and biases that make queries, keys and values."""
        fused = cast(Tensor | None, self.in_proj_weight)
        bias = cast(Tensor | None, self.in_proj_bias)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if fused is None else fused.chunk(3)
        return weights, (None, None, None) if bias is None else bias.chunk(3)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, heads · head_dim) -> (B, heads, N, head_dim)."""
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)

    @staticmethod
    def _mask(padding: Tensor | None, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """What is added to the scores (B, heads, N, M), of a shape that broadcasts to theirs."""
        parts = []
        if mask is not None:
            parts.append(mask.view(query.shape[0], -1, *mask.shape[1:]) if mask.dim() == 3 else mask)
        if padding is not None:
            parts.append(padding[:, None, None, :])
        total = None
        for part in parts:
            if part.dtype == torch.bool:
                part = torch.zeros_like(part, dtype=query.dtype).masked_fill_(part, float("-inf"))
            total = part if total is None else total + part
        return total

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(query, key, value, mask, dropout), None
        scores = (query * self.head_dim**-0.5) @ key.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        return weights @ value, weights


def make_cuttable(model: nn.Module) -> None:
    """Make every `nn.MultiheadAttention` in `model` a `CuttableAttention`, in place. It computes the same."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
            module.__class__ = CuttableAttention
            # torch's fused kernels for whole encoder layers ask for this before they take the weights as they are
            module._qkv_same_embed_dim = False


def is_whole(attention: nn.MultiheadAttention) -> bool:
    """Whether nothing has been cut from an attention layer, neither heads nor what it reads and writes."""
    width, fused = attention.embed_dim, cast(Tensor | None, attention.in_proj_weight)
    if fused is not None:
        made = [(fused, (3 * width, width))]
    else:
        inputs = {"q": width, "k": attention.kdim, "v": attention.vdim}
        made = [(getattr(attention, f"{part}_proj_weight"), (width, size)) for part, size in inputs.items()]
    return all(weight.shape == shape for weight, shape in (*made, (attention.out_proj.weight, (width, width))))
