"""Every flag of a setting reaches what it is for. Run: python -m pytest tests/test_reach.py

Field by field of the settings classes: a value other than the default, given on the command line,
must change what the model, the optimizer or the sampler gets. A new field is covered at once, or
fails here if no value for it is known.
"""

import shlex
from types import FunctionType

import pytest
import torch
from test_fixtures import CHECKPOINT, FIXTURES

import engine_mar
import engine_tokenizer
import main_mar
import main_tokenizer
import models
import sample
import util.evaluation.evaluator
from models.autoencoder_settings import Changes, Losses, Network
from models.mar import MAR
from models.settings import Model, Sampling
from models.vae import AutoencoderKL
from util.evaluation.settings import Evaluation
from util.recipe import Recipe
from util.run import fsdp
from util.run.saver import Saver

# values where none of GUESSES fits
SAID = {
    "anneal": "linear",
    "energy_beta": "1.5",
    "cfg_interval": "0.25 0.75",
    "ch_mult": "1,1,2",
    "img_size": "16",
    "max_timestep": "800",  # the preset's 950 is a default of another kind
    "order": "raster",
    "patch_size": "4",
    "solver": "ddim",  # the checkpoint's is dpm++
}
GUESSES = ("5", "0.375", "other")


class Stop(Exception):
    """Raised when what is looked at has been seen."""


def flag_of(field):
    """The flag of a field as it is typed; "" for a field without one."""
    name = field.name if field.metadata["flag"] is None else field.metadata["flag"]
    return f"--{name}" if name else ""


def other(field):
    """A flag that gives a field another value than its default, as text."""
    if isinstance(field.default, bool):
        return flag_of(field)
    if field.name in SAID:
        return f"{flag_of(field)} {SAID[field.name]}"
    if "choices" in field.metadata:
        name = [name for name in field.metadata["choices"] if name != field.default][-1]
        return f"{flag_of(field)} {name}"
    for guess in GUESSES:
        try:
            if field.metadata.get("type", str)(guess) != field.default:
                return f"{flag_of(field)} {guess}"
        except Exception:
            continue
    raise AssertionError(f"{field.name}: expected a value for it in SAID")


def with_flags(cls):
    """The fields of a settings class that have a flag, as parameters of a test."""
    return [pytest.param(field, id=field.name) for field in cls.fields() if flag_of(field)]


# ---- models --------------------------------------------------------------------------------------

DIGITS = "--preset digits --device cpu --output_dir {folder}"
# what is also said, with the field and without it
BESIDE = {"min_lr": "--lr_schedule cosine"}
# with which a field of Model is looked at, where it is not that of the digits
WITH = {"order": "--model ar_tiny", "energy_beta": "--head energy"}
# fields that are derived, each with flags from which another value follows
DERIVED = {
    "vae_stride": f"--tokenizer kl --vae_path {FIXTURES}/kl.ckpt",
    "vae_embed_dim": f"--tokenizer kl --vae_path {FIXTURES}/kl.ckpt",
    "num_codes": f"--tokenizer vq --vae_path {FIXTURES}/vq.ckpt",
    "token_norm": "--tokenizer kl --vae_path {folder}/normed.ckpt",
    "order": "--model ar_tiny --order random",
    "num_sampling_steps": "--num_sampling_steps 7",
    "max_timestep": "--max_timestep 800",
}


def built(flags, folder, monkeypatch):
    """(arguments, model) that main_mar.py builds, on the meta device."""
    found, build = [], models.build_model

    def spy(name, **arguments):
        with torch.device("meta"):
            found.extend(({"name": name, **arguments}, build(name, **arguments)))
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(models, "build_model", spy)
        patch.setattr("models.found.open_training_data", lambda *_: None)  # the digits are 8×8
        main_mar.main(shlex.split(f"{DIGITS.format(folder=folder)} {flags}"))
    return found


