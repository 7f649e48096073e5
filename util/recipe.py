"""Settings of the training, and advice for runs that they do not fit."""

from dataclasses import dataclass

from util import averages
from util.flags import fraction, nonnegative, nonnegative_int, positive, positive_int
from util.lr_sched import SCHEDULES, learning_rate
from util.settings import Settings, setting
from util.table import Table

# name -> function (model, recipe) that gives the optimizer
OPTIMIZERS = Table(
    "optimizer",
    {
        "adamw": "util.optimizers:adamw",
        "muon": "util.optimizers:muon",
    },
)


@dataclass(frozen=True)
class Recipe(Settings):
    """The training recipe; the defaults are the published ones."""

    epochs: int = setting(400, "passes over the data", type=positive_int)
    batch_size: int = setting(16, "images per batch and process", type=positive_int)
    accum_iter: int = setting(1, "batches per optimizer step", type=positive_int)
    lr: float = setting(
        None, "peak learning rate", type=nonnegative, otherwise="--blr × total batch / 256"
    )
    blr: float = setting(1e-4, "learning rate per 256 images per step", type=nonnegative)
    min_lr: float = setting(0.0, "learning rate at the end of a cosine", type=nonnegative)
    lr_schedule: str = setting("constant", "learning rate after warm-up", choices=SCHEDULES)
    warmup_epochs: float = setting(100, "epochs of linear warm-up from 0", type=nonnegative)
    weight_decay: float = setting(
        0.02, "weight decay, except of biases, 1-D parameters and the head", type=nonnegative
    )
    grad_clip: float = setting(3.0, "maximum gradient norm; 0 is no limit", type=nonnegative)
    optimizer: str = setting(
        "adamw",
        "optimizer; muon: of the matrices of hidden layers, with AdamW for all else",
        choices=OPTIMIZERS,
    )
    ema_rate: float = setting(0.9999, "decay rate of the averaged weights", type=fraction)
    ema_images: tuple = setting(
        None,
        "half-lives of averaged weights, in images, in place of --ema_rate; the first is that of "
        "the main average, each other one is kept, sampled and evaluated beside it",
        type=positive_int,
        nargs="+",
        metavar="N",
        otherwise="one average, by --ema_rate",
    )
    mask_ratio_per_rank: bool = setting(
        False,
        "each process draws its own mask ratio, as in the published code; processes then wait for "
        "one another",
    )
    compile: bool = setting(
        False,
        "compile the blocks and the head with torch.compile: takes minutes at the start, may save "
        "time per step; says which",
    )
    fsdp: bool = setting(
        False,
        "each process holds only a part of the weights, gradients, moments and EMA (FSDP): less "
        "memory, more communication, the same results and checkpoints",
    )

    def total_batch(self, processes):
        """Images per optimizer step."""
        return self.batch_size * self.accum_iter * processes

    def resolved(self, processes):
        """The recipe with the peak learning rate as a number."""
        if self.lr is not None:
            return self
        return self.but(lr=self.blr * self.total_batch(processes) / 256)

    def rate(self, epoch):
        """The learning rate at a fractional epoch."""
        return learning_rate(
            epoch,
            lr=self.lr,
            warmup_epochs=self.warmup_epochs,
            epochs=self.epochs,
            min_lr=self.min_lr,
            schedule=self.lr_schedule,
        )

    def ema_rates(self, images):
        """Name -> decay rate of each average, the main one first. images: those of a step."""
        if not self.ema_images:
            return {"ema": self.ema_rate}
        half_lives = averages.names_of(self.ema_images)
        return {name: averages.rate_of(each, images) for name, each in half_lives.items()}

    def check_steps(self, loader, class_num, processes):
        """Optimizer steps per epoch; prints them and any misfits. Raises ValueError for none."""
        from util.dist import print0

        steps, total = loader.steps // self.accum_iter, self.total_batch(processes)
        if not steps:
            raise ValueError(f"--accum_iter {self.accum_iter}: an epoch has {loader.steps} batches")
        print0(
            f"{loader.images} images of {class_num} classes, {steps} steps of {total} per epoch, "
            f"lr {self.lr:.2e}"
        )
        for line in self.misfits(steps, processes):
            print0(f"NOTE: {line}")
        return steps

    def misfits(self, steps, processes):
        """Sentences on settings that do not fit a run with `steps` per epoch, and what would."""
        if self.warmup_epochs >= self.epochs:
            fitting = max(1, self.epochs // 20) if self.epochs > 1 else 0
            yield (
                f"the warm-up of {self.warmup_epochs:g} epochs is not over in {self.epochs} "
                f"epochs; --warmup_epochs {fitting} would fit"
            )
        total = steps * self.epochs
        if self.ema_images:
            yield from averages.misfits(self.ema_images, total * self.total_batch(processes))
            return
        # an average holds 5% of the initial weights after 3 horizons, and 37% after one
        horizon = 1 / (1 - self.ema_rate) if self.ema_rate < 1 else float("inf")
        if self.ema_rate and 3 * horizon > total:
            fitting = max(0.0, 1 - 10 / total)
            yield (
                f"the EMA remembers {horizon:.0f} steps, the run has {total}; "
                f"--ema_rate {fitting:.4g} would fit"
            )


@dataclass(frozen=True)
class Output(Settings):
    """Where a run writes, what it resumes, when it saves, and which checkpoints it keeps."""

    output_dir: str = setting("./output_dir", "checkpoints", metavar="DIR")
    log_dir: str = setting(
        None, "TensorBoard and log.jsonl", metavar="DIR", otherwise="--output_dir"
    )
    resume: str = setting(
        "",
        "a checkpoint, or a folder holding checkpoint-last.pth: continue where it was saved; a "
        "folder without one starts a new run (default: a new run)",
        metavar="PATH",
    )
    init_from: str = setting(
        "",
        "begin a new run with the EMA weights of this checkpoint, as far as they fit: other "
        "classes, another size or head (default: new weights)",
        metavar="PATH",
    )
    resume_anyway: bool = setting(
        False, "resume although tokenizer or classes are not those of the checkpoint"
    )
    start_epoch: int = setting(0, "first epoch, unless resumed", type=nonnegative_int)
    save_last_freq: int = setting(5, "epochs between checkpoints", type=positive_int)
    save_steps: int = setting(
        None, "save every N optimizer steps as well", type=positive_int, otherwise="epochs only"
    )
    save_minutes: float = setting(
        None,
        "save as well when the last checkpoint is so many minutes old",
        type=positive,
        otherwise="epochs only",
    )
    keep: int = setting(
        2,
        "checkpoints that are kept: checkpoint-last.pth, and before it checkpoint-step….pth",
        type=positive_int,
    )
    keep_every: int = setting(
        None,
        "keep one as checkpoint-epoch….pth every N epochs, for good",
        type=positive_int,
        otherwise="none",
    )
    eval_freq: int = setting(
        40,
        "epochs between grids of samples, and between evaluations with --online_eval",
        type=positive_int,
    )
    dry_run: bool = setting(
        False,
        "build everything, take two steps, save and sample once, report memory and time, and "
        "leave nothing behind",
    )
