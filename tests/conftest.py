"""What holds for every test: nothing is fetched, and a slow machine is no failure."""

import os

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
