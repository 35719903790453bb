"""The batch loss compiled by `torch.compile`, for `train(compile=True)`."""

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from peftlab.tuned.tuned import Tuned


class CompiledLoss:
    """`tuned.batch_loss`, compiled once for every length that batches are padded to.

    Its shapes are fixed, so logits are computed for all tokens, with or without a label.
    """

    def __init__(self, tuned: Tuned, accelerator: Accelerator):
        self.tuned, self.accelerator = tuned, accelerator
        mode = "reduce-overhead" if tuned.device.type == "cuda" else None
        self.loss = torch.compile(tuned.batch_loss, mode=mode, dynamic=False)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        for key in ("input_ids", "decoder_input_ids"):
            if key in batch:
                self.tuned.check_ids(batch[key])
        batch = padded(batch, self.tuned.tokenizer.pad_token_id, self.tuned.context)
        torch.compiler.cudagraph_mark_step_begin()  # the last step's loss and gradients are used
        with self.accelerator.autocast():
            try:
                return self.loss(batch)
            except Exception as error:
                if "No working C++ compiler" not in str(error):
                    raise
                what = (
                    "compile=True: torch.compile finds no C++ compiler: install one (on Linux g++)"
                )
                raise ValueError(f"{what}, or train without it") from error


def padded(batch: dict[str, Tensor], pad: int, context: int) -> dict[str, Tensor]:
    """The batch with rows, and T5's targets, as long as the next power of two from 32 on.

    Rows stay within the context. Nothing that is added is read or has a label.
    """
    fills = {"input_ids": pad, "attention_mask": 0, "decoder_input_ids": pad, "labels": -100}
    read = batch.get("decoder_input_ids", batch["input_ids"])
    made = {}
    for key, tensor in batch.items():
        length = tensor.shape[-1]
        more = min(max(32, 1 << (length - 1).bit_length()), max(context, length)) - length
        by_token = key != "labels" or tensor.shape == read.shape  # a head may have other labels
        made[key] = F.pad(tensor, (0, more), value=fills[key]) if by_token else tensor
    return made
