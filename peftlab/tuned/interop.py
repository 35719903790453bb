"""The way out to Hugging Face PEFT, and the way in.

to_peft(tuned, "adapters/mine")               # then peft.PeftModel.from_pretrained(model, ...)
tuned = from_peft(base, "adapters/theirs")    # as trained with PEFT, positions included

`layouts` says where the tensors of each method stand in PEFT's files. A merged model needs neither:
`tuned.merge_and_export` writes a folder that transformers loads alone.
"""

from __future__ import annotations

from pathlib import Path

from peftlab.bases import Base
from peftlab.tuned.layouts import KNOWN, Layout, Unknown
from peftlab.tuned.saving import CONFIG, is_peft, write_peft
from peftlab.tuned.tuned import Tuned

__all__ = ["KNOWN", "Unknown", "from_peft", "to_peft"]


def to_peft(tuned: Tuned, folder: str | Path) -> Path:
    """Write an adapter that `peft.PeftModel.from_pretrained(model, folder)` reads.

    It computes there what it computes here: the same logits but for rounding. A network that makes
    a soft prompt is left behind. QLoRA's factors are LoRA's, for a base that is in four bits there
    too. `peftlab.json` beside PEFT's two files says what was trained; PEFT does not read it.

    Raises ValueError where PEFT does not know the method, or means something else by it.
    """
    tuned._check_attached()
    return write_peft(tuned, Layout.of(tuned), Path(folder))


def from_peft(base: Base, folder: str | Path) -> Tuned:
    """Attach an adapter that PEFT wrote, or `to_peft`, or `tuned.save` where PEFT has a layout.

    A prefix comes with `shift_positions=True`, for PEFT's text begins behind it. Weights are read
    from safetensors alone: a pickle can run code. Raises FileNotFoundError where there is no such
    adapter, and ValueError for one that is damaged, of a kind that is not known here, or of sizes
    that do not fit the base; nothing stays attached then.
    """
    if (Path(folder) / CONFIG).is_file() and not is_peft(Path(folder)):
        raise ValueError(
            f"{CONFIG} in {str(folder)!r} has no peft_type: PEFT did not write it. "
            "peftlab.attach(base, folder) reads peftlab's own layout"
        )
    return Tuned.load(base, folder)
