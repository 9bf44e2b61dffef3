"""torch.compile around the whole step, an annealed temperature, and a CUDA graph where there is a GPU.

    pip install contrastive_ext
    python compile_and_graphs.py

A float is a constant of a compiled graph: a temperature that changes every step would compile every step. A 0-d tensor
is an input. On a GPU a step of some thousand rows is host time (1.7 ms at 1,024 rows on an H200), which a graph takes
away (0.03 ms): no loss of this package waits for the device, so that forward and backward can be captured.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import contrastive_ext as ce


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """Median time of a call, the device's included."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph: what it reads and writes stays where it is."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # first calls choose kernels and allocate
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="pairs in a batch")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).to(device)
    x1, x2 = torch.randn(2, options.rows, 128, device=device).unbind()
    temperature = torch.tensor(0.5, device=device)  # filled anew every step, never replaced
    graphs = 0

    def step() -> Tensor:
        loss = ce.fused_debiased_loss(encoder(x1), encoder(x2), temperature, tau_plus=0.05)
        for parameter in encoder.parameters():
            parameter.grad = None
        loss.backward()
        return loss

    def counted(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def forward(temperature: Tensor) -> Tensor:
        return ce.fused_debiased_loss(encoder(x1), encoder(x2), temperature, tau_plus=0.05)

    # fullgraph=True: an error, not a slow step, where something cannot be compiled. `backend=counted` only counts
    # graphs; leave it out in a training.
    compiled = torch.compile(forward, fullgraph=True, backend=counted)
    for i in range(5):
        temperature.fill_(0.5 - 0.05 * i)
        torch.testing.assert_close(compiled(temperature), forward(temperature))
    print(f"5 temperatures, {graphs} graph compiled, values as in eager mode")
    print(f"eager {milliseconds(step, options.repeats):.3f} ms")
    if device.type == "cuda":
        print(f"CUDA graph {milliseconds(captured(step), options.repeats):.3f} ms")
    else:
        print("no GPU: no CUDA graph captured")
    return graphs


if __name__ == "__main__":
    main()
