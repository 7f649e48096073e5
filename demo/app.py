"""A page in the browser: pictures of a model, drawn token by token, and inpainting with a brush.

    python -m demo.app --ckpt output_dir/digits/checkpoint-last.pth

This machine alone can open it, unless --host says otherwise; nothing is requested from elsewhere.
"""

import errno
import os
import signal
import socket
import tempfile
from pathlib import Path

from util.flags import Parser, add_device_flag, add_precision_flag, integer, run

DEMO = "output_dir/digits/checkpoint-last.pth"


def get_parser():
    """The parser of all flags."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ckpt",
        default=DEMO,
        metavar="FILE",
        help="a checkpoint, ours or published, or its export as safetensors",
    )
    parser.add_argument(
        "--vae_path", metavar="PATH", help="file of the tokenizer (default: as in training)"
    )
    group = parser.add_argument_group("page")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 127.0.0.1: this machine only, 0.0.0.0: all that can reach it",
    )
    group.add_argument(
        "--port",
        type=integer(1, 65535),
        metavar="N",
        help="port to listen at (default: the first free one from 7860)",
    )
    group = parser.add_argument_group("machine")
    add_device_flag(group)
    add_precision_flag(group)
    return parser


def main(argv=None):
    """Run the script."""
    args = get_parser().parse_args(argv)
    if not Path(args.ckpt).exists():
        made = "; `make demo` makes it" if args.ckpt == DEMO else ""
        raise ValueError(f"--ckpt {args.ckpt}: no such file{made}")
    check_address(args.host, args.port)
    stay_local()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which removes the folder
    with tempfile.TemporaryDirectory(prefix="mar-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        serve(args, folder)


def check_address(host, port):
    """Raises ValueError for a host that is no IPv4 address of this machine, and a port in use."""
    with socket.socket() as test:
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            test.bind((host, port or 0))
        except OSError as error:
            taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
            flag = f"--port {port}" if taken else f"--host {host}"
            other = "another" if taken else "an IPv4 address of this machine"
            raise ValueError(f"{flag}: {error.strerror}, expected {other}") from None


def stay_local():
    """Report and fetch nothing; no proxy stands between this machine and itself."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"


def serve(args, folder):
    """Load the model and serve the page until Ctrl-C or SIGTERM. folder: for its pictures."""
    from demo.studio import Studio
    from util.run.device import pick

    device = pick(args.device, 0, 1)
    studio = Studio(args.ckpt, folder, device, args.precision, args.vae_path)
    try:
        from demo.layout import Layout
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: expected `make app`, or `pip install gradio`") from None
    address = Layout(studio).launch(args.host, args.port)
    print(f"{studio.ckpt}: {address} (Ctrl-C ends it)", flush=True)
    signal.pause()


if __name__ == "__main__":
    run(main)
