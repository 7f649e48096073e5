"""What the parsers of the scripts know. Run: python -m pytest tests/test_flags.py

tests/flags.txt lists every flag with its default, so that a change of either shows in a diff. After
one that is meant: PYTHONPATH=. python tests/test_flags.py > tests/flags.txt
"""

import argparse
import shlex

import pytest
from cli import ROOT

import edit
import main_cache
import main_mar
import main_tokenizer
import neon
import reproduce
import sample
from diffusion.flow import FLOW_SOLVERS
from diffusion.solvers import SOLVERS
from models import presets
from models.autoencoder_settings import CODEBOOKS
from models.config import default_of
from models.settings import (
    CFG_SCHEDULES,
    FILL_ORDERS,
    HEADS,
    LOSS_WEIGHTS,
    MODELS,
    ORDERS,
    TIMESTEPS,
    TOKEN_SCHEDULES,
    TOKENIZERS,
    USUAL,
)
from util.evaluation.metrics import METRICS, SPLITS
from util.flags import PRECISIONS
from util.labels import LABELS
from util.lr_sched import SCHEDULES
from util.recipe import OPTIMIZERS
from util.run.tracker import TRACKERS

FROZEN = ROOT / "tests" / "flags.txt"
PARSERS = {
    "main_mar": main_mar,
    "main_cache": main_cache,
    "main_tokenizer": main_tokenizer,
    "reproduce": reproduce,
    "sample": sample,
    "edit": edit,
    "neon": neon,
}

# The published training command, but for paths and the launcher.
PUBLISHED_TRAINING = """--img_size 256 --vae_path V --vae_embed_dim 16 --vae_stride 16
--patch_size 1 --model mar_large --diffloss_d 3 --diffloss_w 1024 --epochs 400
--warmup_epochs 100 --batch_size 64
--blr 1.0e-4 --diffusion_batch_mul 4 --output_dir D --resume D --data_path P --use_cached
--cached_path C --online_eval --grad_checkpointing --num_workers 10 --pin_mem --world_size 1
--local_rank -1 --dist_on_itp --dist_url env:// --log_dir L --device cuda --seed 1 --start_epoch 0
--min_lr 0 --lr_schedule constant --ema_rate 0.9999 --mask_ratio_min 0.7 --grad_clip 3.0
--attn_dropout 0.1 --proj_dropout 0.1 --buffer_size 64 --num_sampling_steps 100 --temperature 1.0
--class_num 1000 --label_drop_prob 0.1 --eval_freq 40 --save_last_freq 5 --weight_decay 0.02
--lr 8e-4 --no_pin_mem"""
PUBLISHED_EVALUATION = """--model mar_base --diffloss_d 6 --diffloss_w 1024 --eval_bsz 256
--num_images 50000 --num_iter 256 --num_sampling_steps 100 --cfg 2.9 --cfg_schedule linear
--temperature 1.0 --output_dir O --resume R --data_path P --evaluate"""
PUBLISHED_CACHING = """--img_size 256 --vae_path V --vae_embed_dim 16 --batch_size 128 --data_path P
--cached_path C --device cuda --seed 0 --num_workers 10 --pin_mem --world_size 1 --local_rank -1
--dist_on_itp --dist_url env://"""


@pytest.mark.parametrize(
    ("script", "command"),
    [
        (main_mar, PUBLISHED_TRAINING),
        (main_mar, PUBLISHED_EVALUATION),
        (main_cache, PUBLISHED_CACHING),
    ],
)
def test_published_flags_are_known(script, command):
    """Every flag of the published commands parses."""
    args = script.get_parser().parse_args(shlex.split(command))
    assert args.data_path == "P"


def test_published_defaults():
    """A flag left out means what it meant, except the mismatched head and the device."""
    expected = {
        "batch_size": 16,
        "epochs": 400,
        "model": "mar_large",
        "img_size": 256,
        "vae_path": "pretrained_models/vae/kl16.ckpt",
        "num_iter": 64,
        "num_images": 50000,
        "cfg": 1.0,
        "cfg_schedule": "linear",
        "label_drop_prob": 0.1,
        "eval_freq": 40,
        "save_last_freq": 5,
        "online_eval": False,
        "evaluate": False,
        "eval_bsz": 64,
        "weight_decay": 0.02,
        "grad_checkpointing": False,
        "lr": None,
        "blr": 1e-4,
        "min_lr": 0.0,
        "lr_schedule": "constant",
        "warmup_epochs": 100,
        "ema_rate": 0.9999,
        "mask_ratio_min": 0.7,
        "grad_clip": 3.0,
        "attn_dropout": 0.1,
        "proj_dropout": 0.1,
        "buffer_size": 64,
        "diffloss_d": 3,
        "diffusion_batch_mul": 1,
        "temperature": 1.0,
        "data_path": "./data/imagenet",
        "class_num": 1000,
        "output_dir": "./output_dir",
        "seed": 1,
        "resume": "",
        "start_epoch": 0,
        "num_workers": 10,
        "pin_mem": True,
        "dist_url": "env://",
        "use_cached": False,
        "cached_path": "",
        "device": "auto",
    }
    args = vars(main_mar.get_parser().parse_args([]))
    assert {name: args[name] for name in expected} == expected
    # left to the head, and what all but a flow then have
    assert args["num_sampling_steps"] is None and USUAL["num_sampling_steps"] == "100"
    # the published default, 1024, but of our small models
    assert args["diffloss_w"] is None
    assert [default_of(f"mar_{size}", "diffloss_w") for size in ("base", "large", "huge")] == [
        1024
    ] * 3


