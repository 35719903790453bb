"""How `pytest -n 2` spreads the tests over its workers.

A unit of work stays in one worker. That is one file: a notebook's cells run in order in one
kernel, and a module's fixtures are made once. The browser tests share one JupyterLab and are one
unit. The property tests share nothing and are many, so each function of theirs is a unit.
"""

from collections import Counter

import pytest

BROWSER, PROPERTIES = "tests/browser/", "tests/properties/"


def unit(nodeid: str) -> str:
    """The unit of work that a test belongs to."""
    if nodeid.startswith(BROWSER):
        return BROWSER
    return nodeid.split("[" if nodeid.startswith(PROPERTIES) else "::", 1)[0]


def longest_first(items: list[pytest.Item]) -> None:
    """Browser, lessons, and the rest from many tests to few, so that the workers end together."""
    sizes = Counter(unit(item.nodeid) for item in items)

    def rank(item: pytest.Item) -> tuple[bool, bool, int, str]:
        name = unit(item.nodeid)
        return name != BROWSER, not name.endswith(".ipynb"), -sizes[name], name

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, where that is installed
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit(nodeid)

    config.option.loadscopereorder = False  # their order is that of `longest_first`
    return Units(config, log)
