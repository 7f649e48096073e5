"""save_pretrained, from_pretrained and push_to_hub, methods of all models. See docs/sharing.md."""

from tempfile import TemporaryDirectory

# the rest is imported where it is used: few who build a model pass it on


class Pretrained:
    """Base of models that can be passed on.

    Attribute: `config`, the configuration (see models) as far as it is known: all of it for a
    model that was loaded, `model` for one of `build_model`, None for one that was constructed.
    """

    config = None

    @classmethod
    def from_pretrained(cls, source, weights="ema", **overrides):
        """The model at `source` in evaluation mode; its `config` says how it is sampled.

        source: a folder of `save_pretrained`, a checkpoint, an export, or the name of a repository
        of the hub. weights, overrides: see models.load_model. Raises ValueError, also for a model
        of another class. `models.load` gives the tokenizer, too.
        """
        from models import load_model

        model, config = load_model(source, weights, **overrides)
        if not isinstance(model, cls):
            own = type(model).__name__
            raise ValueError(
                f"{source}: {config['model']['name']}, a model of class {own}, expected "
                f"{cls.__name__}; {own}.from_pretrained takes it"
            )
        return model

    def save_pretrained(
        self,
        folder,
        *,
        config=None,
        tokenizer=None,
        with_tokenizer=False,
        run=None,
        samples=None,
        name=None,
        **about,
    ):
        """Write a folder that `from_pretrained` and the scripts take. Raises ValueError.

        The weights are those that the model has: give it the averaged ones.

        Args:
            folder: new, or of an earlier call, whose files are replaced.
            config: entries of the configuration (see models) that the model does not know of itself
                or that shall be others: `model`, `tokenizer`, `sampling`, `data`.
            tokenizer: the tokenizer, of `build_tokenizer`, in place of `config`'s.
            with_tokenizer: copy the tokenizer's file even if it is a published one.
            run: folder of the run, whose results.jsonl and grid of samples the card shows.
            samples: a picture for the card, or True to draw one. By default the run's newest grid.
            name: what commands on the card load (default: the name of the folder).
            about: `title`, `license`, `data`: texts for the card.
        """
        from models.folder import write

        write(self, folder, config or {}, tokenizer, with_tokenizer, run, samples, name, about)

    def push_to_hub(self, name, *, private=False, **kwargs):
        """Save the model and upload it to the repository "user/name"; returns its address.

        The repository is created if there is none; private: whether it is then private. kwargs: see
        `save_pretrained`. Raises ValueError, without a network or a login too.
        """
        from util import hub

        hub.check_name(name)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **{"name": name, **kwargs})
            return hub.push(folder, name, private)
