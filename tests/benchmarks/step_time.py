"""How long one training step takes, ours against Hugging Face PEFT's.

    python tests/benchmarks/step_time.py --pairs 60
    python tests/benchmarks/step_time.py --base smollm2-135m --length 128 --device cuda \\
        --dtype bfloat16
    python tests/benchmarks/step_time.py --labels 0.25

Not collected by pytest: a time is no test. Steps alternate, ours and theirs, on the same batch
with the same optimiser, and the median of the ratio of each pair is printed with its quartiles.
Of every row the last part has labels, `--labels` of it. PEFT's LoRA is the one that its users write
for GPT-2: one delta of the same size on the fused c_attn. On a GPU the peaks of memory are printed
too. `--compile 1` compiles both; the first steps, which compile, are not counted.
"""

import warnings

import peft
import torch
from pairs import arguments, base_of, compare

import peftlab
from peftlab.tuned import Tuned

QKV = ["c_attn"]
CASES = {
    "LoRA": (
        peftlab.LoRA(r=8, alpha=16),
        peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=QKV),
    ),
    "(IA)³, queries too": (
        peftlab.IA3(["q", "k", "v", "down"]),
        peft.IA3Config(task_type="CAUSAL_LM"),
    ),
    "LayerNorm tuning": (
        peftlab.LayerNormTuning(),
        peft.LNTuningConfig(task_type="CAUSAL_LM"),
    ),
    "prompt tuning": (
        peftlab.PromptTuning(20),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    ),
    "P-tuning, LSTM": (
        peftlab.PTuning(20, sizes="peft"),
        peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_reparameterization_type="LSTM"
        ),
    ),
    "prefix tuning": (
        peftlab.PrefixTuning(20),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    ),
    "prefix tuning, MLP": (
        peftlab.PrefixTuning(20, prefix_projection=True, encoder_hidden_size=512),
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=20,
            prefix_projection=True,
            encoder_hidden_size=512,
        ),
    ),
}


def stepper(loss, parameters, args):
    """A function that takes one step."""
    optimizer = torch.optim.AdamW(list(parameters), lr=1e-3)
    short = args.dtype != "float32"

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(args.device, getattr(torch, args.dtype), enabled=short):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def batch_of(tuned: Tuned, args) -> dict[str, torch.Tensor]:
    """Full rows, of which the last part has labels."""
    shape, device = (args.batch, args.length), args.device
    ids = torch.randint(len(tuned.tokenizer), shape, device=device)
    labels = ids.clone()
    labels[:, : args.length - round(args.labels * args.length)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def main() -> None:
    args = arguments(__doc__.split("\n")[0], labels=1.0, compile=0)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    for name, (method, config) in CASES.items():
        if args.only not in name:
            continue
        if args.base != "tiny-gpt":
            method, config = of_llama(method, config)
        tuned = peftlab.attach(base_of(args.base, args.device), method)
        model = peft.get_peft_model(base_of(args.base, args.device).model, config)
        tuned.train()
        model.train()
        batch = batch_of(tuned, args)
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trainable) == tuned.count().parameters
        losses = [lambda t=tuned, b=batch: t.batch_loss(b), lambda m=model, b=batch: m(**b).loss]
        if args.compile:
            mode = "reduce-overhead" if args.device == "cuda" else None
            losses = [torch.compile(loss, mode=mode, dynamic=False) for loss in losses]
        ours = stepper(losses[0], tuned.trainable.values(), args)
        theirs = stepper(losses[1], trainable, args)
        compare(name, ours, theirs, args)
        if args.device == "cuda":
            print(f"    peak memory {peak(ours) / peak(theirs):.2f} of PEFT's")


def of_llama(method, config):
    """The same in a Llama: its maps are apart and have other names."""
    if isinstance(config, peft.LoraConfig):
        config.target_modules = ["q_proj", "v_proj"]
    elif isinstance(config, peft.IA3Config):
        method = peftlab.IA3(["k", "v", "down"])
    return method, config


def peak(step) -> int:
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
