"""Train or evaluate a MAR. `python main_mar.py --help`; for several processes, use torchrun.

Flags become settings, settings become objects, and the engine does the work. Torch is imported
inside functions, so that a wrong flag is reported before torch is loaded.
"""

from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from models import presets
from models.settings import TOKENIZERS, Model, Sampling
from util import averages
from util.data import IMAGES_CHECKED, add_data_flags, check_data_set
from util.data.classes import known_names
from util.data.settings import Reading, Validation, check_validation, plain_reading
from util.evaluation.settings import Evaluation, Occasions
from util.files import make_folder
from util.flags import (
    Parser,
    add_machine_flags,
    add_tokenizer_flags,
    assignment,
    machine,
    run,
)
from util.labels import LABELS
from util.recipe import Output, Recipe
from util.run import last_words, stop
from util.run.tracker import add_tracker_flag
from util.settings import add_flags, destination, from_flags, said_flags

TOKENIZER_FLAGS = ("img_size", "vae_embed_dim")  # fields of Model among the tokenizer's flags


def get_parser():
    """The parser of all flags, most of which are fields of settings."""
    parser = Parser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("model")
    add_flags(group, Model, [name for name in Model.names() if name not in TOKENIZER_FLAGS])
    group.add_argument(
        "--model_kwargs",
        nargs="*",
        type=assignment,
        default=[],
        metavar="NAME=VALUE",
        help="arguments of the model's constructor that have no flag (default: none)",
    )
    group = parser.add_argument_group("training")
    group.add_argument(
        "--preset",
        choices=presets.PRESETS,
        metavar="NAME",
        help="a named set of flags, such as a row of the paper's tables; flags on the command line "
        "override it (default: none)",
    )
    group.add_argument(
        "--list_presets", action="store_true", help="list the presets with their flags, and exit"
    )
    add_flags(group, Recipe)
    add_data_flags(parser.add_argument_group("data"))
    group = parser.add_argument_group("output")
    add_flags(group, Output)
    add_tracker_flag(group)
    group = parser.add_argument_group("evaluation")
    add_flags(group, Occasions, out=[])
    add_flags(group, Validation)
    add_flags(group, Evaluation)
    add_tokenizer_flags(parser, TOKENIZERS)
    add_flags(
        parser.add_argument_group("sampling"),
        Sampling,
        Sampling.names(approximates=None),
    )
    add_flags(
        parser.add_argument_group("faster sampling that approximates", "Off unless given."),
        Sampling,
        Sampling.names(approximates=True),
    )
    add_machine_flags(parser, num_workers=10)
    return parser


@dataclass
class Run:
    """The objects of one run of this script."""

    args: object  # parsed flags
    config: dict  # model, tokenizer and sampling, as checkpoints hold them (see models)
    sampling: Sampling
    tokenizer: object
    device: object
    precision: str
    data: object = None  # the data set to train on; None if nothing is trained
    start: object = None  # see models.transfer; None for new weights
    held_out: object = None  # see models.held_out; None for no held-out loss
    argv: list = None  # the flags as they were given; None for those of the process

    def generation(self):
        """Arguments of `generate_images` that are the same for all samples."""
        return {
            "seed": self.args.seed,
            "batch_size": self.args.eval_bsz,
            "device": self.device,
            "precision": self.precision,
            "latent_range": self.config["latent_range"],
        }

    def labels(self):
        """(labels of --num_images samples, entries of reports on them)."""
        return LABELS[self.args.labels](self.args.num_images, self.config, self.args.seed)


def main(argv=None):
    """Run the script."""
    args, given = presets.apply(get_parser(), argv)
    if args.list_presets:
        print(presets.listing())
        return
    check(args, given)

    from models import checkpoint_config, compare_tokenizer
    from models.fast import products
    from models.found import open_training_data
    from models.held_out import open_held_out
    from models.stored import digests_of
    from models.transfer import open_start
    from util import dist
    from util.precision import pick_precision
    from util.run.resume import hold_output, load_resumed

    device = dist.init(**machine(args))
    precision = pick_precision(args.precision, device)
    with nullcontext() if args.evaluate else hold_output(args):
        last_words.set_folder(args.output_dir, "evaluate" if args.evaluate else "main_mar")
        checkpoint, path = load_resumed(args, needed=args.evaluate)
        products.adopt(products.stored(checkpoint))
        stored = checkpoint_config(checkpoint, path) if checkpoint else {}
        start = open_start(args, given, path)
        data = None if args.evaluate else open_training_data(args, given, stored)
        before = checkpoint["args"] if checkpoint else {}
        config, sampling, tokenizer = configure(args, given, stored, path, data, before)
        if args.evaluate:
            compare_tokenizer(tokenizer, stored | digests_of(checkpoint))
        this = Run(args, config, sampling, tokenizer.to(device), device, precision, data, start)
        this.argv = argv
        model = build(this)
        evaluator = open_evaluation(this)
        this.held_out = open_held_out(args, given, config, this.tokenizer, device, data)
        if args.evaluate:
            evaluate_checkpoint(this, model.eval(), checkpoint, path, evaluator)
        else:
            train(this, model, checkpoint, path, evaluator)


