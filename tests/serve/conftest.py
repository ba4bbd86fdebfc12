"""Servers that several tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.serving import Running, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """The demo model behind the server, as it is without options."""
    with serving(check=True) as running:
        yield running
