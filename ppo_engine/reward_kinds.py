"""What makes a response good: the kinds of rewards a spec may name, and the rules of each.

How each scores stands in the file of its name in `rewards/`; this module knows no torch and asks nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal
from urllib.parse import parse_qsl, urlsplit

import regex
from pydantic import ConfigDict, Discriminator, Field, JsonValue

from ppo_engine import json_schemas
from ppo_engine.addresses import NO_SERVERS, address_of, standing
from ppo_engine.findings import NAME, SECRET
from ppo_engine.hyperparameters import Count, Part, Signed
from ppo_engine.issues import Issue, Loc, shown
from ppo_engine.model_sources import ModelSource
from ppo_engine.patterns import fault

SECRET_PREFIX = "PROXIMA_SECRET_"
"""Of the variables in a worker's environment that hold the secrets specs may name."""
HTTP_ALLOW_PRIVATE = "PROXIMA_HTTP_ALLOW_PRIVATE"
"""Of an engine's environment: 1 lets rewards be asked for at private addresses, loopback among them."""
_SECRET_NAME = regex.compile(SECRET)
_CREDENTIALS = regex.compile(r"[^/?#]*//[^/?#]*@")
_SECRET_OPTION = regex.compile(
    r"(?i)secret|passw|credential|(api|access|private|signing)_?key|(auth|access|api|bearer)_?token"
)


def _example(**fields: JsonValue) -> ConfigDict:
    """A kind's example for the API's documentation."""
    return ConfigDict(json_schema_extra={"examples": [fields]})


class RewardPart(Part):
    """What all rewards share. A row's score is the weighted sum over the rewards of a run."""

    name: str = Field(pattern=NAME)
    """Names the metric `reward/<name>`; unique in the run."""
    weight: Signed = 1.0
    """Of this reward in the sum; below 0 it punishes."""


class FalliblePart(RewardPart):
    """A reward that may be unable to score a row."""

    fallback: Signed | None = None
    """The score, before its weight, of a row that this reward cannot score; the metric `reward/<name>/failed`
    counts such rows. null: the job stops there, and names reward and row."""


class AskedPart(FalliblePart):
    """A reward by code that may give a score when it is asked once more."""

    retries: int = Field(default=2, ge=0, le=10)
    """How often rows without a score are asked for again, after 0.5 s, 1 s, and so on up to 8 s, or when a
    server says, within a minute; the metric `reward/<name>/retried` counts such rows."""


class ModelReward(FalliblePart):
    """The scalar of a sequence-classification model, read at the last token of prompt and response.

    It cannot score a text that is longer than the model's context.
    """

    model_config = _example(
        type="model",
        name="preference",
        source={"type": "hub", "repo": "org/reward-model"},
        chat_template=True,
    )

    type: Literal["model"] = "model"
    """By a model."""
    source: ModelSource
    """The model; it has one label."""
    chat_template: bool = False
    """Render prompt and response with the reward model's own chat template."""


class AdapterReward(RewardPart):
    """The scalar of the adapter that `ppo.reward_adapter_name` names, on the policy's own base."""

    model_config = _example(type="adapter", name="preference")

    type: Literal["adapter"] = "adapter"
    """By an adapter."""


class ReferencePart(FalliblePart):
    """A reward by comparison; it cannot score a row without a text in its column."""

    reference: str | None = None
    """The text compared with, the same for every row."""
    column: str | None = None
    """Or the column of the prompt file that holds it."""


class StringCheck(ReferencePart):
    """1 when the response compares with the reference as asked, else 0."""

    model_config = _example(type="string_check", name="right", operation="eq", column="answer")

    type: Literal["string_check"] = "string_check"
    """By comparison with a text."""
    operation: Literal["eq", "ne", "like", "ilike"] = "eq"
    """Equal, not equal, contains, contains ignoring case."""


class TextSimilarity(ReferencePart):
    """How much the response resembles the reference: from 0, nothing in common, to 1, the same."""

    model_config = _example(type="text_similarity", name="close", metric="rouge_l", column="summary")

    type: Literal["text_similarity"] = "text_similarity"
    """By likeness to a text."""
    metric: Literal["fuzzy_match", "bleu", "rouge_1", "rouge_2", "rouge_l"] = "fuzzy_match"
    """`fuzzy_match`: of characters (rapidfuzz's ratio). `bleu`: of n-grams up to 4 (sacrebleu, one sentence).
    `rouge_1`, `rouge_2`: F1 of words, of pairs of words. `rouge_l`: F1 of the longest common subsequence of
    words."""


