"""Bases: loading, the anatomy of each family, and running a frozen model."""

import copy
import functools
import json
import math

import pytest
import safetensors.torch
import torch
import transformers
from models import CONTEXT, U32, U64, VOCABULARY, hf_model, tiny, token_ids, tokenizer
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface

import peftlab
from peftlab.bases import FAMILIES, TARGETS, Base, shapes

DECODERS = ("gpt2", "llama")


@pytest.fixture(params=DECODERS)
def family(request) -> str:
    return request.param


@pytest.fixture
def base(family) -> Base:
    return tiny(family)


@pytest.fixture
def folder(family, tmp_path):
    """A base on disk in Hugging Face format."""
    hf_model(family).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_load_gives_what_was_saved(folder, base):
    for name in (folder, str(folder)):
        loaded = peftlab.load(name)
        assert loaded.fingerprint() == base.fingerprint()
        assert loaded.digest == base.digest
        ids = token_ids(2, 7)
        assert torch.equal(loaded(ids), base(ids))
        assert loaded.tokenizer.decode(loaded.tokenizer("Grüße, 12!")["input_ids"]) == "Grüße, 12!"
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_files_that_the_authors_of_a_model_left_may_hold_anything(folder, base):
    (folder / "data_config.json").write_text('[{"weight": 4}]')
    (folder / "modules.json").write_text("[]")
    assert peftlab.load(folder).fingerprint() == base.fingerprint()


def test_load_in_another_type(folder):
    loaded = peftlab.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(family):
    bare = tokenizer()
    bare.pad_token = None
    assert Base("bare", hf_model(family), bare).tokenizer.pad_token_id == bare.eos_token_id


def test_the_shape_counts_the_model(base):
    assert base.anatomy.shape.parameters() == sum(p.numel() for p in base.model.parameters())
    assert f"{base.anatomy.shape.parameters():,} parameters" in repr(base)
    assert f"{base.anatomy.family}, decoder, " in repr(base)
    assert base.context == CONTEXT


def test_select_goes_layer_by_layer_and_refuses_strangers(base):
    names = [linear.name for linear in base.anatomy.select(("v", "q"))]
    assert names == ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]
    with pytest.raises(ValueError, match="unknown target 'c_attn'.*has q, k, v, o, up, down"):
        base.anatomy.select(("q", "c_attn"))


def test_the_fingerprint_sees_every_bit(base):
    before = base.fingerprint()
    assert before == base.fingerprint() and len(before) == 64
    for name, tensor in base.model.state_dict().items():
        bits = tensor.view(torch.int32).flatten()
        bits[-1] ^= 1  # the last bit of one number
        assert base.fingerprint() != before, name
        bits[-1] ^= 1
    assert base.fingerprint() == before
    assert tiny(base.anatomy.family, seed=1).digest != base.digest


def test_loss_is_the_mean_over_all_tokens(base):
    """Whatever the batch size; against the sum over each text alone."""
    texts = ["abc", "a much longer text", "xy", "z"]
    total = tokens = 0
    for text in texts:
        ids = torch.tensor([base.tokenizer(text)["input_ids"]])
        if ids.shape[1] > 1:
            total += cross_entropy(base(ids)[0, :-1], ids[0, 1:], reduction="sum").item()
            tokens += ids.shape[1] - 1
    for batch_size in (1, 3, 32):
        # 20 tokens' losses, each with the rounding of logits that come from sums of 24 to 96
        # terms over 2 layers: some hundred roundings, relative to losses of this size.
        assert math.isclose(base.loss(texts, batch_size), total / tokens, rel_tol=500 * U32)


def test_generate_stops_at_the_end_of_text_and_hides_it(base):
    """A model whose head is made to prefer one letter twice, then the end."""
    calls = []

    def force(module, args, output):
        step = len(calls)
        calls.append(step)
        output.logits[:] = 0
        output.logits[..., base.tokenizer("k")["input_ids"][0] if step < 2 else 0] = 9
        return output

    hook = base.model.register_forward_hook(force)
    assert base.generate(["ab", "longer"], max_new_tokens=10) == ["kk", "kk"]
    assert len(calls) == 3
    hook.remove()


def test_generate_puts_the_model_back_into_training_mode(base):
    base.train()
    first = base.generate(["ab"], max_new_tokens=4)
    assert base.model.training
    base.train(False)
    assert base.generate(["ab"], max_new_tokens=4) == first
    assert base.generate([]) == []


