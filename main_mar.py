"""Train a MAR, or evaluate one. `python main_mar.py --help`; several processes by torchrun."""

import os
from functools import partial
from inspect import signature
from itertools import count as counted
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import engine_mar as engine
from models import MODELS, TOKENIZERS, build_model, build_tokenizer, checkpoint_config
from models.heads import HEADS
from util import data, dist, presets
from util.checkpoint import LAST, find_checkpoint, load_checkpoint, save_checkpoint
from util.dist import print0
from util.ema import EMA
from util.evaluation import open_judge
from util.files import make_folder
from util.flags import (
    Parser,
    add_evaluation_flags,
    add_machine_flags,
    add_sampling_flags,
    add_tokenizer_flags,
    approximations,
    fraction,
    nonnegative,
    nonnegative_int,
    positive_int,
    run,
)
from util.image_sets import check_data_set
from util.images import open_writers, save_image
from util.logger import Logger, Progress
from util.lr_sched import learning_rate
from util.precision import pick_precision
from util.weights import digest, load_strictly

# arguments of the model that its weights fix, and those that each run chooses
ARCHITECTURE = (
    "img_size",
    "vae_stride",
    "patch_size",
    "vae_embed_dim",
    "class_num",
    "buffer_size",
    "diffloss_d",
    "diffloss_w",
    "head",
    "num_codes",
    "order",
)
TRAINING = (
    "mask_ratio_min",
    "label_drop_prob",
    "attn_dropout",
    "proj_dropout",
    "diffusion_batch_mul",
    "grad_checkpointing",
    "num_sampling_steps",
    "max_timestep",
)
WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".safetensors")
RECIPE = (
    "epochs",
    "batch_size",
    "accum_iter",
    "lr",
    "blr",
    "min_lr",
    "lr_schedule",
    "warmup_epochs",
    "weight_decay",
    "grad_clip",
    "ema_rate",
)
SAMPLING = ("num_iter", "cfg", "cfg_schedule", "temperature", "order")


