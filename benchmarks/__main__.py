"""`python -m benchmarks [training|service|grid]`: measures, prints the tables, keeps the raw numbers."""

import argparse

from benchmarks import report, service, training
from benchmarks.cells import GRID, GROWTH, STANDARD
from benchmarks.training import Row

BUDGET_SECONDS = {"growth": 240.0, "training": 1500.0, "grid": 4 * 3600.0}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("part", nargs="?", choices=["training", "service", "grid"], help="only this part")
    part = parser.parse_args().part
    figures = service.run() if part in (None, "service") else None
    rows: list[Row] = []
    growth: list[Row] = []
    if part != "service":
        growth = training.run(GROWTH, BUDGET_SECONDS["growth"])
        cells, budget = (GRID, "grid") if part == "grid" else (STANDARD, "training")
        rows = training.run(cells, BUDGET_SECONDS[budget])
        print(
            "\nTraining: 4 epochs, fp32, 2 threads, at most 53 new tokens, batch 32 unless the cell says more"
        )
        print(report.training_table(rows))
        print("\nSeconds of each phase")
        print(report.phases_table(rows))
        print("\nGrowth of the cost (0.4M, LoRA, one base)")
        print(report.growth_table(growth))
    if figures:
        print("\nService: POST /v1/jobs, one uvicorn process on SQLite")
        print(report.service_table(figures))
    print(f"\nraw numbers: {report.keep(rows, growth, figures)}")


if __name__ == "__main__":
    main()
