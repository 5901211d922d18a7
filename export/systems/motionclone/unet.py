"""AnimateDiff's UNet as MotionClone reads it: per-frame norms, text that all frames share, and temporal attention with a tap.

The modules, and so the names of the weights, are those of diffusers' `UNetMotionModel`. What differs:

* the first norm of a motion module takes its statistics per frame, as in the code that the weights were trained with;
  diffusers shares them between frames ("shared"), which changes a quarter of the indices of a motion representation;
* text is `[B, L, D]`, one row a request: keys and values are computed once and not once a frame;
* the pass is in two halves, `head` (which ends behind the guided block) and `tail`: only the first is differentiated.

Sources: AnimateDiff (Guo et al. 2023, arXiv 2307.04725), MotionClone (Ling et al. 2024, arXiv 2406.05338).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionrt.export.systems.motionrag import merge_heads, split_heads

GROUP_NORMS = ("per_frame", "shared")
Skips = tuple[Tensor, ...]


class Upsample(nn.Module):
    """diffusers' `Upsample2D` to twice the size, by the operator itself: what is around it there asks how many rows there are,
    of which a trace makes a limit. `conv` keeps its name, and so its weights."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor, output_size: None = None) -> Tensor:
        """`[n, C, h, w]` -> `[n, C, 2 h, 2 w]`."""
        height, width = hidden_states.shape[-2:]
        return self.conv(torch.ops.aten.upsample_nearest2d.default(hidden_states, [2 * height, 2 * width]))


class FrameNorm(nn.GroupNorm):
    """Group norm of `[B, C, F, h, w]` with statistics of every frame on its own."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        batch, channels, frames = x.shape[:3]
        rows = x.transpose(1, 2).reshape(batch * frames, channels, *x.shape[3:])
        return super().forward(rows).unflatten(0, (batch, frames)).transpose(1, 2)


class SharedText:
    """Processor of spatial attention; a context with fewer rows than `hidden_states` is shared by groups of them (frames).

    With `tapped` it leaves the probabilities of its heads' mean in `seen [B, F L, n]`.
    """

    def __init__(self, tapped: bool = False) -> None:
        self.tapped = tapped
        self.seen: Tensor | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        """`hidden_states [B F, L, C]`, `encoder_hidden_states [B, n, D]` or none (self-attention) -> `[B F, L, C]`."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows = hidden_states.reshape(context.shape[0], -1, hidden_states.shape[-1])
        query, key, value = (split_heads(x, attn.heads) for x in (attn.to_q(rows), attn.to_k(context), attn.to_v(context)))
        if self.tapped:
            seen = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, -1)
            self.seen, hidden = seen.mean(1), merge_heads(seen @ value)
        else:
            hidden = merge_heads(F.scaled_dot_product_attention(query, key, value))
        return attn.to_out[0](hidden).reshape(hidden_states.shape)


class Temporal:
    """Processor of temporal attention, `[B h w, F, C]`; with `tapped` it leaves its probabilities in `seen`, and its keys."""

    def __init__(self, tapped: bool = False) -> None:
        self.tapped = tapped
        self.seen: Tensor | None = None
        self.keys: Tensor | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        """The same shape; `seen [B h w, heads, F queries, F keys]`, `keys [B h w, F, C]`."""
        query, key, value = (split_heads(x(hidden_states), attn.heads) for x in (attn.to_q, attn.to_k, attn.to_v))
        if self.tapped:
            self.seen = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, -1)
            self.keys, hidden = merge_heads(key), self.seen @ value
        else:
            hidden = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](merge_heads(hidden))


def motion_unet(config: Mapping[str, Any], group_norm: str = "per_frame") -> Any:
    """diffusers' `UNetMotionModel` of `config`, changed as this file says; ValueError for a `group_norm` that is none."""
    from diffusers import UNetMotionModel

    if group_norm not in GROUP_NORMS:
        raise ValueError(f"group_norm is {group_norm!r}; allowed: {', '.join(GROUP_NORMS)}.")
    return prepared(UNetMotionModel(**config), group_norm)