def test_logits_have_the_vocabulary_and_a_mask_of_ones_is_no_mask(base):
    ids = token_ids(2, CONTEXT)
    logits = base(ids)
    assert logits.shape == (2, CONTEXT, VOCABULARY)
    assert torch.equal(base(ids, torch.ones_like(ids)), logits)


# Every family ---------------------------------------------------------------------------------

SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=44,
    max_position_embeddings=CONTEXT,
    initializer_range=0.2,
)
DISTIL = dict(
    vocab_size=VOCABULARY,
    dim=24,
    n_layers=2,
    n_heads=3,
    hidden_dim=44,
    max_position_embeddings=CONTEXT,
    initializer_range=0.2,
)
T5 = dict(
    vocab_size=VOCABULARY,
    d_model=24,
    d_kv=10,
    d_ff=44,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=3,
    decoder_start_token_id=0,
)
GROUPED = dict(num_attention_heads=4, num_key_value_heads=2)
GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
GPT2 = dict(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=24, n_layer=2, n_head=3)
SPECIMENS = {  # name: (class, config, head)
    "gpt2": ("GPT2LMHeadModel", GPT2, "lm"),
    "gpt2 headless": ("GPT2Model", GPT2, "none"),
    "llama": ("LlamaForCausalLM", SMALL | GROUPED | {"head_dim": 10}, "lm"),
    "qwen2": ("Qwen2ForCausalLM", SMALL | GROUPED | {"tie_word_embeddings": True}, "lm"),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL, "lm"),
    "gpt_neox in turn": (
        "GPTNeoXForCausalLM",
        SMALL | dict(use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True),
        "lm",
    ),
    "bert": ("BertForMaskedLM", SMALL, "masked_lm"),
    "bert untied": ("BertForMaskedLM", SMALL | {"tie_word_embeddings": False}, "masked_lm"),
    "bert headless": ("BertModel", SMALL, "pooler"),
    "roberta": ("RobertaForMaskedLM", SMALL | {"type_vocab_size": 1}, "masked_lm"),
    "roberta untied": ("RobertaForMaskedLM", SMALL | {"tie_word_embeddings": False}, "masked_lm"),
    "roberta headless": ("RobertaModel", SMALL, "pooler"),
    "distilbert": ("DistilBertForMaskedLM", DISTIL, "masked_lm"),
    "distilbert untied": (
        "DistilBertForMaskedLM",
        DISTIL | {"tie_word_embeddings": False},
        "masked_lm",
    ),
    "distilbert headless": ("DistilBertModel", DISTIL, "none"),
    "t5": ("T5ForConditionalGeneration", T5, "lm"),
    "t5 gated": ("T5ForConditionalGeneration", T5 | GATED, "lm"),
    "t5 headless": ("T5Model", T5, "none"),
}
LOADABLE = [n for n in SPECIMENS if n not in ("gpt2 headless", "t5 headless")]
KINDS = {"bert": "encoder", "roberta": "encoder", "distilbert": "encoder", "t5": "encoder-decoder"}


@functools.cache
def _specimen(name: str) -> transformers.PreTrainedModel:
    class_name, fields, _ = SPECIMENS[name]
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**fields))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms are drawn as well
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def specimen(name: str) -> Base:
    """A fresh base of this sort in float32."""
    return Base(name, copy.deepcopy(_specimen(name)), tokenizer())