class JsonSchema(FalliblePart):
    """`match` when the whole response is JSON that a schema allows, else `no_match`.

    It cannot score a response for which the check takes more than ten seconds.
    """

    model_config = _example(
        type="json_schema",
        name="form",
        schema={"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}},
        match=1.0,
        no_match=-1.0,
    ) | ConfigDict(serialize_by_alias=True)  # pydantic has a use of its own for `schema`

    type: Literal["json_schema"] = "json_schema"
    """By a JSON Schema."""
    json_schema: dict[str, JsonValue] = Field(alias="schema")
    """Draft 2020-12, up to 16,384 characters over all schemas of a run. References stay inside of it
    (`#/$defs/NAME`), patterns are those of Python's `regex`, `format` is not looked at, and anchors,
    `unevaluatedItems`, and `unevaluatedProperties` are not taken."""
    match: Signed = 1.0
    """Where it is allowed."""
    no_match: Signed = 0.0
    """Where it is not, or is no JSON."""


class Regex(FalliblePart):
    """`match` when the pattern is found in the response, else `no_match`.

    It cannot score a response in which the search takes more than ten seconds.
    """

    model_config = _example(type="regex", name="polite", pattern="(?i)please|thank you", no_match=-1.0)

    type: Literal["regex"] = "regex"
    """By a pattern."""
    pattern: str = Field(min_length=1, max_length=1000)
    """In the syntax of Python's `regex`; found anywhere in the response."""
    match: Signed = 1.0
    """Where it is found."""
    no_match: Signed = 0.0
    """Where it is not."""


class Length(RewardPart):
    """Minus the relative distance from a target length: 0 at the target, -1 at twice the target."""

    model_config = _example(type="length", name="brief", target=64, unit="token", weight=0.1)

    type: Literal["length"] = "length"
    """By length."""
    target: Count
    """The best length."""
    unit: Literal["token", "text"] = "token"
    """Tokens of the response, or characters of its text."""


class Plugin(AskedPart):
    """A reward the operator installed: an entry point of the group `proxima.rewards`."""

    model_config = _example(type="plugin", name="cheerful", plugin="cheerful", retries=0, fallback=0.0)

    type: Literal["plugin"] = "plugin"
    """By a plug-in."""
    plugin: str = Field(min_length=1)
    """The entry point's name."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of its factory. `{"secret": "NAME"}` stands for a value that the operator gives the
    worker as `PROXIMA_SECRET_NAME`; a spec itself holds no secrets."""


class Secret(Part):
    """A value that the operator gives the worker as `PROXIMA_SECRET_NAME`."""

    secret: str = Field(pattern=SECRET)
    """Its name, without `PROXIMA_SECRET_`."""


class Http(AskedPart):
    """Scores of a server: batches of rows are sent there as JSON; `docs/rewards.md` has the protocol."""

    model_config = _example(
        type="http",
        name="judge",
        url="https://rewards.example.com/score",
        signing_key={"secret": "JUDGE"},
        retries=4,
    )

    type: Literal["http"] = "http"
    """By a server."""
    url: str = Field(min_length=1, max_length=2048)
    """Where rows are sent by POST. Redirects are not followed, and private addresses not asked, unless the
    operator allows those."""
    batch_size: int = Field(default=64, ge=1, le=4096)
    """Rows of one request."""
    concurrency: int = Field(default=4, ge=1, le=64)
    """Requests at once, per process."""
    timeout: float = Field(default=30.0, ge=0.1, le=300)
    """Seconds for one request, answer included."""
    signing_key: Secret | None = None
    """Sign requests as Standard Webhooks does, with this key: the base64 of 24 or more random bytes."""


Reward = Annotated[
    ModelReward | AdapterReward | StringCheck | TextSimilarity | JsonSchema | Regex | Length | Plugin | Http,
    Discriminator("type"),
]


def check_rewards(rewards: Sequence[RewardPart]) -> Iterator[Issue]:
    """The rules of rewards; locs from the spec's root."""
    names: set[str] = set()
    for index, reward in enumerate(rewards):
        if reward.name in names:
            yield Issue(
                loc=("rewards", index, "name"),
                msg=f"{shown(reward.name)} given twice; each reward of a run needs its own name.",
            )
        names.add(reward.name)
        match reward:
            case ReferencePart():
                yield from _check_reference(reward, index)
            case Regex():
                yield from _check_pattern(reward, index)
            case Plugin():
                yield from _check_options(reward, index)
            case Http():
                yield from _check_url(reward, index)
    yield from _check_schemas(rewards)


def _check_reference(reward: ReferencePart, index: int) -> Iterator[Issue]:
    if (reward.reference is None) == (reward.column is None):
        yield Issue(
            loc=("rewards", index, "reference"),
            msg=f"reference {shown(reward.reference)} and column {shown(reward.column)} given; "
            "give exactly one of them.",
        )
    elif reward.column is None and reward.fallback is not None:
        yield Issue(
            loc=("rewards", index, "fallback"),
            msg=f"{reward.fallback} given with reference, which every row can be compared with: leave it "
            "out, or name a column.",
        )


def _check_pattern(reward: Regex, index: int) -> Iterator[Issue]:
    if (why := fault(reward.pattern)) is not None:
        yield Issue(loc=("rewards", index, "pattern"), msg=f"{shown(reward.pattern)} given; {why}.")


def _check_options(reward: Plugin, index: int) -> Iterator[Issue]:
    for name, value in reward.options.items():
        loc: Loc = ("rewards", index, "options", name)
        if isinstance(value, dict) and "secret" in value and secret_name(value) is None:
            yield Issue(
                loc=loc,
                msg=f'{shown(value)} given; a secret is {{"secret": "NAME"}}, its name in capitals, '
                "digits, and _.",
            )
        elif isinstance(value, str) and _SECRET_OPTION.search(name):
            yield Issue(
                loc=loc,
                msg="A text given for what looks like a secret; a spec holds none, since it is stored and "
                'shown: have the operator set PROXIMA_SECRET_NAME, and give {"secret": "NAME"}.',
            )


def _check_schemas(rewards: Sequence[RewardPart]) -> Iterator[Issue]:
    """Each schema by itself, and how long they are together: to look at one takes time."""
    left = json_schemas.MAX_CHARACTERS
    for index, reward in enumerate(rewards):
        if not isinstance(reward, JsonSchema):
            continue
        left -= json_schemas.size(reward.json_schema)
        loc: Loc = ("rewards", index, "schema")
        if left < 0:
            yield Issue(
                loc=loc,
                msg=f"{shown(reward.json_schema)} given; the schemas of a run have "
                f"{json_schemas.MAX_CHARACTERS} characters at most, and this one exceeds it: shorten them.",
            )
        elif (fault := json_schemas.fault(reward.json_schema)) is not None:
            yield Issue(loc=(*loc, *fault.path), msg=f"{shown(fault.given)} given; {fault.why}.")


def _check_url(reward: Http, index: int) -> Iterator[Issue]:
    if (why := _fault_of_url(reward.url)) is not None:
        yield Issue(loc=("rewards", index, "url"), msg=why)


def _fault_of_url(url: str) -> str | None:
    """What is wrong with a URL, as far as no network need be asked."""
    if _CREDENTIALS.match(url):  # not shown
        return "A URL with a user or password given; a spec holds no secrets: give signing_key instead."
    given = f"{shown(url)} given"
    if not url.isascii() or not url.isprintable() or " " in url:
        return f"{given}; a URL has ASCII characters and no spaces: encode the others."
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
    except ValueError as error:
        return f"{given}, which is no URL ({error}); correct it."
    if any(_SECRET_OPTION.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
        return "A URL with what looks like a secret in its query given; a spec holds none: give signing_key."
    if parts.scheme not in ("http", "https") or not host:
        return f"{given}; rewards are asked for by http or https: give https://HOST/PATH."
    if port == 0 or any(not 1 <= len(label) <= 63 for label in host.rstrip(".").split(".")):
        return f"{given}; no server has that host or port: correct it."
    if parts.fragment:
        return f"{given}; what stands after # is never sent: leave it out."
    address = address_of(host)
    if address is not None and standing(address) == "refused":
        return f"{given}; {NO_SERVERS}: give the address of a server."
    return None


def secret_name(option: JsonValue) -> str | None:
    """The name of the secret that an option stands for; None: it stands for itself."""
    if not isinstance(option, dict) or set(option) != {"secret"}:
        return None
    name = option["secret"]
    return name if isinstance(name, str) and _SECRET_NAME.fullmatch(name) else None
