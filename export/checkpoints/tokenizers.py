"""Tokenizers of model folders as one JSON file, which the runtime reads without transformers or sentencepiece."""

from __future__ import annotations

from pathlib import Path

from motionrt.export.checkpoints.files import CheckpointError, read_json


def tokenizer_json(folder: Path) -> tuple[str, int]:
    """(tokenizers JSON, padding id) of a T5 tokenizer folder: its `tokenizer.json`, or one made from `spiece.model`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; the tokenizer is expected there.")
    if (folder / "tokenizer.json").is_file():
        made = read_json(folder / "tokenizer.json")
        vocabulary = made.get("model", {}).get("vocab", [])
        names = [item[0] if isinstance(item, list) else item for item in vocabulary]
        return (folder / "tokenizer.json").read_text(encoding="utf-8"), names.index("<pad>") if "<pad>" in names else 0
    if (folder / "spiece.model").is_file():
        return from_sentencepiece(folder / "spiece.model"), 0
    raise CheckpointError(f"{folder} has neither tokenizer.json nor spiece.model. Download the tokenizer of the model.")


def clip_tokenizer_json(folder: Path) -> tuple[str, int]:
    """(tokenizers JSON, padding id) of a CLIP tokenizer folder: its `tokenizer.json`, or one made from vocabulary and merges.

    CLIP pads with the token that ends a text, unless the folder's settings name another.
    """
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    said = settings.get("pad_token") or "<|endoftext|>"
    padding = str(said.get("content") if isinstance(said, dict) else said)
    try:
        if (folder / "tokenizer.json").is_file():
            made = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            vocabulary = read_json(folder / "vocab.json")
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [(first, second) for first, second in (line.split() for line in lines[1:] if line)]
            made = CLIPTokenizer(vocabulary, merges).backend_tokenizer
        pad = made.token_to_id(padding)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"{folder} is no CLIP tokenizer ({error!s:.120}). Download it again.") from None
    if pad is None:
        raise CheckpointError(f"{folder}: the padding {padding!r} is not in the vocabulary. Download the tokenizer again.")
    return made.to_str(), pad


def from_sentencepiece(path: Path, extra_ids: int = 100) -> str:
    """T5's unigram model `spiece.model` as tokenizers JSON, with `</s>` behind every text.

    Fields of the protobuf: ModelProto.pieces = 1 (piece = 1, score = 2, type = 3), normalizer_spec = 3
    (precompiled_charsmap = 2).
    """
    import struct

    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    from motionrt.runtime.backends.onnx_weights import protobuf_bytes, protobuf_fields
    from motionrt.runtime.errors import MotionRTError

    vocabulary: list[tuple[str, float]] = []
    charsmap = b""
    try:
        for number, message in protobuf_fields(memoryview(path.read_bytes()), 1, 3):
            if number == 3:
                charsmap = bytes(protobuf_bytes(dict(protobuf_fields(protobuf_bytes(message), 2)).get(2, memoryview(b""))))
                continue
            fields = dict(protobuf_fields(protobuf_bytes(message), 1, 2))
            score = struct.unpack("<f", protobuf_bytes(fields[2]))[0] if 2 in fields else 0.0
            vocabulary.append((bytes(protobuf_bytes(fields[1])).decode(), score))
        names = [piece for piece, _ in vocabulary]
        unknown, end = names.index("<unk>"), names.index("</s>")
    except (MotionRTError, KeyError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is no sentencepiece model of T5 ({error!r:.80}). Download it again.") from None
    vocabulary += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra_ids))]
    tokenizer = Tokenizer(Unigram(vocabulary, unknown, False))
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Strip(left=False, right=True),
                                                 normalizers.Replace(Regex(" {2,}"), "▁")])  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    special = [n for n in ("<pad>", "</s>", "<unk>") if n in names]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", end)]
    )
    text: str = tokenizer.to_str()
    return text