@pytest.mark.parametrize("name", PARSERS)
def test_every_flag_is_explained_with_its_default(name):
    """--help has groups, and for each flag a sentence and its default."""
    parser = PARSERS[name].get_parser()
    text = " ".join(parser.format_help().split())
    for group in parser._action_groups[2:]:
        assert group.title and f"{group.title}:" in text
    for action in parser._actions[1:]:
        assert action.help, action.dest
        said = parser._get_formatter()._get_help_string(action)
        assert "(default: " in said or action.required, f"{action.dest}: {said}"


def test_preset_lies_between_defaults_and_flags():
    """A preset changes defaults; the command line changes the preset; a data set brings its own."""
    args, given = presets.apply(main_mar.get_parser(), ["--preset", "digits", "--epochs", "3"])
    assert (args.model, args.epochs, args.img_size, args.tokenizer) == ("mar_tiny", 3, 8, "pixels")
    assert given == {"preset", "epochs"}
    args, _ = presets.apply(main_mar.get_parser(), ["--data_path", "digits"])
    assert (args.model, args.class_num, args.epochs) == ("mar_large", 10, 400)


# ---- all flags -----------------------------------------------------------------------------------


def listing():
    """A line for each flag of each script, with its default."""
    lines = []
    for name, script in PARSERS.items():
        flags = []
        for action in script.get_parser()._actions[1:]:
            flag = action.option_strings[-1] if action.option_strings else action.dest
            unset = action.required or action.default in (None, argparse.SUPPRESS)
            flags.append(f"{name} {flag}" + ("" if unset else f" {action.default!r}"))
        lines += sorted(flags)
    return "\n".join(lines) + "\n"


def test_no_flag_changes_unnoticed():
    """Names and defaults of all flags are those in flags.txt."""
    assert listing().splitlines() == FROZEN.read_text().splitlines()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("main_mar", PUBLISHED_TRAINING),
        ("main_mar", PUBLISHED_EVALUATION),
        ("main_cache", PUBLISHED_CACHING),
    ],
)
def test_published_flags_are_frozen(name, command):
    """They stay in the list, however it is changed."""
    frozen = {tuple(line.split(" ")[:2]) for line in FROZEN.read_text().splitlines()}
    published = {part for part in command.split() if part.startswith("--")}
    assert published and {(name, flag) for flag in published} <= frozen


# ---- choices -------------------------------------------------------------------------------------

# flag -> the table that it chooses from
TABLES = {
    "model": MODELS,
    "head": HEADS,
    "order": ORDERS,
    "solver": (*SOLVERS, *FLOW_SOLVERS),
    "timesteps": TIMESTEPS,
    "loss_weight": LOSS_WEIGHTS,
    "cfg_schedule": CFG_SCHEDULES,
    "token_schedule": TOKEN_SCHEDULES,
    "tokenizer": TOKENIZERS,
    "metrics": METRICS,
    "preset": presets.PRESETS,
    "isc_splits": SPLITS,
    "labels": LABELS,
    "fill": FILL_ORDERS,
    "lr_schedule": SCHEDULES,
    "optimizer": OPTIMIZERS,
    "precision": ("auto", *PRECISIONS),
    "tracker": TRACKERS,
    "codebook": CODEBOOKS,
    "what": (*reproduce.TABLES, "figures"),
}
# choose between a few of the script's own
PLAIN = {"check_data", "layout", "orientation", "channels"}
CHOICES = [
    pytest.param(action, id=f"{name}-{action.dest}")
    for name, script in PARSERS.items()
    for action in script.get_parser()._actions
    if action.choices is not None and action.dest not in PLAIN
    if not (script is main_tokenizer and action.dest == "preset")
]


@pytest.mark.parametrize("action", CHOICES)
def test_choices_are_the_rows_of_the_table(action):
    """All of them, and no other."""
    assert list(action.choices) == list(TABLES[action.dest])


def test_presets_of_a_tokenizer():
    """--preset offers the rows of presets.NETWORK_PRESETS, each of which sets flags that exist."""
    actions = {action.dest: action for action in main_tokenizer.get_parser()._actions}
    assert list(actions["preset"].choices) == list(presets.NETWORK_PRESETS)
    for name, flags in presets.NETWORK_PRESETS.items():
        args, _ = presets.apply_to_network(main_tokenizer.get_parser(), ["--preset", name])
        assert flags.items() <= vars(args).items()


def test_every_table_has_its_flag():
    """And the tables' rows can all be looked up."""
    assert {parameter.values[0].dest for parameter in CHOICES} == set(TABLES)
    orders = ORDERS, FILL_ORDERS, TOKEN_SCHEDULES
    trained = TIMESTEPS, LOSS_WEIGHTS
    for table in (
        MODELS,
        HEADS,
        *orders,
        CFG_SCHEDULES,
        TOKENIZERS,
        SOLVERS,
        FLOW_SOLVERS,
        *trained,
    ):
        assert all(row and not isinstance(row, str) for _, row in table.rows())


if __name__ == "__main__":
    print(listing(), end="")
