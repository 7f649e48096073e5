"""Evaluate a tokenizer on a data set, or train one first. `python main_tokenizer.py --help`.

With --epochs, a network is trained from scratch, by the losses of models/objective.py. It is
written to tokenizer.ckpt with all that is known of it; every script takes it by --vae_path.

Evaluation prints, and appends to results.jsonl, the Fréchet distance between reconstructed and
original images (rFID), PSNR, SSIM, and the mean and standard deviation of the latents; --vae_scale
is one over the latter. For a discrete tokenizer it gives the fraction of codes in use instead. It
writes reconstructions.png, images above their reconstructions.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from models import presets
from models.autoencoder_settings import (
    NETWORKS,
    RECIPE,
    Changes,
    Losses,
    Network,
    Training,
    check_losses,
)
from models.settings import TOKENIZERS
from util.data import describe_paths, has_images, kind_or_folder
from util.data.settings import Reading
from util.evaluation.settings import NETWORK, Evaluation, Images
from util.files import make_folder
from util.flags import (
    Parser,
    add_machine_flags,
    add_tokenizer_flags,
    machine,
    run,
)
from util.recipe import Output, Recipe
from util.run import last_words
from util.run.tracker import add_tracker_flag
from util.settings import add_flags, from_flags
from util.sizes import plain, sides

MEASURED = 10_000  # images, by which the scale is measured before training has ended
CHECKED = "data_checked_{}.txt"  # which images of a split are intact
SHOWN = 8  # images whose reconstructions are shown
# fields of the recipe and of the output that apply to networks
OFF = {"warmup_epochs": 0, "grad_clip": 0.0, "ema_rate": 0.0}
OUTPUT = [name for name in Output.names() if name not in ("init_from", "start_epoch")]


def get_parser():
    parser = Parser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default="./data/imagenet",
        metavar="PATH",
        help=describe_paths(),
    )
    add_flags(group, Images)
    add_flags(group, Reading)
    add_tokenizer_flags(parser, TOKENIZERS)
    parser.add_argument(
        "--describe",
        action="store_true",
        help="print what the file at --vae_path says of itself, and exit",
    )
    group = parser.add_argument_group(
        "training",
        f"of a {', '.join(NETWORKS)} network on the train split, with random flips if the data "
        "set has them; --batch_size and --vae_embed_dim (here 4, for pca 24) apply as well",
    )
    group.add_argument(
        "--preset",
        choices=presets.NETWORK_PRESETS,
        metavar="NAME",
        help="a named set of flags: a published recipe, or small, which fits a small data set; "
        "flags on the command line override it (default: none)",
    )
    add_flags(group, Training)
    add_flags(group, Recipe, RECIPE, lr=1e-3, lr_schedule="cosine", **OFF)
    add_flags(parser.add_argument_group("network"), Network)
    add_flags(parser.add_argument_group("losses"), Losses)
    add_flags(
        parser.add_argument_group("changes of latents in training", "Off unless given."), Changes
    )
    group = parser.add_argument_group("output")
    add_flags(group, Output, OUTPUT)
    add_tracker_flag(group)
    group = parser.add_argument_group("metrics")
    group.add_argument(
        "--per_channel",
        action="store_true",
        help="one scale and shift per channel of the latents, which then has mean 0 and standard "
        "deviation 1; off: one scale for all, no shift",
    )
    add_flags(group, Evaluation, only=(*NETWORK, "stats_dir"))
    add_machine_flags(parser, num_workers=10)
    return parser


@dataclass
class Run:
    """The objects of one run of this script."""

    args: object  # parsed flags
    device: object
    precision: str
    images: object  # those to evaluate
    extractors: dict  # name -> Extractor
    argv: list = None  # the flags as they were given; None for those of the process
    checkpoint: dict = None  # that is resumed, if any
    path: Path = None  # of it

    @property
    def file(self):
        """The file of the trained network."""
        return Path(self.args.output_dir) / "tokenizer.ckpt"

    def described(self, network, dataset, epochs):
        """What is said of a network that was trained for so many epochs, name -> plain data."""
        from models.autoencoders import described

        return described(self.args, network, dataset, epochs, self.precision, self.checkpoint)

    def loading(self):
        """Arguments of engine_tokenizer for reading a data set in evaluation."""
        how = {"batch_size": self.args.batch_size, "num_workers": self.args.num_workers}
        return {**how, "device": self.device, "seed": self.args.seed}


def main(argv=None):
    args, given = presets.apply_to_network(get_parser(), argv)
    if args.describe:
        if "vae_path" not in given:
            raise ValueError("--describe: expected the --vae_path of a file")
        from models import tokenizer_file

        print(*tokenizer_file.describe(args.vae_path), sep="\n")
        return
    if "img_size" not in given:
        args.img_size = kind_or_folder(args.data_path).defaults.get("img_size", args.img_size)
    if args.preset not in presets.FITTED:
        check(args, given)

    from models.found import complete, fit_tokenizer
    from util import dist
    from util.precision import pick_precision
    from util.run.resume import hold_output

    device = dist.init(**machine(args))
    if args.preset in presets.FITTED:
        fit_tokenizer(args, given)
        check(args, given)
    elif not args.epochs:
        complete(args, given)
    precision = pick_precision(args.precision, device)  # also affects convolutions in evaluation
    make_folder(args.output_dir, "--output_dir")
    with hold_output(args) if args.epochs else nullcontext():
        last_words.set_folder(args.output_dir, "main_tokenizer")
        work(args, given, argv, device, precision)


def work(args, given, argv, device, precision):
    """Train a network, if there are --epochs, and evaluate it."""
    import engine_tokenizer as engine
    from models.autoencoders import resumed
    from util.data import match_channels

    held = resumed(args, given) if args.epochs else (None, None)
    images = get_images(args)
    channels, *size = images[0][0].shape
    epochs, tokenizer = 0, None if args.epochs else get_tokenizer(args, channels, args.vae_path)
    how = args.data_path, size, from_flags(Reading, args), device
    extractors = engine.open_extractors(from_flags(Evaluation, args), *how)
    this = Run(args, device, precision, images, extractors, argv, *held)
    if not tokenizer:
        epochs = train(this, given, plain(size))
        if args.dry_run:
            return
        tokenizer = get_tokenizer(args, channels, this.file)
    match_channels(images.dataset, tokenizer, args.channels)
    measure(this, tokenizer, epochs)


def check(args, given):
    """Raises ValueError for flags that contradict each other."""
    if args.per_channel and args.token_norm:
        raise ValueError("--per_channel: the latents of --token_norm have one norm, leave it out")
    for name in ("vae_path", "vae_scale", "vae_shift"):
        if args.epochs and name in given:
            raise ValueError(
                f"--{name} {getattr(args, name)}: with --epochs the network is trained from "
                "scratch and its scale measured; leave the flag out"
            )
    if args.epochs and args.tokenizer not in NETWORKS:
        raise ValueError(
            f"--epochs {args.epochs}: expected 0 for the tokenizer {args.tokenizer}; what can "
            f"be trained: {', '.join(NETWORKS)}"
        )
    check_losses(args, given)
    only = {*Training.names(), *RECIPE, *Network.names(), *Losses.names(), *Changes.names()}
    idle = given & {*only, *OUTPUT} - {"epochs", "output_dir", "log_dir"}
    if idle and not args.epochs:
        name = min(idle)
        raise ValueError(f"--{name} {getattr(args, name)}: is for training, pass --epochs")
    if args.tokenizer in NETWORKS and not args.epochs and "vae_path" not in given:
        raise ValueError(
            f"--tokenizer {args.tokenizer}: expected --epochs to train one, or a --vae_path"
        )


# ---- measuring ------------------------------------------------------------------------------


def get_tokenizer(args, channels, path):
    """The tokenizer to measure, in the file at `path`. Raises ValueError for flags that do not fit
    it."""
    from models import arguments_of_tokenizer, build_tokenizer

    own = arguments_of_tokenizer(args.tokenizer, channels=channels, vae_path=str(path))
    own |= {"scale": args.vae_scale, "shift": args.vae_shift}
    tokenizer = build_tokenizer(args.tokenizer, **own)
    if args.epochs:  # the flags were those of the trained network
        return tokenizer
    if args.vae_embed_dim not in (None, tokenizer.channels):
        raise ValueError(
            f"--vae_embed_dim {args.vae_embed_dim}: {args.tokenizer} has {tokenizer.channels}"
        )
    if args.per_channel and tokenizer.num_codes:
        raise ValueError(f"--per_channel: the code indices of {args.tokenizer} have no scale")
    return tokenizer


def measure(this, tokenizer, epochs=None, **report):
    """Evaluate a tokenizer on the images; report metrics and write reconstructions.

    epochs: those that its network was trained for, if any. report: arguments of
    util.evaluation.reports.report, such as a logger.
    """
    import engine_tokenizer as engine
    from util.dist import is_main, print0

    args, images = this.args, this.images
    print0(f"{len(images)} images, {args.tokenizer} on {this.device}")
    if epochs and args.split == "train":
        print0("NOTE: they are those of the training; --split has others")
    tokenizer.to(this.device)
    metrics = engine.measure(
        tokenizer,
        images,
        this.extractors,
        **this.loading(),
        per_channel=args.per_channel and not tokenizer.num_codes,
        settings=stated(this, tokenizer) | ({"epochs": epochs} if epochs else {}),
        output_dir=args.output_dir,
        **report,
    )
    if is_main():
        pass_on(this, metrics)


def pass_on(this, metrics):
    """Write metrics into the file of a trained network; of others, print scale and shift."""
    from models import tokenizer_file
    from util.dist import print0

    if this.args.epochs:  # scale and shift are in the file
        found = {"extractor": next(iter(this.extractors), "none"), "images": len(this.images)}
        found |= {name: value for name, value in metrics.items() if not isinstance(value, list)}
        tokenizer_file.add_metrics(this.file, found)
    elif "scale_per_channel" in metrics:
        print0(f"--vae_scale={joined(metrics['scale_per_channel'])}")
        print0(f"--vae_shift={joined(metrics['shift_per_channel'])}")


def stated(this, tokenizer):
    """All that the metrics depend on, for the report."""
    from util.evaluation.features import described
    from util.weights import digest

    args, images = this.args, this.images
    settings = {"images": len(images), "data_path": args.data_path, "split": args.split}
    settings |= {"img_size": plain(images[0][0].shape[1:]), "tokenizer": args.tokenizer}
    settings |= {"scale_used": tokenizer.scale}
    settings |= {"shift_used": tokenizer.shift} if tokenizer.shift else {}
    settings |= {"weights_sha256": digest(tokenizer.state_dict()), "seed": args.seed}
    return settings | described(this.extractors)


def joined(numbers):
    """A list of numbers in the format of a flag, to six digits."""
    return ",".join(f"{number:.6g}" for number in numbers)


def get_images(args):
    """The images to evaluate, (image in [−1, 1], label) each. Raises ValueError."""
    from util.data.loader import evenly

    dataset = open_split(args, args.split, flip=False)
    if not has_images(args.data_path):
        raise ValueError(f"--data_path {args.data_path}: a stream, expected images to measure")
    return evenly(dataset, args.num_images)


def open_split(args, split, flip):
    """A split of the data set, its images checked. Raises ValueError."""
    from util.data import open_data

    record = Path(args.output_dir) / CHECKED.format(split)
    reading = from_flags(Reading, args)
    reading = reading.but(flip=reading.flip and flip)
    how = {"workers": args.num_workers, "record": record}
    return open_data(args.data_path, split, args.img_size, reading, **how)


# ---- training -------------------------------------------------------------------------------


def train(this, given, img_size):
    """Train a network on images of this size, and write its file; returns the epochs done."""
    import torch

    import engine_tokenizer as engine
    from models.autoencoders import new_network, unused
    from util.dist import print0

    args = this.args
    dataset = open_split(args, "train", flip=True)
    own = from_flags(Network, args), args.vae_embed_dim, dataset.channels, img_size
    torch.manual_seed(args.seed)  # initial weights, the same on every process
    network = new_network(args.tokenizer, *own).to(this.device)
    if idle := sorted(unused(args.tokenizer) & given):
        print0(f"NOTE: not used by {args.tokenizer}: {', '.join(f'--{name}' for name in idle)}")
    epochs = args.epochs
    if network.fitted:
        engine.fit_patches(network, dataset, **this.loading())
    else:
        network, epochs = optimize(this, network, dataset)
    if not args.dry_run:
        write(this, network, dataset, epochs)
    return epochs


def optimize(this, network, dataset):
    """Train a network by gradients, and log; returns (the one of averaged weights, epochs done)."""
    import engine_tokenizer as engine
    from util.dist import print0, world_size
    from util.run.dry import dry_run
    from util.run.page import Page
    from util.run.saver import Saver
    from util.run.training import train_epochs

    args = this.args
    recipe = from_flags(Recipe, args).resolved(world_size())
    loader = get_loader(this, dataset, network, recipe.total_batch(world_size()))
    state, objective = start_state(this, network, recipe, loader)
    for line in recipe.misfits(loader.steps // recipe.accum_iter, world_size()):
        print0(f"NOTE: {line}")
    how = {"device": this.device, "precision": this.precision, "seed": args.seed}
    changes = from_flags(Changes, args)
    run_epoch = engine.epoch_runner(network, changes, state, objective, recipe, **how)
    saver = Saver(
        state,
        from_flags(Output, args),
        {**this.described(network, dataset, args.epochs), "latent_range": 0.0},
        vars(args),
        steps=loader.steps // recipe.accum_iter,
        accum_iter=recipe.accum_iter,
        resumed=this.path,
    )
    if args.dry_run:
        images = next(iter(loader.epoch(0)))[0][:1].to(this.device)
        left = recipe.epochs * saver.steps - saver.step
        dry_run(saver, run_epoch, loader, partial(network, images), left, this.device)
    elif state.epoch >= recipe.epochs:
        print0(f"nothing to train: {state.epoch} epochs are done, --epochs is {recipe.epochs}")
    else:
        page = Page(args, get_parser(), this.argv, recipe.epochs, "main_tokenizer.py")
        follow = partial(after_epoch, this, state, dataset, page)
        run_epoch = partial(run_epoch, loader=loader)
        train_epochs(saver, run_epoch, follow, page, recipe.epochs, this.path)
        print0(f"done: {saver.last}, reconstructions and curves in {page.path}")
    return state.network("ema"), state.epoch


def get_loader(this, dataset, network, total):
    """The loader of the training images. total: images per optimizer step, of all processes.

    Raises ValueError for less than a step per epoch.
    """
    from util.data.loader import open_loader
    from util.dist import print0

    args = this.args
    pin = args.pin_mem and this.device.type == "cuda"
    loader = open_loader(dataset, args.batch_size, args.num_workers, args.seed, pin)
    steps = loader.steps // args.accum_iter
    if not steps:
        raise ValueError(f"--accum_iter {args.accum_iter}: an epoch has {loader.steps} batches")
    size = sum(p.numel() for p in network.parameters())
    print0(f"{loader.images} images, {steps} steps of {total} per epoch, {size:,} parameters")
    return loader


def start_state(this, network, recipe, loader):
    """(TrainState, Objective) of a new run, or of the one that is resumed. Raises ValueError."""
    import engine_tokenizer as engine
    from models.discriminator import check_sides
    from util.dist import print0, world_size
    from util.run.record import check_resumed, describe
    from util.run.training import restore

    args, losses = this.args, from_flags(Losses, this.args)
    if args.dry_run:
        losses = losses.but(disc_start=0)  # it shows what the run needs at most
    if losses.disc_weight:
        check_sides(losses.disc_layers, sides(args.img_size))
    how = {"precision": this.precision, "batch_images": recipe.batch_size * world_size()}
    how |= {"device": this.device, "seed": args.seed}
    state, objective = engine.new_state(network, recipe, losses, **how)
    if not objective.perceptual:
        print0("NOTE: without a perceptual loss, reconstructions are blurred; see --perceptual")
    listing = Path(args.output_dir) / CHECKED.format("train")
    more = {"cached": False, "listing": listing, "precision": this.precision}
    state.record = describe(None, loader, recipe, state.optimizer, **more)
    if this.checkpoint:
        before = this.checkpoint["args"], this.checkpoint["record"]
        now, anyway = (vars(args), state.record), args.resume_anyway
        notes = list(check_resumed(this.path, now, before, anyway=anyway))
        restore(state, this.checkpoint, this.path, notes, recipe.accum_iter, loader.steps)
    return state, objective


def after_epoch(this, state, dataset, page, logger, step):
    """When due, write pictures and the file of the network; measure it with --online_eval."""
    args, last = this.args, state.epoch == this.args.epochs
    if state.epoch % args.eval_freq and not last:
        return
    network = state.network("ema")
    draw_pictures(this, network, state.epoch, logger, step)
    if not last:  # it is written and measured after training
        write(this, network, dataset, state.epoch, MEASURED)
        if args.online_eval:
            tokenizer = get_tokenizer(args, dataset.channels, this.file)
            measure(this, tokenizer, state.epoch, logger=logger, step=step)
    page.write()


def draw_pictures(this, network, epoch, logger, step):
    """Save a few of the images above their reconstructions, and their latents."""
    import torch

    import engine_tokenizer as engine
    from util.data.loader import evenly
    from util.dist import is_main

    if not is_main():
        return
    images = torch.stack([image for image, _ in evenly(this.images, SHOWN)]).to(this.device)
    folder = Path(this.args.output_dir) / "samples"
    make_folder(folder, "--output_dir")
    engine.log_pictures(network, images, folder, epoch, logger, step, this.args.seed)


def write(this, network, dataset, epochs, most=None):
    """Measure the scale of the latents, and write the network's file.

    epochs: those that it was trained for. most: number of images at most, by which the scale is
    measured; None for all.
    """
    import engine_tokenizer as engine
    from models import tokenizer_file
    from util import dist
    from util.data.loader import evenly

    args = this.args
    per_channel = args.per_channel or network.fitted
    how = {**this.loading(), "per_channel": per_channel}
    scale, shift = network.fixed_scale, 0.0
    if not scale:
        scale, shift = engine.latent_scale(network, evenly(dataset, most), **how)
    if dist.is_main():
        own = this.described(network, dataset, epochs)
        del own["network"]  # the file takes it from the network itself
        tokenizer_file.write(this.file, network, scale, shift, **own)
    dist.barrier()
    shown = f"{scale:.4f}" if not shift else f"{joined(scale)}, shift {joined(shift)}"
    dist.print0(f"{this.file}: scale {shown}")


if __name__ == "__main__":
    run(main, resumes=True)
