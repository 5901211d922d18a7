"""A pass of AnimateDiff's UNet, layer by layer, with what Motion-I2V changes in it: times per frame, and what moves things.

diffusers' blocks take one embedding a row and have their temporal layers inside. Here a pass is told what a residual block adds
(`added`), and how the frames are mixed (`mixed`); it keeps what does not depend on the text for one branch of guidance, and
makes it two where the first text is read. Modules, and so names of weights, are diffusers'.

Shapes: B requests, g branches of guidance (rows of text for each), F frames; hidden states `[B F, C, h, w]`, or `[B g F, ...]`
behind the first text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, cat

from motionrt.export.systems.rows import repeated


@dataclass(frozen=True)
class Pass:
    """What a pass reads beside hidden states. `added(resnet)`: `[B, F, C]`; `text [B g, L, D]`; `mixed(motion module, hidden)`:
    the same shape."""

    added: Callable[[Any], Tensor]
    mixed: Callable[[Any, Tensor], Tensor]
    text: Tensor

    def branched(self, hidden: Tensor, rows: int) -> Tensor:
        """Hidden states of `rows` requests, for each branch of guidance."""
        return repeated(hidden.unflatten(0, (rows, -1)), self.text.shape[0] // rows).flatten(0, 1)

    def resnet(self, block: Any, hidden: Tensor) -> Tensor:
        """A residual block, of requests or of branches."""
        return resnet(block, hidden, self.added(block))

    def layer(self, hidden: Tensor, resnet: Any, attention: Any, motion: Any) -> Tensor:
        """A residual block, the attention to places and text if there is one, the mixing of frames."""
        hidden = self.resnet(resnet, hidden)
        return self.mixed(motion, hidden if attention is None else self.seen(attention, hidden))

    def seen(self, attention: Any, hidden: Tensor) -> Tensor:
        """Attention to places and to the text."""
        return attention(hidden, encoder_hidden_states=self.text, return_dict=False)[0]


def resnet(block: Any, hidden: Tensor, added: Tensor) -> Tensor:
    """diffusers' ResnetBlock2D, told what the time adds: `hidden [B g F, C, h, w]`, `added [B, F, C']` -> `[B g F, C', h, w]`.

    The rows of `added` are never joined with its frames: they may be those of a table of many timesteps.
    """
    inner = block.conv1(F.silu(block.norm1(hidden))).unflatten(0, (added.shape[0], -1, added.shape[1]))
    inner = block.conv2(F.silu(block.norm2((inner + added[:, None, ..., None, None]).flatten(0, 2))))
    return (hidden if block.conv_shortcut is None else block.conv_shortcut(hidden)) + inner


def encode(net: Any, given: Pass, skips: Sequence[Tensor], begun: int) -> list[Tensor]:
    """The skips of an encoder; those of `skips` are there, as are the first `begun` layers of the first block."""
    made, hidden = list(skips), skips[-1]
    for block in net.down_blocks:
        for resnet, attention, motion in list(layers(block))[begun:]:
            hidden = given.layer(hidden, resnet, attention, motion)
            made.append(hidden)
        begun = 0
        for downsampler in block.downsamplers or ():
            hidden = downsampler(hidden)
            made.append(hidden)
    return made


def middle(net: Any, given: Pass, hidden: Tensor) -> Tensor:
    """The middle block."""
    block = net.mid_block
    hidden = given.resnet(block.resnets[0], hidden)
    for attention, motion, resnet in zip(block.attentions, block.motion_modules, block.resnets[1:], strict=True):
        hidden = given.resnet(resnet, given.mixed(motion, given.seen(attention, hidden)))
    return hidden


def decode(net: Any, given: Pass, hidden: Tensor, skips: Sequence[Tensor]) -> Tensor:
    """What the decoder makes of the middle and the skips, before the last norm."""
    left = list(skips)
    for block in net.up_blocks:
        for resnet, attention, motion in layers(block):
            hidden = given.layer(cat([hidden, left.pop()], 1), resnet, attention, motion)
        for upsampler in block.upsamplers or ():
            hidden = upsampler(hidden)
    return hidden


def output(net: Any, hidden: Tensor) -> Tensor:
    """The network's output of what the decoder gives."""
    return net.conv_out(F.silu(net.conv_norm_out(hidden)))


def layers(block: Any) -> Any:
    """Residual block, attention or None, and motion module of the layers of a block."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return zip(block.resnets, attentions, block.motion_modules, strict=True)
