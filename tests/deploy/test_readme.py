"""What the README and the documents say: the walk-through runs as it stands; names and links exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks import service, workload
from tests.deploy.places import ROOT

DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md") for path in ROOT.glob(pattern)
)


def walkthrough() -> str:
    """The README's shell blocks between its two marks."""
    readme = (ROOT / "README.md").read_text()
    part = readme.partition("<!-- walkthrough")[2].partition("<!-- end of walkthrough -->")[0]
    return "\n".join(re.findall(r"```bash\n(.*?)```", part, re.DOTALL))


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The directory the walk-through was run in, the model it trained, and what it printed."""
    home = tmp_path_factory.mktemp("walkthrough")
    workload.make(workload.SMALL, home / "models" / "tiny")
    model = home / "models" / "tiny" / "policy"
    with (
        service.api(home / "data", home / "models") as (url, key, environment),
        service.started([sys.executable, "-m", "worker"], environment, home / "worker.log"),
    ):
        given = {
            "PROXIMA_URL": url,
            "PROXIMA_KEY": key,
            "MODEL": json.dumps({"type": "local", "path": str(model)}),
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", walkthrough()],
            cwd=home,
            env={**os.environ, **given},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return home, model, done.stdout


def test_walkthrough_shows_the_plan_every_update_and_the_metrics(walked: tuple[Path, Path, str]) -> None:
    _, _, printed = walked
    assert '"num_total_batches":4' in printed
    assert re.findall(r'"key":"metrics:(\d+)"', printed) == ["1", "2", "3", "4"]
    assert '"state":"succeeded"' in printed
    assert re.search(r"^update,objective/scores,objective/kl\s*$", printed, re.MULTILINE)


def test_walkthrough_ends_with_an_adapter_that_peft_loads(walked: tuple[Path, Path, str]) -> None:
    home, model, _ = walked
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), home / "adapter")
    weights = [parameter for name, parameter in policy.named_parameters() if "lora_B" in name]
    assert weights
    assert any(parameter.abs().max() > 0 for parameter in weights)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|\$ )make ([a-z]+)", document.read_text())) <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_named_exist(document: Path) -> None:
    sources = ["service/settings.py", "worker/settings.py", ".env.example"]
    sources += ["tests/servers.py", "tests/e2e/test_stories.py"]
    known = "\n".join((ROOT / path).read_text() for path in sources)
    variables = set(re.findall(r"`PROXIMA_(?!SECRET_)(\w+)`", document.read_text()))  # operators name those
    forms = {name: (f"{name.lower()}:", f"PROXIMA_{name}=", f'"PROXIMA_{name}"') for name in variables}
    assert [name for name in variables if not any(form in known for form in forms[name])] == []
