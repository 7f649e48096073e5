"""The whole pipeline on a folder of pictures: tokenizer, cache, MAR, samples, metrics, one page.

    python -m demo.pipeline                          # emoji, drawn first: `make demo-pipeline`
    python -m demo.pipeline --data_path FOLDER --output_dir output_dir/mine

Every stage is one command, printed before it runs. report.md and report.html in the output folder
show pictures, metrics and commands of all. Called again, it resumes where it was stopped.
"""

import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from util import jsonl
from util.files import make_folder, replacing
from util.flags import Parser, positive_int, run
from util.run import stop

OUTPUT = "output_dir/pipeline"
PLAN = "plan.json"
GUIDANCE = ("1", "3")
# sizes of the runs: about ten minutes on two cores, whatever the number of pictures
TOKENIZER_IMAGES = 20_000  # seen in the training of the tokenizer, repetitions counted
MAR_STEPS = 2_400
SAMPLES = 900  # at most, for each scale of guidance

# stage -> command; what is in braces are fields of Run
COMMANDS = {
    "tokenizer": (
        "main_tokenizer.py --tokenizer kl --ch 16 --ch_mult 1,2,4 --vae_embed_dim 8 --per_channel "
        "--epochs {tokenizer_epochs} --batch_size 16 --lr 2e-3 --warmup_epochs 1 --grad_clip 1 "
        "--data_path {data} --img_size {size} --extractor coarse-pixels --num_workers 0 "
        "--output_dir {out}/tokenizer --resume {out}/tokenizer"
    ),
    "held-out pictures": (
        "main_tokenizer.py --vae_path {out}/tokenizer/tokenizer.ckpt --data_path {data} "
        "--split {held_out} --extractor coarse-pixels --num_workers 0 --output_dir {out}/held_out"
    ),
    "cache": (
        "main_cache.py --vae_path {out}/tokenizer/tokenizer.ckpt --data_path {data} "
        "--cached_path {out}/cache --layout shards --num_workers 0"
    ),
    "decoded": "-m demo.decode --cached_path {out}/cache --out {out}/decoded.npz",
    "MAR": (
        "main_mar.py --preset small --use_cached --cached_path {out}/cache --epochs {mar_epochs} "
        "--eval_freq {mar_shown} --output_dir {out}/mar --resume {out}/mar --num_workers 0"
    ),
    **{
        f"samples, guidance {cfg}": (
            f"sample.py --ckpt {{out}}/mar/checkpoint-last.pth --cfg {cfg} --labels random "
            f"--num_images {{samples}} --batch_size 250 --out {{out}}/guidance{cfg}"
        )
        for cfg in GUIDANCE
    },
    **{
        f"metrics of {name}": (
            f"-m util.evaluation {source} --img_size {{size}} --reference {{reference}} "
            "--extractor coarse-pixels --stats_dir {out}/fid_stats --output_dir {out}/metrics"
        )
        for name, source in {
            "training pictures": "{train}",
            "decoded": "{out}/decoded.npz",
            **{f"guidance {cfg}": f"{{out}}/guidance{cfg}" for cfg in GUIDANCE},
        }.items()
    },
}


@dataclass(frozen=True)
class Run:
    """What the commands depend on."""

    data: str  # folder of the pictures
    emoji: bool  # whether they are the demo's
    train: str  # folder of those for training
    reference: str  # folder of the pictures that images are compared with
    held_out: str  # name of that split; train if there is no other
    out: str
    size: int
    tokenizer_epochs: int
    mar_epochs: int
    mar_shown: int  # epochs between grids of samples
    samples: int

    def command(self, stage):
        """The words of a command, without Python's."""
        return [word.format(**asdict(self)) for word in COMMANDS[stage].split()]


def get_parser():
    """The parser of all flags."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data_path", metavar="PATH", help="pictures, train/class/picture (default: emoji)"
    )
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help=f"all that is written (default: {OUTPUT}, or {OUTPUT}_NAME of PATH)",
    )
    parser.add_argument(
        "--img_size", type=positive_int, default=32, metavar="N", help="side of the pictures"
    )
    return parser


def main(argv=None):
    """Run the script."""
    args = get_parser().parse_args(argv)
    data, out = args.data_path, args.output_dir
    if data and not Path(data).is_dir():
        raise ValueError(f"--data_path {data}: expected a folder with train/class/picture")
    out = Path(out or (f"{OUTPUT}_{Path(data).resolve().name}" if data else OUTPUT))
    data = data or str(out / "emoji")
    make_folder(out, "--output_dir")
    if not args.data_path:
        call("pictures", ["-m", "demo.emoji", data], out)
    plan = plan_run(data, not args.data_path, out, args.img_size)
    keep_plan(plan, out / PLAN)
    for stage in stages(plan):
        call(stage, plan.command(stage), out)
    sys.exit(execute(["-m", "demo.report", str(out)]))


def plan_run(data, emoji, out, size):
    """The Run for a folder of pictures. Raises ValueError for a folder without any."""
    from util.data import open_data
    from util.data.classes import are_none
    from util.data.listing import data_folder

    pictures = open_data(data, "train", size)
    if are_none(pictures.classes):
        raise ValueError(f"--data_path {data}: pictures without classes, expected class folders")
    count = len(pictures)
    mar_epochs = max(1, round(MAR_STEPS * min(32, max(1, count // 8)) / count))
    held_out = next((each for each in ("val", "test") if Path(data, each).is_dir()), "train")
    return Run(
        data=data,
        emoji=emoji,
        train=data_folder(data, "train"),
        reference=data_folder(data, held_out),
        held_out=held_out,
        out=str(out),
        size=size,
        tokenizer_epochs=max(1, round(TOKENIZER_IMAGES / count)),
        mar_epochs=mar_epochs,
        mar_shown=max(1, mar_epochs // 4),
        samples=min(SAMPLES, count),
    )


def keep_plan(plan, path):
    """Write the plan of a new run. Raises ValueError if there is one of another."""
    plan = asdict(plan)
    before = jsonl.parse(path.read_text("utf-8")) if path.is_file() else plan
    other = [
        f"{name} {before.get(name)} (now {plan[name]})"
        for name in plan
        if before.get(name) != plan[name]
    ]
    if other:
        raise ValueError(f"{path}: of a run with {', '.join(other)}: expected another --output_dir")
    with replacing(path) as beside:
        beside.write_text(jsonl.dumps(plan), "utf-8")


def stages(plan):
    """Names of the stages of a Run, after the pictures are there."""
    return [s for s in COMMANDS if s != "held-out pictures" or plan.held_out != "train"]


def call(stage, words, out):
    """Run a command, unless it is done; ends with its status if that is not 0."""
    log = Path(out, "stages.jsonl")
    if any(r["stage"] == stage and r["status"] == 0 for r in jsonl.read(log)):
        return
    print(f"\n== {stage}\n{shlex.join(['python', *words])}", flush=True)
    start = time.perf_counter()
    status = execute(words)
    seconds = time.perf_counter() - start
    record = {"stage": stage, "command": words, "seconds": seconds, "status": status}
    jsonl.append(log, record)
    if status:
        print(f"{stage}: ended with status {status}; the same command resumes there")
        sys.exit(status)


def execute(words):
    """The exit status of a command of Python."""
    with stop.deferred():  # Ctrl-C reaches both; what a scheduler sends, this process alone
        process = subprocess.Popen([sys.executable, *words])
        while process.poll() is None and not stop.reason():
            time.sleep(0.1)
        if stop.reason():
            process.terminate()
        return process.wait()


if __name__ == "__main__":
    run(main, resumes=True)
