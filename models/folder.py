"""The folder of a model that is passed on: weights, config.json, tokenizer and model card.

util/hub.py has the names of its files, and reads it.
"""

import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import models
from models import arguments_of_tokenizer, tokenizer_file
from models.settings import Sampling
from models.stored import check_config
from util import hub, jsonl, model_card
from util.files import first_few, first_line, make_folder, replacing
from util.images import grid, save_image, to_uint8
from util.published import source_of, usual_place
from util.rng import image_generators
from util.sizes import sides
from util.weights import digest, unwrapped, write_safetensors

GRID = re.compile(r"epoch(\d+)_(raw|ema(?:_\d+)?)\.png")  # of main_mar.py
COLUMNS = 10  # classes of a grid that is drawn, two images of each


def write(model, folder, given, tokenizer, with_tokenizer, run, samples, name, about):
    """See models.pretrained.Pretrained.save_pretrained; given: its `config`, a dict."""
    hub.check_folder(folder)
    config = _whole(model, given, tokenizer)
    config["about"] = config.get("about", {}) | {k: v for k, v in about.items() if v is not None}
    model_card.check_about(config["about"])
    if run and not Path(run).is_dir():
        raise ValueError(f"run {run}: no such folder")
    state = unwrapped(model.state_dict())
    _check_finite(state)
    reference, tokenizer = _reference(config, tokenizer, with_tokenizer, samples is True)
    config = {
        "library": hub.LIBRARY,
        "format": hub.FORMAT,
        **config,
        "tokenizer": reference,
        "weights_sha256": digest(state),
    }
    check_config(config, state, folder)
    picture = _picture(model, config, tokenizer, samples, run)
    before = hub.digest_in(folder)
    make_folder(folder, "folder")
    _write(Path(folder), state, config, tokenizer, picture)
    results = jsonl.read(Path(run, "results.jsonl")) if run else []
    text = _card(model, config, name or Path(folder).resolve().name, picture, results)
    _write_text(Path(folder, hub.CARD), text)
    if before:
        _remove_old(Path(folder), config, before == config["weights_sha256"] or picture is not None)


# ---- the configuration ---------------------------------------------------------------------------


def _whole(model, given, tokenizer):
    """A model's configuration as plain data, its own with what is given. Raises ValueError."""
    config = {**(model.config or {}), **given}
    if tokenizer is not None:
        config["tokenizer"] = getattr(tokenizer, "config", None)
    for part in ("model", "tokenizer"):
        if not isinstance(config.get(part), dict) or not config[part].get("name"):
            raise ValueError(
                f"save_pretrained: the {part} of this {type(model).__name__} is not known, "
                f"expected config={{{part!r}: {{'name': …, and its arguments}}}}"
            )
    steps = Sampling().num_iter
    steps = model.seq_len if model.one_at_a_time else min(steps, model.seq_len)
    config.setdefault("sampling", {"num_iter": steps})
    return _without_paths(json.loads(json.dumps(config, default=str)))


def _without_paths(config):
    """The configuration without the paths of the machine on which the model was trained."""
    ((config.get("data") or {}).get("reading") or {}).pop("label_file", None)
    if origin := config.get("init_from"):
        origin["file"] = re.split(r"[/\\]", origin.get("file", ""))[-1]
    return config


def _check_finite(state):
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ValueError(f"save_pretrained: not saved, values are not finite: {first_few(bad)}")


def _reference(config, tokenizer, with_tokenizer, needed):
    """(name and arguments of the tokenizer as config.json has them, the tokenizer or None).

    A published one is found where util.download puts it, any other in the folder. The tokenizer is
    None if its file is not there and not needed. Raises ValueError if it is not there but needed.
    """
    own = dict(config["tokenizer"])
    has_file, path = arguments_of_tokenizer(own["name"], vae_path=None), own.get("vae_path")
    usual = usual_place(path, own["name"]) if has_file else None
    copied = has_file and (with_tokenizer or not usual)
    if tokenizer is None and (not usual or copied or needed or Path(path or usual).exists()):
        place = {"vae_path": path or usual} if has_file else {}
        tokenizer = models.build_tokenizer(**{**own, **place})
    if tokenizer is not None:
        own |= {"scale": tokenizer.scale, "shift": tokenizer.shift}
        models.compare_tokenizer(tokenizer, config)
        sha256, encoder = digest(tokenizer.state_dict()), tokenizer.encoder_sha256()
        if config.setdefault("tokenizer_sha256", sha256) == sha256 and encoder:
            config.setdefault("encoder_sha256", encoder)
    if has_file:
        own["vae_path"] = hub.HERE + hub.TOKENIZER if copied else usual
    return own, tokenizer


# ---- the files -----------------------------------------------------------------------------------


def _write(folder, state, config, tokenizer, picture):
    """Write all but the card, the configuration last, as it has the digest of the weights."""
    if _is_copied(config):
        _write_tokenizer(folder / hub.TOKENIZER, tokenizer, config)
    write_safetensors(folder / hub.WEIGHTS, state, {"config": json.dumps(config)})
    if picture is not None:
        save_image(folder / hub.SAMPLES, picture)
    _write_text(folder / hub.CONFIG, hub.readable(config) + "\n")


