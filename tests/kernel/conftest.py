"""The Triton kernels need a GPU, or a process in which triton was imported under TRITON_INTERPRET=1; the flag is read at import.

Elsewhere test_triton.py is not collected, and test_random_order.py, which is about the interpreter, on no GPU either:
test_interpreter.py runs them in such a process.
"""

import os

import torch

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if torch.cuda.is_available() or interpreted else ["test_triton.py"]
if not interpreted:
    collect_ignore.append("test_random_order.py")
