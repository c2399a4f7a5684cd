"""The peer's own virtual environment: TRL 1.12 from PyPI, on the versions this project is pinned to."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = ROOT / ".venv-trl"
# TRL asks for transformers >= 4.56.2 only; its PPOTrainer was seen to run on the versions pinned here.
# DeepSpeed is there because it is here too: accelerate imports it where it is installed, which costs memory.
REQUIREMENTS = (
    "trl==1.12.0",
    "peft",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "deepspeed",
    "setuptools",
)


def python() -> Path:
    """The interpreter of the environment, which is made on the first call and kept."""
    interpreter = DIRECTORY / "bin" / "python"
    if not _complete(interpreter):
        print(f"making {DIRECTORY.name} with {REQUIREMENTS[0]} (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", DIRECTORY], check=True)
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(interpreter)]
        install = [*uv, "--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*install, *REQUIREMENTS], env=environment(), check=True)
    return interpreter


def environment() -> dict[str, str]:
    """uv does not read pip's setting of a directory with wheels; DeepSpeed is built without its operators."""
    wheels = os.environ.get("PIP_FIND_LINKS", "")
    return {**os.environ, "DS_BUILD_OPS": "0", **({"UV_FIND_LINKS": wheels} if wheels else {})}


def _complete(interpreter: Path) -> bool:
    """Whether an earlier run finished the installation."""
    if not interpreter.exists():
        return False
    probe = "import importlib.metadata as m; raise SystemExit(m.version('trl') != '1.12.0')"
    return subprocess.run([interpreter, "-c", probe], capture_output=True).returncode == 0
