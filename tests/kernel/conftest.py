"""The Triton kernels need a GPU, or a process in which triton was imported under TRITON_INTERPRET=1; the flag is read at import.

Elsewhere test_triton.py is not collected: test_interpreter.py runs it in such a process.
"""

import os

import torch

collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["test_triton.py"]
