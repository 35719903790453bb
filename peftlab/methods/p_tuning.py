"""P-tuning (v1): a small network makes a prompt, and a template places it."""

from dataclasses import dataclass, replace
from itertools import pairwise

from peftlab.methods import soft
from peftlab.methods.checks import check_context, check_init, checked_placement, require
from peftlab.methods.method import Method
from peftlab.methods.prompt_networks import Flat, PromptEncoder, mlp_widths, seeded
from peftlab.methods.prompt_starts import PROMPT_INITS, initial_prompt
from peftlab.sites import InputEmbeddings

ENCODERS = ("lstm", "mlp", "attention", "embedding")
SIZES = ("lama", "few-shot", "peft")


@dataclass(frozen=True)
class PTuning(Method):
    """P-tuning, the first version.

        P = g(Z)      Z (num_virtual_tokens, d_model) and g train, all else is frozen

    Trained: the table Z and the network g. Stored: only P, num_virtual_tokens · d_model numbers;
    g runs one last time and is thrown away. Only the input layer changes.

    `encoder` is g: "lstm" (two directions, then an MLP), "mlp", "attention" (a variant that some
    sources describe, but neither the paper nor its code has), or "embedding" for no network, the
    form that remains after training. `sizes` follows the paper's code for LAMA (LSTM of d_model / 2
    in each direction, MLP d → d → d), that for few-shot SuperGLUE (LSTM of d_model in each
    direction, MLP 2 d → d → d) or PEFT's (h = `encoder_hidden_size`, by default d_model; MLP
    2 h → 2 h → d after the LSTM, d → h → h → d alone).

    `placement` lists the blocks of virtual tokens in the template as (count, place) pairs: place
    is "front", "back" (not on decoders), or "before X" or "after X" for the first token X. The
    paper's (3, 3, 3) around a cloze is [(3, "front"), (3, "before [MASK]"), (3, "after [MASK]")].

    Liu et al. 2021, arXiv:2103.10385, section 3; numbers from the authors' code.
    """

    num_virtual_tokens: int = 9
    encoder: str = "lstm"
    sizes: str = "lama"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    placement: tuple[tuple[int, str], ...] | list | None = None
    init: str = "vocabulary"
    init_text: str | None = None

    name = "p_tuning"
    title = "P-tuning"
    limits = {"num_virtual_tokens": (1,), "encoder_num_layers": (1,)}
    choices = {"encoder": ENCODERS, "sizes": SIZES}

    def __post_init__(self):
        super().__post_init__()
        if self.encoder_hidden_size is not None:
            require("encoder_hidden_size", self.encoder_hidden_size, 1)
            if self.sizes != "peft":
                raise ValueError('encoder_hidden_size is an option of sizes="peft"')
        if self.sizes == "peft" and self.encoder == "attention":
            raise ValueError('sizes="peft" has no attention encoder: use lstm or mlp')
        check_init(self.init, self.init_text, PROMPT_INITS)
        placement = checked_placement(self.placement, self.num_virtual_tokens)
        object.__setattr__(self, "placement", placement)

    @property
    def learning_rate(self) -> float:
        """The learning rate; smaller with a network, which magnifies its own steps."""
        return 0.1 if self.encoder == "embedding" else 1e-2

    def hidden(self, d_model: int) -> int:
        """The hidden width of the encoder."""
        if self.encoder == "lstm" and self.sizes == "lama" and d_model % 2:
            raise ValueError(f'd_model={d_model} is odd: sizes="lama" halves it')
        if self.sizes == "peft":
            return self.encoder_hidden_size or d_model
        return d_model // 2 if self.sizes == "lama" else d_model

    def reach(self, base, attachment, generator):
        check_context(self.num_virtual_tokens, base.anatomy.shape)
        count, d = self.num_virtual_tokens, base.anatomy.shape.d_model
        table = initial_prompt(base, self.init, self.init_text, count, generator)
        if self.encoder == "embedding":
            module = Flat({"prompt": table})
        else:
            with seeded(generator):
                sizes = (self.hidden(d), self.encoder_num_layers)
                module = PromptEncoder(table, self.encoder, self.sizes, *sizes)
        read, places = soft.put(attachment, module), soft.blocks(base, self.placement, count)
        attachment.enter(InputEmbeddings(base.anatomy, read, places))
        attachment.virtual_tokens = count

    def parameters(self, shape):
        check_context(self.num_virtual_tokens, shape)
        d = shape.d_model
        total = self.num_virtual_tokens * d
        if self.encoder == "embedding":
            return total
        h = self.hidden(d)
        if self.encoder == "lstm":
            wide = [d] + [2 * h] * (self.encoder_num_layers - 1)
            total += sum(2 * (4 * h * (w + h) + 8 * h) for w in wide)
        if self.encoder == "attention":
            total += 4 * d * d + 4 * d
        widths = mlp_widths(self.encoder, self.sizes, h, d)
        return total + sum((w_in + 1) * w_out for w_in, w_out in pairwise(widths))

    def folded(self) -> Method:
        """The prompt that the network makes."""
        return self if self.encoder == "embedding" else replace(self, encoder="embedding")
