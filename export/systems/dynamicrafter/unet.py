"""DynamiCrafter's denoiser (Xing et al. 2023, arXiv 2310.12190), with MotionRAG's adapters where they are asked for.

Names of weights are the released ones, the misspelt one too. Two sorts of weight are stored with axes of one element that are
left out here: kernels of temporal convolutions `[C, C, 3, 1, 1]`, which run as 2-D ones over time and all places, and the
projections of the first temporal transformer `[C, C, 1]`.

A group norm takes its statistics over a frame, or over the whole clip: temporal convolutions and temporal transformers see the
clip. Frame order enters by the zeros around a temporal convolution and by the image tokens of each frame alone: temporal
attention has no positions.

Shapes: B requests, R rows (a request has one for each pass of its guidance), F frames, N = R F, C channels, L = h w places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionrt.export.systems.motionclone.unet import Upsample
from motionrt.export.systems.motionrag import merge_heads, split_heads
from motionrt.export.systems.rows import repeated

GROUPS = 32
INIT_HEADS = 8  # of the temporal transformer behind the first convolution, whatever the width is
FRAME_TOKENS = ("split", "all")


@dataclass(frozen=True)
class Size:
    """Sizes of the network. `widths`: multiples of `channels`, level by level; `blocks` of a level; the first `attended` levels
    have transformers, whose heads are `head` wide; `context`: width of text and image tokens; `learned`: the image's part in
    cross-attention is 1 + tanh(alpha), as in the 256 model; `motion`: width of motion tokens, None without adapters.

    `frame_tokens`: a frame sees its share of the image tokens ("split": token f n + i is frame f's), as MotionRAG's copy has it
    for any number of frames, or "all" of them, as the original has it where they are not 16 a frame.
    """

    channels: int = 320
    widths: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    attended: int = 3
    head: int = 64
    context: int = 1024
    learned: bool = False
    motion: int | None = None
    frame_tokens: str = "split"

    @property
    def factor(self) -> int:
        """What height and width of latents must be multiples of."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class Conditions:
    """What cross-attention reads: `text [R, n, D]`, `image [R, m, D]`, and where there are adapters `motion [R, M, Dm]` and
    `scale [R, 1, 1]`."""

    text: Tensor
    image: Tensor
    motion: Tensor | None = None
    scale: Tensor | float = 1.0


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention of `[R, L, C]` to `[R, n, C]`, `heads` heads -> `[R, L, C]`."""
    query, key, value = (split_heads(x, heads) for x in (query, key, value))
    return merge_heads(F.scaled_dot_product_attention(query, key, value))


class SelfAttention(nn.Module):
    """Attention among the tokens of a row."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, conditions: None = None, frames: int = 0) -> Tensor:
        """`[rows, L, C]` -> the same shape."""
        return self.to_out(attend(self.to_q(x), self.to_k(x), self.to_v(x), self.heads))


class CrossAttention(nn.Module):
    """Attention to the text and, by the same queries, to the image; then, by queries of their sum, to the motion.

    o = A(q, text) + g A(q, image), g = 1 or 1 + tanh(alpha);  o' = o + s A(Wqa o, motion): MotionRAG's adapter.

    All frames of a row share text and motion: they are laid out as one long sequence.
    """

    def __init__(self, width: int, size: Size) -> None:
        super().__init__()
        self.heads, self.split, self.adapted = width // size.head, size.frame_tokens == "split", size.motion is not None
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v, self.to_k_ip, self.to_v_ip = (nn.Linear(size.context, width, bias=False) for _ in range(4))
        self.to_out = nn.Sequential(nn.Linear(width, width))
        self.alpha = nn.Parameter(torch.zeros(())) if size.learned else None
        if size.motion is not None:
            self.to_q_a = nn.Linear(width, width, bias=False)
            self.to_k_a, self.to_v_a = (nn.Linear(size.motion, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor, conditions: Conditions, frames: int) -> Tensor:
        """`[N, L, C]` -> the same shape."""
        text, image, motion = conditions.text, conditions.image, conditions.motion
        query = self.to_q(x)
        rows = query.reshape(text.shape[0], -1, query.shape[-1])  # [R, F L, C]
        if self.split:
            image = image.reshape(-1, image.shape[1] // frames, image.shape[2])  # [N, m / F, D]
        seen = attend(query if self.split else rows, self.to_k_ip(image), self.to_v_ip(image), self.heads).reshape(rows.shape)
        if self.alpha is not None:
            seen = seen * (1 + torch.tanh(self.alpha))
        hidden = attend(rows, self.to_k(text), self.to_v(text), self.heads) + seen
        if self.adapted and motion is not None:
            moved = attend(self.to_q_a(hidden), self.to_k_a(motion), self.to_v_a(motion), self.heads)
            hidden = hidden + conditions.scale * moved
        return self.to_out(hidden).reshape(x.shape)


class Gated(nn.Module):
    """GEGLU: the first half of a projection, gated by the second."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., inner]`."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gated(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    """Attention among tokens, `second` (cross-attention, or the same once more), feed-forward; each adds to what it reads."""

    def __init__(self, width: int, heads: int, second: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2, self.ff = SelfAttention(width, heads), second, FeedForward(width)

    def forward(self, x: Tensor, conditions: Conditions | None = None, frames: int = 0, passes: int = 1) -> Tensor:
        """`[rows, L, C]` -> the same shape, or with `passes` times the rows: see `for_passes`."""
        x = for_passes(x + self.attn1(self.norm1(x)), frames, passes)
        x = x + self.attn2(self.norm2(x), conditions, frames)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A block over the places of every frame."""

    def __init__(self, width: int, size: Size) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([Block(width, width // size.head, CrossAttention(width, size))])

    def forward(self, x: Tensor, conditions: Conditions, frames: int, passes: int = 1) -> Tensor:
        """`[N, C, h, w]` -> the same shape, or with `passes` times the rows."""
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, conditions, frames, passes)
        return for_passes(x, frames, passes) + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


def for_passes(x: Tensor, frames: int, passes: int) -> Tensor:
    """Frames `[B F, ...]` once for each pass of their request's guidance: `[B P F, ...]`."""
    if passes == 1:
        return x
    return repeated(x.unflatten(0, (-1, frames)), passes).flatten(0, 1)


class TemporalTransformer(nn.Module):
    """A block over the frames of every place; both attentions are among frames. Its norm sees the whole clip."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, inner), nn.Linear(inner, width)
        self.transformer_blocks = nn.ModuleList([Block(inner, heads, SelfAttention(inner, heads))])

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """`[N, C, h, w]` -> the same shape."""
        height, width = x.shape[2:]
        clip = self.norm(clips(x, frames))  # [R, C, F, L]
        tokens = self.proj_in(clip.permute(0, 3, 2, 1).flatten(0, 1))  # [R L, F, C]
        for block in self.transformer_blocks:
            tokens = block(tokens)
        moved = self.proj_out(tokens).unflatten(0, (-1, height * width)).permute(0, 2, 3, 1)
        return x + moved.flatten(0, 1).unflatten(2, (height, width))


class TemporalConv(nn.Module):
    """Four norms and convolutions over three frames; the norms see the whole clip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for index in range(1, 5):
            dropped = () if index == 1 else (nn.Identity(),)  # dropout, which training had
            conv = nn.Conv2d(width, width, (3, 1), padding=(1, 0))
            setattr(self, f"conv{index}", nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), *dropped, conv))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """`[N, C, h, w]` -> the same shape."""
        clip = clips(x, frames)
        for conv in self.children():
            clip = conv(clip)
        return x + clip.transpose(1, 2).flatten(0, 1).unflatten(2, x.shape[2:])


def clips(x: Tensor, frames: int) -> Tensor:
    """Frames `[N, C, h, w]` as clips `[R, C, F, L]`."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(3)


class ResBlock(nn.Module):
    """Convolutions of a frame that read the time, then those over frames."""

    def __init__(self, width: int, out: int, time: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, out))
        last = nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Identity(), last)
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)
        self.temopral_conv = TemporalConv(out)

    def forward(self, x: Tensor, embedding: Tensor, frames: int) -> Tensor:
        """`[N, C, h, w]`, `embedding [N, E]` -> `[N, out, h, w]`."""
        hidden = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.temopral_conv(self.skip_connection(x) + self.out_layers(hidden), frames)


class Downsample(nn.Module):
    """Half the height and width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class DynamiCrafterUNet(nn.Module):
    """The network on clips that already have their image latents beside the noisy ones."""

    def __init__(self, size: Size, in_channels: int = 8, out_channels: int = 4) -> None:
        super().__init__()
        self.size = size
        time = 4 * size.channels

        def part(width: int, out: int, level: int, *more: nn.Module) -> nn.ModuleList:
            """A ResBlock, and where the level has them both transformers."""
            return nn.ModuleList([ResBlock(width, out, time), *(attention(out) if level < size.attended else ()), *more])

        def attention(width: int) -> tuple[nn.Module, nn.Module]:
            return SpatialTransformer(width, size), TemporalTransformer(width, width // size.head, width)

        def mlp() -> nn.Sequential:
            return nn.Sequential(nn.Linear(size.channels, time), nn.SiLU(), nn.Linear(time, time))

        self.time_embed, self.fps_embedding = mlp(), mlp()
        width = size.channels
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, width, 3, padding=1)])])
        self.init_attn = nn.ModuleList([TemporalTransformer(width, INIT_HEADS, INIT_HEADS * size.head)])
        skips = [width]
        for level, times in enumerate(size.widths):
            for _ in range(size.blocks):
                self.input_blocks.append(part(width, times * size.channels, level))
                width = times * size.channels
                skips.append(width)
            if level < len(size.widths) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(width)]))
                skips.append(width)
        self.middle_block = nn.ModuleList([ResBlock(width, width, time), *attention(width), ResBlock(width, width, time)])
        self.output_blocks = nn.ModuleList()
        for level, times in reversed(list(enumerate(size.widths))):
            for index in range(size.blocks + 1):
                out = times * size.channels
                up = [Upsample(nn.Conv2d(out, out, 3, padding=1))] if level and index == size.blocks else []
                self.output_blocks.append(part(width + skips.pop(), out, level, *up))
                width = out
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1))

    def sinusoid(self, numbers: Tensor) -> Tensor:
        """`[B]` -> cosines, then sines `[B, channels]`, in the weights' dtype."""
        from diffusers.models.embeddings import get_timestep_embedding

        made = get_timestep_embedding(numbers, self.size.channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        return made.to(self.time_embed[0].weight.dtype)

    def embedded(self, timestep: Tensor, fs: Tensor) -> Tensor:
        """Timesteps and conditions `fs`, `[B]` each -> `[B, 4 channels]`."""
        return self.time_embed(self.sinusoid(timestep)) + self.fps_embedding(self.sinusoid(fs))

    def forward(self, sample: Tensor, embedding: Tensor, conditions: Conditions, passes: int = 1) -> Tensor:
        """`sample [B, F, 8, h, w]`: noisy latents, then those of the image; `embedding [B, E]`; `conditions`: `passes` rows in
        turn for each row of these -> `[B passes, F, 4, h, w]`.

        The passes of a request differ in what cross-attention reads alone: what comes before the first is computed once.
        """
        frames = sample.shape[1]
        x, skips, shared = sample.flatten(0, 1), list[Tensor](), passes
        times = repeated(embedding, frames)

        def through(block: Any, x: Tensor) -> Tensor:
            nonlocal shared, times
            for layer in block:
                if isinstance(layer, ResBlock):
                    x = layer(x, times, frames)
                elif isinstance(layer, SpatialTransformer):
                    x = layer(x, conditions, frames, shared)
                    if shared > 1:
                        times, shared = repeated(embedding, passes * frames), 1
                        skips[:] = [for_passes(skip, frames, passes) for skip in skips]
                elif isinstance(layer, TemporalTransformer):
                    x = layer(x, frames)
                else:
                    x = layer(x)
            return x

        for index, block in enumerate(self.input_blocks):
            x = through(block, x)
            if not index:
                x = through(self.init_attn, x)
            skips.append(x)
        x = through(self.middle_block, x)
        for block in self.output_blocks:
            x = through(block, torch.cat([x, skips.pop()], dim=1))
        return self.out(x).unflatten(0, (-1, frames))


def adapted(size: Size) -> dict[str, int]:
    """Attentions that MotionRAG adapts, by their paths in the network, and their widths."""
    from motionrt.export.compiler.weightless import meta

    with meta():
        unet = DynamiCrafterUNet(replace(size, motion=None))
    return {path: part.to_q.in_features for path, part in unet.named_modules() if isinstance(part, CrossAttention)}


def sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> Size:
    """The size of a network with weights of these names and shapes, adapters aside; KeyError for what is no such network."""
    attention = "transformer_blocks.0.attn2"
    head = shapes["init_attn.0.proj_in.weight"][0] // INIT_HEADS
    channels = shapes["input_blocks.0.0.weight"][0]
    levels: list[list[int]] = [[]]
    index, attended = 1, 0
    while True:
        if f"input_blocks.{index}.0.op.weight" in shapes:
            levels.append([])
        elif (first := f"input_blocks.{index}.0.in_layers.2.weight") in shapes:
            levels[-1].append(shapes[first][0])
            if f"input_blocks.{index}.1.norm.weight" in shapes:
                attended = len(levels)
        else:
            break
        index += 1
    context = shapes[f"middle_block.1.{attention}.to_k.weight"][1]
    return Size(
        channels, tuple(level[0] // channels for level in levels if level), len(levels[0]), attended, head, context,
        f"middle_block.1.{attention}.alpha" in shapes,
    )  # fmt: skip
