"""All that an update takes, of a tiny model, on the device that there is."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from fusedit.trainer.config import DiffusionConfig, OptimConfig
from fusedit.trainer.data import PixelBatch
from fusedit.trainer.diffusion import Diffusion, trained_scheduler
from fusedit.trainer.ema import Ema
from fusedit.trainer.encoders import Encoders, SideStream
from fusedit.trainer.families import STABLE_DIFFUSION, TextEncoder
from fusedit.trainer.loss import EditLoss
from fusedit.trainer.optim import make_optimizer
from fusedit.trainer.power_ema import PowerEma
from fusedit.trainer.step import LossScale, Rates, SpikeGuard, StepResult, train_step
from fusedit.trainer.unet import grow_conv_in, prepare_unet
from fusedit.trainer.world import World

# Each option that changes what is computed in a step, and more averages than one.
OPTIONS = {
    "options": DiffusionConfig(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        min_timestep=100,
        max_timestep=1000,
        snr_gamma=5.0,
        noise_offset=0.1,
        input_perturbation=0.1,
    ),
    "lengths": (0.05, 0.1),
}


class Job:
    """Encoders, UNet, loss and optimizer.

    Args:
        base: of `save_tiny_pipeline`.
        fp16: autocast to fp16 on a GPU; the loss is scaled anywhere.
        options: of the loss.
        lengths: of averages beside the usual one.
        precision: of `prepare_unet`.
    """

    def __init__(
        self,
        base,
        device: str,
        *,
        fused: bool = False,
        fp16: bool = False,
        lr=1e-4,
        options: DiffusionConfig | None = None,
        lengths: tuple[float, ...] = (),
        **precision,
    ) -> None:
        self.device, self.lr = torch.device(device), lr
        vae = AutoencoderKL.from_pretrained(base / "vae")
        clip = CLIPTextModel.from_pretrained(base / "text_encoder")
        text_encoder = TextEncoder(STABLE_DIFFUSION, {"text_encoder": clip})
        self.tokens = torch.full((2, 8), 3)
        dtype = torch.float16 if fp16 and device == "cuda" else torch.float32
        if precision.get("param_dtype") == "bf16":
            dtype = torch.bfloat16
        self.encoders = Encoders(vae, text_encoder, self.tokens[:1], self.device, dtype)
        self.aside = SideStream(self.device)
        unet = UNet2DConditionModel.from_pretrained(base / "unet")
        grow_conv_in(unet, "base")
        prepared = prepare_unet(unet, self.device, fused=device == "cuda", **precision)
        self.unet, self.masters = prepared.unet, prepared.masters
        scheduler = {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
        }
        options = options or DiffusionConfig()
        scheduler = trained_scheduler(scheduler, options)
        diffusion = Diffusion.from_scheduler(scheduler, 0.18215, self.device, options)
        null_text = self.encoders.null_text
        self.loss_fn = EditLoss(diffusion, (0.05, 0.05, 0.05), null_text, 5, dtype)
        if prepared.adapter is not None:
            self.loss_fn = prepared.adapter.drawing(self.loss_fn)
        self.parameters = prepared.parameters
        self.ema = Ema(self.parameters, 0.999)
        self.optimizer = make_optimizer(
            self.parameters,
            OptimConfig(),
            self.ema,
            self.masters,
            fused=fused,
            kept=[PowerEma(self.parameters, length) for length in lengths],
        )
        self.scale = LossScale(fp16, self.device)
        self.guard = SpikeGuard(10.0, True, self.device)

    def batch(self, first: int) -> PixelBatch:
        images = torch.randint(0, 256, (2, 2, 3, 16, 16), dtype=torch.uint8)
        positions = torch.arange(first, first + 2)
        batch = PixelBatch(*images, self.tokens, torch.zeros(2, 6), positions, torch.ones(2), ())
        if self.device.type != "cuda":
            return batch
        return PixelBatch(*(one.pin_memory() for one in batch[:-1]), ())

    def update(self, micro_batches, rates) -> StepResult:
        return train_step(
            self.unet, self.loss_fn, self.optimizer, self.scale, World(device=self.device),
            micro_batches, rates, slots=4, max_grad_norm=1.0, guard=self.guard,
        )  # fmt: skip

    def step(self, number: int, update=None) -> StepResult:
        """An update of the loop, from 1."""
        window = [self.batch(4 * number), self.batch(4 * number + 2)]
        weights = [averages.weight(number) for averages in self.optimizer.averages]
        rates = Rates.on(self.device, self.lr / number, *weights)
        samples = self.aside(lambda: [self.encoders.encode(batch) for batch in window])
        return (update or self.update)(samples, rates)

    def moved(self) -> dict[str, torch.Tensor]:
        """All that a step moves, by name."""
        everything = {f"parameter {name}": p for name, p in self.parameters.items()}
        everything |= {f"unet {name}": p for name, p in self.unet.named_parameters()}
        for index, averages in enumerate(self.optimizer.averages):
            everything |= {f"average {index} {n}": a for n, a in averages.averages.items()}
        everything |= {f"moment {path}": m for path, m in self.optimizer.state().items()}
        everything |= {"usual loss": self.guard.usual, "usual steps": self.guard.steps}
        return {name: value.detach().clone() for name, value in everything.items()}
