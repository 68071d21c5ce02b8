"""Makes the pages of docs/results from the JSON summaries there: python scripts/report.py [folder]."""

import sys
from pathlib import Path

from linearize.errors import LinearizeError
from linearize.evaluation.report import write_reports

if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "docs" / "results"
    try:
        for page in write_reports(folder):
            print(page)
    except LinearizeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
