"""An adapted base as one torch module, for the training loops of other libraries."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput as Output

from peftlab.bases import LanguageModel
from peftlab.tuned.loops import ASKED, Steps, callback, follow


class TunedModule(nn.Module):
    """See `Tuned.as_module`. Configs are copies: what a loop writes there never reaches the base.

    Raises ValueError if nothing can train now, and RuntimeError after detach().
    """

    accepts_loss_kwargs = True  # Trainer counts the labels of all batches of a step

    def __init__(self, tuned: LanguageModel):
        super().__init__()
        tuned._check_attached()
        if tuned.merged:
            raise ValueError("the deltas are merged: call unmerge() before training")
        if not tuned.trainable:
            raise ValueError(f"{tuned.label} has no parameter to train: attach LoRA beside it")
        if tuned.using is not None:
            raise ValueError("kept adapters are in use: call use(None) before training")
        self.tuned, self.config = tuned, copy.deepcopy(tuned.model.config)
        self.generation_config = copy.deepcopy(getattr(tuned.model, "generation_config", None))
        self.model, self.head, self.steps = tuned.model, tuned.linear, Steps(tuned)
        self.methods = nn.ModuleList(tuned.modules.values())
        self.training = tuned.model.training
        self.register_load_state_dict_post_hook(_forgive)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """DDP sends what it does not ignore from one process to all: here what trains, and no more.

        The base is in every process already, and a weight held as codes has no place to write to.
        """
        trains = set(map(id, self.tuned.trainable.values()))
        tensors = (*self.named_parameters(), *self.named_buffers())
        return [name for name, tensor in tensors if id(tensor) not in trains]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        use_cache: bool = False,  # some loops say it; no cache is made
        num_items_in_batch: Tensor | int | None = None,
        with_logits: bool = True,
    ) -> Output:
        """The mean loss of the labels that are not −100, in nats, and the logits.

        Without logits less is computed: see `batch_loss`.

        Labels stand at the tokens of `input_ids`, or of T5's decoder, whose input is made of them
        if it is not given. If a step has several batches or devices, `num_items_in_batch` is the
        number of labels in all of them (see `labels_in`): the loss is then the sum of this batch
        over that number, and the sum of all losses the mean over all labels. Raises ValueError for
        a second segment in `token_type_ids`.
        """
        if token_type_ids is not None and token_type_ids.any():
            raise ValueError("token_type_ids: one segment is supported, so all must be 0")
        if self.training and torch.is_grad_enabled():
            self.steps.check()
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.config.is_encoder_decoder:
            if decoder_input_ids is None and labels is not None:
                decoder_input_ids = self.model.prepare_decoder_input_ids_from_labels(labels)
            batch["decoder_input_ids"] = decoder_input_ids
        logits = self.tuned(**batch) if with_logits else None
        if with_logits:
            loss = None if labels is None else self.tuned.label_loss(logits, labels)
        else:
            loss = self.tuned.batch_loss(batch | {"labels": labels})
        if loss is not None and num_items_in_batch is not None:
            here = self.labels_in(labels)  # a batch without a label has no mean
            loss = torch.where(here > 0, loss * here / num_items_in_batch, 0.0)
        return Output(loss=loss, logits=logits)

    def labels_in(self, labels: Tensor) -> Tensor:
        """How many of these labels count in the loss: a decoder predicts none for a row's first."""
        return (self.tuned._align(labels, labels)[1] != -100).sum()

    def after_step(self, step: int, steps: int) -> None:
        """Tell the methods that step 1 … `steps` is done, before the gradients are cleared."""
        self.steps.tell(step, steps)

    def state_dict(self, *_, destination=None, prefix: str = "", keep_vars: bool = False) -> dict:
        """The adapter's tensors alone: those that train, and those that are stored beside them."""
        destination = {} if destination is None else destination
        for name, tensor in (self.tuned.trainable | self.tuned.frozen).items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()
        return destination

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """Copy the adapter's tensors. ValueError unless all are there, whatever `strict` is."""
        self.tuned.load_state(dict(state_dict))
        return nn.modules.module._IncompatibleKeys([], [])

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *_) -> None:
        """The same where another module, such as DDP, holds this one and loads its state."""
        self._loaded = prefix
        self.tuned.load_state({k.removeprefix(prefix): tensor for k, tensor in state_dict.items()})

    def _apply(self, fn, recurse: bool = True) -> TunedModule:
        """Move or cast all modules; what the sites keep beside them follows."""
        super()._apply(fn, recurse)
        follow(self.tuned)
        return self

    def _get_name(self) -> str:
        """The model's class, by which Trainer decides whether labels are shifted."""
        return type(self.model).__name__

    device = property(lambda self: self.tuned.device)
    callback = property(lambda self: callback(self.steps), doc="For Trainer's `callbacks`.")

    def __getattr__(self, name: str):
        return getattr(self.model, name) if name in ASKED else super().__getattr__(name)


def _forgive(module: TunedModule, keys) -> None:
    """Names of the base are not missing: the state does not have them."""
    here = module._loaded
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.startswith(here)]
