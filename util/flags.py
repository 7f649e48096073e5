"""Command lines: groups of flags that the scripts share, presets, and one-line errors."""

import argparse
import math
import os
import sys

from util.dist import cleanup, world_size
from util.precision import PRECISIONS

_UNSET = object()


def _number(kind, expected, fits):
    """An argparse type: a number that fits, else a message that says what was expected."""

    def convert(text):
        try:
            if fits(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}")

    return convert


positive_int = _number(int, "an integer, at least 1", lambda n: n >= 1)
nonnegative_int = _number(int, "an integer, at least 0", lambda n: n >= 0)
nonnegative = _number(float, "a number, at least 0", lambda x: 0 <= x < float("inf"))
finite = _number(float, "a number", math.isfinite)
positive = _number(float, "a number above 0", lambda x: 0 < x < float("inf"))
fraction = _number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)


class Help(argparse.HelpFormatter):
    """Adds each flag's default to its help, unless the help says it in words."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30)

    def _get_default_metavar_for_optional(self, action):
        metavars = {
            int: "N",
            positive_int: "N",
            nonnegative_int: "N",
            finite: "X",
            positive: "X",
            nonnegative: "X",
            fraction: "X",
        }
        return metavars.get(action.type, action.dest.upper())

    def _get_help_string(self, action):
        if isinstance(action, argparse._StoreTrueAction):
            return f"{action.help} (default: off)"
        if not action.option_strings or action.default in (None, "", [], argparse.SUPPRESS):
            return action.help
        if isinstance(action, argparse._StoreConstAction | argparse._HelpAction):
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that knows which flags were given: defaults can depend on others."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        """One line, without the usage."""
        print(f"error: {message}; see --help", file=sys.stderr, flush=True)
        sys.exit(2)

    def parse_given(self, argv=None):
        """(namespace, the names of the flags that were given)."""
        names = {a.dest for a in self._actions if a.dest != "help"}
        marked = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, _UNSET)))
        given = {name for name in names if getattr(marked, name) is not _UNSET}
        for name in names - given:
            setattr(marked, name, self.get_default(name))
        return marked, given


def run(main, argv=None):
    """Run a script's main: what a user got wrong is one line and exit status 2, no traceback."""
    try:
        main(argv)
    except (ValueError, OSError) as error:
        # an error from a loader's worker carries a traceback in its message: its last line counts
        lines = str(error).strip().splitlines()
        print(f"error: {lines[-1].removeprefix('ValueError: ')}", file=sys.stderr, flush=True)
        if world_size() > 1:
            # the others may be waiting for this process: leave at once, the launcher ends them
            os._exit(2)
        sys.exit(2)
    except FloatingPointError as error:  # which every process raises
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        cleanup()
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    cleanup()


def add_tokenizer_flags(parser, tokenizers):
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer",
        choices=tokenizers,
        default="kl16",
        help="what turns images into latents; kl, vq and vq_latent take any network of their kind",
    )
    group.add_argument(
        "--img_size",
        type=positive_int,
        default=256,
        metavar="N",
        help="side of an image, in pixels",
    )
    group.add_argument(
        "--vae_path",
        default="pretrained_models/vae/kl16.ckpt",
        metavar="FILE",
        help="weights of the tokenizer: published, LDM's, Stable Diffusion's, diffusers' or what "
        "main_tokenizer.py trained; of consistency a folder in diffusers' layout",
    )
    group.add_argument(
        "--vae_embed_dim",
        type=positive_int,
        metavar="C",
        help="channels of a latent (default: the tokenizer's; for pixels, the data's)",
    )
    group.add_argument(
        "--vae_scale",
        type=positive,
        metavar="X",
        help="one over the deviation of the latents (default: the one in the file, if it was "
        "trained here; else the tokenizer's: kl16 0.2325, kl8 and consistency 0.18215, pixels 1)",
    )


