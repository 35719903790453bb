"""How long a batch takes whose rows have adapters of their own, against one adapter for all.

    python tests/benchmarks/rows_time.py
    python tests/benchmarks/rows_time.py --base smollm2-135m --length 128 --device cuda \\
        --dtype bfloat16

A forward pass of `--batch` rows over `--adapters` LoRAs, in turns: against one LoRA for all rows,
and against PEFT's batch with `adapter_names`, in which the same adapters are drawn at random.
"""

import warnings

import peft
import torch
from pairs import arguments, base_of, compare

import peftlab


def main() -> None:
    args = arguments(__doc__.split("\n")[0], batch=32, adapters=8)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    gpt = args.base == "tiny-gpt"
    targets = ["c_attn"] if gpt else ["q_proj", "v_proj"]
    tuned = peftlab.attach(base_of(args.base, args.device), peftlab.LoRA(r=8, alpha=16))
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets)
    names = [f"adapter {i}" for i in range(args.adapters)]
    for name in names:
        tuned.keep(name)
        with torch.no_grad():
            for parameter in tuned.trainable.values():
                parameter.normal_(std=0.02)
    model = peft.get_peft_model(base_of(args.base, args.device).model, config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    ids = torch.randint(1, len(tuned.tokenizer), (args.batch, args.length), device=args.device)
    mask, rows = torch.ones_like(ids), [names[i % len(names)] for i in range(args.batch)]
    short = args.dtype != "float32"

    tuned.use(rows)

    def timed(forward):
        @torch.no_grad()
        def call():
            with torch.autocast(args.device, getattr(torch, args.dtype), enabled=short):
                return forward()

        return call

    what = f"{args.batch} rows with {args.adapters} adapters"
    # A second base has the one adapter, so that nothing is swapped between two calls.
    other = peftlab.attach(base_of(args.base, args.device), peftlab.LoRA(r=8, alpha=16))
    other.keep("one")
    other.use("one")

    ours, single = timed(lambda: tuned(ids, mask)), timed(lambda: other(ids, mask))
    named = {"input_ids": ids, "attention_mask": mask, "adapter_names": rows}
    compare(what, ours, single, args, "one adapter")
    compare(what, ours, timed(lambda: model(**named)), args)


if __name__ == "__main__":
    main()
