"""How long one training step takes, ours against Hugging Face PEFT's, on the base that ships.

    python tests/benchmarks/step_time.py [pairs]

Not collected by pytest: a time is no test. Steps alternate, ours and theirs, on the same batch
with the same optimiser, and the median of the ratio of each pair is printed with its quartiles, so
that whatever else the machine does meanwhile falls on both alike. PEFT's LoRA is the one that its
users write for GPT-2: one delta of the same size on the fused c_attn.
"""

import statistics
import sys
import time
import warnings

import peft
import torch
from torch.nn.functional import cross_entropy

import peftlab

BATCH, LENGTH, WARMUP = 16, 32, 5
CASES = {
    "LoRA": (
        peftlab.LoRA(r=8, alpha=16),
        peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["c_attn"]),
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


def stepper(forward, parameters, ids):
    """A function that takes one step and returns its seconds."""
    optimizer = torch.optim.AdamW(list(parameters), lr=1e-3)

    def step() -> float:
        start = time.perf_counter()
        logits = forward(ids)[:, -ids.shape[1] :]
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step


def main(pairs: int = 60) -> None:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    for name, (method, config) in CASES.items():
        tuned = peftlab.attach(peftlab.load("tiny-gpt"), method)
        model = peft.get_peft_model(peftlab.load("tiny-gpt").model, config)
        tuned.train()
        model.train()
        ids = torch.randint(len(tuned.tokenizer), (BATCH, LENGTH))
        mask = torch.ones_like(ids)
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trainable) == tuned.count().parameters
        ours = stepper(tuned, tuned.trainable.values(), ids)
        theirs = stepper(
            lambda x, m=model, k=mask: m(input_ids=x, attention_mask=k).logits, trainable, ids
        )
        for _ in range(WARMUP):
            ours(), theirs()
        times = [(ours(), theirs()) for _ in range(pairs)]
        low, middle, high = statistics.quantiles([a / b for a, b in times], n=4)
        mine, peers = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"{name}: {1000 * mine:.1f} ms a step, PEFT {1000 * peers:.1f} ms; "
            f"ratio {middle:.2f} (quartiles {low:.2f} to {high:.2f}, {pairs} pairs)"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
