from collections.abc import Iterator

import pytest
import torch
from recipe_zoo import Launcher


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """These matrices are too small to share out: waiting for other threads would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
