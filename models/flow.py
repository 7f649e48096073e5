"""A rectified flow as head: a small MLP predicts the velocity of a token (diffusion/flow.py)."""

from functools import cache

from diffusion.flow import FLOW_SOLVERS, RectifiedFlow, flow_steps
from diffusion.schedule import annealing
from models.diffloss import DenoisingMLP, DiffLoss, key_of
from models.fast.denoiser import FastSampler
from models.heads import Head
from models.settings import TIMESTEPS


class Flow(DiffLoss):
    """The head of a model of continuous tokens. Arguments as of DiffLoss, where both have them.

    num_sampling_steps: even steps from noise to token, of which Heun's take two evaluations each.
    timesteps: row of TIMESTEPS; the logit-normal if not given (Esser et al. 2024).
    """

    usual = {"solver": "euler", "num_sampling_steps": "25"}
    solvers = FLOW_SOLVERS
    without_effect = ("max_timestep",)  # no singularity at the end

    def __init__(
        self,
        target_channels,
        z_channels,
        depth,
        width,
        num_sampling_steps="25",
        grad_checkpointing=False,
        diffusion_batch_mul=1,
        timesteps=None,
    ):
        Head.__init__(self)
        self.in_channels = target_channels
        self.net = DenoisingMLP(
            target_channels, width, z_channels, depth, grad_checkpointing, target_channels
        )
        self.diffusion_batch_mul = diffusion_batch_mul
        self.train_diffusion = RectifiedFlow()
        self.timesteps = TIMESTEPS[timesteps or "logit-normal"]
        self.spacing = num_sampling_steps or self.usual["num_sampling_steps"]
        self.quarters = None
        self.fast = FastSampler()
        flow_steps(FLOW_SOLVERS["euler"], self.spacing)  # raises now for steps that do not fit

    def denoising_losses(self, network, target, t, noise):
        """See `RectifiedFlow.training_losses`."""
        return self.train_diffusion.training_losses(network, target, t, noise)

    def plan(self, sampling):
        """See `Diffused.plan`; no step draws noise."""
        if sampling.temperature < 0:
            raise ValueError(f"temperature {sampling.temperature}: expected 0 or more")
        (name, solver), count = self.solver(sampling), annealing(sampling.anneal)
        spacing = sampling.num_sampling_steps or self.spacing

        @cache
        def named_steps(spacing):
            return key_of(name, flow_steps(solver, spacing))

        named_steps(spacing)  # raises now for steps that do not fit
        return (lambda done: named_steps(count(done) if count else spacing)), 0

    def scale_start(self, noise, sampling):
        """The noise at which the flow starts, scaled by the temperature."""
        return noise * sampling.temperature

    def advice(self, sampling):
        """See Head."""
        return Head.advice(self, sampling)
