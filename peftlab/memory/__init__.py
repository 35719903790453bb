"""Where the memory of a training step goes: weights, gradients, optimiser, activations.

tuned = peftlab.attach(base, LoRA())
memory = measure(tuned, batch)                        a step that is taken
memory = predict(LoRA(), "llama-3-8b", 8, 512)        one that needs no weights
memory.bytes("activations"), memory.total["forward"]
"""

from peftlab.memory.step import (
    MOMENTS,
    PRESENT,
    Live,
    Memory,
    gpu_peak,
    lesson_on_gpu,
    measure,
)
from peftlab.memory.traced import predict
