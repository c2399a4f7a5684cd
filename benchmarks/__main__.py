"""`python -m benchmarks [training|service]`: measures, prints the tables, keeps the raw numbers."""

import argparse

from benchmarks import report, service, training


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("part", nargs="?", choices=["training", "service"], help="only this part")
    part = parser.parse_args().part
    figures = None if part == "training" else service.run()
    rows = [] if part == "service" else training.run()
    if rows:
        print("\nTraining: batch 32, 53 new tokens, 4 epochs, fp32, 2 threads")
        print(report.training_table(rows))
    if figures:
        print("\nService: POST /v1/jobs, one uvicorn process on SQLite")
        print(report.service_table(figures))
    print(f"\nraw numbers: {report.keep(rows, figures)}")


if __name__ == "__main__":
    main()
