"""`python -m benchmarks.learning.one --task … --variant … --seed … --curve …`: one run in a process."""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.learning import walks
from benchmarks.learning.curve import Curve


def train(options: argparse.Namespace, output: Path) -> Curve:
    if options.task == "walks":
        return walks.run(options.library, options.variant, options.seed, options.model, output)
    # These two import this trainer, which the peer's environment lacks.
    if options.task == "digits":
        from benchmarks.learning import digits  # noqa: PLC0415

        return digits.run(options.variant, options.seed, output)
    from benchmarks.learning import stories  # noqa: PLC0415

    return stories.run(options.variant, options.seed, options.model, output)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=["walks", "digits", "stories"], required=True)
    parser.add_argument("--library", choices=["proxima", "trl"], default="proxima")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--model", type=Path, help="what training starts from")
    parser.add_argument("--curve", type=Path, required=True, help="where the result goes")
    options = parser.parse_args()
    # One thread each: as many runs as cores take turns with nobody.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as output:
        train(options, Path(output)).save(options.curve)


if __name__ == "__main__":
    main()
