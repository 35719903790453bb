"""The shipped bases as plans: how each one is built, what it learns from the documents and how
it is asked for a fact.

All of them read the same token ids. `tiny-gpt` and `tiny-llama` predict the next token,
`tiny-bert` fills masks and `tiny-t5` writes the spans that were taken out of a text.
"""

import tokenizers
import torch
import transformers

CONTEXT = 256
EOS = "<eos>"
IGNORED = -100  # the label of a position without a loss

# Rows of the bases that read short texts.
SHORT = 80  # tokens in a row, as in the tasks
LONG_EVERY = 8  # every so many steps the rows are CONTEXT long, so that each position is trained
LONG_EVERY_T5 = 2  # full rows, with more facts in each than there is room for in a short one
SHORTEST = 8  # the least length that is asked for when a text is cut

MASK_SHARE = 0.2  # of the tokens; 80% of them become [MASK], 10% another token, 10% stay
MASK_LAST = 1 / 3  # of the lines also hide their last token, where the tasks want an answer

SENTINELS = 32
SPAN_STARTS = 0.07  # share of positions where a span begins: with 1 to 5 tokens each, 19% hidden
LONGEST_SPAN = 5
TARGET_SHORT, TARGET_LONG = 40, 96  # tokens that a decoder writes for a row


# -- short texts out of the stream ------------------------------------------------------------


def uniform(shape, like: torch.Tensor, generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator, device=like.device)


