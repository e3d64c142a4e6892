"""What holds for every test: nothing is fetched, and a slow machine is no failure."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Before any test imports transformers, which reads them once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

# Triton reads it when it is imported, which torch may do first. Where there is a GPU its kernels are tested there.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The timeout of pytest guards against hanging; hypothesis' own deadline of 0.2 s an example would only be noise.
settings.register_profile("moewright", deadline=None)
settings.load_profile("moewright")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are equal to the last bit only with the same number of threads, also in a process that a test starts.

    And tiny products gain nothing from a second thread, and lose much to it where other processes want the core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
