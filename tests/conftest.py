"""One thread for all tests: their networks are small, and the number must not change from one test to the next."""
import torch

torch.set_num_threads(1)