def prepared(network: Any, group_norm: str = "per_frame") -> Any:
    """A UNet or SparseCtrl of diffusers, changed in place as this file says."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
    from diffusers.models.upsampling import Upsample2D

    for module in list(network.modules()):
        if isinstance(module, AnimateDiffTransformer3D):
            if group_norm == "per_frame":
                module.norm.__class__ = FrameNorm  # the same state
            for block in module.transformer_blocks:
                for attention in (block.attn1, block.attn2):
                    if attention is not None:
                        attention.processor = Temporal()
    for module in network.modules():
        if isinstance(module, Attention) and not isinstance(module.processor, Temporal):
            module.processor = SharedText()
        for name, child in list(module.named_children()):
            if isinstance(child, Upsample2D):
                setattr(module, name, Upsample(child.conv))
    return network.eval()


class TappedUNet(nn.Module):
    """The UNet in two halves, `block` being the last guided up block (its index) and the end of the first half.

    `semantic`: whether that block's attention to text is tapped too.
    """

    def __init__(self, unet: Any, block: int = 1, semantic: bool = False) -> None:
        super().__init__()
        self.unet, self.block = unet, block
        self.taps: list[Temporal] = []
        for module in unet.up_blocks[block].motion_modules:
            for part in module.transformer_blocks:
                for attention in (part.attn1, part.attn2):
                    attention.processor = Temporal(tapped=True)
                    self.taps.append(attention.processor)
        self.words: list[SharedText] = []
        for module in unet.up_blocks[block].attentions if semantic else ():
            for part in module.transformer_blocks:
                part.attn2.processor = SharedText(tapped=True)
                self.words.append(part.attn2.processor)

    @property
    def factor(self) -> int:
        """How many places of the latents a guided place is, along a side."""
        return 2 ** (len(self.unet.up_blocks) - 1 - self.block)

    @property
    def layers(self) -> int:
        """How many attentions are guided."""
        return len(self.taps)

    def embedded(self, timestep: Tensor) -> Tensor:
        """`timestep [B]` -> `[B, C]`: all that the network reads of it."""
        unet = self.unet
        return unet.time_embedding(unet.time_proj(timestep).to(unet.conv_in.weight.dtype))

    def words_and_keys(self, frames: int) -> tuple[Tensor, list[Tensor]]:
        """Of the last `head`: the attention to text `[B, F, P, n]`, a mean over layers and heads, and the keys `[B, P, F, C]`
        of every guided attention."""
        seen = torch.stack([tap.seen for tap in self.words if tap.seen is not None]).mean(0)
        keys = [tap.keys.unflatten(0, (seen.shape[0], -1)) for tap in self.taps if tap.keys is not None]
        return seen.unflatten(1, (frames, -1)), keys

    def head(
        self, latents: Tensor, embedding: Tensor, text: Tensor, residuals: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Skips, list[Tensor]]:
        """`latents [B, F, C, h, w]`, `embedding [B, E]`, `text [B, L, D]` -> hidden states and skips as the guided block leaves
        them, and the probabilities `[B, h w, heads, F, F]` of the guided attentions.

        residuals: SparseCtrl's, `[B F, c, h, w]` each: one for every skip, then the middle's.
        """
        unet, frames = self.unet, latents.shape[1]
        times = embedding[:, None].expand(-1, frames, -1).flatten(0, 1)
        hidden = unet.conv_in(latents.flatten(0, 1))
        skips: Skips = (hidden,)
        for block in unet.down_blocks:
            hidden, made = block(hidden_states=hidden, temb=times, num_frames=frames, **context(block, text))
            skips += made
        hidden = _middle(unet, hidden, times, text, frames)
        if residuals:
            skips = tuple(skip + extra for skip, extra in zip(skips, residuals[:-1], strict=True))
            hidden = hidden + residuals[-1]
        for block in unet.up_blocks[: self.block + 1]:
            hidden, skips = _up(block, hidden, skips, times, text, frames)
        seen = [tap.seen.unflatten(0, (latents.shape[0], -1)) for tap in self.taps if tap.seen is not None]
        for tap in self.taps:
            tap.seen = None
        return hidden, skips, seen

    def tail(self, hidden: Tensor, skips: Skips, embedding: Tensor, text: Tensor, frames: int) -> Tensor:
        """The rest of the pass, from what `head` gives: the network's output `[B, F, C, h, w]`."""
        unet = self.unet
        times = embedding[:, None].expand(-1, frames, -1).flatten(0, 1)
        for block in unet.up_blocks[self.block + 1 :]:
            hidden, skips = _up(block, hidden, skips, times, text, frames)
        if unet.conv_norm_out is not None:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        return unet.conv_out(hidden).unflatten(0, (-1, frames))

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, residuals: Sequence[Tensor] = ()) -> Tensor:
        """The whole pass: `latents [B, F, C, h, w]`, `timestep [B]`, `text [B, L, D]` -> `[B, F, C, h, w]`."""
        embedding = self.embedded(timestep)
        hidden, skips, _ = self.head(latents, embedding, text, residuals)
        return self.tail(hidden, skips, embedding, text, latents.shape[1])


def context(block: Any, text: Tensor) -> dict[str, Tensor]:
    """The text, for a block that reads it."""
    return {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}


def _middle(unet: Any, hidden: Tensor, times: Tensor, text: Tensor, frames: int) -> Tensor:
    block = unet.mid_block
    if block is None:
        return hidden
    more = {"num_frames": frames} if hasattr(block, "motion_modules") else {}
    return block(hidden, times, encoder_hidden_states=text, **more)


def _up(block: Any, hidden: Tensor, skips: Skips, times: Tensor, text: Tensor, frames: int) -> tuple[Tensor, Skips]:
    """One up block: what it gives, and the skips that are left for the next."""
    count = len(block.resnets)
    hidden = block(
        hidden_states=hidden, temb=times, res_hidden_states_tuple=skips[-count:], num_frames=frames, **context(block, text)
    )
    return hidden, skips[:-count]
