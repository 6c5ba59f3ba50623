"""Draw a study again from its numbers: python tools/render_study.py docs/studies/scale_up [FOLDER]

The first folder has a summary.json; report.html and figures/ go into the second, by default the same.
"""

import sys
from pathlib import Path

from aquilamoe.config.messages import UserError
from aquilamoe.reports import comparison
from aquilamoe.reports.comparison_findings import findings
from aquilamoe.reports.study import SUMMARY, read


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    try:
        study = read(Path(sys.argv[1]) / SUMMARY)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    for sentence in findings(study):
        print(f"- {sentence.text}")
    print(f"\n{comparison.write(study, Path(sys.argv[-1]))}")


if __name__ == "__main__":
    main()
