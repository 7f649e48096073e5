"""The network of a tokenizer by its flags: built, resumed, and described for its file."""

from inspect import signature

from models import tokenizer_file
from models.autoencoder_settings import (
    CHANNELS,
    NETWORKS,
    RECIPE,
    Changes,
    Losses,
    Network,
    widths,
)
from util.dist import world_size
from util.recipe import Recipe
from util.run.resume import load_resumed
from util.settings import from_flags
from util.sizes import shown, sides


def arguments(kind, network, embed_dim=None, in_channels=3):
    """The constructor arguments of a network of NETWORKS, name -> value.

    network: a Network, of which some fields apply. embed_dim: channels of the latents; None for the
    usual number. in_channels: channels of the images.
    """
    values = network.asdict() | {"ch_mult": widths(network.ch_mult), "in_channels": in_channels}
    values["embed_dim"] = embed_dim or CHANNELS[kind]
    return {name: values[name] for name in signature(NETWORKS[kind]).parameters if name in values}


def new_network(kind, network, embed_dim, in_channels, img_size):
    """A network with random weights for images of a size. Other arguments as in `arguments`.

    Raises ValueError if its stride does not divide the sides of the images.
    """
    own = arguments(kind, network, embed_dim, in_channels)
    built = NETWORKS[kind](**own)
    if any(side % built.stride for side in sides(img_size)):
        name = "stride" if "stride" in own else "ch_mult"
        raise ValueError(
            f"--{name} {getattr(network, name)}: images of {shown(img_size)} pixels, expected a "
            f"multiple of the stride {built.stride}"
        )
    return built


def unused(kind):
    """The names of the settings that a kind of network does not take, a set."""
    network = NETWORKS[kind]
    others = {name for each in NETWORKS for name in NETWORKS[each].own_losses}
    names = {*Network.names()} - arguments(kind, Network()).keys()
    names |= others - {*network.own_losses}
    return names | ({*Losses.names(), *Changes.names(), *RECIPE} if network.fitted else set())


def described(args, network, dataset, epochs, precision, resumed=None):
    """The entries on a network in its file and its checkpoints, name -> plain data.

    args: the parsed flags. epochs: those that it was trained for. resumed: content of the
    checkpoint that was resumed, if any.
    """
    recipe, idle = from_flags(Recipe, args), unused(args.tokenizer)
    used = [from_flags(cls, args).without(idle) for cls in (Losses, Changes)]
    numbers = {"epochs": epochs, "lr": recipe.resolved(world_size()).lr, "seed": args.seed}
    numbers |= {"batch_size": args.batch_size, "processes": world_size()}
    training = tokenizer_file.training_facts(*used, **numbers, precision=precision)
    if resumed and epochs == resumed["epoch"] + 1:  # nothing was trained
        training = {**resumed["config"]["training"], "epochs": epochs}
    return {
        "network": dict(network.config),
        "tokenizer": args.tokenizer,
        "img_size": args.img_size,
        "data": tokenizer_file.data_facts(dataset, args.data_path),
        "training": training,
    }


def resumed(args, given):
    """(content, path) of the checkpoint that --resume names, whose network the flags then describe.

    (None, None) to start a new run. A collective call. Raises ValueError for flags that contradict
    it, and as `load_resumed`.
    """
    checkpoint, path = load_resumed(args, of_tokenizer=True)
    if checkpoint:
        follow(args, given, checkpoint["args"], path)
    return checkpoint, path


def follow(args, given, stored, source):
    """Set the flags of a network to those of the run that is resumed.

    given: names of the flags on the command line. stored: flags of the checkpoint at `source`, name
    -> value. Raises ValueError for a flag that contradicts it.
    """
    names = ["tokenizer", "img_size", "vae_embed_dim", "codebook", *Network.names()]
    names += ["disc_layers", "disc_ch"] if stored.get("disc_weight") else []
    for name in names:
        value = stored.get(name, getattr(args, name))
        if name in given and getattr(args, name) != value:
            raise ValueError(
                f"--{name} {getattr(args, name)}: the training in {source} has {value}, which its "
                "weights fix; leave the flag out"
            )
        setattr(args, name, value)
