"""Scripts can be imported however pytest is started. One thread: small networks only wait for more.

The AVX-512 convolutions of torch 2.6 round so coarsely that test_reference.py fails with them.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)
if torch.__version__.startswith("2.6."):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")  # read at the first convolution