def check(args, given):
    """Raises ValueError for flags that contradict each other; creates the output folders."""
    make_folder(args.output_dir, "--output_dir")
    if args.log_dir:
        make_folder(args.log_dir, "--log_dir")
    if args.out and not args.evaluate:
        raise ValueError(f"--out {args.out[0]}: saves the images of --evaluate, which is not given")
    if args.init_from and args.evaluate:
        raise ValueError(f"--init_from {args.init_from}: begins training; --evaluate has --resume")
    averages.check(args, given)
    check_validation(args)
    measures = args.num_images and (args.evaluate or args.online_eval)
    if measures and args.reference == "auto" and "data_path" in given:
        check_data_set(args.data_path)


# ---- settings ------------------------------------------------------------------------------------


def configure(args, given, stored, source, data, before=None):
    """(configuration, Sampling, tokenizer) according to the flags.

    stored: the configuration in the checkpoint at `source` that is resumed, from which architecture
    and tokenizer come, or {}; a flag that contradicts its architecture is refused. data: the data
    set to train on, or None. before: the flags of the run that is resumed, if any.
    """
    from models.config import (
        as_flags,
        drop_prob,
        fit_preset,
        fit_steps,
        open_tokenizer,
        resolve_model,
    )
    from util.data import facts_of
    from util.dist import print0

    tokenizer, own = open_tokenizer(args, given, stored.get("tokenizer"), source, data)
    fit_preset(args, given, tokenizer, data, stored.get("model", {}), before or {})
    sampling = from_flags(Sampling, args)
    requested = from_flags(
        Model,
        args,
        class_num=args.class_num if "class_num" in given or not data else len(data.classes),
        label_drop_prob=drop_prob(args, given, stored, data.classes if data else []),
        order=sampling.order or "raster",  # the order that a causal model learns
        num_sampling_steps=sampling.num_sampling_steps,
        max_timestep=sampling.max_timestep,
    )
    fields = {field.name for field in Model.fields() if destination(field) in given}
    extra = dict(args.model_kwargs)
    model = resolve_model(requested, fields, extra, tokenizer, stored.get("model"), source)
    sampling = fit_steps(sampling, model, "num_iter" in given)
    config = {
        "model": model,
        "tokenizer": own,
        "sampling": sampling.asdict(),
        "latent_range": stored.get("latent_range", 0.0),
        "data": facts_of(data) if data else dict(stored.get("data") or {}),
    }
    if "init_from" in stored:
        config["init_from"] = stored["init_from"]
    said = {field.name for field in Reading.fields() if destination(field) in given}
    said = {name: value for name, value in said_flags(Reading, args).items() if name in said}
    read = config["data"].get("reading") or {}  # with which data are read, or were in training
    config["data"]["reading"] = said | read if data else read | said
    if (stored or args.init_from) and (note := presets.overridden(args, given, as_flags(config))):
        print0(f"NOTE: {note}")
    return config, sampling, tokenizer


# ---- objects -------------------------------------------------------------------------------------


def build(this):
    """A new model on the run's device, initialized with --seed. Raises ValueError."""
    import torch

    from models.config import build_checked
    from util.dist import print0

    torch.manual_seed(this.args.seed)  # the initial weights, the same on every process
    model = build_checked(this.config["model"], dict(this.args.model_kwargs)).to(this.device)
    model.check(this.sampling)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    name = this.config["model"]["name"]
    print0(f"{name}: {size:.1f}M parameters, {this.precision} on {this.device}")
    if this.start:
        this.start.load(model, this.config, this.tokenizer)
    return model


def open_evaluation(this):
    """The Evaluator, or None if nothing is to be evaluated."""
    if not (this.args.num_images and (this.args.evaluate or this.args.online_eval)):
        return None
    from util.evaluation.evaluator import open_evaluator

    return open_evaluator(
        from_flags(Evaluation, this.args),
        this.args.data_path,
        img_size=this.config["model"]["img_size"],
        num_images=this.args.num_images,
        device=this.device,
        classes=known_names(this.config),
        reading=plain_reading(this.config["data"], {"label_file": this.args.label_file}),
    )


