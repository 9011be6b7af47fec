"""The scripts can be imported however pytest is started.

Tests run on one thread: for networks this small further threads would only wait.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)
