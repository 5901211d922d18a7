"""A sentence-transformers folder as `text_query`: what transformers and plain pooling give, or a refusal before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
transformers = pytest.importorskip("transformers")

import onnxruntime  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from motionrt.export.checkpoints.files import CheckpointError  # noqa: E402
from motionrt.export.checkpoints.text_query import FAMILIES, sentence_encoder  # noqa: E402
from motionrt.export.exporter import Writer, silent  # noqa: E402
from motionrt.export.systems.system import TokenizerText  # noqa: E402

WORDS, WIDTH, HEADS = 50, 32, 2
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 24,
    "max_position_embeddings": 40,
}  # fmt: skip
SMALL: dict[str, Any] = dict.fromkeys(FAMILIES, SIZES) | {
    "distilbert": {"vocab_size": WORDS, "dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 24,
                   "max_position_embeddings": 40},
    "gte": {**SIZES, "type_vocab_size": 0, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 1.5}},
}  # fmt: skip
GTE = {  # config.json of gte-base-en-v1.5, with small sizes
    **SIZES, "architectures": ["NewModel"], "auto_map": {"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"},
    "model_type": "new", "hidden_act": "gelu", "layer_norm_type": "layer_norm", "layer_norm_eps": 1e-12, "pack_qkv": True,
    "position_embedding_type": "rope", "rope_theta": 500000, "rope_scaling": {"type": "ntk", "factor": 2.0},
    "type_vocab_size": 0, "pad_token_id": 0, "logn_attention_scale": False, "logn_attention_clip1": False,
    "unpad_inputs": False, "use_memory_efficient_attention": False,
}  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, **{f"w{i}": i for i in range(4, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_pipeline(folder: Path, pooling: str, *, normalize: bool = True, longest: int = 20) -> None:
    """What sentence-transformers writes around a transformer."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 2 + normalize]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest, "do_lower_case": False}))
    modes = {f"pooling_mode_{m}": False for m in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")}
    modes["pooling_mode_cls_token" if pooling == "cls" else "pooling_mode_mean_tokens"] = True
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **modes}))
    write_tokenizer(folder)


def write_family(folder: Path, family: str, pooling: str) -> Any:
    """A folder with random weights in the layout that is released; its model."""
    torch.manual_seed(len(family))
    config = transformers.AutoConfig.for_model(family, **SMALL[family])
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, safe_serialization=True)
    write_pipeline(folder, pooling)
    return model


