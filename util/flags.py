"""Command lines: types of flags, groups shared by scripts, and one-line error messages.

Nothing here imports torch, so that a wrong flag is reported at once.
"""

import argparse
import math
import os
from ast import literal_eval

from util.run import ending, last_words, stop
from util.sizes import plain

PRECISIONS = ("bf16", "fp16", "tf32", "fp32")
_UNSET = object()


def _number(kind, expected, fits):
    """An argparse type: a number that fits; the error message states what was expected."""

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


def integer(low, high):
    """An argparse type: an integer from low to high."""
    return _number(int, f"an integer from {low} to {high}", lambda n: low <= n <= high)


def checked(function):
    """An argparse type: the unchanged text, if the function accepts it without a ValueError."""

    def convert(text):
        try:
            function(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return convert


def per_channel(kind, expected):
    """An argparse type: one number, or a list of numbers of this type separated by commas.

    kind: argparse type of one number. expected: description of it for the error message.
    """

    def convert(text):
        try:
            numbers = [kind(part) for part in text.split(",")]
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(
                f"{text}: expected {expected}, or one per channel, separated by commas"
            ) from None
        return numbers if len(numbers) > 1 else numbers[0]

    return convert


def assignment(text):
    """An argparse type: NAME=VALUE to (name, value); the value is a Python literal, else text."""
    name, _, value = text.partition("=")
    if not name.isidentifier() or not value:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE, such as mlp_ratio=2")
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


class OneOrMore(argparse.Action):
    """Keeps a single value as it is, and several as a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


class Help(argparse.HelpFormatter):
    """Adds each flag's default to its help, unless the help already states it."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30)

    def _get_default_metavar_for_optional(self, action):
        if action.type in (int, positive_int, nonnegative_int):
            return "N"
        numbers = (finite, positive, nonnegative, fraction)
        return "X" if action.type in numbers else action.dest.upper()

    def _get_help_string(self, action):
        switches = argparse._StoreTrueAction | argparse._StoreFalseAction
        if isinstance(action, switches | argparse.BooleanOptionalAction):
            return f"{action.help} (default: off)"
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        if not action.option_strings or action.default in (None, "", [], argparse.SUPPRESS):
            return action.help
        if isinstance(action, argparse._StoreConstAction | argparse._HelpAction):
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that knows which flags were given, so defaults can depend on others."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        """Print one line, without the usage, and exit."""
        ending.fail(f"error: {message}; see --help")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does, noting the flags that there are."""
        ending.note_flags(self._option_string_actions)
        return super().parse_known_args(args, namespace)

    def parse_given(self, argv=None):
        """(namespace, the names of the flags that were given)."""
        names = {a.dest for a in self._actions if a.dest != "help"}
        marked = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, _UNSET)))
        given = {name for name in names if getattr(marked, name) is not _UNSET}
        for name in names - given:
            setattr(marked, name, self.get_default(name))
        return marked, given


def run(main, argv=None, resumes=False):
    """Run a script's main. What a user can change ends in one line, without a traceback.

    resumes: whether the script, called again after a signal, goes on where it was stopped.
    """
    stop.listen(resumes)
    # torch, when it is loaded, then leaves out twenty lines of C++ for each lost connection
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        main(argv)
    except (Exception, KeyboardInterrupt) as error:
        ending.end(error)
        raise
    last_words.none()
    ending.leave_group()


def add_tokenizer_flags(parser, tokenizers):
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer",
        choices=tokenizers,
        default="kl16",
        help="tokenizer of the images; kl, vq and vq_latent accept any network of their kind",
    )
    add_size_flag(group, "side of the images in pixels, or their height and width", 256)
    group.add_argument(
        "--vae_path",
        default="pretrained_models/vae/kl16.ckpt",
        metavar="PATH",
        help="weights of the tokenizer: published, from LDM or Stable Diffusion, trained by "
        "main_tokenizer.py, or a folder of diffusers (docs/tokenizers.md has the flags for each)",
    )
    group.add_argument(
        "--vae_embed_dim",
        type=positive_int,
        metavar="C",
        help="channels of a latent (default: the tokenizer's; for pixels, those of the data)",
    )
    add_latent_flags(
        group, "from the file or the config.json beside it, else the tokenizer's default"
    )