def get_parser():
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=MODELS, default="mar_large", help="backbone and its size")
    group.add_argument(
        "--vae_stride",
        type=positive_int,
        metavar="S",
        help="pixels a latent, along a side (default: the tokenizer's)",
    )
    group.add_argument(
        "--patch_size",
        type=positive_int,
        metavar="P",
        help="P×P latents are one token (default: the tokenizer's: kl16 1, kl8 2, pixels 4)",
    )
    group.add_argument("--class_num", type=positive_int, default=1000, help="classes")
    group.add_argument(
        "--buffer_size",
        type=positive_int,
        default=64,
        help="class tokens in front of the encoder's",
    )
    group.add_argument(
        "--head",
        choices=HEADS,
        help="what models a token: Diffusion Loss, cross-entropy over codes, or L2 (default: that "
        "which fits the tokenizer, diffloss or ce)",
    )
    group.add_argument(
        "--diffloss_d", type=positive_int, default=3, help="blocks of the denoising MLP"
    )
    group.add_argument(
        "--diffloss_w", type=positive_int, default=1024, help="width of the denoising MLP"
    )
    group.add_argument("--attn_dropout", type=fraction, default=0.1, help="dropout of attention")
    group.add_argument("--proj_dropout", type=fraction, default=0.1, help="dropout of projections")
    group.add_argument(
        "--mask_ratio_min", type=fraction, default=0.7, help="least share of unknown tokens"
    )
    group.add_argument(
        "--mask_ratio_per_rank",
        action="store_true",
        help="each process draws its own ratio, as in the published code; they then wait for one "
        "another",
    )
    group.add_argument(
        "--label_drop_prob",
        type=fraction,
        default=0.1,
        help="share of labels dropped, for guidance",
    )
    group.add_argument(
        "--diffusion_batch_mul",
        type=positive_int,
        default=1,
        help="timesteps drawn for each token (the paper's models: 4)",
    )
    group.add_argument(
        "--no_vlb", action="store_true", help="leave the variational term out of the loss"
    )
    group.add_argument(
        "--grad_checkpointing", action="store_true", help="compute blocks again, to save memory"
    )

    group = parser.add_argument_group("training")
    group.add_argument(
        "--preset",
        choices=presets.PRESETS,
        metavar="NAME",
        help="flags that belong together, such as a row of the paper's tables; single flags "
        "override them (default: none)",
    )
    group.add_argument(
        "--list_presets", action="store_true", help="show the presets with their flags, and stop"
    )
    group.add_argument("--epochs", type=positive_int, default=400, help="passes over the data")
    group.add_argument(
        "--batch_size", type=positive_int, default=16, help="images a process and batch"
    )
    group.add_argument(
        "--accum_iter", type=positive_int, default=1, help="batches per step of the optimiser"
    )
    group.add_argument(
        "--lr", type=nonnegative, help="peak learning rate (default: --blr × total batch / 256)"
    )
    group.add_argument(
        "--blr", type=nonnegative, default=1e-4, help="the rate for 256 images a step"
    )
    group.add_argument("--min_lr", type=nonnegative, default=0.0, help="where a cosine ends")
    group.add_argument(
        "--lr_schedule", choices=("constant", "cosine"), default="constant", help="after warm-up"
    )
    group.add_argument("--warmup_epochs", type=nonnegative, default=100, help="linear, from 0")
    group.add_argument(
        "--weight_decay",
        type=nonnegative,
        default=0.02,
        help="not on biases, 1-D parameters, the head",
    )
    group.add_argument(
        "--grad_clip",
        type=nonnegative,
        default=3.0,
        help="largest norm of the gradient; 0 is no limit",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the blocks and the head with torch.compile: minutes at the start, fewer "
        "milliseconds a step",
    )
    group.add_argument("--ema_rate", type=fraction, default=0.9999, help="of the averaged weights")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default="./data/imagenet",
        metavar="DIR",
        help="a folder with train/class/image files, or 'digits': the built-in 8×8 digits",
    )
    group.add_argument(
        "--use_cached", action="store_true", help="train on latents that main_cache.py wrote"
    )
    group.add_argument(
        "--cached_path", default="", metavar="DIR", help="where those are (default: none)"
    )

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="./output_dir", metavar="DIR", help="checkpoints")
    group.add_argument(
        "--log_dir", metavar="DIR", help="TensorBoard and log.jsonl (default: --output_dir)"
    )
    group.add_argument(
        "--resume",
        default="",
        metavar="PATH",
        help="a checkpoint, or a folder holding checkpoint-last.pth: go on with the next epoch. "
        "A folder without one starts anew (default: a new run)",
    )
    group.add_argument(
        "--start_epoch", type=nonnegative_int, default=0, help="epoch to begin with, if not resumed"
    )
    group.add_argument(
        "--save_last_freq", type=positive_int, default=5, help="epochs between checkpoints"
    )
    group.add_argument(
        "--eval_freq",
        type=positive_int,
        default=40,
        help="epochs between grids of samples, and between evaluations with --online_eval",
    )

    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--evaluate", action="store_true", help="sample --num_images with the EMA, train nothing"
    )
    group.add_argument(
        "--online_eval",
        action="store_true",
        help="do so every --eval_freq epochs, with the EMA and the raw weights",
    )
    group.add_argument(
        "--out",
        nargs="*",
        default=[],
        metavar="PATH",
        help="with --evaluate, keep the images: .png a grid, .npz one file, else a folder "
        "(default: none)",
    )
    group.add_argument(
        "--num_images", type=positive_int, default=50000, help="as many of each class"
    )
    group.add_argument("--eval_bsz", type=positive_int, default=64, help="images sampled at once")

    add_evaluation_flags(parser)
    add_tokenizer_flags(parser, TOKENIZERS)
    add_sampling_flags(
        parser,
        num_iter=64,
        num_sampling_steps="100",
        cfg=1.0,
        cfg_schedule="linear",
        temperature=1.0,
    )
    add_machine_flags(parser, num_workers=10)
    return parser


