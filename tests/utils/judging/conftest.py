"""A judge's server for each test that asks for one."""

from collections.abc import Iterator

import pytest
from judge_server import JudgeServer, judge_server


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as running:
        yield running
