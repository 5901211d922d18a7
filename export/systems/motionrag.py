"""MotionRAG's own modules, written plainly as released (arXiv 2509.26391).

Resampler (motion and image projector), sinusoidal tables, CAMA (the motion context transformer) and the Motion-Adapter
in its two places: the joint attention of CogVideoX and the cross-attention of SVD. State-dict keys are the released
ones, so that official files load unchanged. Nothing here is optimised: the compiler pass derives the fast forms.

Shapes: B batch, K references, M motion tokens, D token width, L sequence length, N heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_table(positions: int, dim: int) -> Tensor:
    """Fixed sine and cosine table `[positions, dim]` fp32: even columns sine, odd columns cosine.

    angle(p, j) = p / 10000^(2 floor(j/2) / dim), computed in fp64 and rounded once.
    """
    position = torch.arange(positions, dtype=torch.float64)[:, None]
    column = torch.arange(dim, dtype=torch.float64)[None]
    angle = position / 10000 ** (2 * torch.div(column, 2, rounding_mode="floor") / dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


class PerceiverAttention(nn.Module):
    """Learned queries `[B, Q, dim]` read features and themselves: keys and values are `[features; queries]`."""

    def __init__(self, dim: int, dim_head: int, heads: int) -> None:
        super().__init__()
        inner = dim_head * heads
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """`features [B, n, dim]`, `latents [B, Q, dim]` -> update of the latents `[B, Q, dim]`."""
        features, latents = self.norm1(features), self.norm2(latents)
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([features, latents], dim=1)).chunk(2, dim=-1)
        query, key, value = (split_heads(x, self.heads) for x in (query, key, value))
        return self.to_out(merge_heads(F.scaled_dot_product_attention(query, key, value)))


class Resampler(nn.Module):
    """Perceiver resampler: features `[B, n, embedding_dim]` -> tokens `[B, num_queries, output_dim]`.

    With `with_cls_token` one more query is learned, and the result is (token 0 `[B, output_dim]`, the others).
    """

    def __init__(
        self,
        dim: int = 1024,
        depth: int = 4,
        dim_head: int = 64,
        heads: int = 12,
        num_queries: int = 25,
        embedding_dim: int = 768,
        output_dim: int = 1024,
        ff_mult: int = 4,
        with_cls_token: bool = False,
    ) -> None:
        super().__init__()
        self.with_cls_token = with_cls_token
        self.latents = nn.Parameter(torch.randn(1, num_queries + int(with_cls_token), dim) / dim**0.5)
        self.proj_in = nn.Linear(embedding_dim, dim)
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            feed_forward = nn.Sequential(
                nn.LayerNorm(dim),
                nn.Linear(dim, dim * ff_mult, bias=False),
                nn.GELU(),
                nn.Linear(dim * ff_mult, dim, bias=False),
            )
            self.layers.append(nn.ModuleList([PerceiverAttention(dim, dim_head, heads), feed_forward]))

    def forward(self, features: Tensor) -> Any:
        """`features [B, n, embedding_dim]` -> tokens `[B, num_queries, output_dim]` (or the pair, see the class)."""
        features = self.proj_in(features)
        latents = self.latents.expand(features.shape[0], -1, -1)
        for attention, feed_forward in self.layers:  # type: ignore[misc]
            latents = latents + attention(features, latents)
            latents = latents + feed_forward(latents)
        tokens = self.norm_out(self.proj_out(latents))
        return (tokens[:, 0], tokens[:, 1:]) if self.with_cls_token else tokens


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameter names of `torch.nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, mask: Tensor | None, last: int | None = None) -> Tensor:
        """`x [B, L, dim]`, additive `mask [L, L]` -> `[B, L, dim]`; with `last`, only the last rows `[B, last, dim]`."""
        if last is None:
            query, key, value = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            width = x.shape[-1]
            query = F.linear(x[:, -last:], self.in_proj_weight[:width], self.in_proj_bias[:width])
            key, value = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        query, key, value = (split_heads(part, self.heads) for part in (query, key, value))
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)))


class EncoderLayer(nn.Module):
    """Post-norm transformer layer: x = LN1(x + SA(x)); x = LN2(x + FF(x)), exact GELU, eps 1e-5."""

    def __init__(self, dim: int, heads: int, ff_dim: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, heads)
        self.linear1 = nn.Linear(dim, ff_dim)
        self.linear2 = nn.Linear(ff_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None, last: int | None = None) -> Tensor:
        """`x [B, L, dim]`, additive `mask [L, L]` -> `[B, L, dim]`; with `last`, only the last rows `[B, last, dim]`."""
        x = self.norm1((x if last is None else x[:, -last:]) + self.self_attn(x, mask, last))
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))


class Cama(nn.Module):
    """Motion context transformer: adapts the references' motion tokens to the target image.

    Blocks of `num_queries` tokens, least similar reference first, the target last. Block i holds the motion tokens of
    block i-1 (block 1 holds `sos_token`) plus the appearance tokens of block i; a token sees its own block and the
    earlier ones; output block i predicts the motion tokens of block i. At most 256 positions.
    """

    MAX_POSITIONS = 256

    def __init__(
        self, num_queries: int = 25, dim: int = 1024, layers: int = 4, heads: int = 16, ff_dim: int = 4096
    ) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.sos_token = nn.Parameter(torch.randn(1, num_queries, dim) / dim**0.5)
        self.transformer = nn.ModuleDict(
            {"layers": nn.ModuleList(EncoderLayer(dim, heads, ff_dim) for _ in range(layers))}
        )
        self.vision_pe: Tensor
        self.condition_pe: Tensor
        self.register_buffer("vision_pe", sinusoidal_table(self.MAX_POSITIONS, dim), persistent=False)
        self.register_buffer("condition_pe", sinusoidal_table(num_queries, dim), persistent=False)

    def sequence(self, reference_motion: Tensor, appearance: Tensor) -> Tensor:
        """Encoder input `[B, (K+1) M, D]` from `reference_motion [B, K, M, D]` and `appearance [B, K+1, M, D]`.

        Both most similar first; the last appearance is the target's.
        """
        batch = reference_motion.shape[0]
        sos = self.sos_token.to(reference_motion.dtype).expand(batch, -1, -1)
        motion = torch.cat([sos[:, None], reference_motion.flip(1)], dim=1).flatten(1, 2)
        images = torch.cat([appearance[:, :-1].flip(1), appearance[:, -1:]], dim=1)
        images = (images + self.condition_pe.to(images.dtype)).flatten(1, 2)
        return motion + self.vision_pe[: motion.shape[1]].to(motion.dtype) + images

    def blocked(self, length: int) -> Tensor:
        """Block-causal mask `[length, length]` bool, True where attention is forbidden."""
        block = torch.div(
            torch.arange(length, device=self.vision_pe.device), self.num_queries, rounding_mode="floor"
        )
        return block[None, :] > block[:, None]

    def forward_all(self, reference_motion: Tensor, reference_appearance: Tensor, appearance: Tensor) -> Tensor:
        """All output blocks `[B, K+1, M, D]`, least similar reference first, the target last (arguments: `forward`)."""
        x = self.sequence(reference_motion, torch.cat([reference_appearance, appearance[:, None]], dim=1))
        length = x.shape[1]
        mask = torch.zeros(length, length, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(self.blocked(length), float("-inf"))
        for layer in self.transformer["layers"]:  # type: ignore[union-attr]
            x = layer(x, mask)
        return x.unflatten(1, (-1, self.num_queries))

    def forward(self, reference_motion: Tensor, reference_appearance: Tensor, appearance: Tensor) -> Tensor:
        """Predicted motion tokens of the target, `[B, M, D]`.

        `reference_motion`, `reference_appearance` `[B, K, M, D]`, most similar first; `appearance [B, M, D]`.
        """
        x = self.sequence(reference_motion, torch.cat([reference_appearance, appearance[:, None]], dim=1))
        length = x.shape[1]
        mask = torch.zeros(length, length, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(self.blocked(length), float("-inf"))
        *layers, final = self.transformer["layers"]  # type: ignore[misc]
        for layer in layers:
            x = layer(x, mask)
        return final(x, None, self.num_queries)  # the last block sees every block: it needs no mask, nor the other rows


class MotionAdapter(nn.Module):
    """Motion-Adapter projections: h + scale * softmax(q k^T / sqrt(d)) v, q from h `[B, L, D]`, k and v from motion."""

    def __init__(self, hidden_dim: int, motion_dim: int) -> None:
        super().__init__()
        self.to_q_ip = nn.ModuleList([nn.Linear(hidden_dim, hidden_dim, bias=False)])
        self.to_k_ip = nn.ModuleList([nn.Linear(motion_dim, hidden_dim, bias=False)])
        self.to_v_ip = nn.ModuleList([nn.Linear(motion_dim, hidden_dim, bias=False)])

    def adapt(self, hidden: Tensor, motion: Tensor, scale: Tensor | float, heads: int) -> Tensor:
        """`hidden [B, L, D]`, `motion [b, M, Dm]` with B a multiple of b (each row repeated in place) -> `[B, L, D]`."""
        if motion.shape[0] != hidden.shape[0]:
            motion = motion.repeat_interleave(hidden.shape[0] // motion.shape[0], dim=0)
        query = split_heads(self.to_q_ip[0](hidden), heads)
        key = split_heads(self.to_k_ip[0](motion), heads)
        value = split_heads(self.to_v_ip[0](motion), heads)
        return hidden + scale * merge_heads(F.scaled_dot_product_attention(query, key, value))


class MotionAdapterCogVideoX(MotionAdapter):
    """Attention processor for diffusers' CogVideoX `attn1`: joint [text; video] attention, then the Motion-Adapter."""

    def __call__(  # diffusers reads the processor's own signature to decide which keywords to pass on
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        motion: Tensor | None = None,
        motion_scale: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """`hidden_states [B, Lv, D]`, `encoder_hidden_states [B, Lt, D]`, `motion [b, M, Dm]` -> (video, text)."""
        from diffusers.models.embeddings import apply_rotary_emb

        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (split_heads(project(joint), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:  # the video part only
            query, key = (
                torch.cat([x[:, :, :text], apply_rotary_emb(x[:, :, text:], image_rotary_emb)], dim=2)
                for x in (query, key)
            )
        hidden = merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask))
        if motion is not None:
            hidden = self.adapt(hidden, motion, motion_scale, attn.heads)
        hidden = attn.to_out[1](attn.to_out[0](hidden))
        return hidden[:, text:], hidden[:, :text]


class MotionAdapterCrossAttention(MotionAdapter):
    """Attention processor for an SVD-style `attn2`: attention to the image context, then the Motion-Adapter."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        motion: Tensor | None = None,
        motion_scale: Tensor | float = 1.0,
    ) -> Tensor:
        """`hidden_states [B, L, C]`, context `[b, n, Dc]`, `motion [b, M, Dm]`, B a multiple of b -> `[B, L, C]`."""
        context = encoder_hidden_states
        if context.shape[0] != hidden_states.shape[0]:
            context = context.repeat_interleave(hidden_states.shape[0] // context.shape[0], dim=0)
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key, value = (split_heads(project(context), attn.heads) for project in (attn.to_k, attn.to_v))
        hidden = merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask))
        if motion is not None:
            hidden = self.adapt(hidden, motion, motion_scale, attn.heads)
        return attn.to_out[1](attn.to_out[0](hidden))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, L, N d]` -> `[B, N, L, d]`."""
    return x.view(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """`[B, N, L, d]` -> `[B, L, N d]`."""
    return x.transpose(1, 2).flatten(2)


def install_cogvideox_adapter(transformer: Any, motion_width: int) -> None:
    """Put a Motion-Adapter on every `transformer_blocks[i].attn1`; new weights are drawn from torch's generator.

    Tokens and scale reach them by `transformer(..., attention_kwargs={"motion": [B, M, D], "motion_scale": s})`.
    """
    for block in transformer.transformer_blocks:
        attention = block.attn1
        hidden = attention.to_q.in_features
        attention.set_processor(MotionAdapterCogVideoX(hidden, motion_width).to(attention.to_q.weight))
