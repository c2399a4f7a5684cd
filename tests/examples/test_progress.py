"""What is shown of a job that runs: lines where there is no terminal."""

import io

from randomwalks.progress import summary, watch
from rich.console import Console

METRICS = {"objective/scores": 0.5, "objective/kl": 1.25, "time/tokens_per_second": 99.6, "lr": 1.0}


def test_a_line_for_every_update_and_the_final_state() -> None:
    output = io.StringIO()
    events = [
        {"type": "state", "update": 0, "data": {"state": "running"}},
        {"type": "metrics", "update": 1, "data": METRICS},
        {"type": "checkpoint", "update": 1, "data": {}},
        {"type": "state", "update": 1, "data": {"state": "succeeded"}},
    ]
    assert watch(events, 1, Console(file=output)) == "succeeded"
    assert output.getvalue() == "update 1/1  reward 0.500  KL 1.250  tokens/s 100\n"


def test_a_terminal_gets_a_bar_with_the_same_numbers() -> None:
    output = io.StringIO()
    events = [{"type": "metrics", "update": 1, "data": METRICS}]
    watch(events, 2, Console(file=output, force_terminal=True, width=100))
    assert "1/2" in output.getvalue()
    assert "reward 0.500" in output.getvalue()


def test_numbers_that_json_has_no_form_for_come_as_text_and_some_may_be_missing() -> None:
    assert summary({"objective/scores": "NaN", "objective/kl": "-Infinity"}) == "reward nan  KL -inf"
