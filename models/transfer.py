"""Fine-tuning (--init_from): a new run begins with all that fits of a checkpoint's weights.

What may differ is known by name: the classes, the positions of another image size, and the modules
that depend on what a token is, with the head among them. All else must fit strictly.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from models import build_model, checkpoint_config
from models.config import FIXED, FLAGS, as_flags, check_same_latents, takes
from util.data.classes import known_names, same_classes
from util.dist import print0
from util.files import first_few
from util.run.resume import load_start
from util.weights import digest, load_strictly

TABLE = "class_emb.weight"
OF_TOKENIZER = ("tokenizer", "vae_path", "vae_scale", "vae_shift", "patch_size")
HINT = "--init_from takes models of the same width, depth and blocks"


# ---- the file ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The EMA weights of a checkpoint, from which a new run begins."""

    path: str
    weights: dict  # name -> tensor
    config: dict  # see models
    classes: list | None  # names, if known
    tokenizer: str | None  # digest of its weights, if known

    def load(self, model, config, tokenizer):
        """Give a new model all that fits, and say what is new; `config` then names the file.

        config: the run's configuration. tokenizer: its tokenizer. Raises ValueError for weights
        that do not fit.
        """
        with torch.device("meta"):
            source = build_model(**self.config["model"])
        name = config["tokenizer"]["name"]  # maybe by a cache, or by the file of --vae_path
        check_same_latents(name, self.config["tokenizer"]["name"], self.path)
        names = config["data"]["classes"]
        if len(names) != model.class_num:
            raise ValueError(f"--class_num {model.class_num}: the data have {len(names)} classes")
        rows = rows_for(names, self.classes, source.class_num)
        fit = Fit(model, source, self.weights, rows)
        load_strictly(model, fit.state, self.path, HINT)
        print0(f"--init_from {self.path} (EMA): {fit.describe()}")
        print0(f"its classes: {describe_rows(rows, names, self.classes)}")
        own = digest(tokenizer.state_dict())
        if self.tokenizer and self.tokenizer != own:
            both = f"its sha256 {self.tokenizer[:12]}, here {own[:12]}"
            print0(f"NOTE: {self.path} was trained with another tokenizer ({both})")
        facts = {"file": str(self.path), "weights": "ema", "sha256": digest(self.weights)}
        config["init_from"] = facts


def open_start(args, given, resumed):
    """The Start that --init_from names, or None. A collective call. Raises ValueError.

    args: all flags; those that are not given become the file's where its weights fix them. given:
    names of the flags that the user set. resumed: path of a checkpoint that is resumed instead.
    """
    if resumed and args.init_from:
        print0(f"NOTE: --init_from {args.init_from} is not used again: {resumed} is resumed")
    checkpoint, path = load_start("" if resumed else args.init_from)
    if not path:
        return None
    config = checkpoint_config(checkpoint, path)
    fill_flags(args, given, config, path)
    record = checkpoint.get("record") or {}
    classes = class_names(checkpoint, config)
    return Start(path, checkpoint["model_ema"], config, classes, record.get("tokenizer"))


def fill_flags(args, given, config, source):
    """Set the flags that are not given to those of a configuration that its weights fix.

    Raises ValueError for another model, and for a tokenizer of another kind.
    """
    flags, own = as_flags(config), config["model"]
    if "model" in given and args.model != own["name"]:
        raise ValueError(
            f"--model {args.model}: {source} holds {own['name']}; leave the flag out to take it "
            "from there"
        )
    names = FIXED | {*OF_TOKENIZER}
    if "tokenizer" in given and args.tokenizer != flags["tokenizer"]:
        check_same_latents(args.tokenizer, flags["tokenizer"], source)
        names -= {*OF_TOKENIZER}
    if "vae_path" in given and args.vae_path != flags.get("vae_path"):
        names -= {"vae_scale", "vae_shift"}  # another network has its own
    flags["order"] = own.get("order", args.order)  # of a causal model
    for name in {*names, "order"} - given:
        setattr(args, name, flags.get(name, getattr(args, name)))
    if args.max_timestep is None:
        args.max_timestep = own.get("max_timestep")
    head = args.head or own.get("head") or "diffloss"
    extra = {k: v for k, v in own.items() if k not in FLAGS and k in takes(own["name"], head)}
    args.model_kwargs = [*{**extra, **dict(args.model_kwargs)}.items()]


# ---- the weights ---------------------------------------------------------------------------------


