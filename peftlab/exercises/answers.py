"""Where answers run: on copies of what they get, for a while, and without a trace behind them.

An answer may do anything: write into its inputs, change PyTorch's settings, loop for ever, exit,
return an object that claims to equal everything. A trial sees of it a result made of plain numbers,
words, tensors and collections of them, or the exception that ended it.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from types import EllipsisType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SECONDS = 10.0  # of the processor, so that neither a debugger nor a busy machine uses them up


class Wrong(Exception):
    """Raised inside a trial, with the diagnosis for the learner."""


class Untouched(Exception):
    """The answer is still the stub."""


class Stopped(Exception):
    """The answer ended in an error: any exception, or an exit."""

    error = property(lambda self: self.args[0])


class TookTooLong(BaseException):
    """Raised in an answer that does not end. No Exception: a loop may well contain those."""


def describe(error: Any) -> str:
    """An exception in one line, for a learner."""
    try:
        text = str(error).strip().splitlines()
    except BaseException:
        text = []
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


# --- what an answer leaves as it was ------------------------------------------------------------


def default_device() -> torch.device | None:
    """The device that was set; None if none was. PyTorch itself says "cpu" for none."""
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return context and context.device


DRAWS = [
    (torch.get_rng_state, torch.set_rng_state),
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
]
SETTINGS = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (default_device, torch.set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (os.getcwd, os.chdir),
]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Give the random numbers and the settings back as they were found."""
    cuda = [(torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)]
    draws = DRAWS + cuda * torch.cuda.is_initialized()
    drawn = [(give_back, get()) for get, give_back in draws]
    found = [(give_back, get, get()) for get, give_back in SETTINGS]
    try:
        yield
    finally:
        for give_back, state in drawn:
            give_back(state)
        for give_back, get, setting in found:
            if get() != setting:
                give_back(setting)


@contextmanager
def usual() -> Iterator[None]:
    """The same draws and settings for every check, whatever the notebook has set; undisturbed."""
    with undisturbed(), torch.inference_mode(False):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs as well
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.set_default_device(None)
        yield


@contextmanager
def watched() -> Iterator[list]:
    """Raise `TookTooLong` after `SECONDS`, and list each Ctrl-C. Signals reach the main thread."""
    pressed: list = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield pressed
        return

    def press(*signal_and_frame):
        pressed.append(True)
        before(*signal_and_frame)

    def stop(*_):
        raise TookTooLong

    with ExitStack() as ends:
        ends.callback(signal.signal, signal.SIGINT, before)
        signal.signal(signal.SIGINT, press if callable(before) else before)
        if hasattr(signal, "setitimer"):
            ends.callback(signal.signal, signal.SIGPROF, signal.signal(signal.SIGPROF, stop))
            ends.callback(signal.setitimer, signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_PROF, SECONDS, 1.0)
        yield pressed


# --- what an answer returns ---------------------------------------------------------------------


def settled(made: Any) -> Any:
    """What an answer returned, in plain types. Raises `Wrong` if nothing can be read from it.

    Asks for types and never for an object's own word: that may lie.
    """
    kind = type(made)
    if any(kind is plain for plain in (NoneType, EllipsisType, bool, int, float, str)):
        return made
    if issubclass(kind, Tensor):
        return _plain(made)
    if issubclass(kind, np.generic):
        return settled(np.generic.item(made))
    if issubclass(kind, np.ndarray):
        return _plain(torch.as_tensor(np.array(np.ndarray.view(made, np.ndarray))))
    if kind is Fraction:
        return float(made)
    if issubclass(kind, (int, float)):
        return (int if issubclass(kind, int) else float).__pos__(made)
    if issubclass(kind, str):
        return str.__getitem__(made, slice(None))
    for plain, kept in ((list, list), (tuple, tuple), (set, set), (frozenset, set)):
        if issubclass(kind, plain):
            return kept(settled(item) for item in plain.__iter__(made))
    if issubclass(kind, dict):
        return {settled(key): settled(value) for key, value in dict.items(made)}
    what = "is complex" if issubclass(kind, complex) else f"is of the type {kind.__name__}"
    raise Wrong(f"what you return {what}: numbers, tensors, words and lists of them can be read")


def _plain(made: Tensor) -> Tensor:
    """A tensor of PyTorch's own class, dense, on the CPU, and with real numbers in it."""
    with torch._C.DisableTorchFunctionSubclass():
        if not (type(made) is Tensor or type(made) is nn.Parameter) or vars(made):
            made = Tensor.as_subclass(made, Tensor)
        if made.is_complex():
            raise Wrong("your tensor is complex: real numbers are asked for")
        if made.is_meta or made.is_nested or made.numel() > 10**8:
            raise Wrong("your tensor has no numbers, or more of them than can be read")
        if made.is_quantized:
            return made.dequantize()
        return made.to_dense().cpu() if made.layout != torch.strided else made.cpu()


class Answer:
    """A learner's function as a trial calls it. `handed` are the copies that it got last."""

    handed: tuple = ()
    error: BaseException | None = None

    def __init__(self, function: Any):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        own = [isinstance(item, Tensor) and not item.is_leaf for item in args]  # of an earlier call
        args = [item.detach() if made else item for item, made in zip(args, own, strict=True)]
        self.handed = copy.deepcopy(tuple(args))
        with watched() as pressed, undisturbed():
            try:
                made = settled(self.function(*self.handed))
            except BaseException as error:
                self.error = error
        if pressed:  # by the learner, who wants the cell to stop whatever the answer made of it
            raise KeyboardInterrupt
        if self.error is None and made is None:
            self.error = Wrong("your code returns None: is its `return` missing?")
        if self.error is not None:
            raise self.error
        return made


def outcome(trial: Callable, answer: Any, size: tuple = ()) -> Any:
    """What the trial of an answer gives: a result, or a `Wrong`, an `Untouched` or a `Stopped`."""
    run = Answer(answer)
    try:
        with usual():
            return trial(run if callable(answer) else settled(answer), *size)
    except BaseException as error:
        ended = run.error
        if isinstance(error, KeyboardInterrupt) and error is not ended:
            raise
        error = ended or error
        if isinstance(error, (Wrong, Untouched)):
            return error
        if type(error) is NotImplementedError and not error.args:  # PyTorch's own has words
            return Untouched()
        if ended or not isinstance(error, Exception):
            return Stopped(error)
        return Wrong(f"what you return has not the form that is asked for ({describe(error)})")