def main(argv=None):
    args, given = presets.apply(get_parser(), argv)
    if args.list_presets:
        print(presets.listing())
        return
    device = dist.init(args.device, args.dist_on_itp, args.dist_url)
    make_folder(args.output_dir, "--output_dir")
    if args.log_dir:
        make_folder(args.log_dir, "--log_dir")
    if args.out and not args.evaluate:
        raise ValueError(f"--out {args.out[0]}: keeps the images of --evaluate, which is not given")
    measures = (args.evaluate or args.online_eval) and args.reference == "auto"
    if measures and "data_path" in given:
        check_data_set(args.data_path)
    precision = pick_precision(args.precision, device)
    path = find_checkpoint(args.resume) if args.resume else None
    if not path and (args.evaluate or Path(args.resume).suffix in WEIGHT_FILES):
        raise ValueError(f"--resume {args.resume!r}: expected a checkpoint, found none")
    if args.resume and not path:
        print0(f"--resume {args.resume}: no {LAST} there, starting anew")
    checkpoint = load_checkpoint(path) if path else None

    config, tokenizer = configure(args, given, checkpoint, path)
    tokenizer.to(device)
    torch.manual_seed(args.seed)  # the initial weights, the same on every process
    model = build_model(**config["model"]).to(device)
    model.check_sampling(**sampling_settings(args))
    ema = EMA(model, args.ema_rate)
    if checkpoint:
        if not args.evaluate:
            load_strictly(model, checkpoint["model"], path)
        load_strictly(ema.module, checkpoint["model_ema"], path)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print0(f"{config['model']['name']}: {size:.1f}M parameters, {precision} on {device}")

    common = {"config": config, "tokenizer": tokenizer, "device": device, "precision": precision}
    judge = get_judge(args, config, device)
    if args.evaluate:
        logger = Logger(args.log_dir or args.output_dir, goes_on=True)
        common |= {"logger": logger, "writers": open_writers(args.out, labels_of(args, config))}
        evaluate(args, ema.module, judge, name="ema", step=steps_done(checkpoint), **common)
        logger.close()
    else:
        train(args, model, ema, checkpoint, judge, **common)


