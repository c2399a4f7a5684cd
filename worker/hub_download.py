"""A program that brings a model of the Hugging Face hub into this machine's cache.

    python -m worker.hub_download ANSWER REPO REVISION

It writes the snapshot's directory into the file ANSWER and ends with status 0; or why there is none, with
status 1, or with `LATER` where the same may be had another time. It is run below a guard: a download takes
long, and can be ended at any moment.
"""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LATER = 75  # EX_TEMPFAIL of sysexits.h
NEVER = (RepositoryNotFoundError, RevisionNotFoundError, DisabledRepoError, HFValidationError)
"""Closed repositories, which ask for another token, are among those not found."""

# What models and tokenizers are made of; pickled weights are left where they are.
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def main(answer: Path, repo: str, revision: str) -> int:
    try:
        snapshot = snapshot_download(repo, revision=revision, allow_patterns=PATTERNS)
    except Exception as error:
        # Whatever the hub, the network, or the disk raises, it is why the model cannot be had.
        reason = str(error).strip().partition("\n")[0]
        sys.stderr.write(f"{repo} at {revision}: {reason}\n")
        answer.write_text(reason)
        return 1 if isinstance(error, NEVER) or constants.HF_HUB_OFFLINE else LATER
    answer.write_text(snapshot)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
