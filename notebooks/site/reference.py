"""Pages of the package's names, from its docstrings."""

import importlib
import inspect
from types import ModuleType

import peftlab

ROOMS = {
    "methods": "peftlab.methods",
    "accounting": "peftlab.accounting",
    "memory": "peftlab.memory",
    "adviser": "peftlab.memory.adviser",
    "tasks": "peftlab.tasks",
    "heads": "peftlab.methods.heads",
    "scores": "peftlab.methods.scores",
    "probes": "peftlab.bases.probes",
    "quantisation": "peftlab.sites.quantisation",
    "interop": "peftlab.tuned.interop",
    "panels": "peftlab.panels",
    "figures": "peftlab.figures",
    "exercises": "peftlab.exercises",
}


def offered(module: ModuleType) -> list[str]:
    """The public functions and classes of a room: of a file its own, of a folder what its door
    imports from inside."""
    inside = module.__name__
    names = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
    found = []
    for name in names:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            if thing.__module__ == inside or thing.__module__.startswith(f"{inside}."):
                found.append(name)
    return found


def entry(name: str, thing: object) -> str:
    """One name, for Sphinx."""
    if inspect.isclass(thing):
        return f".. autoclass:: {name}\n   :members:\n\n"
    return f".. autofunction:: {name}\n\n"


def headed(title: str) -> str:
    return f"{title}\n{'=' * len(title)}\n\n"


def door() -> str:
    """The names that `import peftlab` brings, without the methods."""
    methods = importlib.import_module("peftlab.methods")
    names = [n for n in peftlab.__all__ if n not in peftlab._ROOMS and not hasattr(methods, n)]
    text = headed("peftlab") + ".. automodule:: peftlab\n   :no-members:\n\n"
    return text + "".join(entry(f"peftlab.{n}", getattr(peftlab, n)) for n in sorted(names))


def room(name: str) -> str:
    """A page of one room."""
    module = importlib.import_module(ROOMS[name])
    text = headed(f"peftlab.{name}") + f".. automodule:: {ROOMS[name]}\n   :no-members:\n\n"
    for each in sorted(offered(module), key=str.lower):
        top = getattr(peftlab, each, None) is getattr(module, each) and name == "methods"
        text += entry(f"{'peftlab' if top else ROOMS[name]}.{each}", getattr(module, each))
    return text


def pages() -> dict[str, str]:
    """Each page's name and text, in reading order."""
    return {"peftlab": door(), **{name: room(name) for name in ROOMS}}