def _remove_old(folder, config, keep_picture):
    """Remove what an earlier call left in the folder and this one did not write."""
    if not keep_picture:
        (folder / hub.SAMPLES).unlink(missing_ok=True)
    if not _is_copied(config):
        (folder / hub.TOKENIZER).unlink(missing_ok=True)


def _is_copied(config):
    """Whether the tokenizer's file lies in the folder."""
    return str(config["tokenizer"].get("vae_path")).startswith(hub.HERE)


def _write_text(path, text):
    with replacing(path) as beside:
        beside.write_text(text, "utf-8")


def _write_tokenizer(path, tokenizer, config):
    """Write the network of a tokenizer as main_tokenizer.py does, with what its file says of it."""
    said = tokenizer_file.read(tokenizer.config.get("vae_path") or "")
    about = {part: said.get(part, {}) for part in ("data", "training", "metrics")}
    about["img_size"] = said.get("img_size", config["model"]["img_size"])
    tokenizer_file.write(
        path,
        tokenizer.vae,
        tokenizer.scale,
        tokenizer.shift,
        tokenizer=config["tokenizer"]["name"],
        check=partial(_check_tokenizer, config["tokenizer"]),
        **about,
    )


def _check_tokenizer(own, path):
    """Raises ValueError unless a tokenizer can be built from its file that was just written."""
    try:
        models.build_tokenizer(**{**own, "vae_path": str(path)})
    except ValueError as error:
        reason = first_line(error).replace(str(path), "it")
        raise ValueError(
            f"save_pretrained: not saved, as the network of this tokenizer {own['name']} could not "
            f"be loaded again from a file alone ({reason})"
        ) from None


# ---- the card ------------------------------------------------------------------------------------


def _picture(model, config, tokenizer, samples, run):
    """The grid of samples that the card shows, uint8 (H, W, 3), or None. Raises ValueError."""
    if samples is True:
        return _draw(model, tokenizer, config)
    if samples is None:
        samples = _newest_grid(run, config) if run else None
    if samples is None:
        return None
    try:
        with Image.open(samples) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"samples {samples}: no picture ({first_line(error)})") from None


def _newest_grid(run, config):
    """The last grid of samples in the folder of a run that is of weights of this kind, averaged or
    raw, and not of later ones, or the picture in a folder that these weights were passed on in;
    None without any."""
    training = config.get("training", {})
    kind = "raw" if training and not training.keys() & {"ema_rate", "ema_images"} else "ema"
    named = [(GRID.fullmatch(path.name), path) for path in Path(run, "samples").glob("*.png")]
    further = f"ema_{training.get('ema_images')}"  # unless these are the main average
    kind = further if any(found and found[2] == further for found, _ in named) else kind
    grids = {int(found[1]): path for found, path in named if found and found[2] == kind}
    if done := [epoch for epoch in grids if epoch <= training.get("epochs", math.inf)]:
        return grids[max(done)]
    own = hub.digest_in(run) == config["weights_sha256"] and Path(run, hub.SAMPLES).is_file()
    return Path(run, hub.SAMPLES) if own else None


@torch.no_grad()
def _draw(model, tokenizer, config):
    """A grid of two images from each of up to ten classes, drawn with seed 0."""
    columns, device = min(model.class_num, COLUMNS), next(model.parameters()).device
    labels = [i * model.class_num // columns for i in range(columns)] * 2
    sampling, training = models.sampling_of(model, config), model.training
    latents = model.eval().sample_tokens(
        len(labels),
        labels=torch.tensor(labels, device=device),
        generator=image_generators(0, range(len(labels))),
        progress=True,
        **sampling.asdict(),
    )
    model.train(training)
    images = tokenizer.to(device).decode(latents)
    return grid(to_uint8(images), columns, min_side=64)


def _card(model, config, name, picture, results):
    """The text of the model card. results: lines of results.jsonl."""
    own = [each for each in results if each.get("weights_sha256") == config["weights_sha256"]]
    path = config["tokenizer"].get("vae_path")
    advice = "" if path is None or path.startswith(hub.HERE) else source_of(path)
    return model_card.card(
        name,
        config,
        facts=_rows(model, config),
        table=model_card.metrics_table(own, Sampling.names()),
        picture=hub.SAMPLES if picture is not None else None,
        tokenizer=advice and f"Its tokenizer is not in this repository. {advice}, to `{path}`",
    )


def _rows(model, config):
    """What the model is, label -> text."""
    own, count = config["model"], sum(p.numel() for p in model.parameters())
    head = type(model.head).__name__ if model.head_name else "none: the backbone predicts the noise"
    if model.head_name and {"diffloss_d", "diffloss_w"} <= own.keys():
        head += f", an MLP of {own['diffloss_d']} blocks, {own['diffloss_w']} wide"
    kind = f"of {model.token_embed_dim} numbers"
    kind = f"each one of {model.num_codes} codes" if model.num_codes else kind
    return {
        "backbone": f"{type(model).__name__}, `{own['name']}`",
        "parameters": f"{count / 1e6:.1f}M",
        "head": head,
        "images": "×".join(map(str, sides(own["img_size"]))) + " pixels",
        "classes": model.class_num,
        "tokens": f"{model.seq_h}×{model.seq_w}, {kind}",
        "tokenizer": f"`{config['tokenizer']['name']}`",
    }
