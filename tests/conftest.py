"""What every test shares: one thread, a forked random state, a device."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device that models are fitted on")


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def forked_rng():
    """Give each test the same random state, and the caller's state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def generator():
    """A generator of the test's own."""
    return torch.Generator().manual_seed(20)


@pytest.fixture(autouse=True)
def validation_flag():
    """No test leaves torch's argument validation other than it found it."""
    before = torch.distributions.Distribution._validate_args
    yield
    torch.distributions.Distribution.set_default_validate_args(before)
