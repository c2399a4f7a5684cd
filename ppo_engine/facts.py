"""What is known of a model without loading it: its configuration, tokenizer files, and safetensors headers.

Every fact that cannot be read is None, and rules that need it stay silent: the engine finds out.
This module knows no torch, no transformers, no hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ppo_engine.issues import Loc, shown
from ppo_engine.reward_kinds import ModelReward
from ppo_engine.spec import RunSpec

_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_EMBEDDINGS = ("embed", "wte", "wpe", "shared")
_PROMPT_COLUMNS = {"prompt", "input_ids", "attention_mask"}  # rewards get them in fields of their own
ADAPTED = "base_model.model."  # what peft puts before the names of weights
REWARD_HEAD = "score.weight"
_CLASSIFIERS = (REWARD_HEAD, "classifier.weight", "classifier.out_proj.weight")  # of decoders, of encoders
OUTPUT_LAYERS = ("lm_head", "embed_out", "output_layer", "score", "classifier")
_TIED_OUTPUT = "lm_head"  # what nearly every architecture calls it
_STARTS_BESIDE_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")  # of peft's `init_lora_weights`


_Shapes = Mapping[str, tuple[int, ...]]


class FactsError(ValueError):
    """A directory that is no model or adapter; the message names the file and what is wrong with it."""


class TokenizerFacts(BaseModel):
    """pad_token, eos_token: as text; None where the tokenizer names none."""

    model_config = ConfigDict(frozen=True)

    pad_token: str | None
    eos_token: str | None
    chat_template: bool


class ModelFacts(BaseModel):
    """What a model directory tells.

    architectures: class names, from `config.json`.
    context_length: most positions. hidden_size: width of the trunk.
    parameters: number of weights stored. weight_bytes: their size on disk.
    linears: two-dimensional weights that are neither embeddings nor output layers, name → shape.
    modules: parameters of every module that has some of its own, by name; a tied output layer among them.
    output_layers: parameters of those stored, such as `lm_head` or `score`, by name.
    labels: outputs of a classification head. has_padding: whether config or tokenizer name a padding token.
    """

    model_config = ConfigDict(frozen=True)

    model_type: str | None = None
    architectures: tuple[str, ...] = ()
    vocab_size: int | None = None
    context_length: int | None = None
    hidden_size: int | None = None
    layers: int | None = None
    labels: int | None = None
    parameters: int | None = None
    weight_bytes: int | None = None
    linears: dict[str, tuple[int, int]] = {}
    modules: dict[str, int] = {}
    output_layers: dict[str, int] = {}
    has_padding: bool | None = None
    tokenizer: TokenizerFacts | None = None

    @property
    def is_causal_lm(self) -> bool | None:
        """Whether the config declares a decoder-only language model; None: it declares nothing."""
        if not self.architectures:
            return None
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in self.architectures)

    @property
    def is_classifier(self) -> bool:
        """Whether the config declares a sequence-classification model."""
        return any("SequenceClassification" in name for name in self.architectures)

    @property
    def trunk_parameters(self) -> int | None:
        """Weights stored without the output layers: what another head can be put on."""
        return None if self.parameters is None else self.parameters - sum(self.output_layers.values())


class AdapterFacts(BaseModel):
    """What the directory of a LoRA adapter tells.

    target_modules: None where it holds a pattern instead of names.
    modules_to_save: what was trained whole beside it; its weights are `whole` of the `parameters`.
    base_model: what its config calls the model that it was trained on.
    changes: the modules it changes, name → (outputs, inputs).
    head: labels and width of a score head, which makes it a reward.
    """

    model_config = ConfigDict(frozen=True)

    r: int | None = None
    lora_alpha: int | None = None
    target_modules: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    parameters: int | None = None
    whole: int = 0
    base_model: str | None = None
    changes: dict[str, tuple[int, int]] = {}
    head: tuple[int, int] | None = None


class Facts(BaseModel):
    """All that a plan may know beside the spec.

    adapters: by their names in the spec. rewards: by the reward's name. prompts: rows to train on. columns:
    what rewards can read of the rows of each file, by its field in `prompts`.
    """

    model_config = ConfigDict(frozen=True)

    model: ModelFacts | None = None
    value: ModelFacts | None = None
    adapters: dict[str, AdapterFacts] = {}
    rewards: dict[str, ModelFacts] = {}
    prompts: int | None = None
    columns: dict[str, frozenset[str]] = {}


def facts_at(path: Path, loc: Loc) -> ModelFacts | AdapterFacts:
    """Read the facts of what a spec names at a place: a model, or an adapter.

    Raises:
        FactsError: the directory holds no such thing.
    """
    return read_adapter_facts(path) if _is_adapter(loc) else read_model_facts(path)


def gather(
    spec: RunSpec,
    found: Mapping[Loc, ModelFacts | AdapterFacts],
    prompts: int | None,
    columns: Mapping[str, Iterable[str]] | None = None,
) -> Facts:
    """The facts of a run, from those found of each model by its place in the spec, and of the prompt files.

    columns: all that a file's rows have, by its field in `prompts`; None: not known.
    """
    models = {loc: facts for loc, facts in found.items() if isinstance(facts, ModelFacts)}
    return Facts(
        model=models.get(("model",)),
        value=models.get(("method", "value", "source")),
        adapters={str(loc[-1]): facts for loc, facts in found.items() if isinstance(facts, AdapterFacts)},
        rewards={
            reward.name: models[loc]
            for index, reward in enumerate(spec.rewards)
            if isinstance(reward, ModelReward) and (loc := ("rewards", index, "source")) in models
        },
        prompts=prompts,
        columns={field: frozenset(names) - _PROMPT_COLUMNS for field, names in (columns or {}).items()},
    )


def _is_adapter(loc: Loc) -> bool:
    return loc[:2] == ("method", "adapters")


def read_model_facts(path: Path) -> ModelFacts:
    """Read the facts of a model directory.

    Raises:
        FactsError: there is no directory, no readable `config.json`, or the weights are not safetensors.
    """
    config = _read_config(path, "config.json")
    text = config.get("text_config") or config
    tensors = _read_tensors(path)
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    tokenizer = _read_tokenizer(path)
    return ModelFacts(
        model_type=config.get("model_type"),
        architectures=tuple(config.get("architectures") or ()),
        vocab_size=_first(text, "vocab_size"),
        context_length=_first(text, "max_position_embeddings", "n_positions", "max_sequence_length"),
        hidden_size=_first(text, "hidden_size", "n_embd", "d_model"),
        layers=_first(text, "num_hidden_layers", "n_layer", "num_layers"),
        labels=_labels(config, shapes),
        parameters=sum(map(prod, shapes.values())) if tensors else None,
        weight_bytes=sum(prod(shape) * size for shape, size in tensors.values()) if tensors else None,
        linears=linears(shapes),
        modules=modules(shapes, _first(text, "vocab_size")),
        output_layers=_output_layers(shapes),
        has_padding=_has_padding(text, tokenizer),
        tokenizer=tokenizer,
    )


def read_adapter_facts(path: Path) -> AdapterFacts:
    """Read the facts of an adapter's directory, in peft's layout.

    Raises:
        FactsError: there is no directory, no readable `adapter_config.json`, the adapter is no LoRA, or not
            of a base that stays as it is, or its weights are not safetensors.
    """
    config = _read_config(path, "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise FactsError(f"{path} has an adapter of type {shown(config.get('peft_type'))}; give a LoRA.")
    if (reason := why_base_changes(config.get("init_lora_weights"), config.get("bias"))) is not None:
        raise FactsError(f"{path} has an adapter with {reason}")
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        raise FactsError(f"{path} has no {weights.name}; save the adapter again as safetensors.")
    targets, base = config.get("target_modules"), config.get("base_model_name_or_path")
    saved = config.get("modules_to_save")
    shapes = {name.removeprefix(ADAPTED): shape for name, (shape, _) in _read_header(weights).items()}
    return AdapterFacts(
        r=_first(config, "r"),
        lora_alpha=_first(config, "lora_alpha"),
        target_modules=tuple(sorted(map(str, targets))) if isinstance(targets, list) else None,
        modules_to_save=tuple(sorted(map(str, saved))) if isinstance(saved, list) else (),
        parameters=sum(map(prod, shapes.values())),
        whole=sum(prod(shape) for name, shape in shapes.items() if ".lora_" not in name),
        base_model=base if isinstance(base, str) and base else None,
        changes=_changes(shapes),
        head=_matrix(shapes.get(REWARD_HEAD)),
    )


def why_base_changes(init_lora_weights: object, bias: object) -> str | None:
    """Why the base would not stay as it was under an adapter of this peft config, and what to do; or None.

    The base without adapters is the reference, and is what others load an exported adapter on.
    """
    start = init_lora_weights.lower() if isinstance(init_lora_weights, str) else init_lora_weights
    if not (start is None or isinstance(start, bool) or start in _STARTS_BESIDE_THE_BASE):
        return (
            f"init_lora_weights {shown(init_lora_weights)}, which changes the base's own weights, and the "
            f"base without adapters is the reference: give true or one of {shown(_STARTS_BESIDE_THE_BASE)}. "
            "One that is trained already becomes a plain LoRA where peft saves it with "
            "path_initial_model_for_weight_conversion."
        )
    if bias not in (None, "none"):
        return (
            f"bias {shown(bias)}, whose biases are the base's own, and the base without adapters is the "
            'reference: give "none", or lora_bias true, for biases of the adapter.'
        )
    return None


def _changes(shapes: _Shapes) -> dict[str, tuple[int, int]]:
    """Of each pair of A [rank, inputs] and B [outputs, rank]."""
    found = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".lora_A.weight")
        narrow, wide = _matrix(shape), _matrix(shapes.get(f"{module}.lora_B.weight"))
        if module != name and narrow and wide:
            found[module] = (wide[0], narrow[1])
    return found


def _matrix(shape: tuple[int, ...] | None) -> tuple[int, int] | None:
    return (shape[0], shape[1]) if shape is not None and len(shape) == 2 else None


def _has_padding(config: dict[str, Any], tokenizer: TokenizerFacts | None) -> bool | None:
    if isinstance(config.get("pad_token_id"), int):
        return True
    return None if tokenizer is None else tokenizer.pad_token is not None


def _read_config(path: Path, name: str) -> dict[str, Any]:
    if not path.is_dir():
        raise FactsError(f"{path} is not a directory; give one in the layout of save_pretrained.")
    config = _read_json(path / name)
    if config is None:
        raise FactsError(f"{path} has no {name}; give a directory in the layout of save_pretrained.")
    return config


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise FactsError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise FactsError(f"{path} holds {shown(content)}; it must hold a JSON object.")
    return content


def _first(config: dict[str, Any], *names: str) -> int | None:
    return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), None)


def _labels(config: dict[str, Any], shapes: _Shapes) -> int | None:
    """From the head where it is stored: a config leaves its default of two labels out."""
    for head in _CLASSIFIERS:
        if head in shapes:
            return shapes[head][0]
    names = config.get("id2label")
    return len(names) if isinstance(names, dict) else _first(config, "num_labels")


def _read_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name → (shape, bytes per element) of every stored weight."""
    files = sorted(path.glob("*.safetensors"))
    if not files and any(path.glob("*.bin")):
        raise FactsError(f"{path} has pickled weights only; save the model again as safetensors.")
    return {name: entry for file in files for name, entry in _read_header(file).items()}


