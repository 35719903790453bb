"""Random numbers that a block of code draws from a seed of its own, and that nobody else misses.

torch has one generator for all threads. In the main thread it is seeded and put back; in another
thread that would change what the main thread draws meanwhile, so each operation there is given a
generator of its own. Both ways draw the same numbers.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DROPOUT = ("dropout", "scaled_dot_product_attention")  # functions of torch that have it


@contextlib.contextmanager
def drawing(seed: int, device: torch.device | None = None, dropout: bool = False) -> Iterator[None]:
    """Inside, torch draws from this seed; afterwards its generators are as they were.

    With `dropout`, in another thread than the main one, only dropout draws from the seed, which is
    faster. A GPU's dropout has no generator but the GPU's own: what another thread draws on the
    same GPU meanwhile is not protected there.
    """
    on_gpu = device is not None and device.type == "cuda"
    if threading.current_thread() is threading.main_thread():
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            torch.manual_seed(seed)
            yield
    elif on_gpu:
        state = torch.cuda.get_rng_state(device)
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            torch.cuda.set_rng_state(state, device)
    else:
        generator = torch.Generator().manual_seed(seed)
        with _InDropout(generator) if dropout else _Redirect(generator):
            yield


class _Redirect(TorchDispatchMode):
    """Gives this generator to every operation of this thread that would draw without one."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            if any(argument.name == "generator" for argument in func._schema.arguments):
                kwargs["generator"] = self.generator
        return func(*args, **kwargs)


class _InDropout(TorchFunctionMode):
    """Redirects inside the functions that have dropout. Around all of them it would be slow."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func, types, args=(), kwargs=None):
        draws = any(name in getattr(func, "__name__", "") for name in DROPOUT)
        with _Redirect(self.generator) if draws else contextlib.nullcontext():
            return func(*args, **(kwargs or {}))
