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
