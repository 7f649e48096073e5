"""Checkpoints, for resuming a run and for rebuilding model and tokenizer to sample.

A file is a dict with the entries of the published code, which can therefore load it: `model`,
`model_ema`, `optimizer`, `epoch`, `args` and, in fp16 only, `scaler`. In addition, `config` is a
plain dict that describes how to build the model and the tokenizer and how to sample, and `format`
is the version of the layout. Format 2 can be a file from within an epoch: `epoch` is then the last
one that is complete, and `place` says where in the next one: `batch`, the number of batches done,
`images`, how many are in a batch of all processes, and `draws`, the states of each process's
EpochDraws, or None. `record` says what else the run depends on, see util/run/record.py.
"""

import json
import os
import re
from argparse import Namespace
from itertools import count
from pathlib import Path

import torch

from util import averages, hub
from util.dist import (
    all_gather,
    barrier,
    gather,
    is_main,
    is_sharded,
    own_part,
    print0,
    rank,
    world_size,
)
from util.ema import EMAs
from util.files import first_few, first_line, replacing
from util.plain import is_count
from util.stored import check_checkpoint, check_optimizer_fits, expect
from util.weights import (
    OF_TOKENIZERS,
    load_strictly,
    read_file,
    read_metadata,
    read_weights,
    unwrapped,
    write_safetensors,
)

LAST = "checkpoint-last.pth"
OWN_NAME = re.compile(r"checkpoint-(last|step\d+|epoch\d+)\.pth")
FORMAT = 2


def _from_published(content):
    """Convert format 0, of the published code and our first files, to format 1."""
    args = content.get("args", {})
    return {
        "model_ema": content["model"],
        "config": None,
        **content,
        "args": vars(args) if isinstance(args, Namespace) else args,
    }


# n -> function that converts the content of a file from format n to format n + 1
MIGRATIONS = {0: _from_published, 1: dict}


