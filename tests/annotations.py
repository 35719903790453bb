"""Every annotation in peftlab is checked at each call, tensor shapes included.

jaxtyping's import hook decorates each function with `jaxtyping.jaxtyped`. At every call that binds
the arguments, opens a memo of axis sizes and checks the arguments twice, which costs more than most
of the functions do. Here beartype alone checks each function, its arguments once and its result
once. Only annotations that name axes need the memo, and only their functions open one. While a step
is compiled nothing is checked, because checks are not part of it.
"""

import functools
import inspect
import types
import typing

import jaxtyping
import torch
from beartype import BeartypeConf, beartype

# A memo of axis sizes, open while it is entered; it keeps nothing itself, so one serves for all.
MEMO = jaxtyping.jaxtyped("context")
strict = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def resolved(function: types.FunctionType) -> dict:
    """The annotations as objects. As in jaxtyping, a name that is not known yet allows anything."""

    def hint(annotation):
        def one(value: annotation):
            pass

        try:
            return typing.get_type_hints(one, function.__globals__, include_extras=True)["value"]
        except Exception:
            return typing.Any

    return {name: hint(annotation) for name, annotation in function.__annotations__.items()}


def names_axes(hint) -> bool:
    """Whether an array with a shape is anywhere inside this annotation."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(names_axes, typing.get_args(hint)))


def checking_once(jaxtyped):
    """`jaxtyping.jaxtyped`, but functions are checked by beartype, in a memo if they need one."""

    def decorator(*arguments, typechecker=None):
        full = jaxtyped(*arguments, typechecker=typechecker)
        return full if arguments else functools.partial(decorate, full)

    def decorate(full, function):
        if not isinstance(function, types.FunctionType) or special(function):
            return full(function)
        hints = resolved(function)
        if not hints or any(map(is_triton, hints.values())):
            return function
        checked = strict(with_annotations(function, hints))
        if any(map(names_axes, hints.values())):
            checked = in_a_memo(checked)

        @functools.wraps(function)
        def choose(*args, **kwargs):
            __tracebackhide__ = True
            off = torch.compiler.is_compiling() or jaxtyping.config.jaxtyping_disable
            call = function if off else checked
            return call(*args, **kwargs)

        return choose

    return decorator


def is_triton(hint) -> bool:
    """Whether a function is a kernel, which Triton reads and compiles, and nobody calls."""
    return isinstance(hint, type) and hint.__module__.startswith("triton.")


def in_a_memo(checked):
    """Sizes of axes that have a name agree in all annotations of one call."""

    def call(*args, **kwargs):
        __tracebackhide__ = True
        with MEMO:
            return checked(*args, **kwargs)

    return call


def special(function: types.FunctionType) -> bool:
    return (
        inspect.isgeneratorfunction(function)
        or inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
        or getattr(function, "__no_type_check__", False)
    )


def with_annotations(function: types.FunctionType, annotations: dict) -> types.FunctionType:
    """The same function under other annotations."""
    twin = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__, twin.__annotations__ = function.__kwdefaults__, annotations
    twin.__module__, twin.__qualname__ = function.__module__, function.__qualname__
    return twin


def check_every_call(package: str) -> None:
    """From now on, whatever is imported from this package is checked."""
    jaxtyping.jaxtyped = checking_once(jaxtyping.jaxtyped)
    jaxtyping.install_import_hook(package, "beartype.beartype")