def on_disk(model: transformers.PreTrainedModel, folder, without=()) -> None:
    """Save a model, less these tensors, with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name not in without}
    assert len(kept) == len(tensors) - len(without)
    safetensors.torch.save_file(kept, folder / "model.safetensors", {"format": "pt"})


def test_every_family_has_a_specimen_and_one_kind():
    assert list(FAMILIES) == list(shapes.FAMILIES)
    assert {name.split()[0] for name in SPECIMENS} == set(FAMILIES)
    for family, described in FAMILIES.items():
        base = specimen(family)
        assert base.kind == base.anatomy.kind == described.kind == base.anatomy.shape.kind
        assert base.kind == KINDS.get(family, "decoder")
        assert f": {family}, {base.kind}, " in repr(base)
    assert "2 + 3 layers" in repr(specimen("t5"))


@pytest.mark.parametrize("name", SPECIMENS)
def test_parameters_and_head_are_those_of_the_model(name):
    base = specimen(name)
    shape, model = base.anatomy.shape, base.model
    assert shape.parameters() == sum(p.numel() for p in model.parameters())
    assert shape.head == SPECIMENS[name][2]
    assert base.has_lm_head == (shape.head in ("lm", "masked_lm"))
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    assert shape.norms == len(norms)
    assert {shape.norm_size} == {sum(p.numel() for p in m.parameters()) for m in norms}
    # The backbone alone: the tensors that its stacks use, T5's shared table once.
    inside = {p for stack in base.anatomy.stacks.values() for p in stack.parameters()}
    if base.anatomy.family != "t5" and getattr(base.anatomy.backbone, "pooler", None) is not None:
        inside -= set(base.anatomy.backbone.pooler.parameters())
    assert shape.without_head().parameters() == sum(p.numel() for p in inside)
    assert shape.without_head().without_head() == shape.without_head()


@pytest.mark.parametrize("name", SPECIMENS)
def test_stacks_give_hidden_states_of_tokens_and_of_vectors(name):
    base = specimen(name)
    anatomy, ids = base.anatomy, token_ids(2, 7)
    assert list(anatomy.stacks) == list(anatomy.layers)
    assert list(anatomy.stacks) == (["encoder", "decoder"] if "t5" in name else [""])
    assert anatomy.backbone is next(iter(anatomy.stacks.values()))
    assert anatomy.embedding is base.model.get_input_embeddings()
    assert anatomy.embedding.weight.shape == (VOCABULARY, 24)
    counts = [anatomy.shape.layers, anatomy.shape.decoder_layers][: len(anatomy.stacks)]
    assert [len(blocks) for blocks in anatomy.layers.values()] == counts
    for stack, module in anatomy.stacks.items():
        assert all(block in set(module.modules()) for block in anatomy.layers[stack])
        more = {"encoder_hidden_states": torch.randn(2, 5, 24)} if stack == "decoder" else {}
        from_tokens = module(input_ids=ids, **more).last_hidden_state
        from_vectors = module(inputs_embeds=anatomy.embedding(ids), **more).last_hidden_state
        assert from_tokens.shape == (2, 7, 24)
        # RoBERTa counts positions without padding, and no token here is padding.
        assert torch.equal(from_tokens, from_vectors)


@pytest.mark.parametrize("name", SPECIMENS)
def test_every_linear_is_found_once_and_written_alone(name):
    """Each matrix has the shape's numbers; writing changes its rows of one tensor, no others."""
    base = specimen(name)
    anatomy = base.anatomy
    assert set(anatomy.targets) <= set(TARGETS) and anatomy.targets == anatomy.shape.targets
    written = 0
    for target in anatomy.targets:
        [(copies, d_in, d_out)] = anatomy.shape.matrices(target)
        found = anatomy.select((target,))
        assert [(linear.d_in, linear.d_out) for linear in found] == [(d_in, d_out)] * copies
        written += copies * d_in * d_out
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    for linear in anatomy.linears.values():
        old, new = linear.weight.clone(), torch.randn(linear.d_out, linear.d_in)
        linear.write(new)
        assert torch.equal(linear.weight, new)
        changed = [k for k, t in base.model.state_dict().items() if not torch.equal(t, before[k])]
        assert len(changed) == 1
        tensor = base.model.state_dict()[changed[0]]
        assert (tensor != before[changed[0]]).sum() == new.numel()
        assert sorted(tensor[tensor != before[changed[0]]].tolist()) == sorted(
            new.flatten().tolist()
        )
        linear.write(old)
        assert torch.equal(tensor, before[changed[0]])
        with pytest.raises(ValueError, match=f"{linear.name} is {linear.d_out}×{linear.d_in}, not"):
            linear.write(new[1:])
    for linear in anatomy.linears.values():  # all together: every entry once
        linear.write(torch.full_like(linear.weight, math.inf))
    infinite = sum(t.isinf().sum().item() for t in set(base.model.parameters()))
    assert infinite == written


@pytest.mark.parametrize("name", SPECIMENS)
def test_adding_to_the_output_is_writing_to_the_weight(name):
    base = specimen(name)
    base.model.double()
    for linear in base.anatomy.linears.values():
        x = torch.randn(2, 3, linear.d_in, dtype=torch.float64)
        delta = torch.randn(linear.d_out, linear.d_in, dtype=torch.float64)
        added = linear.add_to(linear.module(x), x @ delta.T)
        size = linear.module(x).abs().max() + (x.abs() @ delta.abs().T).max()
        linear.write(linear.weight + delta)
        # Two orders of sums of 2 · d_in products and a bias.
        assert (added - linear.module(x)).abs().max() <= 4 * (linear.d_in + 2) * U64 * size


