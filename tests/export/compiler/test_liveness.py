"""Bytes alive at once in a traced graph, against a count by hand."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from motionrt.export.compiler.liveness import live_bytes  # noqa: E402

N = 1000  # values of float32: 4000 bytes


class Chain(nn.Module):
    """a and b live together, then b and c; the view of c takes nothing; the sum keeps c through its view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))

    def forward(self, x: Tensor) -> Tensor:
        a = x.exp()  # a
        b = a * self.weight  # a b
        c = torch.cat([b, b])  # b c (2 N)
        seen = c.view(2, N)  # c
        d = seen.sum(0)  # c d
        return d + seen[0]  # c d e: 4 N


def test_live_bytes_are_those_of_the_busiest_operation() -> None:
    program = torch.export.export(Chain().eval(), (torch.ones(N),)).run_decompositions({})
    assert live_bytes(program.graph) == 4 * N * 4


def test_parts_of_a_split_live_as_long_as_the_last_one_is_read() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.exp().split(N // 2)  # N
            return (a + 1).sum() + b.sum()  # N + N / 2, and the sum

    program = torch.export.export(Split(), (torch.ones(N),)).run_decompositions({})
    assert live_bytes(program.graph) == 4 * N + 2 * N + 4


def test_an_untyped_chain_frees_what_nobody_reads_again() -> None:
    class Long(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                x = x.exp()
            return x

    assert live_bytes(torch.export.export(Long(), (torch.ones(N),)).graph) == 2 * N * 4
