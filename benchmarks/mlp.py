"""How fast are the MLPs? Layers without their blocks of zeros against whole ones, and against torch's.

    python -m benchmarks.mlp --output runs/mlp.json

Takes 16 tables of figures of --seconds each: about 3 minutes. Prints a table for each MLP and batch size, and writes
the same as JSON.

Weights are random. In "1x16, 75 %" three quarters of them lie in blocks of zeros: 16 consecutive outputs of one input.
The layer of the dense features and the layer with one output stay whole, as in training. "dense" is the same MLP
without zeros, computed by the kernels for whole layers; "torch" is torch's addmm and relu. "times faster" is the median
of the ratios to "dense" of each round. Set OMP_NUM_THREADS=1 for figures of one thread.
"""

from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.results import save
from benchmarks.timing import parse, side_by_side
from dlrm.inference.packing import LinearFunction, block_of, pack_chain
from dlrm.model import DLRM, MLP
from dlrm.ops import BLOCKS
from dlrm.presets import PRESETS

BATCHES = (1, 64, 256, 2048)
SPARSITIES = (0.5, 0.75, 0.9)


def mlps(name: str) -> dict[str, MLP]:
    """Return the MLPs of a preset, by name."""
    torch.manual_seed(0)
    model = DLRM(PRESETS[name].model, nn.Identity())
    return {"bottom": model.bottom, "top": model.top}


def by_torch(mlp: MLP) -> LinearFunction:
    """Return the MLP as torch's operators."""
    layers = [(x.bias.detach(), x.weight.detach().t()) for x in mlp if isinstance(x, nn.Linear)]
    relu_last = isinstance(mlp[-1], nn.ReLU)

    def run(x: Tensor) -> Tensor:
        for i, layer in enumerate(layers):
            x = torch.addmm(layer[0], x, layer[1])
            if relu_last or i + 1 < len(layers):
                x = x.relu_()
        return x

    return run


def pruned(mlp: MLP, block: int, sparsity: float) -> LinearFunction:
    """Return the MLP without a share of its blocks, computed without them."""
    weights, blocks = [], []
    for linear in mlp:
        if not isinstance(linear, nn.Linear):
            continue
        weight, (fan_out, fan_in) = linear.weight.detach(), linear.weight.shape
        whole = fan_out == 1 or fan_in < 64
        if not whole:
            kept = torch.rand(-(-fan_out // block), fan_in) >= sparsity
            weight = weight * kept.repeat_interleave(block, 0)[:fan_out]
        weights.append((weight, linear.bias.detach()))
        blocks.append(block_of(weight) if whole else block)
    return pack_chain(weights, blocks, relu_last=isinstance(mlp[-1], nn.ReLU))


def measure(name: str, seconds: float, bar: tqdm) -> list[dict]:
    """Return the times of a preset's MLPs, for each batch size."""
    results = []
    for which, mlp in mlps(name).items():
        weights = [(x.weight.detach(), x.bias.detach()) for x in mlp if isinstance(x, nn.Linear)]
        runs = {
            "dense": pack_chain(weights, [None] * len(weights), relu_last=isinstance(mlp[-1], nn.ReLU)),
            "torch": by_torch(mlp),
        }
        for block in BLOCKS:
            runs |= {f"1x{block}, {100 * sparsity:.0f} %": pruned(mlp, block, sparsity) for sparsity in SPARSITIES}
        for batch_size in BATCHES:
            bar.set_description(f"{name}, {which}, B={batch_size}")
            x = torch.randn(batch_size, weights[0][0].shape[1])
            with torch.inference_mode():
                times = side_by_side({label: partial(run, x) for label, run in runs.items()}, seconds, against="dense")
            results.append({"preset": name, "mlp": which, "batch_size": batch_size, "microseconds": times})
            bar.update()
    return results


def report(results: list[dict]) -> str:
    """Return results as tables of text."""
    lines = []
    for result in results:
        lines.append(f"\n{result['preset']}, {result['mlp']} MLP, B={result['batch_size']}")
        lines.append(f"  {'':12}{'median us':>11}{'p20':>10}{'p80':>10}{'times faster than dense':>25}{'p20-p80':>14}")
        for name, time in result["microseconds"].items():
            spread = f"{time['times_faster_p20']:.2f}-{time['times_faster_p80']:.2f}"
            lines.append(
                f"  {name:12}{time['median']:11.1f}{time['p20']:10.1f}{time['p80']:10.1f}"
                f"{time['times_faster']:25.2f}{spread:>14}"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the program."""
    args = parse(__doc__, seconds=10, tables=False)
    results = []
    with tqdm(total=2 * len(BATCHES) * len(args.presets), unit="table") as bar:
        for name in args.presets:
            results += measure(name, args.seconds, bar)
    print(report(results))
    save(args.output, results)


if __name__ == "__main__":
    main()
