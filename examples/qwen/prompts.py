"""Writes `train.jsonl` and `heldout.jsonl`: chat prompts that ask for a product, with the answer in a column.

    python examples/qwen/prompts.py DIRECTORY

Both what is right and what is brief can be rewarded by rule here, without a reward model. Nothing needs to be
installed.
"""

import json
import random
import sys
from pathlib import Path

TRAIN, HELDOUT = 2000, 128


def row(first: int, second: int) -> dict[str, object]:
    """One prompt; `answer` is what the reward `correct` compares the response with."""
    question = f"What is {first} times {second}? Answer with the number only."
    return {"messages": [{"role": "user", "content": question}], "answer": str(first * second)}


def write(directory: Path) -> None:
    """Both files below `directory`; no question stands in both, and every call writes the same bytes."""
    pairs = [(first, second) for first in range(2, 50) for second in range(11, 100)]
    random.Random(1).shuffle(pairs)
    directory.mkdir(parents=True, exist_ok=True)
    parts = {"train": pairs[:TRAIN], "heldout": pairs[TRAIN : TRAIN + HELDOUT]}
    for name, chosen in parts.items():
        lines = [json.dumps(row(first, second)) + "\n" for first, second in chosen]
        (directory / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
