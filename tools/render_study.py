"""Judge and draw a study again from its numbers: python tools/render_study.py docs/studies/scale_up [FOLDER]

The first folder has a summary.json. What follows from its numbers - ranks, intervals, savings, recoveries - is computed
again; summary.json, report.html and figures/ go into the second folder, by default the same, and its README.md gets the
sentences.
"""

import re
import sys
from pathlib import Path

from aquilamoe.ablation.conclusions import conclusions
from aquilamoe.ablation.ranking import judge
from aquilamoe.ablation.study import SUMMARY, Ancestor, Entry, Seed, Study, read, text
from aquilamoe.config.messages import UserError
from aquilamoe.reports import comparison
from aquilamoe.training.metrics import RECOVERED

SENTENCES = re.compile(r"(?<=Written by the command, from the numbers only\.\n\n)(- .*\n)+")


def judged(study: Study) -> Study:
    """The study with everything that follows from its numbers as it is computed now."""
    entries = [_recovered(entry, study.ancestors) for entry in study.entries]
    return study.model_copy(update={"entries": judge(entries, study.baseline)})


def _recovered(entry: Entry, ancestors: dict[str, Ancestor]) -> Entry:
    """An entry whose seeds have recovered at once where growing left them at their source's loss."""
    seeds = {number: _seed(seed, ancestors) for number, seed in entry.seeds.items()}
    return entry.model_copy(update={"seeds": seeds})


def _seed(seed: Seed, ancestors: dict[str, Ancestor]) -> Seed:
    if "recovery_tokens" not in seed.figures or not seed.ancestors or not seed.curve:
        return seed
    if seed.curve[0][2] > ancestors[seed.ancestors[-1]].loss + RECOVERED:
        return seed
    return seed.model_copy(update={"figures": seed.figures | {"recovery_tokens": 0.0, "recovery_flops": 0.0}})


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    folder = Path(sys.argv[-1])
    try:
        study = judged(read(Path(sys.argv[1]) / SUMMARY))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    sentences = "".join(f"- {sentence.text}\n" for sentence in conclusions(study))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).write_text(text(study), encoding="utf-8")
    page = folder / "README.md"
    if page.is_file():
        page.write_text(SENTENCES.sub(lambda _: sentences, page.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{sentences}\n{comparison.write(study, folder)}")


if __name__ == "__main__":
    main()
