"""What a person sees while a job runs: a bar on a terminal, plain lines anywhere else."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

COLUMNS = {
    "reward": ("objective/scores", "{:.3f}"),
    "KL": ("objective/kl", "{:.3f}"),
    "tokens/s": ("time/tokens_per_second", "{:.0f}"),
}


def watch(events: Iterable[dict[str, Any]], updates: int, console: Console) -> str:
    """Show a job's events as they come; returns its final state."""
    state = "queued"
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(state, total=updates, numbers="")
        for event in events:
            if event["type"] == "state":
                state = event["data"]["state"]
                bar.update(task, description=state)
            if event["type"] == "metrics":
                numbers = summary(event["data"])
                bar.update(task, completed=event["update"], numbers=numbers)
                if not console.is_terminal:
                    console.print(f"update {event['update']}/{updates}  {numbers}")
    return state


def summary(metrics: dict[str, Any]) -> str:
    """The numbers one follows in a run of PPO, as far as they are there; JSON has "NaN" as text."""
    return "  ".join(
        f"{name} {number.format(float(metrics[key]))}"
        for name, (key, number) in COLUMNS.items()
        if key in metrics
    )
