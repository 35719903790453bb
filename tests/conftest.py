"""What holds for every test: no network, checked shapes, few threads, figures compared by value.

This file runs before anything imports peftlab, torch or transformers, and its environment reaches
every process that a test starts.
"""

import base64
import gc
import importlib.util
import math
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent

# Modules and collected tests stay to the end: the collector neither looks at them while they are
# made nor ever again, see `pytest_collection_finish`.
gc.disable()

# The network ends at this machine, here and in every child process.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE / "offline"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Small models gain nothing from many threads, and sums keep their order. `pytest -n 2` has one
# process for each core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(HERE))
import offline.sitecustomize  # noqa: E402, F401  (importing it blocks this process)
from annotations import check_every_call  # noqa: E402

check_every_call("peftlab")

import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from nbval.plugin import IPyNbCell  # noqa: E402
from workers import longest_first, pytest_xdist_make_scheduler  # noqa: E402, F401

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


class StoredFigure(dict):
    """A Plotly figure's data, equal to another when no point has visibly moved.

    nbval compares a figure's JSON byte for byte, and two BLAS libraries round differently. Numbers
    agree here when |a - b| <= max(1e-3 |a|, 1e-4 max|array|): one pixel of a 700-pixel axis is
    1.4e-3 of its length, and a float32 sum over 1,024 terms moves by at most 1,024 * 2**-24 = 6e-5
    of its largest partial sum when its order changes. Everything else must be identical.
    """

    def __eq__(self, other):
        return same(dict(self), dict(other))

    def __ne__(self, other):
        return not self == other


def decoded(value):
    """Plotly's binary arrays ({dtype, bdata}) as flat lists of numbers; other values unchanged."""
    if isinstance(value, dict) and "bdata" in value:
        return np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"]).tolist()
    return value


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def same(a, b, largest: float = 0.0) -> bool:
    a, b = decoded(a), decoded(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        scale = max((abs(x) for x in a if is_number(x) and math.isfinite(x)), default=0.0)
        return len(a) == len(b) and all(same(x, y, scale) for x, y in zip(a, b, strict=True))
    if is_number(a) and is_number(b):
        return (a != a and b != b) or math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4 * largest)
    return type(a) is type(b) and a == b


def sanitize(cell, value, text_only=IPyNbCell.sanitize):
    return StoredFigure(value) if isinstance(value, dict) else text_only(cell, value)


IPyNbCell.sanitize = sanitize


def as_stored(outputs: list) -> list:
    """Outputs with the data of their Plotly figures under the type that it is stored as."""
    kinds = {"application/vnd.plotly.v1+json": "application/vnd.peftlab.figure+json"}
    for output in outputs:
        if "data" in output:
            output["data"] = {kinds.get(kind, kind): data for kind, data in output["data"].items()}
    return outputs


def compare(cell, test, ref, skip_compare=None, by_kind=IPyNbCell.compare_outputs):
    return by_kind(cell, as_stored(test), ref, skip_compare)


IPyNbCell.compare_outputs = compare


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # one of several workers
        longest_first(items)
    skip_without_the_real_model(items)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def skip_without_the_real_model(items):
    """Lesson 11 is about a real model; where that is not installed it is skipped, and says why."""
    from peftlab.bases.real import REAL

    known = REAL["smollm2-135m"]
    needed = (known.package.replace("-", "_"), *known.needs.split())
    if missing := [module for module in needed if importlib.util.find_spec(module) is None]:
        skip = pytest.mark.skip(reason=f"{', '.join(missing)} is not installed: {known.install}")
        for item in items:
            if item.path.name == "11_real_model.ipynb":
                item.add_marker(skip)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's top folder."""
    return HERE.parent


@pytest.fixture
def untyped():
    """What a user meets: the checks of annotations, which only the tests switch on, are off."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
