"""Where a model, or a data set, comes from: a directory on a disk the worker sees, or the Hugging Face hub.

This module reads neither.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Discriminator, Field

from ppo_engine.findings import REPOSITORY
from ppo_engine.hyperparameters import Part


class LocalModel(Part):
    """A directory in the layout of `save_pretrained`, on a disk the worker sees."""

    type: Literal["local"] = "local"
    """On a disk."""
    path: str = Field(min_length=1)
    """The directory. The service allows only paths inside the roots its operator names."""


class HubModel(Part):
    """A model repository on the Hugging Face hub."""

    type: Literal["hub"] = "hub"
    """On the hub."""
    repo: str = Field(pattern=REPOSITORY)
    """`owner/name`."""
    revision: str = Field(default="main", min_length=1)
    """Branch, tag, or commit. A job keeps the commit that its first attempt found, and goes on with that."""


class HubData(Part):
    """A split of a data set on the Hugging Face hub."""

    type: Literal["hub"]
    """On the hub."""
    repo: str = Field(pattern=REPOSITORY)
    """`owner/name`."""
    revision: str = Field(default="main", min_length=1)
    """Branch, tag, or commit. A job keeps the commit that its first attempt found, and goes on with that."""
    config: str | None = Field(default=None, min_length=1)
    """Which of its configurations; by default the only one, or the one that it names as its default."""
    split: str = Field(default="train", min_length=1)
    """Which of its splits."""

    def __str__(self) -> str:
        config = "" if self.config is None else f"{self.config}, "
        return f"{self.repo}@{self.revision} ({config}{self.split})"


ModelSource = Annotated[LocalModel | HubModel, Discriminator("type")]


def public_name(path: str) -> tuple[str, str | None]:
    """What others may call a local model, and its revision: where it lies on a machine is nobody's business.

    A snapshot in the hub's cache has the names of its repository and commit; others, the last part of theirs.
    """
    parts = PurePath(path).parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/", 1), parts[-1]
    return PurePath(path).name, None
