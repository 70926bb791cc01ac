"""AWS for the tests that need one (marked `aws`): servers that live as long as the session, places of a test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.awsfaults import AwsFaults, aws_faults
from tests.support.awsplace import AwsPlace, use_test_credentials
from tests.support.emulators import dynalite_server, moto_server


@pytest.fixture(scope="session")
def moto_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto_server(log=tmp_path_factory.mktemp("moto") / "log") as url:
        yield url


@pytest.fixture(scope="session")
def dynalite_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with dynalite_server(log=tmp_path_factory.mktemp("dynalite") / "log") as url:
        yield url


@pytest.fixture
def aws_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    use_test_credentials(monkeypatch)


@pytest.fixture
def place(moto_url: str, aws_credentials: None) -> AwsPlace:
    """Nothing is in it yet."""
    return AwsPlace(moto_url)


@pytest.fixture
def harmed(place: AwsPlace) -> Iterator[AwsFaults]:
    """A proxy before the place's AWS: use it by `place.through(harmed.url)`."""
    with aws_faults(place.url) as faults:
        yield faults