@pytest.mark.parametrize("name", SPECIMENS)
def test_q_k_and_v_are_what_attention_gets(name, monkeypatch):
    """W x + b of each role, head by head, against the queries, keys and values of a real run."""
    base, calls, inputs = specimen(name), [], {}

    def record(module, query, key, value, mask, **kwargs):
        calls.append((module, {"q": query, "k": key, "v": value}))
        return query.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "recorded", record)
    base.model.set_attn_implementation("recorded")
    for linear in base.anatomy.linears.values():
        linear.module.register_forward_pre_hook(
            lambda module, args: inputs.__setitem__(module, args[0])
        )
    more = {"decoder_input_ids": token_ids(2, 4)} if base.kind == "encoder-decoder" else {}
    base.model(input_ids=token_ids(2, 7), **more)
    assert len(calls) == base.anatomy.shape.attentions
    rotary = base.anatomy.family in ("llama", "qwen2", "gpt_neox")
    seen = 0
    for module, used in calls:
        mine = set(module.modules())
        for linear in base.anatomy.linears.values():
            if linear.target not in used or linear.module not in mine:
                continue
            x, bias = inputs[linear.module], linear.module.bias
            ours = x @ linear.weight.T
            size = x.abs() @ linear.weight.abs().T
            if bias is not None:
                ours, size = ours + bias[linear.index], size + bias[linear.index].abs()
            theirs = used[linear.target].transpose(1, 2).flatten(2)
            if rotary and linear.target in "qk":  # the rotation at position 0 is none
                ours, theirs = ours[:, :1], theirs[:, :1]
            # Two orders of a sum of d_in products and a bias.
            assert (ours - theirs).abs().max() <= 2 * (linear.d_in + 1) * U32 * size.max()
            seen += 1
    assert seen == 3 * len(calls)


@pytest.mark.parametrize("name", ["llama", "qwen2", "t5 gated"])
def test_up_is_linear_and_gate_is_activated(name):
    """Twice `up` is twice what `down` gets, to the bit; twice `gate` is not."""
    base = specimen(name)
    linears = base.anatomy.linears
    for site in [site for site in linears if site.endswith(".down")]:
        up, gate = (linears[site.replace("down", part)] for part in ("up", "gate"))
        block = next(
            module
            for module in base.model.modules()
            if {up.module, gate.module, linears[site].module} <= set(module.children())
        )
        seen = []
        hook = linears[site].module.register_forward_pre_hook(
            lambda m, args, s=seen: s.append(args)
        )
        x = torch.randn(2, 3, 24)
        block(x)
        for part in (up, gate):
            kept = part.weight.clone()
            part.write(2 * kept)
            block(x)
            part.write(kept)
        hook.remove()
        plain, up_doubled, gate_doubled = (args[0] for args in seen)
        assert torch.equal(up_doubled, 2 * plain) and not torch.equal(gate_doubled, 2 * plain)


@pytest.mark.parametrize("name", SPECIMENS)
def test_roles_run_in_their_order(name):
    """In every block q, k and v run before o, of each attention; then gate and up before down."""
    base, order = specimen(name), []
    by_module = {linear.module: linear.target for linear in base.anatomy.linears.values()}
    for module, target in by_module.items():
        role = "qkv" if target in "qkv" else target
        module.register_forward_hook(lambda *_, role=role: order.append(role))
    more = {"decoder_input_ids": token_ids(2, 4)} if base.kind == "encoder-decoder" else {}
    base.model(input_ids=token_ids(2, 7), **more)
    order = [role for role, after in zip(order, [*order[1:], ""], strict=True) if role != after]
    mlp = ["gate", "up", "down"] if "gate" in order else ["up", "down"]
    wanted = []
    for stack, blocks in base.anatomy.layers.items():
        attentions = ["qkv", "o"] * (2 if stack == "decoder" else 1)
        wanted += (attentions + mlp) * len(blocks)
    assert order == wanted


