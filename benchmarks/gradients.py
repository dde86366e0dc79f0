"""When gradients are ready in a backward, and how long ranks take to exchange them: measured.

    python -m fusedit.benchmarks.gradients demo FILE STEPS FLAGS OF FUSEDIT TRAIN
    python -m fusedit.benchmarks.gradients sd15 FILE BATCH
    torchrun --nproc-per-node=N -m fusedit.benchmarks.gradients exchange FILE BYTES ...

The processes that `scaling.py` starts; each writes a JSON file. `demo` is a run of the trainer on
one rank, `sd15` the update of `update.py` at 256 px on a GPU; neither may have a CUDA graph, whose
replay calls no hooks. `exchange` times all-reduces of so many bytes while nothing else is done.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..launch.train import make_world
from ..trainer import job
from ..trainer.config import PrecisionConfig
from ..trainer.plan import set_numerics
from ..trainer.unet import Prepared
from ..trainer.world import World
from . import demo_steps, update
from .demo_steps import WARM_UP
from .overlap import Gradient
from .shapes import TEXT_TOKENS

UPDATES = 15  # of sd15
EXCHANGES, EXCHANGES_WARM_UP = 30, 5


class Backward(NamedTuple):
    """Of an update of one rank and one micro-step."""

    gradients: list[Gradient]  # in the order in which they are ready
    share: float  # of the update's time, from the loss's gradient to the last parameter's
    step_ms: float | None  # of the update; None where it is not measured


# What the scaling calls; each in a process of its own, and raises RunFailed.


def of_demo(steps: int, flags: Sequence[str], output: Path) -> Backward:
    """Of the trainer's run with these flags, on one rank."""
    words = [*flags, *demo_steps.unattended(output), "--cuda_graphs=off"]
    return _read(_run("demo", [str(steps), *words], output))


def of_sd15(batch: int, output: Path) -> Backward:
    """Of Stable Diffusion 1.5's update of one micro-step on the GPU that is here."""
    return _read(_run("sd15", [str(batch)], output))


def all_reduce_ms(sizes: Sequence[int], ranks: int, output: Path) -> list[float]:
    """Medians, for sizes in bytes."""
    taken = json.loads(_run("exchange", [*map(str, sizes)], output, ranks))
    return [statistics.median(runs) for runs in taken]


def _run(kind: str, words: Sequence[str], output: Path, ranks: int = 1) -> str:
    file = output / f"{kind}.json"
    demo_steps.run_module("benchmarks.gradients", [kind, str(file), *words], output, ranks)
    return file.read_text()


def _read(text: str) -> Backward:
    gradients, share, step_ms = json.loads(text)
    return Backward([Gradient(*one) for one in gradients], share, step_ms)


# What their processes do.


