"""New networks of tokenizers, built by the flags."""

from inspect import signature

from models.autoencoder_settings import CHANNELS, NETWORKS, Network, widths
from util.run.resume import load_resumed
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


def unused(kind, given):
    """The fields of Network among the names `given` that a kind of network does not take."""
    return sorted(set(given) & set(Network.names()) - arguments(kind, Network()).keys())


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
    for name in ("tokenizer", "img_size", "vae_embed_dim", *Network.names()):
        value = stored.get(name, getattr(args, name))
        if name in given and getattr(args, name) != value:
            raise ValueError(
                f"--{name} {getattr(args, name)}: the network in {source} has {value}, which its "
                "weights fix; leave the flag out"
            )
        setattr(args, name, value)
