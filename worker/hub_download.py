"""A program that brings a model of the Hugging Face hub into this machine's cache.

    hub_download.py REPO REVISION ANSWER

It writes the snapshot's directory into the file ANSWER and ends with status 0; or, with status 1, why there
is none. It is run by its path, below a guard: a download takes long, and can be ended at any moment.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from huggingface_hub import snapshot_download

# What models and tokenizers are made of; pickled weights are left where they are.
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def main(repo: str, revision: str, answer: Path) -> int:
    try:
        snapshot = snapshot_download(repo, revision=revision, allow_patterns=PATTERNS)
    except Exception as error:
        # Whatever the hub, the network, or the disk raises, it is why the model cannot be had.
        traceback.print_exc()
        answer.write_text(str(error).strip().partition("\n")[0])
        return 1
    answer.write_text(snapshot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
