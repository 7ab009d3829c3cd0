"""Optimizers of PyTorch, which work in place, with their arrays, ready to step."""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from benchmarks.speed.rounds import Runner
from benchmarks.speed.workloads import Workload, examples, gradients, initial_parameters

torch.set_num_threads(len(os.sched_getaffinity(0)))

MakeOptimizer = Callable[[list[Any]], Any]


class TorchStep(Runner):
    """``optimizer.step()``.

    Args:
      make: Makes the optimizer of a list of parameters.
      workload: Parameters and gradients.
    """

    def __init__(self, make: MakeOptimizer, workload: Workload):
        self.params = _parameters(workload)
        self.source = [torch.from_numpy(leaf) for leaf in gradients(workload)]
        for param in self.params:
            param.grad = torch.empty_like(param)
        self.optimizer = make(self.params)
        self.fill()
        start = time.perf_counter()
        self.step()
        self.first_step = time.perf_counter() - start
        self.nbytes = _nbytes(self.optimizer, self.params)
        self.details = {}

    def fill(self) -> None:
        """Writes new gradients over the old ones."""
        for param, grad in zip(self.params, self.source):
            param.grad.copy_(grad)

    def step(self) -> None:
        """One step."""
        self.optimizer.step()


class TorchTrainingStep(Runner):
    """Forward, backward and ``optimizer.step()``, not compiled together."""

    def __init__(self, make: MakeOptimizer, workload: Workload):
        self.params = _parameters(workload)
        self.inputs, self.targets = (torch.from_numpy(values) for values in examples(workload))
        self.optimizer = make(self.params)
        start = time.perf_counter()
        self.step()
        self.first_step = time.perf_counter() - start
        self.nbytes = _nbytes(self.optimizer, self.params)
        self.details = {}

    def fill(self) -> None:
        """Nothing: a training step makes its own gradients."""

    def step(self) -> None:
        """One step."""
        self.optimizer.zero_grad()
        hidden = self.inputs
        for kernel, bias in zip(self.params[::2], self.params[1::2]):
            hidden = torch.addmm(bias, torch.relu(hidden), kernel)
        torch.mean((hidden - self.targets) ** 2).backward()
        self.optimizer.step()


def start_torch(make: MakeOptimizer, workload: Workload) -> Runner:
    """A runner for ``workload``: a training step if it has a batch, else an optimizer step."""
    _warm_up()
    return (TorchTrainingStep if workload.batch else TorchStep)(make, workload)


@functools.cache
def _warm_up() -> None:
    """Starts PyTorch's threads, so that no contestant's first step has to."""
    torch.ones(1 << 20).add_(1)


def _parameters(workload: Workload) -> list[Any]:
    return [torch.nn.Parameter(torch.from_numpy(p)) for p in initial_parameters(workload)]


def _nbytes(optimizer: Any, params: list[Any]) -> dict[str, int]:
    state = [value for param in params for value in optimizer.state[param].values()]
    size = sum(_tensor_nbytes(param) for param in params)
    return {
        "params": size,
        "state": sum(_tensor_nbytes(each) for each in state if isinstance(each, torch.Tensor)),
        "grads": size,
    }


def _tensor_nbytes(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's codes and scales
        names, _ = tensor.__tensor_flatten__()
        return sum(_tensor_nbytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
