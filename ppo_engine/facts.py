"""What is known of a model without loading it: its `config.json`, tokenizer files, and safetensors headers.

Every fact that cannot be read is None, and rules that need it stay silent: the engine finds out.
This module knows no torch, no transformers, no hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ppo_engine.spec import shown

_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_EMBEDDINGS = ("embed", "wte", "wpe", "shared")
_OUTPUT_LAYERS = ("lm_head", "embed_out", "output_layer", "score", "classifier")


class FactsError(ValueError):
    """A model directory that is none; the message names the file and what is wrong with it."""


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
    labels: outputs of a classification head.
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
    tokenizer: TokenizerFacts | None = None

    @property
    def is_causal_lm(self) -> bool | None:
        """Whether the config declares a decoder-only language model; None: it declares nothing."""
        if not self.architectures:
            return None
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in self.architectures)


class Facts(BaseModel):
    """All that a plan may know beside the spec. rewards: by the reward's name. prompts: rows to train on."""

    model_config = ConfigDict(frozen=True)

    model: ModelFacts | None = None
    value: ModelFacts | None = None
    rewards: dict[str, ModelFacts] = {}
    prompts: int | None = None


def read_model_facts(path: Path) -> ModelFacts:
    """Read the facts of a model directory.

    Raises:
        FactsError: there is no directory, no readable `config.json`, or the weights are not safetensors.
    """
    if not path.is_dir():
        raise FactsError(f"{path} is not a directory; give one in the layout of save_pretrained.")
    config = _read_json(path / "config.json")
    if config is None:
        raise FactsError(f"{path} has no config.json; give a directory in the layout of save_pretrained.")
    text = config.get("text_config") or config
    tensors = _read_tensors(path)
    return ModelFacts(
        model_type=config.get("model_type"),
        architectures=tuple(config.get("architectures") or ()),
        vocab_size=_first(text, "vocab_size"),
        context_length=_first(text, "max_position_embeddings", "n_positions", "max_sequence_length"),
        hidden_size=_first(text, "hidden_size", "n_embd", "d_model"),
        layers=_first(text, "num_hidden_layers", "n_layer", "num_layers"),
        labels=_labels(config),
        parameters=sum(_count(shape) for shape, _ in tensors.values()) if tensors else None,
        weight_bytes=sum(_count(shape) * size for shape, size in tensors.values()) if tensors else None,
        linears=_linears(tensors),
        tokenizer=_read_tokenizer(path),
    )


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


def _labels(config: dict[str, Any]) -> int | None:
    names = config.get("id2label")
    return len(names) if isinstance(names, dict) else _first(config, "num_labels")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


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
            return {
                name: (tuple(entry["shape"]), _DTYPE_BYTES.get(entry["dtype"], 4))
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise FactsError(f"{file} is not a safetensors file, or is damaged.") from None


def _linears(tensors: dict[str, tuple[tuple[int, ...], int]]) -> dict[str, tuple[int, int]]:
    found = {}
    for name, (shape, _) in tensors.items():
        module = name.removesuffix(".weight")
        last = module.rsplit(".", 1)[-1]
        is_matrix = len(shape) == 2 and name.endswith(".weight")
        if is_matrix and not any(word in last for word in _EMBEDDINGS) and last not in _OUTPUT_LAYERS:
            found[module] = (shape[0], shape[1])
    return found


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