class TrainState:
    """The state of a run, at a place: `epoch`, the next or current one, and `batch`es of it done.

    `batch_images`: images in a batch of all processes. `draws`: within an epoch that was resumed,
    the state of this process's EpochDraws, or None. `record`: see util/run/record.py, or None.
    parts: what else a training has, such as a discriminator, name -> object with `state_dict` and
    `load_state_dict`. emas: averages besides the main one, `ema`, by name (see util/averages.py);
    in a file they are `parts`, too. Attribute `emas`: all of them.
    """

    def __init__(
        self, model, ema, optimizer, scaler, epoch=0, batch_images=1, parts=None, emas=None
    ):
        self.model, self.ema, self.optimizer, self.scaler = model, ema, optimizer, scaler
        self.epoch, self.batch, self.draws = epoch, 0, None
        self.batch_images, self.record = batch_images, None
        self.emas = EMAs({"ema": ema, **(emas or {})})
        self.parts = {**(parts or {}), **(emas or {})}

    def save(self, path, config, args, before=None):
        """Write the state to `path` atomically: after a crash, the old file is still there.

        A collective call; rank 0 writes. config: the configuration (see models). args: all flags,
        name -> value. before: called on rank 0 when the new file is complete and about to replace
        the old one. Raises FloatingPointError if a value is not finite.
        """
        content = self._content(config, args)
        if is_main():
            with replacing(path, size_of(content), durable=True) as beside:
                with open(beside, "wb") as file:  # torch keeps one that it opened, if that fails
                    torch.save(content, file)
                if before:
                    before()
        barrier()

    def _content(self, config, args):
        content = {
            "model": self.model.state_dict(),
            "model_ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch - 1,  # the last epoch done, as published
            "args": dict(args),
            "config": config,
            "format": FORMAT,
        }
        if self.parts:
            content["parts"] = {name: part.state_dict() for name, part in self.parts.items()}
        if self.record:
            content["record"] = self.record
        if self.scaler.is_enabled():  # the published code cannot load the state of a disabled one
            content["scaler"] = self.scaler.state_dict()
        if self.batch:
            content["place"] = {"batch": self.batch, "images": self.batch_images}
            content["place"]["draws"] = gather(self.draws)
        bad = [
            names for names in all_gather(first_few(not_finite(content, self._names()))) if names
        ]
        if bad:
            raise FloatingPointError(
                f"not saved, as values are not finite: {bad[0]}; the last checkpoint is from "
                "before. Try --precision bf16 or fp32, or a lower --lr"
            )
        if is_sharded(self.model):
            from util.run import fsdp  # which takes time to load

            content = fsdp.gathered(content)
        return content

    def load(self, checkpoint, source):
        """Restore a loaded checkpoint: weights alone, or everything if it holds an optimizer.

        source: its path, for messages. Peak learning rate and weight decay remain those of the
        current optimizer. Raises ValueError for weights that do not fit, and for values that are
        not finite.
        """
        load_strictly(self.model, checkpoint["model"], source)
        for ema in self.emas.values():  # one that the file does not have begins as the main one
            load_strictly(ema.module, checkpoint["model_ema"], source)
        if "optimizer" not in checkpoint:
            return
        check_optimizer_fits(checkpoint["optimizer"], self.optimizer, source)
        if bad := not_finite({"optimizer": checkpoint["optimizer"]}, self._names()):
            raise ValueError(
                f"{source}: not finite: {first_few(bad)}; it is damaged, or of a run that diverged"
            )
        names = ("weight_decay", "betas", "fused", "foreach")
        own = [
            {name: group[name] for name in names if name in group}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group, values in zip(self.optimizer.param_groups, own, strict=True):
            group |= values  # the last two are implementation choices, whoever wrote the file
        self._load_parts(checkpoint.get("parts", {}), source)
        self.epoch = checkpoint["epoch"] + 1
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])

    def _load_parts(self, states, source):
        for name in states.keys() - self.parts.keys():
            print0(f"NOTE: the {name} in {source} is not used, and left out of what is saved")
        for name, part in self.parts.items():
            if name not in states:
                begins = "as the main average" if name in self.emas else "anew"
                print0(f"NOTE: {source} has no {name}: it begins {begins}")
                continue
            try:
                part.load_state_dict(states[name])
            except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{source}: its {name} does not fit: {first_line(error)}"
                ) from None

    def networks(self):
        """Names of the weights that `network` takes, the main ones first."""
        return [*self.emas, "raw"]

    def network(self, weights):
        """The model with the weights of this name, in evaluation mode. A collective call."""
        model = self.model.eval() if weights == "raw" else self.emas[weights].module
        if is_sharded(model):
            from util.run import fsdp

            return fsdp.whole(model)
        return model

    def _names(self):
        """Names of the parameters in the order of the optimizer, which counts them."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        groups = self.optimizer.param_groups
        return [names[id(p)] for group in groups for p in group["params"]]

    def resume_within(self, place, accum_iter, steps):
        """Restore the `place` of a checkpoint; returns whether the same random draws go on.

        steps: batches per epoch. With another number of images per step, no image is left out, and
        up to a step's are seen twice.
        """
        self.batch = place["batch"]
        whole, states = self.batch % accum_iter == 0, place["draws"]
        if whole and place["images"] == self.batch_images and len(states) == world_size():
            self.draws = states[rank()]
            return True
        done = min(self.batch * place["images"] // self.batch_images, steps)
        self.batch = done // accum_iter * accum_iter
        return False


def write_content(path, content, check=None):
    """Write tensors in nested dicts with `torch.save`, whole or not at all.

    check: called with the temporary path of the whole file; what it raises keeps the old one.
    """
    with replacing(path, size_of(content), durable=True) as beside:
        with open(beside, "wb") as file:  # given a path, torch stores its name, with this host's
            torch.save(content, file)
        if check:
            check(beside)


def size_of(content):
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, list | tuple):
        return 0
    return sum(map(size_of, content))


def tensors_of(content, name=""):
    """(name, tensor) of all tensors in nested dicts and lists; names are joined by spaces."""
    if isinstance(content, torch.Tensor):
        yield name, content
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    for key, value in content.items() if isinstance(content, dict) else ():
        yield from tensors_of(value, f"{name} {key}".lstrip())


def not_finite(content, names=()):
    """Names of the values of a checkpoint that are not finite, where this process holds them.

    names: those of the parameters that the optimizer counts.
    """
    values = {
        f"{part} {name}": value
        for part in ("model", "model_ema")
        for name, value in content.get(part, {}).items()
    }
    for number, state in content["optimizer"]["state"].items():
        name = names[number] if number in range(len(names)) else number
        values |= {f"optimizer's {key} of {name}": value for key, value in state.items()}
    tensors = tensors_of(content.get("parts", {}))
    values |= {name: value for name, value in tensors if value.is_floating_point()}
    finite = [own_part(torch.as_tensor(value)).isfinite().all() for value in values.values()]
    whole = torch.stack([x.to(finite[0].device) for x in finite]).tolist() if finite else []
    return [name for name, ok in zip(values, whole, strict=True) if not ok]


def find_checkpoint(path):
    """The checkpoint file at `path`, or the last one in that folder; None if there is none.

    In a folder without any, the weights of a model that was passed on, see util.hub. Raises
    ValueError if their config.json is not there.
    """
    path = Path(path)
    if path.is_dir():
        earlier = earlier_checkpoints(path)  # a crash can have renamed the last one, without a new
        passed_on = path / hub.WEIGHTS
        if not earlier and not (path / LAST).is_file() and passed_on.is_file():
            if not (path / hub.CONFIG).is_file():
                raise ValueError(f"{path}: {hub.WEIGHTS} without its {hub.CONFIG}")
            return passed_on
        path = path / LAST if (path / LAST).is_file() or not earlier else earlier[-1]
    return path if path.is_file() else None


def find_weights(source):
    """The checkpoint file at `source`: a file, a folder, or the name of a repository of the hub.

    Raises ValueError if there is none.
    """
    if found := find_checkpoint(source):
        return found
    if hub.is_name(source):
        source = hub.fetch(source)
        if found := find_checkpoint(source):
            return found
    if Path(source).is_dir():
        raise ValueError(f"{source}: no checkpoint in it: expected {LAST} or {hub.WEIGHTS}")
    raise ValueError(f"{source}: no such file or folder")


def earlier_checkpoints(folder):
    """The checkpoints in a folder that --keep kept, the oldest first."""
    found = [path for path in own_checkpoints(folder) if path.stem.startswith("checkpoint-step")]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def own_checkpoints(folder):
    """The checkpoints in a folder, but for those that `keep_others` has renamed."""
    return [path for path in Path(folder).glob("*.pth") if OWN_NAME.fullmatch(path.name)]


def keep_others(folder, resumed):
    """Rename the checkpoints in `folder` that do not lead to the one that a run resumes.

    The run would overwrite some, and a restart of it would take others for its own. resumed: path
    of the checkpoint, or None. In its folder, those that are not newer lead to it.
    """
    last = Path(folder).resolve() / LAST
    resumed = resumed and Path(resumed).resolve()
    if not is_main() or resumed == last:
        return
    before = resumed.stat().st_mtime if resumed and resumed.parent == last.parent else 0
    others = [p for p in own_checkpoints(folder) if p.name == LAST or p.stat().st_mtime > before]
    ends = (f"-before{n}.pth" for n in count(1))
    end = next(end for end in ends if not any(Path(folder).glob(f"*{end}")))
    for path in sorted(others):
        os.replace(path, path.with_name(path.stem + end))
        print0(f"NOTE: {path} is not what this run resumes: it is now {path.stem + end}")


def steps_done(checkpoint):
    """Number of optimizer steps of a loaded checkpoint; its epoch if they are not recorded."""
    states = checkpoint.get("optimizer", {}).get("state", {}).values()
    steps = [state["step"] for state in states if "step" in state]  # Muon's have none
    return int(steps[0]) if steps else checkpoint.get("epoch", 0)


def weights_in(checkpoint):
    """Name -> state dict of all weights in a loaded checkpoint: ema, ema_N, …, raw."""
    parts = checkpoint.get("parts", {})
    further = {name: parts[name] for name in filter(averages.FURTHER.fullmatch, parts)}
    return {"ema": checkpoint["model_ema"], **further, "raw": checkpoint["model"]}


def load_checkpoint(path, of_tokenizer=False):
    """The content of a checkpoint: ours, a published one, or an EMA export. A dict.

    `model` and `model_ema` are always present, `args` is a dict, `config` is None in a published
    file. of_tokenizer: whether main_tokenizer.py wrote it. Raises ValueError if the file is
    missing, damaged, of a newer format, or of something else than is expected.
    """
    if Path(path).suffix == ".safetensors" and not of_tokenizer:
        return _load_export(path)
    content = read_file(path)
    if of_tokenizer:
        _expect_tokenizer(content, path)
    else:
        _refuse_tokenizer(content, path)
    if not isinstance(content, dict) or "model" not in content:
        names = list(map(str, content)) if isinstance(content, dict) else [type(content).__name__]
        held = first_few(names, 5)
        raise ValueError(f"{path}: no MAR checkpoint: expected an entry 'model', found {held}")
    found = content.get("format", 0)
    expect(is_count(found), path, "format", found, "an integer")
    if found not in range(FORMAT + 1):
        raise ValueError(
            f"{path}: a checkpoint of format {found}, expected at most {FORMAT}: it was written by "
            "a newer version of this library"
        )
    for number in range(found, FORMAT):
        content = MIGRATIONS[number](content)
    check_checkpoint(content, path)
    return content | _unwrapped(content)


def _refuse_tokenizer(content, path):
    """Raises ValueError for the file of a tokenizer's network."""
    parts = [content, *content.values()] if isinstance(content, dict) else []
    names = [str(name) for part in parts if isinstance(part, dict) for name in part]
    if any(f".{name}".endswith(tuple(f".{own}" for own in OF_TOKENIZERS)) for name in names):
        raise ValueError(
            f"{path}: the network of a tokenizer, expected a checkpoint of a model; --vae_path "
            "takes this file"
        )