def _read_header(file: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """The header of a safetensors file: its length in 8 little-endian bytes, then as much JSON."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, file.stat().st_size):
            raise FactsError(f"{file} is not a safetensors file, or is cut off.")
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if opened.tell() + end > file.stat().st_size:
                raise FactsError(f"{file} is cut off.")
            return {
                name: (tuple(entry["shape"]), _DTYPE_BYTES.get(entry["dtype"], 4))
                for name, entry in header.items()
            }
        except FactsError:
            raise
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
            raise FactsError(f"{file} is not a safetensors file, or is damaged.") from None


def linears(shapes: _Shapes) -> dict[str, tuple[int, int]]:
    """Of all weights, the matrices an adapter can be put on: neither embeddings nor output layers."""
    found = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        is_matrix = len(shape) == 2 and name.endswith(".weight")
        if is_matrix and not _is_embedding(name, shape, None) and _output_layer(name) is None:
            found[module] = (shape[0], shape[1])
    return found


def modules(shapes: _Shapes, vocab_size: int | None) -> dict[str, int]:
    """Of all weights, how many each module has of its own.

    An output layer that is tied to the embedding is not stored: it counts as the embedding does.
    """
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        module = name.rpartition(".")[0]
        counts[module] = counts.get(module, 0) + prod(shape)
    embeddings = [prod(shape) for name, shape in shapes.items() if _is_embedding(name, shape, vocab_size)]
    if embeddings and not _output_layers(shapes):
        counts[_TIED_OUTPUT] = embeddings[0]
    return counts


def _is_embedding(name: str, shape: tuple[int, ...], rows: int | None) -> bool:
    *_, module, kind = ["", *name.split(".")]
    is_matrix = kind == "weight" and len(shape) == 2 and rows in (None, shape[0])
    return is_matrix and any(word in module for word in _EMBEDDINGS)


def _output_layers(shapes: _Shapes) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        if (layer := _output_layer(name)) is not None:
            counts[layer] = counts.get(layer, 0) + prod(shape)
    return counts


def _output_layer(name: str) -> str | None:
    """Which output layer a weight belongs to: they stand beside the trunk, or are named so at its end."""
    first, *_, module, _ = ["", *name.split(".")]
    return next((part for part in (first, module) if part in OUTPUT_LAYERS), None)


def _read_tokenizer(path: Path) -> TokenizerFacts | None:
    """None where the tokenizer's class may have tokens of its own that the files do not name."""
    config = _read_json(path / "tokenizer_config.json")
    if config is None:
        return None
    named = {**(_read_json(path / "special_tokens_map.json") or {}), **config}
    generic = str(config.get("tokenizer_class")) in {"TokenizersBackend", "PreTrainedTokenizerFast"}
    pad, eos = _token(named.get("pad_token")), _token(named.get("eos_token"))
    if not generic and pad is None and eos is None:
        return None
    has_template = bool(config.get("chat_template")) or (path / "chat_template.jinja").exists()
    return TokenizerFacts(pad_token=pad, eos_token=eos, chat_template=has_template)


def _token(entry: object) -> str | None:
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None
