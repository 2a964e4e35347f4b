"""The forward pass in training: insert image features into the word embeddings, and compute the loss on the answers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm.data.conversation import IGNORE
from mllm.data.video import Size
from mllm.encoders.encoder import select_features
from mllm.model.packing import Packing, marked, places_of
from mllm.model.tiles import Llava, TokenLayout, newline_of, placeholder_ids


def embed_inputs(
    model: Llava,
    input_ids: Tensor,
    image_features: Tensor | None = None,
    pixel_values: Tensor | None = None,
    placeholders: int | None = None,
    image_sizes: Sequence[Size] = (),
) -> Tensor:
    """Return the word embeddings [B, L, D] of `input_ids` with projected image tokens at the `<image>` positions.

    They equal those of the stock forward. `image_features` [n, N, W] are the encoder's tokens of all crops in order;
    alternatively `pixel_values` [n, 3, S, S] are the crops. With tiles, `image_sizes` holds (height, width) of each
    image, or VIDEO for a video, whose frames are its crops. `placeholders` is the number of placeholders in
    `input_ids`; without it the host waits for the GPU. For a batch without images pass the same kind of tensor with
    n = 0. A zero image then goes through the same modules with weight zero, because under ZeRO-3 every rank must run
    every module, or the other ranks wait forever. Raises ValueError if placeholders and image tokens differ in number.
    """
    config, inner = model.config, model.model
    newline = newline_of(model)
    inputs_embeds = model.get_input_embeddings()(input_ids)
    tower, projector = inner.vision_tower, inner.multi_modal_projector
    if pixel_values is not None:
        has_images = len(pixel_values) > 0
        pixels = pixel_values if has_images else pixel_values.new_zeros(1, *pixel_values.shape[1:])
        # With checkpointing PEFT makes embeddings require gradients, so a frozen tower would keep its activations.
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
        tokens = TokenLayout.of(config).arranged(projected, newline, image_sizes)
    if placeholders is None:
        placeholders = int(positions.sum())
    if placeholders != len(tokens):
        raise ValueError(f"{placeholders} image placeholders, but {len(tokens)} image tokens")
    if not has_images:
        unused = projected.sum() if newline is None else projected.sum() + newline.sum()
        return inputs_embeds + 0.0 * unused
    # Not masked_scatter, because its gradient is a selection, and the host would wait for its size.
    rows = inputs_embeds.flatten(0, 1).index_put((places_of(positions, placeholders),), tokens)
    return rows.view_as(inputs_embeds)


def hidden_states(
    model: Llava, inputs_embeds: Tensor, attention_mask: Tensor, packing: Packing | None = None
) -> Tensor:
    """Return the language model's last hidden states: those of all positions [B · L, D], or of the packed row [T, D].

    Args:
        inputs_embeds: [B, L, D].
        attention_mask: [B, L], not read with `packing`.
    """
    language_model = model.model.language_model
    if packing is None:
        outputs = language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
    else:
        outputs = language_model(
            inputs_embeds=inputs_embeds.flatten(0, 1).index_select(0, packing.row)[None],
            position_ids=packing.position_ids,
            use_cache=False,
            packing=packing,
        )
    return outputs.last_hidden_state.flatten(0, 1)


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
    """Return the mean next-token cross entropy over the labelled positions. Only those positions get logits.

    inputs_embeds [B, L, D], attention_mask [B, L], labels [B, L] with -100 where nothing is learned. `num_items`, for
    gradient accumulation, replaces the number of labelled tokens as divisor. `learned` is that number; without it the
    host waits for the GPU. With `packing` the batch goes through the language model as one row without padding, so the
    attention of the language model must be `PACKED`. A batch without labels has loss zero, but the loss still depends
    on every weight.
    """
    is_learned = F.pad(labels[:, 1:] != IGNORE, (0, 1))
    indices = places_of(is_learned, int(is_learned.sum()) if learned is None else learned)
    states = hidden_states(model, inputs_embeds, attention_mask, packing)
    logits = model.lm_head(states.index_select(0, indices if packing is None else packing.in_row(indices))).float()
    divisor = num_items if num_items is not None else max(len(indices), 1)
    return F.cross_entropy(logits, labels.flatten().index_select(0, indices + 1), reduction="sum") / divisor
