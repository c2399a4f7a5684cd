"""Whether models and adapters fit the roles that a run has for them: policy, value, reference, reward.

The rules of a spec's models, and of a script's: of what is told in `facts.py`, whoever found it out. Facts
that are not known break no rule. This module knows no files, no torch, and no sizes of batches.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ppo_engine.facts import OUTPUT_LAYERS, AdapterFacts, ModelFacts
from ppo_engine.findings import REPOSITORY
from ppo_engine.hyperparameters import Hyperparameters
from ppo_engine.issues import Issue, Loc, shown
from ppo_engine.model_sources import HubModel, ModelSource, public_name
from ppo_engine.spec import Lora, PromptLengths


def check_policy(model: ModelFacts) -> Iterator[Issue]:
    """Whether a model can be a policy; locs from the spec's root."""
    if model.is_causal_lm is False:
        yield Issue(
            loc=("model",),
            msg=f"A model of architecture {shown(model.architectures)} given; PPO trains causal language "
            "models: give one whose config names a ...ForCausalLM.",
        )
    tokenizer = model.tokenizer
    if tokenizer is not None and tokenizer.pad_token is None and tokenizer.eos_token is None:
        yield Issue(
            loc=("model",),
            msg="A model given whose tokenizer has neither a pad token nor an eos token; name one of them in "
            "its tokenizer_config.json.",
        )


def check_lengths(ppo: Hyperparameters, model: ModelFacts) -> Iterator[Issue]:
    """Rules between the model's sizes and hyperparameters; locs relative to `ppo`."""
    if model.context_length is not None and ppo.response_length >= model.context_length:
        yield Issue(
            loc=("response_length",),
            msg=f"{ppo.response_length} given; the model has {model.context_length} positions for prompt and "
            "response together: give fewer.",
        )
    if (
        ppo.stop_token_id is not None
        and model.vocab_size is not None
        and ppo.stop_token_id >= model.vocab_size
    ):
        yield Issue(
            loc=("stop_token_id",),
            msg=f"{ppo.stop_token_id} given; the model's vocabulary has ids 0 to {model.vocab_size - 1}: "
            "give one of these.",
        )
    if ppo.stop_token == "eos" and model.tokenizer is not None and model.tokenizer.eos_token is None:
        yield Issue(
            loc=("stop_token",),
            msg='"eos" given; the model\'s tokenizer has no eos token: give stop_token_id.',
        )


def check_prompt_lengths(lengths: PromptLengths, ppo: Hyperparameters, model: ModelFacts) -> Iterator[Issue]:
    """Whether the longest prompt leaves room for a response; locs relative to `prompts`."""
    if lengths.max_length is None or model.context_length is None:
        return
    room = model.context_length - ppo.response_length
    if 0 < room < lengths.max_length:
        yield Issue(
            loc=("max_length",),
            msg=f"{lengths.max_length} given; the model has {model.context_length} positions, and "
            f"response_length {ppo.response_length} leaves {room} for a prompt: give at most {room}, or "
            "leave it out.",
        )


def check_targets(target_modules: str | Sequence[str], model: ModelFacts) -> Iterator[Issue]:
    """Whether the model has the modules that an adapter is asked for; locs relative to `method`."""
    if isinstance(target_modules, str) or not model.linears:
        return
    for index, target in enumerate(target_modules):
        if not any(_targets(name, target) for name in model.linears):
            known = sorted({name.rsplit(".", 1)[-1] for name in model.linears})
            yield Issue(
                loc=("target_modules", index),
                msg=f"{shown(target)} given; {model.model_type or 'the model'} has the linear modules "
                f'{shown(known, 400)}: choose of these, or give "all-linear".',
            )