def add_sampling_flags(parser, **defaults):
    """How to sample. A default of None is taken from the checkpoint."""
    group = parser.add_argument_group("sampling")

    def add(name, words, **kwargs):
        default = defaults.get(name)
        if default is None:
            words += " (default: the checkpoint's)"
        group.add_argument(f"--{name}", default=default, help=words, **kwargs)

    add(
        "num_iter",
        "autoregressive steps, 1 to the number of tokens",
        type=positive_int,
        metavar="K",
    )
    add(
        "num_sampling_steps",
        "diffusion steps of a token: a count, counts of sections (10,10,20) or ddimN",
        metavar="S",
    )
    add("cfg", "guidance scale; 1 is no guidance", type=finite, metavar="W")
    add(
        "cfg_schedule",
        "guidance over the steps: 1 to --cfg as tokens become known, or --cfg throughout",
        choices=("linear", "constant"),
    )
    group.add_argument(
        "--order",
        choices=("random", "raster", "confidence"),
        help="in which tokens are generated, and a causal model is trained; confidence needs "
        "cross-entropy (default: the model's, random, but raster for a new causal one)",
    )
    add("temperature", "of the diffusion noise, or of the logits", type=nonnegative, metavar="T")
    group.add_argument(
        "--max_timestep",
        type=_number(int, "an integer from 0 to 999", lambda n: 0 <= n <= 999),
        metavar="T",
        help="start the reverse process at this timestep instead of 999; 950 keeps a model that "
        "is small or not trained for long from diverging (default: the checkpoint's, else 999). "
        "Price: 980 instead of 950 is 12.1",
    )
    group = parser.add_argument_group(
        "faster sampling that approximates",
        "Off unless given, here or in the training of the checkpoint. Prices are those on the "
        "digits (benchmarks/RESULTS.md): how many times as many images a second, and the Fréchet "
        "distance, which is 11.9 for exact sampling.",
    )
    group.add_argument(
        "--solver",
        choices=("ddpm", "ddim", "dpm++"),
        help="of the reverse process: ddim and dpm++ need no noise and fewer --num_sampling_steps, "
        "and start at 950 (default: ddpm). Price: 10 steps of dpm++ 2.9 times, 10.8; of ddim 3.1 "
        "times, 13.3",
    )
    group.add_argument(
        "--anneal",
        metavar="KIND",
        help="diffusion steps that fall as tokens become known: linear, cosine or two-stage, from "
        "50 to 5, or as in linear:100:10; starts at 950; none is off (default: off). Price: "
        "linear 2.0 times, 12.5; cosine 1.8, 12.7; two-stage 2.0, 13.4",
    )
    group.add_argument(
        "--cfg_interval",
        type=fraction,
        nargs=2,
        metavar=("A", "B"),
        help="guidance only while the share of the steps that are done is from A to B (default: "
        "0 1). Price: 0.25 0.75 1.2 times, 10.8",
    )
    group.add_argument(
        "--refresh_every",
        type=positive_int,
        metavar="P",
        help="compute all features every P steps, between them only what changed most; of the "
        "bidirectional models (default: 1). Price: 2 is 1.02 times, 11.9; 4 is 1.06 times, 12.2",
    )


APPROXIMATIONS = ("solver", "anneal", "cfg_interval", "refresh_every")


EXACT = {"solver": "ddpm", "anneal": "none", "cfg_interval": [0.0, 1.0], "refresh_every": 1}


def approximations(args, stored):
    """What of the flags approximates, as `sample_tokens` takes it; else what is stored does."""
    asked = {name: getattr(args, name) for name in APPROXIMATIONS}
    chosen = {n: stored.get(n) if value is None else value for n, value in asked.items()}
    return {n: value for n, value in chosen.items() if value is not None and value != EXACT[n]}


def add_evaluation_flags(parser, standalone=False):
    """Against what images are measured, and by which network."""
    group = parser.add_argument_group("figures")
    words = "a folder of images, an .npz (mu and sigma, or images in arr_0), a data set (a folder "
    words += "with train/) or 'digits': the held-out ones"
    auto = "; auto: fid_stats/adm_in<img_size>_stats.npz where that is, else --data_path; none: "
    auto += "only figures that need none"
    group.add_argument(
        "--reference",
        default=None if standalone else "auto",
        metavar="PATH",
        help=words + (" (default: no reference)" if standalone else auto),
    )
    add_extractor_flags(group)
    group.add_argument(
        "--isc_splits",
        choices=("torch-fidelity", "adm"),
        default="torch-fidelity",
        help="of the Inception Score: ten parts after a shuffle, or consecutive 5,000 images",
    )
    group.add_argument(
        "--stats_dir",
        default="fid_stats",
        metavar="DIR",
        help="where statistics of data sets are kept, by all that they depend on",
    )


def add_extractor_flags(group):
    group.add_argument(
        "--extractor",
        metavar="NAME",
        help="whose features are compared: torch-fidelity's inception-v3-compat, "
        "dinov2-vit-l-14, …; digits-classifier or grey-pixels (default: inception-v3-compat, for "
        "the digits digits-classifier)",
    )
    group.add_argument(
        "--inception_weights",
        metavar="FILE",
        help="Inception's weights (default: torch-fidelity downloads them)",
    )


def add_device_flag(group):
    group.add_argument(
        "--device", default="auto", help="cuda, cpu, or auto: cuda where there is one"
    )


def add_machine_flags(parser, num_workers, precision=True):
    group = parser.add_argument_group("machine")
    add_device_flag(group)
    if precision:
        group.add_argument(
            "--precision",
            choices=("auto", *PRECISIONS),
            default="auto",
            help="of the networks; auto: bf16 where the GPU has it, else fp16 (with a loss scaler "
            "in training), fp32 on a CPU; tf32: float32 with faster products on a GPU; fp32: "
            "nothing less, in the tokenizer's convolutions neither. The diffusion arithmetic and "
            "the network at its first step are float32 in every case",
        )
    group.add_argument(
        "--seed", type=nonnegative_int, default=1, help="of everything that is drawn"
    )
    if num_workers is not None:
        group.add_argument(
            "--num_workers",
            type=nonnegative_int,
            default=num_workers,
            help="loader processes, each",
        )
        group.add_argument(
            "--pin_mem",
            action="store_const",
            const=True,
            default=True,
            help="page-locked batches, faster to a GPU (default: on)",
        )
        group.add_argument(
            "--no_pin_mem",
            action="store_const",
            const=False,
            dest="pin_mem",
            default=argparse.SUPPRESS,
            help="ordinary memory instead (default: off)",
        )
    group.add_argument(
        "--dist_on_itp", action="store_true", help="the launcher is Open MPI, not torchrun"
    )
    group.add_argument(
        "--dist_url", default="env://", metavar="URL", help="where the processes meet"
    )
    for name in ("world_size", "local_rank"):
        group.add_argument(
            f"--{name}",
            type=int,
            help="accepted as in the published code (default: the launcher's)",
        )
