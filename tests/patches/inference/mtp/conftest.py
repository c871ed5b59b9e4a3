"""Of transformers from 5.23 on; and with one thread: tiny products are no work for two, which wait for each other."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def heads_of_transformers() -> None:
    from transformers import cache_utils

    if not hasattr(cache_utils, "MtpCache"):
        pytest.skip("this transformers has no heads of several tokens, and other caches")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
