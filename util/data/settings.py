"""Settings of how pictures are listed and read, from which scripts create their flags."""

from dataclasses import dataclass

from util.settings import Settings, setting


@dataclass(frozen=True)
class Reading(Settings):
    """How the pictures of a data set are listed and read."""

    flip: bool = setting(
        True,
        "never mirror images, as for letters, digits, or left and right in medicine (default: half "
        "the images of a training batch)",
        "no_flip",
    )


PLAIN = Reading(flip=False)  # for evaluation
# what matters to evaluation, which never mirrors images
PLAIN_NAMES = [name for name in Reading.names() if name != "flip"]


def plain_reading(data, said):
    """The Reading of real images that samples are compared with.

    data: what a checkpoint knows of its training data; its `reading`, name -> value, is that in
    training. said: name -> value according to flags, which override it; None where not given.
    """
    values = dict((data or {}).get("reading") or {})
    values |= {name: value for name, value in said.items() if value is not None}
    return PLAIN.but(**{name: values[name] for name in PLAIN_NAMES if name in values})
