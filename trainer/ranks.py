"""One training over several processes: each takes its share of a batch, and gradients are added up.

``accelerate launch`` starts the processes and says who is who. LoRA's gradients are a few megabytes, so they
are summed in one message a step; what a process did not compute arrives the same way. Alone, nothing is sent.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the scheduler shows where rounds run without loading torch
    from torch import Tensor
    from torch.nn import Parameter


@dataclass(frozen=True)
class Ranks:
    """This process is number ``index`` of ``count``."""

    index: int = 0
    count: int = 1
    local: int = 0
    """Its number on this host: the GPU it takes."""

    @property
    def leads(self) -> bool:
        """Whether this process writes what all of them made."""
        return self.index == 0

    def place(self, device: str) -> str:
        """The device of this process for a round that runs on ``device``."""
        return f"cuda:{self.local}" if device == "cuda" and self.count > 1 else device

    def share(self, numbers: list[int]) -> list[int]:
        """This process's part of a batch; the parts of all are the batch."""
        return numbers[self.index :: self.count]

    def add_up(self, *tensors: "Tensor") -> None:
        """Replace each tensor by its sum over the processes, in one message; the same bits for everyone."""
        if self.count == 1:
            return
        import torch

        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(
            tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True
        ):
            tensor.detach().copy_(part.view_as(tensor))

    def add_up_gradients(self, parameters: "Iterable[Parameter]") -> None:
        """``add_up`` for the gradients; one that a process does not have counts as zero."""
        if self.count == 1:
            return
        import torch

        gradients: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.add_up(*gradients)

    def wait(self) -> None:
        """Until every process has come here."""
        if self.count > 1:
            import torch

            torch.distributed.barrier()


def launched() -> bool:
    """Whether ``accelerate launch`` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch_command(device: str, *, gpus: int | None = None) -> list[str]:
    """The front of a command line that runs a program on every GPU there is; empty where one process will do.

    ``device``: auto and cuda take all GPUs, cpu and cuda:N need no launch. ``gpus``: torch's count.
    """
    if device not in ("auto", "cuda"):
        return []
    import torch

    count = torch.cuda.device_count() if gpus is None else gpus
    if not count:
        return []
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    several = ["--multi_gpu"] if count > 1 else []
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launcher, "--num_processes", str(count), *plain, *several]


def join_ranks(device: str) -> Ranks:
    """The place of this process among those that ``accelerate launch`` started; alone without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    return Ranks(state.process_index, state.num_processes, state.local_process_index)