@pytest.mark.parametrize("name", LOADABLE)
def test_every_family_is_loaded_as_it_was_saved(name, tmp_path):
    base = specimen(name)
    on_disk(base.model, tmp_path)
    loaded = peftlab.load(tmp_path)
    assert type(loaded.model) is type(base.model)
    assert loaded.fingerprint() == base.fingerprint() and loaded.digest == base.digest
    assert loaded.anatomy.shape.head == base.anatomy.shape.head
    assert loaded.kind == base.kind and loaded.has_lm_head == base.has_lm_head
    assert list(loaded.anatomy.linears) == list(base.anatomy.linears)
    assert loaded.anatomy.shape.parameters() == sum(p.numel() for p in loaded.model.parameters())
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_names_of_linears():
    """In one stack by layer; in T5 by stack, and the decoder's second attention apart."""
    assert "layers.1.gate" in specimen("llama").anatomy.linears
    linears = specimen("t5").anatomy.linears
    decoder = linears["decoder.layers.2.cross.q"]
    assert (decoder.target, decoder.layer) == ("q", 2)
    blocks = specimen("t5").model
    assert linears["encoder.layers.1.v"].module.weight.equal(
        blocks.encoder.block[1].layer[0].SelfAttention.v.weight
    )
    assert decoder.module.weight.equal(blocks.decoder.block[2].layer[1].EncDecAttention.q.weight)
    assert "encoder.layers.0.cross.q" not in linears and "encoder.layers.2.q" not in linears


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_encoder_without_its_pooler_has_no_head(name, tmp_path):
    """As sentence encoders are often saved: what no file holds is not drawn at random."""
    model = specimen(f"{name} headless").model
    on_disk(model, tmp_path, without=("pooler.dense.weight", "pooler.dense.bias"))
    loaded = peftlab.load(tmp_path)
    assert loaded.anatomy.shape.head == "none" and not loaded.has_lm_head
    assert loaded.model.pooler is None
    assert loaded.anatomy.shape.parameters() == sum(p.numel() for p in loaded.model.parameters())
    ids = token_ids(2, 7)
    wanted = model(input_ids=ids).last_hidden_state
    assert torch.equal(loaded.anatomy.backbone(input_ids=ids).last_hidden_state, wanted)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("bert", "cls.predictions.bias"),
        ("bert", "cls.predictions.transform.dense.weight"),
        ("bert", "bert.embeddings.LayerNorm.bias"),
        ("bert headless", "encoder.layer.1.output.dense.weight"),
        ("bert headless", "pooler.dense.bias"),
        ("roberta", "lm_head.dense.bias"),
        ("distilbert", "vocab_layer_norm.weight"),
        ("distilbert headless", "transformer.layer.0.ffn.lin1.weight"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.k.weight"),
    ],
)
def test_any_other_missing_tensor_is_refused_by_name(name, key, tmp_path):
    on_disk(specimen(name).model, tmp_path, without=(key,))
    with pytest.raises(ValueError, match=f"is damaged: {key} is missing"):
        peftlab.load(tmp_path)


def test_a_t5_with_a_head_of_its_own_is_counted_with_it(tmp_path):
    """transformers ties the head whatever the config says, unless the file holds another."""
    model = specimen("t5 gated").model
    assert specimen("t5 gated").anatomy.shape.tied
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 24))
    on_disk(model, tmp_path)
    loaded = peftlab.load(tmp_path)
    assert not loaded.anatomy.shape.tied
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)
    assert loaded.anatomy.shape.parameters() == sum(p.numel() for p in loaded.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_a_tokenizer_is_refused(family, tmp_path):
    """transformers makes one of special tokens alone, and says nothing."""
    on_disk(specimen(family).model, tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="tokenizer"):
        peftlab.load(tmp_path)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "t5"])
def test_encoders_need_a_padding_token(name):
    bare = tokenizer()
    bare.pad_token = None
    with pytest.raises(ValueError, match=f"'x': {name} needs a tokenizer with a padding token"):
        Base("x", copy.deepcopy(_specimen(name)), bare)


def test_an_unknown_family_is_told_all_known_ones(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    known = "gpt2, llama, qwen2, gpt_neox, bert, roberta, distilbert, t5"
    with pytest.raises(ValueError, match=f"family 'bloom'; peftlab knows {known}"):
        peftlab.load(tmp_path)


def test_an_encoder_decoder_asks_for_what_its_decoder_reads():
    with pytest.raises(ValueError, match="is an encoder-decoder: give decoder_input_ids"):
        tiny("t5")(token_ids(2, 5))