def check_saved_modules(lora: Lora, model: ModelFacts) -> Iterator[Issue]:
    """Whether the model has what is to be trained whole, and no adapter on it; locs relative to `method`."""
    if not model.modules:
        return
    adapted = targeted(lora.target_modules, model.linears)
    known = sorted({name.rsplit(".", 1)[-1] for name in model.modules.keys() - adapted})
    for index, given in enumerate(lora.modules_to_save):
        found = saved_modules((given,), model.modules)
        if not found:
            yield Issue(
                loc=("modules_to_save", index),
                msg=f"{shown(given)} given; beside those with an adapter, the modules of "
                f"{model.model_type or 'the model'} are {shown(known, 400)}: choose of these.",
            )
        elif twice := sorted(found & adapted):
            yield Issue(
                loc=("modules_to_save", index),
                msg=f"{shown(given)} given, and target_modules puts an adapter on {shown(twice[0])}; what is "
                "trained whole has no adapter: leave it out here, or give target_modules without it.",
            )


def saved_modules(names: Sequence[str], modules: Iterable[str]) -> set[str]:
    """The modules that peft's `modules_to_save` means."""
    return {module for module in modules if module.endswith(tuple(names))}


def _targets(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def check_adapter(lora: Lora, name: str, adapter: AdapterFacts, model: ModelFacts | None) -> Iterator[Issue]:
    """Whether the adapter that the trained one starts as is what the spec says; locs relative to `method`.

    An adapter keeps its own shape, so a field that says another would be without effect.
    """
    for field in ("r", "lora_alpha"):
        given, own = getattr(lora, field), getattr(adapter, field)
        if own is not None and given != own:
            yield _other_than_start(field, given, name, own)
    own_targets = adapter.target_modules
    if own_targets is not None and not _same_modules(
        lora.target_modules, own_targets, model.linears if model is not None else {}
    ):
        yield _other_than_start("target_modules", lora.target_modules, name, own_targets)
    if set(lora.modules_to_save) != set(adapter.modules_to_save):
        yield _other_than_start("modules_to_save", lora.modules_to_save, name, adapter.modules_to_save)


def check_base(adapter: AdapterFacts, model: ModelFacts, loc: Loc) -> Iterator[Issue]:
    """Whether a model has what an adapter changes, of the same shapes; the first thing it lacks is told."""
    named = (
        ""
        if adapter.base_model is None
        else f" (its config names {shown(public_name(adapter.base_model)[0])})"
    )
    for name, shape in adapter.changes.items():
        # Output layers and embeddings are not told, and experts are stored as one weight.
        if not model.linears or name.rsplit(".", 1)[-1] in OUTPUT_LAYERS or "experts" in name:
            continue
        own = model.linears.get(name)
        if own is None or sorted(own) != sorted(shape):
            has = "no such module" if own is None else f"one of {own[0]} x {own[1]}"
            yield Issue(
                loc=loc,
                msg=f"An adapter given that changes {name}, of {shape[0]} x {shape[1]}; the model has {has}: "
                f"it was trained for another base{named}. Give one that was trained for this model.",
            )
            return
    width = model.hidden_size
    if adapter.head is not None and width is not None and adapter.head[1] != width:
        yield Issue(
            loc=loc,
            msg=f"An adapter given whose score head reads {adapter.head[1]} numbers; the model has {width}: "
            f"it was trained for another base{named}. Give one that was trained for this model.",
        )


def check_head(adapter: AdapterFacts, loc: Loc, *, is_reward: bool) -> Iterator[Issue]:
    """Whether an adapter has the score head that its role needs, and no other has one."""
    if is_reward and adapter.head is None:
        yield Issue(
            loc=loc,
            msg="An adapter without a score head given, and reward_adapter_name names it; give one that PEFT "
            "saved of a decoder's ...ForSequenceClassification with task_type SEQ_CLS.",
        )
    elif is_reward and adapter.head is not None and adapter.head[0] != 1:
        yield Issue(
            loc=loc,
            msg=f"An adapter with {adapter.head[0]} labels given, and reward_adapter_name names it; a reward "
            "is one number: use one with 1 label.",
        )
    elif adapter.head is not None and not is_reward:
        yield Issue(
            loc=loc,
            msg="An adapter with a score head given, which makes it a reward; name it in "
            "ppo.reward_adapter_name, or give one of a language model.",
        )


def _other_than_start(field: str, given: object, name: str, own: object) -> Issue:
    return Issue(
        loc=(field,),
        msg=f"{shown(given)} given; the adapter that is trained starts as {shown(name)}, which has "
        f"{shown(own, 400)}: give that.",
    )


def _same_modules(
    given: Sequence[str] | str, own: Sequence[str], linears: Mapping[str, tuple[int, int]]
) -> bool:
    if linears:
        return targeted(given, linears) == targeted(own, linears)
    return isinstance(given, str) or set(given) == set(own)


def targeted(targets: Sequence[str] | str, linears: Mapping[str, tuple[int, int]]) -> set[str]:
    """The linear modules that a spec's `target_modules` means."""
    if targets == "all-linear":
        return set(linears)
    return {name for name in linears if any(_targets(name, target) for target in targets)}


def check_named_base(adapter: AdapterFacts, source: ModelSource, loc: Loc) -> Iterator[Issue]:
    """Whether the hub's model that an adapter's config names is the one given."""
    own, given = adapter.base_model, _hub_name(source)
    if own is not None and given is not None and _is_repository(own) and not same_name(own, given):
        yield Issue(
            loc=loc,
            msg=f"An adapter given whose config names the base {shown(own)}; the model is "
            f"{shown(given)}: give one that was trained on that.",
        )


def _hub_name(source: ModelSource) -> str | None:
    """What the hub calls a model; None: it need not be of the hub."""
    if isinstance(source, HubModel):
        return source.repo
    name, revision = public_name(source.path)
    return None if revision is None else name


def _is_repository(name: str) -> bool:
    return re.fullmatch(REPOSITORY, name) is not None


def same_name(one: str, other: str) -> bool:
    """Whoever publishes a copy of a model changes the owner, not the name."""
    return one.rsplit("/", 1)[-1].lower() == other.rsplit("/", 1)[-1].lower()


def check_value_model(value: ModelFacts, policy: ModelFacts | None, loc: Loc) -> Iterator[Issue]:
    """Whether a model can be the critic of a policy: a decoder that reads the same ids."""
    if value.is_causal_lm is False and not value.is_classifier:
        yield Issue(
            loc=loc,
            msg=f"A model of architecture {shown(value.architectures)} given; a value model is a "
            "...ForCausalLM, or a ...ForSequenceClassification with 1 label.",
        )
    elif value.is_classifier and value.output_layers and "score" not in value.output_layers:
        yield Issue(
            loc=loc,
            msg=f"A model of architecture {shown(value.architectures)} given, which reads a text as a whole; "
            "a value is read at every token: give a decoder.",
        )
    elif value.is_classifier and value.labels is not None and value.labels != 1:
        yield Issue(
            loc=loc,
            msg=f"A model with {value.labels} labels given; a value is one number: use one with 1 label.",
        )
    if policy is None:
        return
    for field, what in (("vocab_size", "ids"), ("context_length", "positions")):
        own, needed = getattr(value, field), getattr(policy, field)
        if own is not None and needed is not None and own < needed:
            yield Issue(
                loc=loc,
                msg=f"A model with {own} {what} given; the policy has {needed}, and a value model reads all "
                "that the policy writes: use one with as many.",
            )


def check_reward_model(model: ModelFacts, loc: Loc) -> Iterator[Issue]:
    """Whether a model can score text with one number."""
    if model.architectures and not model.is_classifier:
        yield Issue(
            loc=loc,
            msg=f"A model of architecture {shown(model.architectures)} given; a reward model is a "
            "...ForSequenceClassification: give one.",
        )
    elif model.labels is not None and model.labels != 1:
        yield Issue(
            loc=loc,
            msg=f"A model with {model.labels} labels given; a reward is one number: use one with 1 label.",
        )
    if model.has_padding is False:
        yield Issue(
            loc=loc,
            msg="A model without a padding token given; set pad_token in its tokenizer_config.json, or "
            "pad_token_id in its config.json (its eos token will do: padding changes no score).",
        )