def write_normed(path):
    """The file of a tokenizer with token norm."""
    network = {"embed_dim": 4, "ch_mult": (1, 2), "ch": 8, "token_norm": True}
    weights = AutoencoderKL(**network).state_dict()
    torch.save({"model": weights, "config": {"network": network}}, path)


def anatomy(model):
    """All plain values and shapes that a model is made of."""
    plain = (bool, int, float, str, type(None), FunctionType)
    parts = {f"{name} shape": tuple(p.shape) for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        parts[path] = type(module).__name__
        parts |= {f"{path}.{k}": v for k, v in vars(module).items() if isinstance(v, plain)}
    return parts


@pytest.mark.parametrize("field", Model.fields(), ids=Model.names())
def test_fields_of_models(field, tmp_path, monkeypatch):
    """The argument of the constructor changes, and so does the model that it makes."""
    flags = (DERIVED.get(field.name) or other(field)).format(folder=tmp_path)
    write_normed(tmp_path / "normed.ckpt")
    with_it = WITH.get(field.name, "--img_size 8")
    before, model = built(with_it, tmp_path, monkeypatch)
    after, changed = built(f"{with_it} {flags}", tmp_path, monkeypatch)
    assert field.name in after and after[field.name] != before.get(field.name)
    assert anatomy(changed) != anatomy(model)
    if field.name not in ("name", "head", *DERIVED):  # on which others depend
        assert {name for name in before if after[name] != before[name]} == {field.name}


@pytest.mark.parametrize("name", ["vae_stride", "vae_embed_dim"])
def test_flags_that_contradict_the_tokenizer(name, tmp_path):
    """They are the tokenizer's: the published flag is accepted where it says the same."""
    with pytest.raises(ValueError, match=f"--{name} 3: the tokenizer"):
        main_mar.main(shlex.split(f"{DIGITS.format(folder=tmp_path)} --{name} 3"))


# ---- training ------------------------------------------------------------------------------------


def trained(flags, folder, monkeypatch):
    """What the engine, the optimizer, the EMA and the compiler get, as plain values."""
    found = {"epochs": 0, "compiled": []}

    def spy(model, tokenizer, loader, optimizer, scaler, ema, epoch, *, learning_rate, **how):
        found["epochs"] += 1
        found["learning_rate"] = [learning_rate(x / 2) for x in range(1000)]
        found["batch_size"] = loader.batches.batch_size
        found["decay"] = [group["weight_decay"] for group in optimizer.param_groups]
        found["ema_rates"] = {name: average.rate for name, average in ema.items()}
        found["how"] = {
            k: v for k, v in how.items() if k not in ("logger", "progress", "after_step")
        }
        return 0.0

    with monkeypatch.context() as patch:
        patch.setattr(engine_mar, "train_one_epoch", spy)
        patch.setattr(main_mar, "after_epoch", lambda *args: None)
        patch.setattr(Saver, "save", lambda saver: None)
        patch.setattr(
            torch.nn.Module,
            "compile",
            lambda module, **how: found["compiled"].append(type(module).__name__),
        )
        common = "--data_path digits --model mar_tiny --device cpu --num_workers 0"
        patch.setattr(fsdp, "shard", lambda *models: found.update(sharded=len(models)))
        main_mar.main(shlex.split(f"{common} --output_dir {folder} {flags}"))
    return found


@pytest.mark.parametrize("field", with_flags(Recipe))
def test_fields_of_the_recipe(field, tmp_path, monkeypatch):
    """What trains the model changes."""
    beside = BESIDE.get(field.name, "")
    before = trained(beside, tmp_path, monkeypatch)
    assert trained(f"{beside} {other(field)}", tmp_path, monkeypatch) != before
    assert trained(beside, tmp_path, monkeypatch) == before


# ---- sampling ------------------------------------------------------------------------------------


@pytest.fixture(params=["sample", "main_mar"])
def sampled(request, tmp_path, monkeypatch):
    """A function from flags to the keyword arguments that `sample_tokens` gets from a script."""
    monkeypatch.setattr(util.evaluation.evaluator, "open_evaluator", evaluator)
    scripts = {
        "sample": (sample.main, f"--ckpt {CHECKPOINT} --out {tmp_path}/images"),
        "main_mar": (
            main_mar.main,
            f"--resume {CHECKPOINT} --evaluate --num_images 3 --output_dir {tmp_path}",
        ),
    }
    main, common = scripts[request.param]

    def sampled(flags):
        found = []

        def spy(model, bsz, **arguments):
            found.append(arguments)
            raise Stop

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(MAR, "sample_tokens", spy)
            main(shlex.split(f"{common} --device cpu {flags}"))
        return found[0]

    return sampled


def evaluator(*args, **kwargs):
    """Where nothing is measured."""

    class Nothing:
        def start(self, count):
            return None

    return Nothing()


@pytest.mark.parametrize("field", with_flags(Sampling))
def test_fields_of_sampling(field, sampled):
    """The sampler gets the value that was given, and all others as they were."""
    before, after = sampled(""), sampled(other(field))
    assert set(Sampling.names()) <= set(before)
    changed = {name for name in Sampling.names() if after[name] != before[name]}
    assert changed == {field.name}


# ---- evaluation, tokenizers ----------------------------------------------------------------------


@pytest.mark.parametrize("script", ["sample", "main_mar"])
@pytest.mark.parametrize("field", with_flags(Evaluation))
def test_fields_of_evaluation(field, script, tmp_path, monkeypatch):
    """The Evaluator is opened with the value that was given."""

    def spy(settings, *args, **kwargs):
        found.append(settings)
        raise Stop

    found = []
    monkeypatch.setattr(util.evaluation.evaluator, "open_evaluator", spy)
    flags = f"--ckpt {CHECKPOINT} --reference none"
    main = sample.main
    if script == "main_mar":
        flags = f"--resume {CHECKPOINT} --evaluate --output_dir {tmp_path}"
        main = main_mar.main
    for said in ("", other(field)):
        with pytest.raises(Stop):
            main(shlex.split(f"{flags} --device cpu {said}"))
    before, after = (settings.asdict() for settings in found)
    assert {name for name in before if before[name] != after[name]} == {field.name}


def test_fields_of_a_tokenizer_s_training(tmp_path, monkeypatch):
    """Those of a kl network, the losses, the changes and the recipe reach its training."""

    def spy(network, changes, state, objective, recipe, **how):
        found.append((network.config, changes, objective.settings, recipe))
        raise Stop

    def run(*flags):
        kind = ["--tokenizer", "kl", "--epochs", "2", "--data_path", "digits", "--batch_size", "4"]
        where = ["--device", "cpu", "--output_dir", str(tmp_path), "--num_workers", "0"]
        with pytest.raises(Stop):
            main_tokenizer.main([*kind, *where, *flags])

    found = []
    skipped = {"perceptual", "perceptual_weight", "perceptual_weights"}
    skipped |= {"stride", "num_codes", "epochs", "disc_layers"}
    monkeypatch.setattr(engine_tokenizer, "epoch_runner", spy)
    classes = Network, Changes, Losses, Recipe
    fields = [field for cls in classes for field in cls.fields()]
    taken = {action.dest for action in main_tokenizer.get_parser()._actions}
    fields = [f for f in fields if f.name in taken - skipped and f.name != "batch_size"]
    run()
    constant = "--lr_schedule constant"  # cosine is this script's default
    run("--disc_layers", "1", *shlex.split(" ".join([*map(other, fields), constant])))
    before, after = ({k: v for part in each for k, v in as_dict(part)} for each in found)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"disc_layers", *(f.name for f in fields)}


def as_dict(part):
    """The items of settings, or of a configuration."""
    return (part if isinstance(part, dict) else part.asdict()).items()
