"""What a process may take of the machine: turns of the garbage collector, and PyTorch's threads."""

from collections.abc import Iterator
from contextlib import contextmanager

# The imports of torch and of Keras make 200,000 to 500,000 objects, which stay. Python looks among them for
# garbage after every 700 (`gc.set_threshold`); after as many as this, the imports take a sixth less time.
COLLECT_AFTER = 10_000


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch use so many threads inside an operator."""
    import torch  # Keras's process, which needs the number above, has none

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