def check_data(this):
    """Raises ValueError unless the training data are whole and fit the model and tokenizer."""
    from util.data import check_classes, check_images
    from util.data.cached import check_cache
    from util.sizes import sides
    from util.weights import digest

    args, tokenizer = this.args, this.tokenizer
    size, classes = this.config["model"]["img_size"], this.config["model"]["class_num"]
    if args.use_cached:
        name, path = (tokenizer.config.get(entry) for entry in ("name", "vae_path"))
        own = digest(tokenizer.state_dict())
        check_cache(args.cached_path, own, size, tokenizer_name=name, vae_path=path)
        this.data.expect((tokenizer.moment_channels, *sides(size, tokenizer.stride)))
    check_classes(this.data, classes, args.cached_path if args.use_cached else args.data_path)
    if not args.use_cached:
        check_images(this.data, args.num_workers, Path(args.output_dir) / IMAGES_CHECKED)


def open_loader(this):
    """The loader of images or, with --use_cached, of moments. Raises ValueError for bad data."""
    from util.data import loader
    from util.dist import print0

    check_data(this)
    if getattr(this.data, "flip", False):
        print0("half the images are mirrored at random; --no_flip: none")
    args, pin = this.args, this.args.pin_mem and this.device.type == "cuda"
    return loader.open_loader(this.data, args.batch_size, args.num_workers, args.seed, pin)


# ---- work ----------------------------------------------------------------------------------------


def evaluate_checkpoint(this, model, checkpoint, path, evaluator):
    """Evaluate a checkpoint: the held-out loss of its weights, and samples of the EMA."""
    import engine_mar as engine
    from util.checkpoint import steps_done, weights_in
    from util.logger import Logger
    from util.weights import load_strictly

    logger = Logger(this.args.log_dir or this.args.output_dir, resumed=True)
    if this.held_out:
        held = weights_in(checkpoint)
        for name in {id(held[name]): name for name in reversed(held)}.values():  # each once
            load_strictly(model, held[name], path)
            measure_held_out(this, model, name, logger, steps_done(checkpoint))
    if not evaluator:
        logger.close()
        return
    load_strictly(model, checkpoint["model_ema"], path)
    drawn = model, this.tokenizer, this.labels()[0], this.sampling
    how = {"weights": "ema", **this.generation()}
    how["source"] = engine.source_of(path, this.config["tokenizer"], this.tokenizer)
    with engine.open_images(this.args.out, *drawn, **how) as outputs, stop.deferred():
        evaluate(this, model, "ema", evaluator, logger, steps_done(checkpoint), outputs)
    logger.close()


def evaluate(this, model, weights, evaluator, logger, step, outputs=None):
    """Evaluate --num_images samples; returns the metrics, {} off rank 0. weights: their name."""
    import engine_mar as engine

    config, (labels, balance) = this.config["model"], this.labels()
    settings = {"weights": weights, **balance, "seed": this.args.seed, "dtype": this.precision}
    settings |= {"model": config["name"], "head": config.get("head")}
    settings |= {"max_timestep": config.get("max_timestep")}
    report = {"output_dir": this.args.output_dir, "logger": logger, "step": step}
    return engine.evaluate(
        model,
        this.tokenizer,
        labels,
        this.sampling,
        evaluator,
        settings=settings,
        outputs=outputs,
        **report,
        progress=f"evaluating {weights}",
        **this.generation(),
    )


def measure_held_out(this, model, weights, logger, step):
    """Report the held-out losses, if there are held-out images. weights: name of the weights."""
    if this.held_out:
        losses = this.held_out.losses(model, this.precision)
        this.held_out.report(losses, weights, this.args.output_dir, logger, step)


def train(this, model, checkpoint, path, evaluator):
    """Train from the checkpoint's place, or from the first epoch, to the last."""
    from util import dist
    from util.dist import print0
    from util.run.page import Page
    from util.run.saver import Saver
    from util.run.training import train_epochs

    args = this.args
    loader = open_loader(this)
    recipe = from_flags(Recipe, args).resolved(dist.world_size())
    steps = recipe.check_steps(loader, this.config["model"]["class_num"], dist.world_size())
    state = start_state(this, model, recipe, checkpoint, path, loader)
    if state.epoch >= recipe.epochs:
        print0(f"nothing to train: {state.epoch} epochs are done, --epochs is {recipe.epochs}")
        return
    run_epoch = epoch_runner(this, model, state, recipe, loader.steps)
    counts = {"steps": steps, "accum_iter": recipe.accum_iter}
    saver = Saver(state, from_flags(Output, args), this.config, vars(args), resumed=path, **counts)
    with closing(loader) if hasattr(loader, "close") else nullcontext():
        if args.dry_run:
            try_out(this, saver, run_epoch, loader, recipe.epochs * steps)
        else:
            page = Page(args, get_parser(), this.argv, recipe.epochs)
            follow = partial(after_epoch, this, state, recipe.epochs, evaluator, page)
            run_epoch = partial(run_epoch, loader=loader)
            train_epochs(saver, run_epoch, follow, page, recipe.epochs, path)
            print0(f"done: {saver.last}, samples and curves in {page.path}")


