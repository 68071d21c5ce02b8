"""Makes the pages of docs/results from the JSON files there: python scripts/report.py [folder].

After a sweep, its runs become one such file and page: python scripts/report.py --compare outputs/sweeps/scenes_mixers.
"""

import argparse
import sys
from pathlib import Path

from linearize.errors import MISTAKE, LinearizeError
from linearize.evaluation.comparison import compare_runs
from linearize.evaluation.report import write_reports
from linearize.files import write_json


def main() -> None:
    """Reads the command line."""
    results = Path(__file__).resolve().parents[1] / "docs" / "results"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=results, help="where the JSON files are")
    parser.add_argument("--compare", type=Path, metavar="SWEEP", help="folder of a sweep; FOLDER gets <its name>.json")
    parser.add_argument("--speed", type=Path, metavar="JSON", help="what scripts/benchmark.py suite=mixers wrote")
    arguments = parser.parse_args()
    try:
        if arguments.compare is not None:
            comparison = compare_runs(arguments.compare, arguments.speed)
            write_json(arguments.folder / f"{arguments.compare.name}.json", comparison)
        for page in write_reports(arguments.folder):
            print(page)
    except LinearizeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(MISTAKE)


if __name__ == "__main__":
    main()