class Fit:
    """The weights of one model, made to fit another.

    weights: name -> tensor, those of the model `source`, which may be on the meta device. rows: for
    each class the row of the class table to take, or None for a new one; or None for the table as
    it is. What is not understood stays as it is, and does not fit.

    Attributes: `state`, name -> tensor for the model; names of modules and tables: `new`, which
    begin as the model has them, `resized`, for another number of tokens, and `unused`.
    """

    def __init__(self, model, source, weights, rows):
        self.model, self.source, self.weights = model, source, weights
        self.own, self.state = model.state_dict(), dict(weights)
        self.new, self.resized, self.unused = [], [], []
        self._fit_modules()
        self._fit_tables()
        if rows is not None:
            none = weights["fake_latent"][0]  # a class that is new begins as no class
            table = self.state[TABLE]
            self.state[TABLE] = torch.stack([none if i is None else table[i] for i in rows])

    def _fit_modules(self):
        """Modules that depend on what a token is are taken whole, or are new."""
        for name in dict.fromkeys([*self.source.token_modules(), *self.model.token_modules()]):
            here, there = _below(name, self.own), _below(name, self.state)
            if _shapes(here) != _shapes(there):
                self._replace(name, here, there)

    def _fit_tables(self):
        before, after = self.source.position_tables(), self.model.position_tables()
        old, now = self.source.grid, self.model.grid
        for name in dict.fromkeys([*before, *after]):
            here, there = ({name: s[name]} if name in s else {} for s in (self.own, self.state))
            if not (here and there):
                self._replace(name, here, there)
            elif here[name].shape[-1] != there[name].shape[-1]:
                continue  # of another width: it does not fit
            elif _shapes(here) != _shapes(there) or old != now:
                sizes = (before[name], *old), (after[name], *now)
                self.state[name] = resize(there[name], *sizes, here[name])
                self.resized.append(name)

    def _replace(self, name, here, there):
        """A module or table of this model, {} if it has none, in place of the file's."""
        self.state = {k: v for k, v in self.state.items() if k not in there} | here
        (self.new if here else self.unused).append(name)

    def describe(self):
        """What is taken, and what is new: a text."""
        taken = sum(self.state[name] is self.weights.get(name) for name in self.state)
        lists = {"resized": self.resized, "new": self.new, "not used": self.unused}
        parts = [f"{what}: {', '.join(names)}" for what, names in lists.items() if names]
        return "; ".join([f"{taken} of {len(self.state)} tensors as they are", *parts])


def _below(name, state):
    """The tensors of the module of this name."""
    return {key: value for key, value in state.items() if key.startswith(f"{name}.")}


def _shapes(state):
    return {name: value.shape for name, value in state.items()}


@torch.no_grad()
def resize(table, before, after, fresh):
    """A table of positions (1, n + h·w, D) for another size: (1, n' + h'·w', D).

    before, after: (n, h, w) and (n', h', w'); n rows stand before those of the tokens, h × w in
    raster order. The first are kept, and `fresh`, a table of the new size, has those that are
    missing; the others are interpolated (bicubic, antialiased).
    """
    (front, *grid), (count, *size) = before, after
    kept = table[:, : min(front, count)]
    tokens = table[:, front:]
    if grid != size:
        planes = tokens.float().transpose(1, 2).unflatten(2, grid)  # (1, D, h, w)
        planes = F.interpolate(planes, size, mode="bicubic", antialias=True)
        tokens = planes.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([kept, fresh[:, kept.shape[1] : count].to(table), tokens], 1)


# ---- the classes ---------------------------------------------------------------------------------


def class_names(checkpoint, config):
    """Names of a checkpoint's classes, a list; None if not known."""
    names = known_names(config) or (checkpoint.get("record") or {}).get("classes")
    return names if names and len(names) == config["model"]["class_num"] else None


def rows_for(names, old, count):
    """For each of the classes `names`, the row of a table of `count` classes, or None if new.

    old: names of the classes in the table, or None if not known. None if all rows stay: the classes
    are the same, or as many without known names.
    """
    if not old and len(names) == count:
        old = sorted(names)  # as in the published code, where numbers are texts
    if names == old:
        return None
    return same_classes(names, old or [])


def describe_rows(rows, names, old):
    """Where the classes come from: a text."""
    if rows is None:
        return f"all {len(names)} as they are" + ("" if old else ", as their names are not known")
    new = [name for name, row in zip(names, rows, strict=True) if row is None]
    text = f"{len(names) - len(new)} of {len(names)} by name"
    return f"{text}; new, beginning as no class: {first_few(new)}" if new else text