class _Size(argparse.Action):
    """Keeps one number, or the two of images that are not square, as util.sizes stores them."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            given = " ".join(map(str, values))
            raise argparse.ArgumentError(self, f"{given}: expected one side, or height and width")
        setattr(namespace, self.dest, plain(values if len(values) == 2 else values[0]))


def add_size_flag(group, help, default=None):
    """Add --img_size N, or --img_size H W for images that are not square."""
    group.add_argument(
        "--img_size",
        nargs="+",
        action=_Size,
        type=positive_int,
        default=default,
        metavar="N",
        help=help,
    )


def add_latent_flags(group, default):
    """Add the flags of the latents' scale and shift. default: their default, in words."""
    group.add_argument(
        "--vae_scale",
        type=per_channel(positive, "a number above 0"),
        metavar="X[,X…]",
        help="one over the standard deviation of the latents, or one value per channel "
        f"(default: {default})",
    )
    group.add_argument(
        "--vae_shift",
        type=per_channel(finite, "a number"),
        metavar="X[,X…]",
        help="mean of the latents, subtracted before scaling, or one value per channel; write "
        f"--vae_shift=-1,… if the first is negative (default: {default})",
    )


def add_device_flag(group):
    group.add_argument(
        "--device",
        default="auto",
        help="cuda, mps (Apple's GPUs), cpu, or auto: cuda if available, else cpu",
    )


def add_precision_flag(group):
    group.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="precision of the networks; auto: bf16 if the GPU supports it, else fp16 (with a "
        "loss scaler in training), fp32 on a CPU; there bf16 is worth trying with AMX or "
        "AVX-512-BF16, fp16 mostly slower; tf32: float32 with faster products on a GPU; "
        "fp32: float32 throughout, including the tokenizer's convolutions. The diffusion "
        "arithmetic and the network at its first step always use float32",
    )


def add_machine_flags(parser, num_workers, precision=True):
    group = parser.add_argument_group("machine")
    add_device_flag(group)
    if precision:
        add_precision_flag(group)
    group.add_argument("--seed", type=nonnegative_int, default=1, help="seed of all random draws")
    if num_workers is not None:
        group.add_argument(
            "--num_workers",
            type=nonnegative_int,
            default=num_workers,
            help="loader processes per process, at most its part of the machine's cores",
        )
        group.add_argument(
            "--pin_mem",
            action="store_const",
            const=True,
            default=True,
            help="use page-locked memory for batches, for faster copies to a GPU (default: on)",
        )
        group.add_argument(
            "--no_pin_mem",
            action="store_const",
            const=False,
            dest="pin_mem",
            default=argparse.SUPPRESS,
            help="use ordinary memory instead (default: off)",
        )
    group.add_argument(
        "--dist_on_itp", action="store_true", help="the launcher must be Open MPI, not torchrun"
    )
    group.add_argument(
        "--dist_url", default="env://", metavar="URL", help="URL of the rendezvous of the processes"
    )
    group.add_argument(
        "--dist_timeout",
        type=positive,
        default=5.0,
        metavar="MINUTES",
        help="a process that is silent for so long, or a link that is cut, ends all processes",
    )
    for name in ("world_size", "local_rank"):
        group.add_argument(
            f"--{name}",
            type=int,
            help="as in the published code: must agree with the launcher (default: the launcher's)",
        )


def machine(args):
    """The arguments of util.dist.init, from the flags of `add_machine_flags`."""
    names = ("device", "dist_on_itp", "dist_url", "world_size", "local_rank")
    return {"timeout": args.dist_timeout, **{name: getattr(args, name) for name in names}}
