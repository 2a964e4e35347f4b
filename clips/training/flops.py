"""The FLOPs of a pretraining step, by the layers of the model and the tokens of a batch."""

from clips.common.flops import forward_flops, training_flops
from clips.data.loader import texts_of
from clips.engine.engine import Batch
from clips.model.layers import Blocks
from clips.training.losses import world_size
from clips.training.task import Task


def flops_of(task: Task, batch: Batch, *, repeated: bool = False) -> int:
    """Return the FLOPs of the forward and backward pass of `task` over a `batch` of clips/data/loader.py.

    Args:
        repeated: Include what a step computes twice to save memory, which does not count for the MFU.
    """
    vision, text, captioner = task.model.visual, task.model.text, task.model.captioner
    counts, kept, texts = batch["counts"], task.kept(batch), texts_of(batch)
    B, pixels = len(batch["images"]), vision.config.tokens(batch["images"].shape[-1])
    patches = pixels if kept.patches is None else kept.patches.shape[1]
    slots = patches + vision.config.prefix_tokens
    sees, reads = task.freeze != "vision", task.freeze != "text"

    total = B * pixels * training_flops(vision.patch_embed, False)
    total += B * training_flops(vision.proj, sees) + len(texts) * B * training_flops(text.proj, reads)
    # Each text: this rank's images against all texts, and its texts against all images.
    total += len(texts) * 3 * 4 * B * B * world_size() * task.contrasted * task.model.config.embed_dim
    for tower, trains, tokens, pairs in (
        (vision, sees, B * slots, B * slots**2),
        (text, reads, sum(counts.texts), sum(B * ids.shape[1] ** 2 for ids in texts)),
    ):
        forward = tokens * forward_flops(tower.blocks) + len(tower.blocks) * pairs * 4 * tower.config.width
        total += 3 * forward if trains else forward
        if repeated:
            total += _checkpointed(tower.blocks, forward, tokens) if trains else 0
            total += forward if task.contrasted > 1 else 0
    if captioner is None or "caption" not in batch:
        return total

    images = patches if kept.image_tokens is None else kept.image_tokens.shape[1]
    web, positions = texts[0].shape[1] - (text.config.pool == "cls"), batch["caption"].shape[1] - 1
    slots, last = images + web + positions, captioner.blocks[-1].get_submodule
    total += counts.captioned * images * training_flops(captioner.image_proj, sees)
    total += counts.captioned * web * training_flops(captioner.text_proj, reads)
    pairs = counts.captioned * slots * ((len(captioner.blocks) - 1) * slots + positions)
    # The last block computes queries, projection and MLP only for the positions that predict.
    skipped = counts.captioner - counts.predicted
    forward = counts.captioner * forward_flops(captioner.blocks) + pairs * 4 * captioner.config.width
    forward -= skipped * (forward_flops(last("attn.proj")) + forward_flops(last("mlp")))
    head = counts.predicted * forward_flops(captioner.head)
    total += 3 * (forward + head)
    if repeated:
        total += _checkpointed(captioner.blocks, forward, counts.captioner, skipped)
        total += head if B * positions > task.config.caption_chunk else 0
    return total


def _checkpointed(blocks: Blocks, forward: int, tokens: int, skipped: int = 0) -> int:
    """Return the FLOPs of activation checkpointing: all of a block but its last product, because no gradient needs it.

    Args:
        skipped: Number of the tokens that the last block skips.
    """
    products = [forward_flops(block.get_submodule("mlp.fc2")) for block in blocks]
    return forward - tokens * sum(products) + skipped * products[-1] if blocks.activation_checkpointing else 0
