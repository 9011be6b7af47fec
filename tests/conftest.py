"""The scripts can be imported however pytest is started. One thread: for networks this small more of them only wait."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)
