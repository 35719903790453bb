"""The two axes of the property suite: every case of `models.CASES`, on every family."""

import pytest
from models import CASES, FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param
