"""What is measured: named cells, each a model, a method, and sizes, with the trainers that run it."""

from dataclasses import dataclass

from benchmarks.workload import LARGE, SMALL, WIDE, Size, ending_early

RESPONSE_TOKENS = 53
MEAN_EARLY = RESPONSE_TOKENS / 3


@dataclass(frozen=True)
class Contender:
    """One side of a comparison. method: full, lora (own value model), lora-head (head on the trunk)."""

    label: str
    library: str
    method: str


@dataclass(frozen=True)
class Comparison:
    """Contenders that train the same model in the same rounds; the first is the yardstick."""

    title: str
    size: Size
    contenders: tuple[Contender, ...]
    rounds: int
    batch: int = 32
    response: int = RESPONSE_TOKENS


FULL = (Contender("TRL 1.12", "trl", "full"), Contender("Proxima", "proxima", "full"))
LORA = (
    Contender("TRL 1.12", "trl", "lora"),
    Contender("Proxima", "proxima", "lora"),
    Contender("Proxima, one base", "proxima", "lora-head"),
)
METHODS = {"full": FULL, "LoRA": LORA}


def pair(size: Size, rounds: int, batch: int = 32) -> list[Comparison]:
    """Full fine-tuning and LoRA of one model."""
    suffix = "" if batch == 32 else f" x{batch}"
    return [
        Comparison(f"{size.name} {method}{suffix}", size, contenders, rounds, batch)
        for method, contenders in METHODS.items()
    ]


SMALL_EARLY, LARGE_EARLY = ending_early(SMALL, MEAN_EARLY), ending_early(LARGE, MEAN_EARLY)

STANDARD = [
    *pair(SMALL, rounds=10),
    *pair(LARGE, rounds=3),
    *pair(SMALL_EARLY, rounds=10),
    *pair(LARGE_EARLY, rounds=3),
    *pair(WIDE, rounds=3, batch=8),
]
"""What `make bench` measures."""

GRID = [
    *STANDARD,
    *pair(SMALL, rounds=5, batch=128),
    *pair(SMALL_EARLY, rounds=5, batch=128),
    *pair(LARGE, rounds=2, batch=128),
    *pair(LARGE_EARLY, rounds=2, batch=128),
]
"""What `make bench-full` measures."""

_OURS = (Contender("Proxima, one base", "proxima", "lora-head"),)

GROWTH = [
    *(Comparison(f"{tokens} tokens", SMALL, _OURS, 3, response=tokens) for tokens in (25, 50, 100, 200)),
    *(Comparison(f"{batch} rows", SMALL, _OURS, 3, batch=batch) for batch in (16, 32, 64, 128)),
]
"""How the cost of an update of ours grows with the length of responses, and with the batch."""
