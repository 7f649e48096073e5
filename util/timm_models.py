"""Models of timm, fetched or from a file."""

from util.files import first_line
from util.weights import load_strictly, never_unpickling, read_weights


def open_timm(name, weights, flag):
    """A model of timm with trained weights, on the CPU.

    weights: their file; without it they are fetched. flag: the one that chose the name, for the
    message, such as --extractor; that of the file is then --extractor_weights. Raises ValueError
    for an unknown name, and for weights that cannot be had or do not fit.
    """
    import timm

    try:
        with never_unpickling():
            model = timm.create_model(name, pretrained=not weights)
    except Exception as error:  # an unknown name, no network, no published weights
        raise ValueError(
            f"{flag} timm:{name}: not available ({first_line(error)}); expected a name of timm, "
            f"and its weights as {flag}_weights FILE where they cannot be fetched"
        ) from error
    if weights:
        load_strictly(model, read_weights(weights), weights)
    return model
