"""Rows of a batch as the denoising steps lay them out: what belongs to one request lies together.

Row b of an input belongs to request b. Guidance needs two rows of a request, without and with its conditions, and a network
over frames F rows for each of those. They are kept in the order [B, 2, F], so that requests are joined into a batch, and taken
out of it again, along axis 0 of every tensor.
"""

from __future__ import annotations

from torch import Tensor, cat


def repeated(x: Tensor, times: int) -> Tensor:
    """Each row `times` times in place: `[B, ...]` -> `[B times, ...]`."""
    return x[:, None].expand(-1, times, *[-1] * (x.ndim - 1)).flatten(0, 1)


def paired(*parts: Tensor) -> Tensor:
    """Rows of all in turn: two `[B, n, ...]` -> `[2 B, n, ...]`, rows first[0], second[0], first[1], ...; or three."""
    return cat(parts, dim=1).unflatten(1, (len(parts), parts[0].shape[1])).flatten(0, 1)


def guided(output: Tensor, guidance: Tensor) -> Tensor:
    """Classifier-free guidance v_u + g (v_c - v_u): rows (u, c) in turn, `[2 B, ...]`, g `[B, ...]` -> `[B, ...]`."""
    without, conditioned = output.unflatten(0, (-1, 2)).unbind(1)
    return mixed(without, conditioned, guidance)


def mixed(without: Tensor, conditioned: Tensor, guidance: Tensor) -> Tensor:
    """v_u + g (v_c - v_u), `[B, ...]` each."""
    return without + guidance * (conditioned - without)


def like(x: Tensor, other: Tensor) -> Tensor:
    """One number for each row, `[B]`, so that it multiplies rows of `other [B, ...]`: `[B, 1, ...]`."""
    return x.reshape(-1, *[1] * (other.ndim - 1))


def solved(coefficients: Tensor, latents: Tensor, output: Tensor, previous_x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The solver's update, a row (p0, p1, c0, c1, c2, c3) of `coefficients [B, 6]` for each request: (next latents, x0).

    x0 = p0 x + p1 v;  x' = c0 x + c1 x0 + c2 x0_previous + c3 noise.
    """
    p0, p1, c0, c1, c2, c3 = (like(column, latents) for column in coefficients.unbind(1))
    x0 = p0 * latents + p1 * output
    return c0 * latents + c1 * x0 + c2 * previous_x0 + c3 * noise, x0
