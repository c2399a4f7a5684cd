"""A program that brings a model of the Hugging Face hub into this machine's cache.

    hub_download.py REPO REVISION ANSWER

It writes the snapshot's directory into the file ANSWER and ends with status 0; or, with status 1, why there
is none. It is run by its path, below a guard: a download takes long, and can be ended at any moment.
"""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

# What models and tokenizers are made of; pickled weights are left where they are.
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def main(repo: str, revision: str, answer: Path) -> int:
    try:
        snapshot = snapshot_download(repo, revision=revision, allow_patterns=PATTERNS)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        answer.write_text(str(error).strip().partition("\n")[0])
        return 1
    answer.write_text(snapshot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