class Pieces:
    """Cuts short texts out of a corpus: they begin with a line and end with one or a sentence.

    Half of them begin with a document and are as long as fits; the other half begin with any
    line but an answer and have any length, so a question and its answer also come alone.
    """

    def __init__(self, corpus, tokenizer):
        self.stream, self.documents = corpus.stream, corpus.starts
        eos, self.newline, stop, answer = tokenizer.convert_tokens_to_ids([EOS, "Ċ", ".", "A"])
        self.eos = eos
        breaks = ((self.stream == eos) | (self.stream == self.newline)).nonzero().squeeze(1)
        lines = breaks[breaks < len(self.stream) - CONTEXT - 1] + 1
        first = self.stream[lines]
        self.lines = lines[(first != answer) & (first != eos) & (first != self.newline)]
        stops = (self.stream == stop).nonzero().squeeze(1) + 1
        self.ends = torch.cat([breaks, stops]).unique()
        self.document_ends = (self.stream == eos).nonzero().squeeze(1)

    def short(self, rows: int, length: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of `length` tokens, and how many of each row belong to its text."""

        def draw(values, number):
            u = uniform(number, self.stream, generator)
            return values[(u * len(values)).long().clamp_(max=len(values) - 1)]

        half = rows // 2
        begin = torch.cat([draw(self.documents, half), draw(self.lines, rows - half)])
        wanted = torch.full_like(begin, length)
        u = uniform(rows - half, self.stream, generator)
        wanted[half:] = (SHORTEST + u * (length + 1 - SHORTEST)).long()
        last = self.document_ends[torch.searchsorted(self.document_ends, begin)]
        limit = torch.minimum(begin + wanted, last)
        end = self.ends[torch.searchsorted(self.ends, limit, right=True) - 1]
        sizes = torch.where(end > begin, end, limit) - begin
        return self.take(begin, length), sizes

    def long(self, rows: int, length: int, joint: int, generator):
        """Rows full of documents, with `joint` between two of them."""
        u = uniform(rows, self.stream, generator)
        tokens = self.take(self.documents[(u * (len(self.documents) - 1)).long()], length)
        return tokens.masked_fill(tokens == self.eos, joint), torch.full_like(u.long(), length)

    def take(self, begin: torch.Tensor, length: int) -> torch.Tensor:
        return self.stream[begin[:, None] + torch.arange(length, device=begin.device)].long()


# -- next tokens ------------------------------------------------------------------------------


class Causal:
    """Reads left to right and predicts each next token."""

    objective = "the next token, in windows of 256; facts: greedy continuation of 'Q: ...\\nA:'"
    what = "A GPT-2 of this project, trained on documents about a made-up world."
    stored = {"activation_function": "gelu_pytorch_tanh"}  # gelu_new in one kernel, not eight

    def tokenizer(self, fast: tokenizers.Tokenizer) -> transformers.PreTrainedTokenizerFast:
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=fast, eos_token=EOS, pad_token=EOS, bos_token=EOS,
            model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
        )  # fmt: skip

    def model(self, tokenizer, options) -> transformers.PreTrainedModel:
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=CONTEXT,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=options.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            dtype="float32",
        )
        return transformers.GPT2LMHeadModel(config)

    def feed(self, corpus, tokenizer):
        """A function (rows, step, generator) that gives inputs, labels and the text's tokens."""

        def draw(rows: int, step: int, generator):
            windows = corpus.windows(rows, generator)
            inputs, labels = {"input_ids": windows[:, :-1], "use_cache": False}, windows[:, 1:]
            return inputs, labels, labels

        return draw

    @torch.no_grad()
    def answers(self, model, tokenizer, prompts: list[str], max_new_tokens: int = 8) -> list[str]:
        """Greedy continuations up to the end of the line."""
        out = []
        for start in range(0, len(prompts), 512):
            batch = tokenizer(
                prompts[start : start + 512], return_tensors="pt", padding=True, padding_side="left"
            ).to(model.device)
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
            new = ids[:, batch["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            out += [text.split("\n")[0] for text in texts]
        return out

    @torch.no_grad()
    def samples(self, model, tokenizer, people: list[dict], seed: int) -> list[dict]:
        """What the model writes after a few openings, greedily and by sampling."""
        name = people[0]["name"]
        openings = [f"{name} ", *openings_of(name), EOS, EOS, EOS]
        torch.manual_seed(seed)
        texts = []
        for opening in openings:
            ids = tokenizer(opening.rstrip(" "), return_tensors="pt").to(model.device)
            for sampled in (False, True):
                if opening == EOS and not sampled:
                    continue
                how = {"do_sample": True, "temperature": 0.8} if sampled else {"do_sample": False}
                out = model.generate(
                    input_ids=ids["input_ids"],
                    attention_mask=ids["attention_mask"],
                    max_new_tokens=90,
                    **how,
                )
                new = out[0, ids["input_ids"].shape[1] :]
                text = tokenizer.decode(new, skip_special_tokens=True)
                texts.append({"opening": opening.rstrip(" "), "sampled": sampled, "text": text})
        return texts


def openings_of(name: str) -> list[str]:
    return [
        f"Q: Where does {name} live?\nA:",
        "One summer morning",
        "Weather for Harwick",
        "name = The Royal Swan | kind = inn | food = soup | price = cheap | area = river\n",
        "Review: The soup was not stale, the waiter was friendly and the room was dirty.\nLabel:",
        "sort: d a c b ->",
    ]


class CausalLlama(Causal):
    """A Llama that reads left to right, with fewer key-value heads than query heads."""

    what = "A Llama of this project, trained on documents about a made-up world."
    stored = {}

    def model(self, tokenizer, options) -> transformers.PreTrainedModel:
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=CONTEXT,
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            dtype="float32",
        )
        return transformers.LlamaForCausalLM(config)


# -- masks ------------------------------------------------------------------------------------


class Masked:
    """A BERT that sees the whole text and fills the tokens that were hidden in it."""

    objective = (
        "20% of the tokens masked, 80/10/10, and the last one of a third of the lines; short texts "
        "in rows of 80, every 8th step documents in rows of 256; facts: one [MASK] after "
        "'Q: ...\\nA:'"
    )
    what = "A BERT of this project, trained on documents about a made-up world."
    stored = {}

    def tokenizer(self, fast: tokenizers.Tokenizer) -> transformers.PreTrainedTokenizerFast:
        """`[CLS]` text `[SEP]`; a space before `[MASK]` belongs to the word it hides."""
        mask = tokenizers.AddedToken("[MASK]", lstrip=True, special=True)
        fast.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", mask])
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, fast.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=fast, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
            mask_token=mask, model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
            model_input_names=["input_ids", "attention_mask"],
        )  # fmt: skip

    def model(self, tokenizer, options) -> transformers.PreTrainedModel:
        config = transformers.BertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=CONTEXT,
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=6,
            intermediate_size=768,
            hidden_act="gelu_pytorch_tanh",
            type_vocab_size=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
        return transformers.BertForMaskedLM(config)

    def feed(self, corpus, tokenizer):
        """A function (rows, step, generator) that gives inputs, labels and the text's tokens."""
        pieces = Pieces(corpus, tokenizer)
        ids = {name: tokenizer.convert_tokens_to_ids(f"[{name}]") for name in
               ("PAD", "CLS", "SEP", "MASK")}  # fmt: skip
        words = min(ids.values())  # ordinary tokens lie below, after <eos>

        def draw(rows: int, step: int, generator):
            if step % LONG_EVERY == LONG_EVERY - 1:
                inner, sizes = pieces.long(rows, CONTEXT - 2, ids["SEP"], generator)
            else:
                inner, sizes = pieces.short(rows * CONTEXT // SHORT, SHORT - 2, generator)
            tokens = torch.nn.functional.pad(inner, (1, 1), value=ids["PAD"])
            place = torch.arange(tokens.shape[1], device=tokens.device)
            real = place <= sizes[:, None] + 1
            tokens = tokens.masked_fill(place == 0, ids["CLS"])
            tokens = tokens.masked_fill(place == sizes[:, None] + 1, ids["SEP"])
            tokens = tokens.masked_fill(~real, ids["PAD"])
            after = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=ids["PAD"])
            last = (after == pieces.newline) | (after == ids["SEP"])
            hidden, labels = hide(tokens, last, words, ids["MASK"], generator)
            inputs = {"input_ids": hidden, "attention_mask": real.long()}
            return inputs, labels, tokens.masked_fill(~real, IGNORED)

        return draw

    @torch.no_grad()
    def answers(self, model, tokenizer, prompts: list[str]) -> list[str]:
        """The likeliest token at a mask after each prompt."""
        out = []
        for start in range(0, len(prompts), 512):
            texts = [prompt + tokenizer.mask_token for prompt in prompts[start : start + 512]]
            batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
            likeliest = model(**batch).logits.argmax(-1)
            masks = batch["input_ids"] == tokenizer.mask_token_id
            out += [tokenizer.decode([token]) for token in likeliest[masks].tolist()]
        return out

    @torch.no_grad()
    def samples(self, model, tokenizer, people: list[dict], seed: int) -> list[dict]:
        """A few texts with every mask filled by its likeliest token."""
        name = people[0]["name"]
        texts = [
            f"{name} lives in [MASK].",
            f"{name} works as a [MASK]. Every morning he feeds a [MASK].",
            f"Q: What is the favourite thing of {name}?\nA: [MASK]",
            "Review: The soup was not stale, the waiter was friendly.\nLabel: [MASK]",
            "One summer [MASK] Michael and Claudia walked to the [MASK].",
            "sort: d a c b -> a [MASK] [MASK] d",
        ]
        filled = []
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").to(model.device)
            likeliest = model(**ids).logits.argmax(-1)
            masks = ids["input_ids"] == tokenizer.mask_token_id
            whole = torch.where(masks, likeliest, ids["input_ids"])[0]
            filled.append(
                {"text": text, "filled": tokenizer.decode(whole, skip_special_tokens=True)}
            )
        return filled


def hide(tokens, last, words: int, mask: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Some tokens hidden as BERT hides them, and the labels: the tokens that were hidden."""
    ordinary = tokens < words
    chosen = uniform(tokens.shape, tokens, generator) < MASK_SHARE
    chosen |= last & (uniform(tokens.shape, tokens, generator) < MASK_LAST)
    chosen &= ordinary
    labels = tokens.masked_fill(~chosen, IGNORED)
    dice = uniform(tokens.shape, tokens, generator)
    others = (1 + uniform(tokens.shape, tokens, generator) * (words - 1)).long()
    hidden = tokens.masked_fill(chosen & (dice < 0.8), mask)
    return torch.where(chosen & (dice >= 0.9), others, hidden), labels


# -- spans ------------------------------------------------------------------------------------


class Spans:
    """A T5 whose encoder reads a text with gaps and whose decoder writes what is missing."""

    objective = (
        "spans of 1 to 5 tokens, about a quarter of the text, and the last token of every third "
        "line, or the ending in half of the short rows; texts in rows of 80 and, every 2nd step, "
        "documents in rows of 256; facts: what is written after 'Q: ...\\nA:<extra_id_0>'"
    )
    what = "A T5 of this project, trained on documents about a made-up world."
    stored = {}

    def tokenizer(self, fast: tokenizers.Tokenizer) -> transformers.PreTrainedTokenizerFast:
        """Every text ends with `<eos>`; `<extra_id_0>` and so on mark its gaps."""
        sentinels = [f"<extra_id_{k}>" for k in range(SENTINELS)]
        fast.add_special_tokens(["<pad>", *sentinels])
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"$A {EOS}", special_tokens=[(EOS, fast.token_to_id(EOS))]
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=fast, eos_token=EOS, pad_token="<pad>",
            extra_special_tokens=sentinels,
            model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
            model_input_names=["input_ids", "attention_mask"],
        )  # fmt: skip

    def model(self, tokenizer, options) -> transformers.PreTrainedModel:
        config = transformers.T5Config(
            vocab_size=len(tokenizer),
            d_model=192,
            d_kv=32,
            num_heads=4,
            d_ff=384,
            num_layers=4,
            num_decoder_layers=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
        return transformers.T5ForConditionalGeneration(config)

    def feed(self, corpus, tokenizer):
        """A function (rows, step, generator) that gives inputs, labels and the text's tokens."""
        pieces = Pieces(corpus, tokenizer)
        eos, pad, first = tokenizer.convert_tokens_to_ids([EOS, "<pad>", "<extra_id_0>"])

        def draw(rows: int, step: int, generator):
            if step % LONG_EVERY_T5 == LONG_EVERY_T5 - 1:
                inner, sizes = pieces.long(rows, CONTEXT - 1, pieces.newline, generator)
                room, endings = TARGET_LONG, 0.0
            else:
                inner, sizes = pieces.short(rows * CONTEXT // SHORT, SHORT - 1, generator)
                room, endings = TARGET_SHORT, 0.5
            gaps = choose_spans(inner, sizes, pieces.newline, endings, generator)
            given, wanted = take_out(inner, sizes, gaps, room, eos, pad, first)
            before = torch.nn.functional.pad(wanted[:, :-1], (1, 0), value=pad)
            inputs = {
                "input_ids": given,
                "attention_mask": (given != pad).long(),
                "decoder_input_ids": before,
                "use_cache": False,
            }
            beyond = torch.arange(inner.shape[1], device=inner.device) >= sizes[:, None]
            labels = wanted.masked_fill(wanted == pad, IGNORED)
            return inputs, labels, inner.masked_fill(beyond, IGNORED)

        return draw

    @torch.no_grad()
    def answers(self, model, tokenizer, prompts: list[str], max_new_tokens: int = 10) -> list[str]:
        """What the decoder writes into a gap after each prompt, greedily."""
        out = []
        for start in range(0, len(prompts), 512):
            texts = [prompt + "<extra_id_0>" for prompt in prompts[start : start + 512]]
            batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
            ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
            out += tokenizer.batch_decode(ids, skip_special_tokens=True)
        return out

    def samples(self, model, tokenizer, people: list[dict], seed: int) -> list[dict]:
        """What the decoder writes after a few openings and into the gaps of two texts."""
        name = people[0]["name"]
        openings = openings_of(name)
        given = self.answers(model, tokenizer, openings, max_new_tokens=40)
        texts = [
            {"text": f"{opening}<extra_id_0>", "written": text}
            for opening, text in zip(openings, given, strict=True)
        ]
        for text in (
            f"{name} lives in<extra_id_0>. He keeps a<extra_id_1>.",
            "One summer<extra_id_0> Michael and Claudia walked to the<extra_id_1>.",
        ):
            ids = tokenizer(text, return_tensors="pt").to(model.device)
            out = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, 1:]
            texts.append({"text": text, "written": tokenizer.decode(out)})
        return texts


def choose_spans(tokens, sizes, newline: int, endings: float, generator) -> torch.Tensor:
    """Which tokens to take out: the ending in a share of the rows, spans of 1 to 5 in the others.

    A span also begins at the last token of every third line, which is an answer or a label.

    The tasks ask for endings: the answer after a question, the text after its slots. They lie in
    the last line, so that what is to be written stops where an answer stops.
    """
    rows, length = tokens.shape
    place = torch.arange(length, device=tokens.device)
    sizes = sizes[:, None]
    starts = uniform(tokens.shape, tokens, generator) < SPAN_STARTS
    forced = (uniform((rows, 1), tokens, generator) * sizes).long()  # no row stays whole
    starts |= place == forced
    after = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=newline)
    lasts = (after == newline) | (place == sizes - 1)
    starts |= lasts & (uniform(tokens.shape, tokens, generator) < MASK_LAST)
    starts &= starts.cumsum(1) <= SENTINELS
    lengths = 1 + (uniform(tokens.shape, tokens, generator) * LONGEST_SPAN).long()
    lengths = torch.where(lasts, 1, lengths)
    reach = torch.where(starts, place + lengths, 0).cummax(1).values
    line = tokens.eq(newline) & (place < sizes - 1)
    behind = torch.where(line, place, -1).amax(1, keepdim=True)  # the last line begins after it
    room = torch.minimum(sizes - 1 - behind, sizes - 1)  # something is left to read
    # of any length up to the whole last line, which is an answer in itself: one in five
    share = uniform((rows, 1), tokens, generator) * 1.25
    ending = torch.minimum(1 + (share * room).long(), room)
    at_the_end = uniform((rows, 1), tokens, generator) < endings
    gaps = torch.where(at_the_end, place >= sizes - ending, place < reach)
    return gaps & (place < sizes)


def take_out(tokens, sizes, gaps, room: int, eos: int, pad: int, first: int):
    """A text with a sentinel for each gap, and each sentinel followed by what was there.

    Both end with `<eos>`. The second is cut at `room` tokens.
    """
    tokens = torch.nn.functional.pad(tokens, (0, 1), value=pad)
    gaps = torch.nn.functional.pad(gaps, (0, 1), value=False)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    tokens = tokens.masked_fill(place == sizes[:, None], eos)
    opening = gaps & ~torch.nn.functional.pad(gaps[:, :-1], (1, 0), value=False)
    number = opening.cumsum(1)  # gaps so far, this one included
    end = place == sizes[:, None]

    def write(values, where, kept, length):
        """Values at their places; what is not kept or lies outside falls off the end."""
        where = where.masked_fill(~kept, length).clamp(max=length)
        out = torch.full((len(values), length + 1), pad, device=values.device)
        return out.scatter(1, where, values)[:, :length]

    sentinels = first + number - 1
    kept = ((~gaps & (place < sizes[:, None])) | opening) | end
    given = torch.where(opening, sentinels, tokens)
    given = write(given, kept.cumsum(1) - 1, kept, tokens.shape[1])
    behind = gaps.cumsum(1) - 1 + number  # a missing token comes after the sentinels so far
    behind = torch.where(end, gaps.sum(1, keepdim=True) + number, behind)
    wanted = write(tokens, behind, gaps | end, room)
    heads = write(sentinels, behind - 1, opening, room)
    return given, torch.where(heads != pad, heads, wanted)


PLANS = {"tiny-gpt": Causal(), "tiny-llama": CausalLlama(), "tiny-bert": Masked(),
         "tiny-t5": Spans()}  # fmt: skip
