"""Tokenizer folders: a sentencepiece model is read from its bytes, without the library."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tokenizers import Tokenizer

from motionrt.export.checkpoints.files import CheckpointError
from motionrt.export.checkpoints.tokenizers import tokenizer_json

PIECES = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁", -2.0, 1), ("▁wave", -1.0, 1), ("s", -3.0, 1),
          ("▁w", -4.0, 1), ("a", -5.0, 1), ("ve", -5.5, 1)]  # fmt: skip


def sentencepiece(pieces: list[tuple[str, float, int]]) -> bytes:
    """The protobuf of a model: ModelProto.pieces = 1 {piece = 1, score = 2, type = 3}; a trainer spec (2) to skip."""
    out = b""
    for text, score, kind in pieces:
        name = text.encode()
        body = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        out += b"\x0a" + bytes([len(body)]) + body
    return out + b"\x12\x02\x18\x01"


def test_a_sentencepiece_model_tokenizes_as_unigram_with_an_end_token(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(sentencepiece(PIECES))
    text, pad = tokenizer_json(tmp_path)
    tokenizer = Tokenizer.from_str(text)
    assert pad == 0 and tokenizer.get_vocab_size() == len(PIECES) + 100  # T5's extra ids
    assert tokenizer.encode("waves  wave").ids == [4, 5, 4, 1]  # the likeliest pieces, runs of spaces as one
    assert tokenizer.encode("").ids == [1]
    assert tokenizer.encode("z").ids == [3, 2, 1]  # unknown
    assert tokenizer.decode(tokenizer.encode("waves").ids) == "waves"


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, sentencepiece(PIECES)[:50], sentencepiece(PIECES[:1])])
def test_damaged_sentencepiece_models_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(CheckpointError, match="no sentencepiece model of T5"):
        tokenizer_json(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither tokenizer.json nor spiece.model"):
        tokenizer_json(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        tokenizer_json(tmp_path / "nowhere")
