"""The rules of what computes in a low precision, on graphs of a few nodes; ONNX graphs and torch programs share them."""

from __future__ import annotations

from motionrt.runtime.backends.precision import FULL, HEAVY, Op, low_ops


def lows(ops: list[Op], outputs: list[str], wide: tuple[str, ...] = ()) -> dict[str, bool]:
    return {str(op.writes[0]): low for op, low in zip(ops, low_ops(ops, outputs, wide), strict=True)}


def test_heavy_ops_are_low_norms_are_not_and_pointwise_ops_follow_what_they_read() -> None:
    ops = [
        Op("MatMul", ("x",), ("a",), ("w",)),
        Op("LayerNormalization", ("a",), ("n",), ("g",)),
        Op("Mul", ("n",), ("m",), ("s",)),  # after a norm: all that it reads is float32
        Op("Add", ("a", "m"), ("r",)),  # the residual stream
        Op("MatMul", ("r",), ("y",), ("v",)),
    ]
    assert lows(ops, ["y"]) == {"a": True, "n": False, "m": False, "r": True, "y": True}
    assert not HEAVY & FULL


def test_what_only_feeds_the_outputs_after_the_last_heavy_op_is_float32() -> None:
    ops = [
        Op("linear", ("x",), ("v",), ("w",)),
        Op("mul", ("v", "guidance"), ("g",)),
        Op("add", ("g", "x"), ("next",)),
        Op("mul", ("v",), ("back",)),
        Op("linear", ("back",), ("aux",), ("w2",)),  # so `back` is not late
    ]
    assert lows(ops, ["next", "aux"]) == {"v": True, "g": False, "next": False, "back": True, "aux": True}


def test_a_cast_from_integers_is_float32_and_an_embedding_is_low() -> None:
    ops = [
        Op("Cast", (), ("t",), widens=True),
        Op("Mul", ("t",), ("angle",), ("f",)),
        Op("Sin", ("angle",), ("s",)),
        Op("MatMul", ("s",), ("e",), ("w",)),
        Op("Gather", (), ("words",), ("table",)),
        Op("Add", ("words", "e"), ("sum",)),
        Op("MatMul", ("sum",), ("y",), ("w2",)),
    ]
    assert lows(ops, ["y"]) == {
        "t": False, "angle": False, "s": False, "e": True, "words": True, "sum": True, "y": True
    }  # fmt: skip


def test_a_wide_weight_keeps_its_result_and_the_stream_in_float32_up_to_the_next_heavy_op() -> None:
    """T5: the second projection overflows, and so does the residual stream that it is added to."""
    ops = [
        Op("Gather", (), ("stream",), ("words",)),
        Op("MatMul", ("stream",), ("inner",), ("block.wi.weight",)),
        Op("MatMul", ("inner",), ("outer",), ("block.wo.weight",)),
        Op("Add", ("stream", "outer"), ("sum",)),
        Op("RMSNormalization", ("sum",), ("norm",), ("g",)),
        Op("MatMul", ("norm",), ("q",), ("next.q.weight",)),
        Op("Attention", ("q", "q", "q"), ("mixed",)),
        Op("Add", ("sum", "mixed"), ("more",)),
        Op("MatMul", ("more",), ("y",), ("head",)),
    ]
    plain = lows(ops, ["y"])
    assert plain["outer"] and plain["sum"] and plain["more"]
    kept = lows(ops, ["y"], ("*.wo.weight",))
    assert {name for name in plain if plain[name] and not kept[name]} == {"outer", "sum", "more"}


def test_an_attention_between_wide_weights_is_float32() -> None:
    """The middle of SVD's VAE encoder: projections by wide weights, and the product of what they give."""
    ops = [
        Op("Conv", ("x",), ("a",), ("vae.conv",)),
        Op("MatMul", ("a",), ("q",), ("vae.q",)),
        Op("Attention", ("q", "q", "q"), ("m",)),
        Op("Conv", ("m",), ("z",), ("vae.out",)),
        Op("Conv", ("x",), ("clip",), ("clip.conv",)),
    ]
    assert lows(ops, ["z", "clip"], ("vae.*",)) == {"a": False, "q": False, "m": False, "z": False, "clip": True}
