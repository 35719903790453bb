"""Adapters to Hugging Face PEFT, and from it.

to_peft(tuned, "adapters/mine")               # then peft.PeftModel.from_pretrained(model, ...)
tuned = from_peft(base, "adapters/theirs")    # as trained with PEFT, positions included

`layouts` gives the places of each method's tensors in PEFT's files. A merged model needs no PEFT:
`tuned.merge_and_export` writes a folder that transformers loads alone.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from peftlab.bases import Base
from peftlab.bases.files import read_json
from peftlab.tuned.layouts import KNOWN, Layout, Unknown
from peftlab.tuned.saving import CONFIG, write_peft
from peftlab.tuned.tuned import Tuned

__all__ = ["KNOWN", "Unknown", "from_peft", "to_peft"]


def to_peft(tuned: Tuned, folder: str | Path) -> Path:
    """Write an adapter that `peft.PeftModel.from_pretrained(model, folder)` reads.

    In PEFT it computes the same logits, up to rounding. A network that makes a soft prompt is not
    written. QLoRA's factors are written as LoRA's, for a base that PEFT also holds in four bits.
    `peftlab.json` beside PEFT's two files records what was trained; PEFT does not read it.

    Raises ValueError if PEFT does not have the method, or has a different one of that name.
    """
    tuned._check_attached()
    return write_peft(tuned, Layout.of(tuned), Path(folder))


def from_peft(base: Base, folder: str | Path) -> Tuned:
    """Attach an adapter that PEFT or `to_peft` wrote, or `tuned.save` if PEFT has a layout.

    A prefix gets `shift_positions=True`, because PEFT's text begins after it. Weights are read only
    from safetensors: a pickle can run code. Raises FileNotFoundError if there is no such adapter,
    and ValueError if it is damaged, of an unknown kind, or of sizes that do not fit the base; after
    an error nothing stays attached.
    """
    config = Path(folder, CONFIG)
    described: dict = {"peft_type": ""}
    with suppress(OSError, ValueError):  # what is wrong with the file is said when it is read
        described = read_json(config)
    if not {"peft_type", "config"} & described.keys():  # AdapterHub's has a "config"
        raise ValueError(
            f"{CONFIG} in {str(folder)!r} has no peft_type: PEFT did not write it. "
            "peftlab.attach(base, folder) reads peftlab's own layout"
        )
    return Tuned.load(base, folder)
