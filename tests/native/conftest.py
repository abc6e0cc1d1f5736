from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.library import build_package, installed


@pytest.fixture(scope="session")
def package() -> Path:
    """A folder with the package, built once."""
    return build_package()


@pytest.fixture
def native(package: Path) -> Iterator[Path]:
    """The package is installed."""
    with installed(package):
        yield package