def _expect_tokenizer(content, path):
    """Raises ValueError unless it is the checkpoint of the training of a tokenizer's network."""
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict) or "network" not in config or "optimizer" not in content:
        raise ValueError(
            f"{path}: expected a checkpoint of the training of a tokenizer, as main_tokenizer.py "
            "writes it"
        )


def _unwrapped(content):
    """The weights of a checkpoint under the names of a model; the same dict twice stays so."""
    model = unwrapped(content["model"])
    same = content["model_ema"] is content["model"]
    return {"model": model, "model_ema": model if same else unwrapped(content["model_ema"])}


def export_ema(source, path, config):
    """Write the EMA weights of a loaded checkpoint, and `config`, as safetensors."""
    write_safetensors(path, source["model_ema"], {"config": json.dumps(config)})


def _load_export(path):
    weights, metadata = read_weights(path), read_metadata(path)
    _refuse_tokenizer(weights, path)
    if "sha256" not in metadata:
        print0(f"NOTE: {path}: without a sha256, by which damage would be found; export it again")
    try:
        config = json.loads(metadata.get("config", "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its configuration cannot be read ({error})") from None
    config = hub.config_of(path, config)
    content = {"model": weights, "model_ema": weights, "config": config, "args": {}}
    check_checkpoint(content, path)
    if tokenizer := (config or {}).get("tokenizer_sha256"):
        content["record"] = {"tokenizer": tokenizer}
    return content
