"""A program that makes prompts of a data set of the Hugging Face hub, checked like those of an uploaded file.

    python -m worker.hub_prompts ANSWER TARGET MAX_BYTES SOURCE

SOURCE is a `HubData` as JSON. Rows are read from the hub as they are written, so that no more of a data set
than `MAX_BYTES` ever comes here; its own code is never run. It writes into the file ANSWER, as JSON, the
commit, the number of rows, and their columns, and ends with status 0; or what is wrong, with status 1, locs
from the source; or with `LATER`, in words, why the same may be had another time. It is run below a guard.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow as pa
from datasets import get_dataset_config_names, load_dataset_builder
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ppo_engine.issues import Issue, SpecError, shown
from ppo_engine.model_sources import HubData
from service.uploads.convert import Written, write_rows
from service.uploads.lines import BadFile
from service.uploads.parquet import read_tables
from worker.hub_download import LATER, NEVER

BATCH_ROWS = 1024
KINDS = ("arrow", "csv", "json", "parquet")
"""Of files that rows are read from: plain tables, whose readers run nothing that they hold."""

MEMORY_BYTES = 4 * 2**30
"""Most that reading may take: a small file can unpack to a huge one."""

# Files that are no table, damaged, or of several kinds: whatever is raised for them is of these.
UNREADABLE = (
    *(DatasetsError, pa.ArrowException, FileNotFoundError),
    *(LookupError, MemoryError, TypeError, ValueError),
)
SCRIPT = RuntimeError
"""Of a data set that is code, which is not run."""


def main(answer: Path, target: Path, max_bytes: int, source: HubData) -> int:
    try:
        commit = find_commit(source)
        with target.open("wb") as file:
            tables = read(source, commit)
            written = write_rows(read_tables(tables), file, max_bytes, unit="Row")
    except SpecError as error:
        return _refuse(answer, error.issues)
    except BadFile as error:
        return _refuse(answer, [Issue(loc=(), msg=issue.msg) for issue in error.issues])
    except Exception as error:
        # Whatever the hub, the network, or the disk raises, it is why the data set cannot be had.
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if is_final(error) or constants.HF_HUB_OFFLINE:
            return _refuse(answer, [Issue(loc=(), msg=f"{source} given, which cannot be read: {reason}")])
        sys.stderr.write(f"{source}: {reason}\n")
        answer.write_text(reason)
        return LATER
    answer.write_text(_success(commit, written))
    return 0


def is_final(error: BaseException) -> bool:
    """Whether it says something of the data set, which another time would say as well."""
    return isinstance(error, (*NEVER, *UNREADABLE, SCRIPT)) and not _may_pass(error)


def _may_pass(error: BaseException | None) -> bool:
    """Whether behind an error stands a hub that is away, or has had enough of requests for now.

    `LocalEntryNotFoundError` is a file that is not here and could not be asked for.
    """
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | httpx.TransportError):
            return True
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (429, *range(500, 600)):
            return True
        error = error.__cause__ or error.__context__
    return False


def find_commit(source: HubData) -> str:
    """Where the revision is now.

    Raises:
        SpecError: there is no such data set or revision.
    """
    try:
        commit = HfApi().dataset_info(source.repo, revision=source.revision).sha
    except RepositoryNotFoundError:
        raise _refusal(
            "repo",
            f"{shown(source.repo)} given; the hub has no such data set, or hides it from the token of this "
            "service: correct the name, or have the operator give a token that may read it.",
        ) from None
    except RevisionNotFoundError:
        raise _refusal(
            "revision",
            f"{shown(source.revision)} given; {source.repo} has no such branch, tag, or commit: correct it.",
        ) from None
    assert commit is not None, "the hub names the commit of what it is asked for"
    return commit


def read(source: HubData, commit: str) -> Iterator[pa.Table]:
    """The rows of the split, a few at a time.

    Raises:
        SpecError: there is no such configuration or split.
    """
    try:
        builder = load_dataset_builder(source.repo, name=source.config, revision=commit)
    except ValueError:
        _check_config(source, get_dataset_config_names(source.repo, revision=commit))
        raise
    if builder.name not in KINDS:
        raise _refusal(
            "repo",
            f"{shown(source.repo)} given, which is made of files of the kind {builder.name}; rows are read "
            f"from {shown(KINDS)}: give another data set.",
        )
    splits = [str(split) for split in builder.config.data_files or ()]
    if source.split not in splits:
        raise _refusal(
            "split",
            f"{shown(source.split)} given; {source.repo} has the splits {shown(splits, 400)}: give one of "
            "these.",
        )
    return iter(builder.as_streaming_dataset(source.split).with_format("arrow").iter(BATCH_ROWS))


def _check_config(source: HubData, names: list[str]) -> None:
    given = "Not given" if source.config is None else f"{shown(source.config)} given"
    if source.config not in names and len(names) > (source.config is None):
        raise _refusal(
            "config",
            f"{given}; {source.repo} has the configurations {shown(names, 400)}: give one of these.",
        )


def _refusal(field: str, msg: str) -> SpecError:
    return SpecError([Issue(loc=(field,), msg=msg)])


def _refuse(answer: Path, issues: list[Issue]) -> int:
    answer.write_text(json.dumps([issue.model_dump(mode="json") for issue in issues]))
    return 1


def _success(commit: str, written: Written) -> str:
    return json.dumps({"commit": commit, "rows": written.rows, "columns": written.columns})


def bound_memory() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    bound = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, most))


if __name__ == "__main__":
    bound_memory()
    sys.exit(
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), HubData.model_validate_json(sys.argv[4]))
    )
