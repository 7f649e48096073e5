"""FLOPs, bytes and products that sampling and training need, from the shapes alone."""

import math
from collections import Counter


def transformer_flops(model, known):
    """FLOPs of MAR's encoder and decoder for one sequence with `known` known tokens."""
    buffer, width = model.buffer_size, model.fake_latent.shape[1]

    def stack(blocks, tokens):
        weights = sum(p.numel() for p in blocks.parameters() if p.ndim > 1)
        return 2 * tokens * weights + len(blocks) * 4 * tokens**2 * width

    return stack(model.encoder_blocks, buffer + known) + stack(
        model.decoder_blocks, buffer + model.seq_len
    )


def head_flops(model):
    """FLOPs of the denoising MLP for one row, without its embeddings of t and z."""
    return 2 * sum(
        p.numel()
        for name, p in model.diffloss.net.named_parameters()
        if p.ndim > 1 and not name.startswith(("time_embed", "cond_embed"))
    )


def step_flops(model, step):
    """FLOPs of an autoregressive step with guidance, as the method states it. step: a Step."""
    rows = 2 * step.bsz * (step.unknown - step.remaining)
    transformer = 2 * step.bsz * transformer_flops(model, model.seq_len - step.unknown)
    return transformer + rows * model.diffloss.gen_diffusion.num_steps * head_flops(model)


def training_flops(model, masked):
    """FLOPs of the forward and backward pass of one image with `masked` masked tokens."""
    rows = model.diffloss.diffusion_batch_mul * masked
    forward = transformer_flops(model, model.seq_len - masked) + rows * head_flops(model)
    return 3 * forward


def bytes_read(model, width):
    """Bytes of weights that an autoregressive step reads, each number `width` bytes.

    The MLPs of the head's blocks are read at each diffusion step, all others once.
    """
    blocks = model.diffloss.net.res_blocks
    mlp = sum(p.numel() for block in blocks for p in block.mlp.parameters())
    others = sum(p.numel() for p in model.parameters()) - mlp
    return width * (others + model.diffloss.gen_diffusion.num_steps * mlp)


def training_products(model, bsz, masked):
    """Shapes (rows, inputs, outputs) of linear layers in training, those with most FLOPs first.

    bsz: images of a step. masked: masked tokens of an image.
    """
    rows = {
        "encoder_blocks": bsz * (model.buffer_size + model.seq_len - masked),
        "decoder_blocks": bsz * (model.buffer_size + model.seq_len),
        "diffloss": bsz * masked * model.diffloss.diffusion_batch_mul,
    }
    flops = Counter()
    for name, layer in model.named_modules():
        part = name.split(".")[0]
        if part in rows and hasattr(layer, "out_features"):
            shape = rows[part], layer.in_features, layer.out_features
            flops[shape] += math.prod(shape)
    return [shape for shape, _ in flops.most_common()]


def sampling_products(model, batch_sizes, num_iter):
    """The same of the head's MLPs in sampling with guidance, for the mean number of tokens."""
    tokens = max(1, model.seq_len // num_iter)
    width = model.diffloss.net.input_proj.out_features
    return [(2 * bsz * tokens, width, width) for bsz in batch_sizes]