def epoch_runner(this, model, state, recipe, batches):
    """`engine_mar.train_one_epoch` with all arguments that are the same for every epoch.

    batches: those of an epoch.
    """
    import engine_mar as engine
    from util import dist

    if recipe.compile:
        from util.run.compiling import compile_model

        left = (recipe.epochs - state.epoch) * batches - state.batch
        compile_model(model, recipe.batch_size, this.device, this.precision, left)
    return partial(
        engine.train_one_epoch,
        dist.wrap(model, this.device),
        this.tokenizer,
        optimizer=state.optimizer,
        scaler=state.scaler,
        ema=state.emas,
        learning_rate=recipe.rate,
        device=this.device,
        precision=this.precision,
        cached=this.args.use_cached,
        accum_iter=recipe.accum_iter,
        grad_clip=recipe.grad_clip,
        seed=this.args.seed,
        shared_mask_ratio=not recipe.mask_ratio_per_rank,
    )


def try_out(this, saver, run_epoch, loader, steps):
    """--dry_run: report what a step, a checkpoint and a sample cost. steps: those of the run."""
    import engine_mar as engine
    from util.run.dry import dry_run

    network = saver.state.network("ema")
    how = this.generation() | {"latent_range": float("inf")}  # untrained samples need no advice
    draw = partial(engine.sample_grid, network, this.tokenizer, [0], this.sampling, **how)
    dry_run(saver, run_epoch, loader, draw, steps - saver.step, this.device)


def start_state(this, model, recipe, checkpoint, path, loader):
    """The TrainState of a new run, or of a run resumed from a checkpoint. Raises ValueError."""
    import engine_mar as engine
    from models.config import compare_with
    from models.fast import products
    from util.data.manifest import MANIFEST
    from util.dist import world_size
    from util.run.record import describe
    from util.run.training import restore

    args, total = this.args, recipe.batch_size * world_size()
    state = engine.new_state(model, recipe, this.device, this.precision, total)
    state.epoch = args.start_epoch
    listing = (args.output_dir, IMAGES_CHECKED)
    if args.use_cached:
        listing = (args.cached_path, MANIFEST)
    more = {"cached": args.use_cached, "listing": Path(*listing), "precision": this.precision}
    state.record = describe(this.tokenizer, loader, recipe, state.optimizer, **more)
    if this.device.type == "cpu":  # the same on every process; those of a checkpoint were adopted
        state.record["products"] = products.settle()
    if not checkpoint:
        return state
    averages.check_resumed(args.ema_images, checkpoint["args"].get("ema_images"), path)
    notes = compare_with(checkpoint, path, vars(args), this.config, state.record)
    restore(state, checkpoint, path, notes, recipe.accum_iter, loader.steps)
    return state


def after_epoch(this, state, epochs, evaluator, page, logger, step):
    """Sample grids and evaluate when due. epochs: those of the run. step: optimizer steps done."""
    from util.dist import print0
    from util.evaluation.metrics import ranking

    if state.epoch % this.args.eval_freq == 0 or state.epoch == epochs:
        found = {}
        for name in state.networks():
            draw_grid(this, state, name, logger, step)
            measure_held_out(this, state.network(name), name, logger, step)
            if this.args.online_eval:
                network = state.network(name)
                found[name] = evaluate(this, network, name, evaluator, logger, step)
        for line in ranking(found):
            print0(line)
        page.write()


def draw_grid(this, state, name, logger, step):
    """Save a grid of two images from each of up to ten classes, spread evenly, at fixed seeds."""
    import engine_mar as engine
    from util.images import save_image

    classes = this.config["model"]["class_num"]
    columns = min(classes, 10)
    labels = [i * classes // columns for i in range(columns)] * 2
    image = engine.sample_grid(
        state.network(name), this.tokenizer, labels, this.sampling, columns, **this.generation()
    )
    if image is not None:
        file = f"samples/epoch{state.epoch:04d}_{name}.png"
        logger.image(f"samples/{name}", image, step)
        save_image(Path(this.args.output_dir) / file, image)


if __name__ == "__main__":
    run(main, resumes=True)
