"""The training forward pass: image features among word embeddings, and the loss on the answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm.data.conversation import IGNORE
from mllm.data.video import Size
from mllm.encoders.encoder import select_features
from mllm.model.packing import Packing, marked, places_of
from mllm.model.tiles import Layout, Llava, newline_of, placeholder_ids


def embed_inputs(
    model: Llava,
    input_ids: Tensor,
    image_features: Tensor | None = None,
    pixel_values: Tensor | None = None,
    placeholders: int | None = None,
    image_sizes: Sequence[Size] = (),
) -> Tensor:
    """The word embeddings [B, L, D] of `input_ids` with projected image tokens at the `<image>` positions.

    Equal to what the stock forward computes from pixels. `image_features` [n, N, W] are the encoder's tokens of all
    squares in order; alternatively `pixel_values` [n, 3, S, S]. An image is a square, or with tiles as many as
    `image_sizes`, (height, width) of each image, give; VIDEO stands there for a video, whose frames are its squares. In
    a batch without images pass the same kind of tensor with n = 0: then a zero image goes through the same modules with
    weight zero, because under ZeRO-3 every rank must run every module or the others wait for ever. `placeholders`:
    their number, if known: without it the host waits for the GPU.
    """
    config, inner = model.config, model.model
    newline = newline_of(model)
    inputs_embeds = model.get_input_embeddings()(input_ids)
    tower, projector = inner.vision_tower, inner.multi_modal_projector
    if pixel_values is not None:
        has_images = len(pixel_values) > 0
        pixels = pixel_values if has_images else pixel_values.new_zeros(1, *pixel_values.shape[1:])
        # With checkpointing PEFT lets embeddings ask for gradients: a frozen tower would keep all its activations.
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(learns):
            image_features = select_features(
                tower, pixels, config.vision_feature_layer, config.vision_feature_select_strategy
            )
    elif image_features is not None and len(image_features) > 0:
        has_images = True
    else:
        has_images = False
        image_features = torch.zeros(1, 1, projector.linear_1.in_features, device=input_ids.device)
    projected = projector(image_features.to(inputs_embeds.device, projector.linear_1.weight.dtype))
    projected = projected.to(inputs_embeds.dtype)
    positions = marked(input_ids, *placeholder_ids(config))
    tokens = projected.flatten(0, 1) if has_images else projected.flatten(0, 1)[:0]
    if has_images and newline is not None:
        tokens = Layout.of(config).arranged(projected, newline, image_sizes)
    if placeholders is None:
        placeholders = int(positions.sum())
    if placeholders != len(tokens):
        raise ValueError(f"{placeholders} image placeholders, but {len(tokens)} image tokens")
    if not has_images:
        unused = projected.sum() if newline is None else projected.sum() + newline.sum()
        return inputs_embeds + 0.0 * unused
    # Not masked_scatter: its gradient is a selection, for whose size the host waits.
    rows = inputs_embeds.flatten(0, 1).index_put((places_of(positions, placeholders),), tokens)
    return rows.view_as(inputs_embeds)


def causal_lm_loss(
    model: Llava,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    num_items: Tensor | float | None = None,
    *,
    learned: int | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """Mean next-token cross entropy over the labelled positions; logits exist only for those.

    inputs_embeds [B, L, D], attention_mask [B, L], labels [B, L] with -100 where nothing is learned. `num_items`
    replaces the number of labelled tokens as divisor (gradient accumulation). `learned`: the number of labelled tokens,
    if known: without it the host waits for the GPU. With `packing` the batch goes through the language model as one row
    without padding, and the language model's attention must be `PACKED`. Without any label the loss is zero, and still
    depends on every weight.
    """
    is_learned = F.pad(labels[:, 1:] != IGNORE, (0, 1))
    places = places_of(is_learned, int(is_learned.sum()) if learned is None else learned)
    language_model = model.model.language_model
    if packing is None:
        outputs = language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
        states = outputs.last_hidden_state.flatten(0, 1).index_select(0, places)
    else:
        outputs = language_model(
            inputs_embeds=inputs_embeds.flatten(0, 1).index_select(0, packing.row)[None],
            position_ids=packing.position_ids,
            use_cache=False,
            packing=packing,
        )
        states = outputs.last_hidden_state[0].index_select(0, packing.in_row(places))
    logits = model.lm_head(states).float()
    divisor = num_items if num_items is not None else max(len(places), 1)
    return F.cross_entropy(logits, labels.flatten().index_select(0, places + 1), reduction="sum") / divisor
