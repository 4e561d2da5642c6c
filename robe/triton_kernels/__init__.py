"""The operators on a GPU, in Triton: the bodies of ``torch.ops.robe.*`` for CUDA tensors.

robe/backends.py imports this at the first call with a CUDA tensor, where triton is installed. With TRITON_INTERPRET=1
set beforehand, the same kernels run on CPU tensors, one program after another; so tests run without a GPU.

A program works on a tile (BAGS, BLOCKS, WIDTH): some ids of a lookup or some bags, the blocks of an embedding, the
components of a block, so that a block is hashed once and read side by side. Embeddings of more components than a tile
take several programs. Embeddings and their gradients start at multiples of D: they are read and written 16 bytes at a
time where D allows, and so are the weights under the "identity" hash. Hashed blocks start at any weight, so that each
of their weights is a load by itself.

Gradients are added with atomics, in float32 for half precision, in an order that changes from run to run. After
``torch.use_deterministic_algorithms(True)``, and in the optimizers' ``update_`` always (float64 is left to the
reference), they go another way: a list of the parts of embeddings and where each goes ("pieces", some 60 bytes each),
sorted by place; then each program sums what falls into one segment of the array, in the order of the list, and writes
the gradient, or applies the optimizer's rule, there. No gradient of the array is kept then.

As in torch's own kernels, an id out of range, or offsets that do not rise, trip an assertion on the device, which ends
the program's use of the GPU: to ask beforehand would mean to wait for the device in each call.
"""

from collections.abc import Callable
from typing import Any

from robe.triton_kernels import bag, lookup, update

KERNELS: dict[str, Callable[..., Any]] = {**lookup.BODIES, **bag.BODIES, **update.BODIES}