def write_gte(folder: Path) -> dict[str, Any]:
    """A folder as gte-base-en-v1.5 is released, with random weights; its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(5)
    shapes = {"embeddings.word_embeddings.weight": (WORDS, WIDTH), "embeddings.LayerNorm.weight": (WIDTH,),
              "embeddings.LayerNorm.bias": (WIDTH,)}  # fmt: skip
    for i in range(2):
        inner: dict[str, tuple[int, ...]] = {
            "attention.qkv_proj.weight": (3 * WIDTH, WIDTH), "attention.qkv_proj.bias": (3 * WIDTH,),
            "attention.o_proj.weight": (WIDTH, WIDTH), "attention.o_proj.bias": (WIDTH,), "attn_ln.weight": (WIDTH,),
            "attn_ln.bias": (WIDTH,), "mlp.up_gate_proj.weight": (48, WIDTH), "mlp.down_proj.weight": (WIDTH, 24),
            "mlp.down_proj.bias": (WIDTH,), "mlp_ln.weight": (WIDTH,), "mlp_ln.bias": (WIDTH,),
        }  # fmt: skip
        shapes |= {f"encoder.layer.{i}.{key}": shape for key, shape in inner.items()}
    tensors = {key: torch.randn(shape, generator=draw) * 0.3 for key, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(GTE))
    write_pipeline(folder, "cls", normalize=False, longest=8192)
    return tensors


def plain_gte(w: dict[str, Any], ids: Any) -> Any:
    """NewModel of gte-base-en-v1.5 for one unpadded text `[1, L]`, written down from its published description."""
    norm = lambda x, name: F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)  # noqa: E731
    width, scale = WIDTH // HEADS, 2.0
    rates = (500000.0 * scale) ** -(torch.arange(0, width, 2) / width) / scale ** (2 / width)
    angle = torch.arange(ids.shape[1])[:, None] * rates
    cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))
    turn = lambda x: x * cos + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * sin  # noqa: E731
    h = norm(w["embeddings.word_embeddings.weight"][ids], "embeddings.LayerNorm")
    for i in range(2):
        p = f"encoder.layer.{i}."
        qkv = F.linear(h, w[f"{p}attention.qkv_proj.weight"], w[f"{p}attention.qkv_proj.bias"])
        q, k, v = (x.unflatten(-1, (HEADS, width)).transpose(1, 2) for x in qkv.split(WIDTH, -1))
        mixed = torch.softmax(turn(q) @ turn(k).mT / width**0.5, -1) @ v
        out = F.linear(mixed.transpose(1, 2).flatten(2), w[f"{p}attention.o_proj.weight"], w[f"{p}attention.o_proj.bias"])
        h = norm(h + out, f"{p}attn_ln")
        up, gate = F.linear(h, w[f"{p}mlp.up_gate_proj.weight"]).chunk(2, -1)
        h = norm(h + F.linear(F.gelu(gate) * up, w[f"{p}mlp.down_proj.weight"], w[f"{p}mlp.down_proj.bias"]), f"{p}mlp_ln")
    return F.normalize(h[:, 0], dim=-1)


def exported(folder: Path, out: Path) -> tuple[Callable[..., Any], dict[str, Any], TokenizerText]:
    """The graph of `folder` in ONNX Runtime, its manifest entry, and its tokenizer."""
    (out / "graphs").mkdir(parents=True)
    encoder, writer = sentence_encoder(folder), Writer(out, False, silent)
    writer.add("text_query", encoder.graph())
    session = onnxruntime.InferenceSession(str(out / "graphs" / "text_query.onnx"), providers=["CPUExecutionProvider"])

    def call(ids: Any, mask: Any) -> Any:
        return session.run(["embedding"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]

    return call, writer.graphs["text_query"], encoder.tokenizer


def texts(batch: int, length: int) -> tuple[Any, Any]:
    """Ids and masks, the last text padded."""
    ids = torch.randint(4, WORDS, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    if batch > 1 and length > 2:
        ids[-1, length // 2 :], mask[-1, length // 2 :] = 0, 0
    return ids, mask


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folder_embeds_as_transformers_and_plain_pooling_do(family: str, pooling: str, tmp_path: Path) -> None:
    model = write_family(tmp_path, family, pooling)
    encoder = sentence_encoder(tmp_path)
    assert encoder.tokenizer.max_length == 20
    module = encoder.network.loaded()
    for batch, length in ((1, 1), (2, 5), (3, 20)):
        ids, mask = texts(batch, length)
        ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
        with torch.no_grad():
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            ours = module(ids, mask)
        if pooling == "cls":
            want = hidden[:, 0]
        else:
            want = torch.stack([row[keep.bool()].mean(0) for row, keep in zip(hidden, mask, strict=True)])
        np.testing.assert_allclose(ours.numpy(), F.normalize(want, dim=-1).numpy(), atol=2e-5)


@pytest.mark.slow
def test_mean_pooling_is_exported_with_sizes_that_change(tmp_path: Path) -> None:
    write_family(tmp_path / "model", "bert", "mean")
    call, entry, tokenizer = exported(tmp_path / "model", tmp_path / "out")
    assert tokenizer.max_length == 20
    assert [port["name"] for port in entry["inputs"]] == ["input_ids", "attention_mask"]
    module = sentence_encoder(tmp_path / "model").network.loaded()
    for batch, length in ((1, 1), (2, 5), (3, 20), (4, 8)):
        ids, mask = texts(batch, length)
        with torch.no_grad():
            np.testing.assert_allclose(call(ids, mask), module(ids, mask).numpy(), atol=2e-5)


@pytest.mark.slow
def test_gte_as_released_embeds_as_its_description_says(tmp_path: Path) -> None:
    weights = write_gte(tmp_path / "gte")
    call, entry, tokenizer = exported(tmp_path / "gte", tmp_path / "out")
    digest = sentence_encoder(tmp_path / "gte").network.digest()
    assert (tokenizer.max_length, tokenizer.pad_id) == (40, 0) and json.loads(tokenizer.json)["model"]["type"] == "WordLevel"
    assert entry["outputs"][0]["dims"][1] == WIDTH and entry["inputs"][0]["dims"][1]["max"] == 40
    for length in (1, 7, 40):
        ids, mask = texts(1, length)
        np.testing.assert_allclose(call(ids, mask), plain_gte(weights, ids).numpy(), atol=2e-5)
    both, mask = texts(2, 9)  # what is padded does not count
    np.testing.assert_allclose(call(both, mask)[1:], plain_gte(weights, both[1:, :4]).numpy(), atol=2e-5)
    weights["encoder.layer.1.mlp_ln.bias"] += 1
    save_file({f"new.{key}": value for key, value in weights.items()}, tmp_path / "gte" / "model.safetensors")
    other = sentence_encoder(tmp_path / "gte")
    assert len(other.network.reports[0].used) == len(weights)
    assert digest != other.network.digest() and other.graph().sizes["tokens"].max == 40


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "encoder.layer.1.attention.qkv_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "is no folder"),
    "no sentence-transformers folder": (lambda f: (f / "modules.json").unlink(), "has no modules.json"),
    "another module": (
        lambda f: (f / "modules.json").write_text(
            json.dumps([{"path": "", "type": f"sentence_transformers.models.{k}"} for k in ("Transformer", "Pooling", "Dense")])
        ),
        "lists Transformer, Pooling, Dense; allowed: Transformer, Pooling, and Normalize",
    ),
    "a module elsewhere": (
        lambda f: (f / "modules.json").write_text((f / "modules.json").read_text().replace("1_Pooling", "../1_Pooling")),
        "must lie inside",
    ),
    "another pooling": (
        lambda f: edit(f / "1_Pooling" / "config.json", pooling_mode_cls_token=False, pooling_mode_max_tokens=True),
        "pools by max; allowed: cls or mean",
    ),
    "two poolings": (lambda f: edit(f / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True), "pools by cls and mean"),
    "a prompt": (
        lambda f: (f / "config_sentence_transformers.json").write_text(
            json.dumps({"default_prompt_name": "query", "prompts": {"query": "query: "}})
        ),
        "puts the prompt 'query' before every text",
    ),
    "another family": (lambda f: edit(f / "config.json", model_type="llama"), "holds a llama model; allowed: bert, .*NewModel"),
    "another rope": (lambda f: edit(f / "config.json", rope_scaling={"type": "yarn", "factor": 2}), "rope_scaling is .*yarn"),
    "log n attention": (lambda f: edit(f / "config.json", logn_attention_scale=True), "logn_attention_scale is True"),
    "a key too few": (lambda f: tensors(f, lambda s: s.pop(KEY)), f"lacks key `{KEY}`"),
    "a key too many": (lambda f: tensors(f, lambda s: s.update(extra=torch.ones(1))), "has the unexpected key `extra`"),
    "a shape off by one": (
        lambda f: tensors(f, lambda s: s.update({KEY: torch.ones(97, 32)})),
        rf"`{KEY}` has the shape \[97, 32\]; \[96, 32\] is expected",
    ),
    "mixed dtypes": (
        lambda f: tensors(f, lambda s: s.update({KEY: s[KEY].half()})), f"mixes dtypes: .*float32, `{KEY}` is float16"
    ),
    "a cut file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-4]), "no intact safetensors"
    ),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "has no .*model.safetensors.*has pytorch_model.bin"
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no such tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "is no tokenizer"),
    "a tokenizer of another model": (lambda f: edit(f / "config.json", vocab_size=49), "`embeddings.word_embeddings.weight`"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_folders_that_do_not_fit_are_refused_by_name(damage: str, tmp_path: Path) -> None:
    write_gte(tmp_path / "gte")
    change, message = DAMAGES[damage]
    change(tmp_path / "gte")
    with pytest.raises(CheckpointError, match=message):
        sentence_encoder(tmp_path / "gte")


def test_lower_case_and_tokens_are_as_the_folder_says(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_gte(tmp_path / "gte")
    edit(tmp_path / "gte" / "sentence_bert_config.json", do_lower_case=True, max_seq_length=9)
    found = sentence_encoder(tmp_path / "gte")
    assert found.tokenizer.max_length == 9 and found.network.module.pooling == "cls"
    assert Tokenizer.from_str(found.tokenizer.json).encode("W5 w6").ids == [1, 5, 6, 2]
    tensors(tmp_path / "gte", lambda s: s.update({"embeddings.word_embeddings.weight": torch.ones(49, WIDTH)}))
    edit(tmp_path / "gte" / "config.json", vocab_size=49)
    with pytest.raises(CheckpointError, match="has 50 tokens and the model 49"):
        sentence_encoder(tmp_path / "gte")