def configure(args, given, checkpoint, source):
    """The configuration (see `models`) that the flags ask for, and its tokenizer.

    Of a checkpoint that is resumed, architecture and tokenizer are taken; a flag that says
    otherwise of the architecture is refused.
    """
    stored = checkpoint_config(checkpoint, source) if checkpoint else {}
    chosen = {"name": "tokenizer", "vae_path": "vae_path", "scale": "vae_scale"}
    own = {key: getattr(args, flag) for key, flag in chosen.items()}
    if args.tokenizer == "pixels":
        channels = 1 if args.data_path == data.DIGITS else 3
        own = {"name": "pixels", "scale": args.vae_scale, "channels": channels}
    if stored:
        held = stored["tokenizer"]
        if "tokenizer" in given and (args.tokenizer == "pixels") != (held["name"] == "pixels"):
            raise ValueError(
                f"--tokenizer {args.tokenizer}: {source} was trained with {held['name']}; leave "
                "the flag out to take it from there"
            )
        own = {**held, **{k: own[k] for k, flag in chosen.items() if flag in given}}
    tokenizer = build_tokenizer(**own)
    own["scale"] = tokenizer.scale  # the file then says it, whatever the table says one day

    derived = {"vae_stride": tokenizer.stride, "vae_embed_dim": tokenizer.channels}
    for name, value in derived.items():
        if name in given and getattr(args, name) != value:
            raise ValueError(
                f"--{name} {getattr(args, name)}: the tokenizer {own['name']} has {value}"
            )
    derived["num_codes"] = tokenizer.num_codes
    derived["patch_size"] = args.patch_size or tokenizer.patch_size
    model = configure_model(args, given, derived, stored.get("model"), source)

    length = (model["img_size"] // model["vae_stride"] // model["patch_size"]) ** 2
    one_at_a_time = MODELS[model["name"]].func.one_at_a_time
    if "num_iter" not in given:
        args.num_iter = length if one_at_a_time else min(args.num_iter, length)
    if one_at_a_time and args.num_iter != length:
        raise ValueError(
            f"--num_iter {args.num_iter}: {model['name']} generates one of its {length} tokens a "
            "step; leave the flag out"
        )
    if not 1 <= args.num_iter <= length:
        raise ValueError(f"--num_iter {args.num_iter}: expected 1 to {length}, the tokens")
    config = {
        "model": model,
        "tokenizer": own,
        "sampling": sampling_settings(args),
        "latent_range": stored.get("latent_range", 0.0),
    }
    return config, tokenizer


def configure_model(args, given, derived, stored, source):
    """Name and arguments of the model: of flags, what its tokenizer says, and what is stored."""
    name = args.model if "model" in given or not stored else stored["name"]
    takes = signature(MODELS[name]).parameters
    for flag in given & {*ARCHITECTURE, *TRAINING} - {"vae_stride", "vae_embed_dim", "order"}:
        if flag not in takes:
            raise ValueError(f"--{flag} {getattr(args, flag)}: {name} has no such argument")
    asked = {**vars(args), **derived, "order": args.order or "raster"}
    model = {"name": name, **{key: asked[key] for key in ARCHITECTURE if key in takes}}
    for key, value in model.items() if stored else ():
        flag = "model" if key == "name" else key
        if flag in given and value != stored.get(key):
            raise ValueError(
                f"--{flag} {value}: {source} holds {stored.get(key)}; leave the flag out to take "
                "it from there"
            )
        model[key] = stored.get(key)
    model |= {key: getattr(args, key) for key in TRAINING if key in takes}
    model["vlb"] = not args.no_vlb
    if stored and args.max_timestep is None:
        model["max_timestep"] = stored.get("max_timestep")
    return model


def train(args, model, ema, checkpoint, judge, *, config, tokenizer, device, precision):
    """Train from the checkpoint's next epoch, or from the first, to the last."""
    loader = get_loader(args, config, tokenizer, device)
    steps = len(loader) // args.accum_iter
    if not steps:
        raise ValueError(f"--accum_iter {args.accum_iter}: an epoch has {len(loader)} batches")
    total_batch = args.batch_size * args.accum_iter * dist.world_size()
    lr = args.blr * total_batch / 256 if args.lr is None else args.lr
    rate = partial(
        learning_rate,
        lr=lr,
        warmup_epochs=args.warmup_epochs,
        epochs=args.epochs,
        min_lr=args.min_lr,
        schedule=args.lr_schedule,
    )
    print0(f"{len(loader.dataset)} images, {steps} steps of {total_batch} an epoch, lr {lr:.2e}")
    for line in misfits(args, steps):
        print0(f"NOTE: {line}")

    optimizer = torch.optim.AdamW(
        engine.parameter_groups(model, args.weight_decay), lr=lr, betas=(0.9, 0.95), fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    start = args.start_epoch
    if checkpoint and "optimizer" in checkpoint:
        for group in checkpoint["optimizer"]["param_groups"]:
            group |= {"fused": True, "foreach": None}  # how, not what: whoever wrote the file
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[1]["weight_decay"] = args.weight_decay
        start = checkpoint["epoch"] + 1
        if scaler.is_enabled() and checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
        print0(f"resumed {args.resume}: {start} epochs are done")
        if changed := list(changes({**vars(args), "lr": lr}, checkpoint["args"])):
            print0(f"NOTE: not as before: {', '.join(changed)}")

    elif checkpoint:
        print0(f"NOTE: {args.resume} holds weights only: training begins with epoch {start}")
    if start >= args.epochs:
        print0(f"nothing to train: {start} epochs are done, --epochs is {args.epochs}")
        return

    if args.compile:
        model.compile_training()
    parallel = model
    if dist.world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        parallel = DistributedDataParallel(model, device_ids=ids)
    output = Path(args.output_dir)
    keep_other(output, args.resume if checkpoint else "")
    logger = Logger(args.log_dir or args.output_dir, goes_on=start > 0)
    progress = Progress(args.epochs * steps, "training", "step", done=start * steps)
    for epoch in range(start, args.epochs):
        largest = engine.train_one_epoch(
            parallel,
            tokenizer,
            loader,
            optimizer,
            scaler,
            ema,
            epoch,
            learning_rate=rate,
            device=device,
            precision=precision,
            cached=args.use_cached,
            accum_iter=args.accum_iter,
            grad_clip=args.grad_clip,
            seed=args.seed,
            logger=logger,
            progress=progress,
            shared_mask_ratio=not args.mask_ratio_per_rank,
        )
        config["latent_range"] = max(config["latent_range"], largest)
        last = epoch + 1 == args.epochs
        if (epoch + 1) % args.save_last_freq == 0 or last:
            if dist.is_main():
                path = output / LAST
                save_checkpoint(path, model, ema, optimizer, scaler, epoch, config, vars(args))
            dist.barrier()
        if (epoch + 1) % args.eval_freq == 0 or last:
            common = {"config": config, "tokenizer": tokenizer, "device": device}
            common["precision"] = precision
            for name, network in (("ema", ema.module), ("raw", model.eval())):
                image = grid(args, network, **common)
                if image is not None:
                    logger.image(f"samples/{name}", image, (epoch + 1) * steps)
                    save_image(output / "samples" / f"epoch{epoch + 1:04d}_{name}.png", image)
                if args.online_eval:
                    step = (epoch + 1) * steps
                    evaluate(args, network, judge, name=name, logger=logger, step=step, **common)
    progress.close()
    logger.close()
    print0(f"done: {output / LAST}, samples in {output / 'samples'}")


def keep_other(output, resumed):
    """Rename a checkpoint that this run, which did not begin with it, would replace."""
    path = output / LAST
    same = resumed and find_checkpoint(resumed).resolve() == path.resolve()
    if dist.is_main() and path.is_file() and not same:
        names = (path.with_name(f"{path.stem}-before{n}{path.suffix}") for n in counted(1))
        other = next(name for name in names if not name.exists())
        os.replace(path, other)
        print0(f"NOTE: {path} is of another run, not resumed here: it is now {other.name}")


def get_loader(args, config, tokenizer, device):
    """The loader of images or, with --use_cached, of moments. Raises ValueError for bad data."""
    size, classes = config["model"]["img_size"], config["model"]["class_num"]
    if args.use_cached:
        side = size // tokenizer.stride
        shape = (tokenizer.moment_channels, side, side)
        data.check_cache(args.cached_path, digest(tokenizer.state_dict()), size)
        dataset = data.cached_set(args.cached_path, shape, classes)
    else:
        record = Path(args.output_dir) / "data_checked.txt"
        dataset = data.training_set(args.data_path, size, classes, args.num_workers, record)
    pin = args.pin_mem and device.type == "cuda"
    return data.training_loader(dataset, args.batch_size, args.num_workers, args.seed, pin)


def misfits(args, steps):
    """Lines that say which defaults do not fit a run this short, and what would."""
    if args.warmup_epochs >= args.epochs:
        fitting = max(1, args.epochs // 20) if args.epochs > 1 else 0
        yield (
            f"the warm-up of {args.warmup_epochs:g} epochs is not over in {args.epochs} epochs; "
            f"--warmup_epochs {fitting} would fit"
        )
    # an average holds 5% of the initial weights after 3 horizons, and 37% after one
    total, horizon = steps * args.epochs, 1 / (1 - args.ema_rate)
    if 3 * horizon > total:
        fitting = max(0.0, 1 - 10 / total)
        yield (
            f"the EMA remembers {horizon:.0f} steps, the run has {total}; "
            f"--ema_rate {fitting:.4g} would fit"
        )


def changes(now, before):
    """Flags of the recipe that differ from those that a checkpoint was trained with."""
    for name in (*RECIPE, *TRAINING):
        if before.get(name) is not None and before[name] != now[name]:
            yield f"--{name} {now[name]} (was {before[name]})"


def sampling_settings(args):
    """How to sample, as `generate_images` takes it."""
    return {name: getattr(args, name) for name in SAMPLING} | approximations(args, {})


def grid(args, model, *, config, tokenizer, device, precision):
    """Two images of each of up to ten classes, spread over all, with fixed seeds."""
    count = config["model"]["class_num"]
    columns = min(count, 10)
    return engine.sample_grid(
        model,
        tokenizer,
        [i * count // columns for i in range(columns)] * 2,
        columns=columns,
        seed=args.seed,
        batch_size=args.eval_bsz,
        device=device,
        precision=precision,
        latent_range=config["latent_range"],
        **sampling_settings(args),
    )


def get_judge(args, config, device):
    """What measures samples, or None where nothing is to be evaluated."""
    if not (args.evaluate or args.online_eval):
        return None
    return open_judge(
        args.reference,
        args.data_path,
        img_size=config["model"]["img_size"],
        num_images=args.num_images,
        extractor=args.extractor,
        weights=args.inception_weights,
        splits=args.isc_splits,
        cache=args.stats_dir,
        device=device,
    )


def labels_of(args, config):
    """As many of each class, the classes in turn: splits of the IS take consecutive images."""
    return [i % config["model"]["class_num"] for i in range(args.num_images)]


def steps_done(checkpoint):
    """Steps of the optimiser, if the checkpoint has it, else epochs: where a plot puts figures."""
    states = checkpoint.get("optimizer", {}).get("state", {})
    return int(next(iter(states.values()))["step"]) if states else checkpoint.get("epoch", 0)


def evaluate(args, model, judge, *, config, tokenizer, device, precision, name, **kwargs):
    """Measure num_images samples, as many of each class. name: of the weights, ema or raw."""
    settings = {"weights": name, **sampling_settings(args), "seed": args.seed}
    settings |= {key: config["model"][key] for key in ("num_sampling_steps", "max_timestep")}
    engine.evaluate(
        model,
        tokenizer,
        labels_of(args, config),
        judge,
        settings={**settings, "dtype": precision, "model": config["model"]["name"]},
        output_dir=args.output_dir,
        seed=args.seed,
        batch_size=args.eval_bsz,
        device=device,
        precision=precision,
        latent_range=config["latent_range"],
        progress=f"evaluating {name}",
        **kwargs,
        **sampling_settings(args),
    )


if __name__ == "__main__":
    run(main)