class Stamps:
    """Notes the time of each gradient of a model, by hooks; one backward is one update."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.sizes = [parameter.numel() for parameter in model.parameters()]
        self.began: list[Any] = []  # seconds, or events on a GPU
        self.ready: list[dict[int, Any]] = []  # of each backward, by the parameter's place
        model.register_forward_hook(self._watch)
        for place, parameter in enumerate(model.parameters()):
            parameter.register_post_accumulate_grad_hook(self._noting(place))

    def backward(self) -> Backward:
        """Medians over all backwards but the first ones, and the last, whose update has no end."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        first, last = 1 + int(WARM_UP * len(self.began)), len(self.began) - 1
        steps, shares = [], []
        ready: dict[int, list[float]] = {place: [] for place in range(len(self.sizes))}
        for at in range(first, last):
            steps.append(self._ms(self.began[at], self.began[at + 1]))
            after = {
                place: self._ms(self.began[at], when) for place, when in self.ready[at].items()
            }
            shares.append(max(after.values()) / steps[-1])
            for place, ms in after.items():
                ready[place].append(ms / max(after.values()))
        gradients = [
            Gradient(self.sizes[place], statistics.median(found)) for place, found in ready.items()
        ]
        gradients.sort(key=lambda gradient: gradient.ready)
        return Backward(gradients, statistics.median(shares), statistics.median(steps))

    def _watch(self, model: nn.Module, inputs: object, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(self._begin)

    def _begin(self, _: Tensor) -> None:
        self.began.append(self._now())
        self.ready.append({})

    def _noting(self, place: int) -> Callable[[Tensor], None]:
        def note(_: Tensor) -> None:
            self.ready[-1][place] = self._now()

        return note

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # on the stream that the gradient is made on
        return event

    def _ms(self, since: Any, until: Any) -> float:
        on_gpu = self.device.type == "cuda"
        return since.elapsed_time(until) if on_gpu else 1e3 * (until - since)


def demo(steps: str, flags: Sequence[str]) -> Backward:
    made: list[Stamps] = []

    def prepare(unet: nn.Module, device: torch.device, **told: object) -> Prepared:
        prepared = own(unet, device, **told)  # pyright: ignore
        made.append(Stamps(prepared.unet, device))
        return prepared

    own = job.prepare_unet
    with patch.object(job, "prepare_unet", prepare):
        demo_steps.main([steps, "ours", *flags])
    return made[0].backward()


def sd15(batch: int) -> Backward:
    set_numerics(PrecisionConfig())
    torch.cuda.set_stream(torch.cuda.Stream())
    case = update.case_of(f"sd15-256:{batch}x1")
    made = update.Job(case, update.WAYS["fused+compile"], "cuda")
    stamps = Stamps(made.unet, made.device)
    for _ in range(UPDATES):
        made.step()
    return stamps.backward()


def exchanged(sizes: Sequence[int], world: World) -> list[list[float]]:
    """Milliseconds of each all-reduce, by size in bytes; ranks begin together."""
    taken = []
    for size in sizes:
        values = torch.zeros(size // 4, device=world.device)
        runs = []
        for _ in range(EXCHANGES_WARM_UP + EXCHANGES):
            world.barrier()
            since = time.perf_counter()
            dist.all_reduce(values)
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
            runs.append(1e3 * (time.perf_counter() - since))
        taken.append(runs[EXCHANGES_WARM_UP:])
    return taken


# Counted, where there is no GPU.


def counted(pixels: int) -> Backward:
    """Of Stable Diffusion 1.5, a model: every FLOP takes as long as any other.

    The share is that of the FLOPs of forward and backward; an optimizer takes from it.
    """
    ready: list[tuple[int, int]] = []
    with (
        FakeTensorMode(),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),  # whose products are counted
    ):
        unet = update.make_unet()

        def note(parameter: Tensor) -> None:
            ready.append((parameter.numel(), counter.get_total_flops()))

        for parameter in unet.parameters():
            parameter.register_post_accumulate_grad_hook(note)
        latents = torch.empty(1, 8, pixels // 8, pixels // 8)
        text = torch.empty(1, TEXT_TOKENS, unet.config["cross_attention_dim"])
        out = unet(latents, torch.zeros(1, dtype=torch.int64), text, return_dict=False)[0]
        forward = counter.get_total_flops()
        out.sum().backward()
        everything = counter.get_total_flops()
    backward = everything - forward
    gradients = [Gradient(size, (flops - forward) / backward) for size, flops in ready]
    return Backward(gradients, backward / everything, None)


def main(argv: Sequence[str] | None = None) -> int:
    kind, file, *words = sys.argv[1:] if argv is None else argv
    path = Path(file)
    if kind == "demo":
        path.write_text(json.dumps(demo(words[0], words[1:])))
    elif kind == "sd15":
        path.write_text(json.dumps(sd15(int(words[0]))))
    elif kind == "exchange":
        world = make_world()
        world.start()
        taken = exchanged([int(word) for word in words], world)
        if world.is_main:
            path.write_text(json.dumps(taken))
        world.stop()
    else:
        raise ValueError(f"demo, sd15 or exchange; got {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
