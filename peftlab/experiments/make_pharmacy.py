"""Make the questions of the pharmacy task: `python -m peftlab.experiments.make_pharmacy`.

Reads the hand-written `data/tasks/pharmacy/medicines.jsonl`, which is teaching material and not
medical advice, and writes `{train,dev,test}.jsonl` beside it. The same seed gives the same bytes.
`peftlab.tasks.pharmacy` says what the splits share.
"""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

from peftlab.bases.data import data_path
from peftlab.tasks import SPLITS, pharmacy
from peftlab.tasks.pharmacy import Question

NEW_MEDICINES = 20  # in the test alone
WORDINGS_EACH = 4  # of the trained wordings, in which a medicine is trained


def make_pharmacy(rng: random.Random, medicines: list[dict]) -> dict[str, list[Question]]:
    """Three sorts of question on every medicine, in wordings drawn for each.

    The medicines are in drawn order, the same in every split, and all questions on one medicine
    stand together.
    """
    order = rng.sample(medicines, len(medicines))
    trained, new = order[:-NEW_MEDICINES], order[-NEW_MEDICINES:]
    sorts = list(pharmacy.QUESTIONS)
    splits = {split: [] for split in SPLITS}
    for position, medicine in enumerate(trained):
        for sort in sorts:
            drawn = rng.sample(range(pharmacy.TRAINED_WORDINGS), WORDINGS_EACH + 1)
            for wording in drawn[:-1]:
                question = pharmacy.example(medicine, sort, wording, pharmacy.KNOWN)
                splits["train"].append(question)
            wording = rng.choice(pharmacy.DEV_WORDINGS)
            splits["dev"].append(pharmacy.example(medicine, sort, wording, pharmacy.NEW_WORDING))
            wording = rng.choice(pharmacy.TEST_WORDINGS)
            splits["test"].append(pharmacy.example(medicine, sort, wording, pharmacy.NEW_WORDING))
            if sort == sorts[position % len(sorts)]:  # one a medicine, the sorts in turn
                question = pharmacy.example(medicine, sort, drawn[-1], pharmacy.KNOWN)
                splits["test"].append(question)
    for medicine in new:
        for sort in sorts:
            known, unused = rng.randrange(pharmacy.TRAINED_WORDINGS), pharmacy.TEST_WORDINGS
            splits["test"] += [
                pharmacy.example(medicine, sort, known, pharmacy.NEW_MEDICINE),
                pharmacy.example(medicine, sort, rng.choice(unused), pharmacy.NEW_BOTH),
            ]
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=data_path(), help="the data folder to write to")
    options = parser.parse_args()

    rng = random.Random(f"pharmacy {options.seed}")
    folder = options.out / "tasks" / "pharmacy"
    folder.mkdir(parents=True, exist_ok=True)
    for split, questions in make_pharmacy(rng, pharmacy.medicines()).items():
        text = "".join(json.dumps(asdict(question)) + "\n" for question in questions)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / f'{split}.jsonl'}: {len(questions):,} questions")


if __name__ == "__main__":
    main()
