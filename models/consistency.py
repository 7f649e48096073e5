"""The Consistency Decoder (OpenAI 2023) of the diffusers library, an optional dependency.

It decodes the latents of KL-8 in two steps of a consistency model instead of one pass of a decoder.
The network and its two steps are those of the library; our code reads and checks the weights.
"""

from models.diffusers_files import read_config, weights_file
from util.weights import load_strictly, read_weights


def load_consistency_decoder(path):
    """diffusers' ConsistencyDecoderVAE with the weights at `path`, including the encoder of KL-8.

    path: a folder written by diffusers (config.json beside diffusion_pytorch_model.*), or a weight
    file; without a config.json beside it, the published architecture is assumed.
    Raises ValueError if diffusers is not installed, or the file is missing or does not fit.
    """
    try:
        from diffusers import ConsistencyDecoderVAE
    except ImportError as error:
        raise ValueError(
            "the tokenizer consistency needs the diffusers library "
            f"({error}): pip install 'mar-diffloss[consistency]'"
        ) from None
    file = weights_file(path)
    state = read_weights(file, missing="Expected openai/consistency-decoder as diffusers saves it")
    config = read_config(path, ConsistencyDecoderVAE.__name__)
    model = ConsistencyDecoderVAE.from_config(config)
    load_strictly(model, state, file)
    return model
