"""The training forward pass: image features among word embeddings, and the loss on the answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from mllm.data.conversation import IGNORE
from mllm.encoders.encoder import select_features
from mllm.model.packing import Packing


def embed_inputs(
    model: LlavaForConditionalGeneration,
    input_ids: Tensor,
    image_features: Tensor | None = None,
    pixel_values: Tensor | None = None,
) -> Tensor:
    """The word embeddings [B, L, D] of `input_ids` with projected image tokens at the `<image>` positions.

    Equal to what the stock forward computes from pixels. `image_features` [n, N, W] are the encoder's tokens of all
    images in order; alternatively `pixel_values` [n, 3, S, S]. In a batch without images pass the same kind of tensor
    with n = 0: then a zero image goes through the same modules with weight zero, because under ZeRO-3 every rank must
    run every module or the others wait for ever.
    """
    config, inner = model.config, model.model
    inputs_embeds = model.get_input_embeddings()(input_ids)
    tower, projector = inner.vision_tower, inner.multi_modal_projector
    if pixel_values is not None:
        has_images = len(pixel_values) > 0
        pixels = pixel_values if has_images else pixel_values.new_zeros(1, *pixel_values.shape[1:])
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
    positions = input_ids == config.image_token_id
    tokens = projected.flatten(0, 1) if has_images else projected.flatten(0, 1)[:0]
    if int(positions.sum()) != len(tokens):
        raise ValueError(f"{int(positions.sum())} image placeholders, but {len(tokens)} image tokens")
    if not has_images:
        return inputs_embeds + 0.0 * projected.sum()
    return inputs_embeds.masked_scatter(positions[..., None], tokens)


def causal_lm_loss(
    model: LlavaForConditionalGeneration,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    num_items: Tensor | int | None = None,
    shared: int | None = None,
) -> Tensor:
    """Mean next-token cross entropy over the labelled positions; logits exist only for those.

    inputs_embeds [B, L, D], attention_mask [B, L], labels [B, L] with -100 where nothing is learned. `num_items`
    replaces the number of labelled tokens as divisor (gradient accumulation). With `shared`, see `shared_length`, the
    batch goes through the language model as one row without padding (mllm/model/packing.py), whose attention must be
    `PACKED`. Without any label the loss is zero, and still depends on every weight.
    """
    targets = labels[:, 1:]
    learned = targets != IGNORE
    language_model = model.model.language_model
    if shared is None:
        outputs = language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
        states = outputs.last_hidden_state[:, :-1][learned]
    else:
        packing = Packing.of(attention_mask, shared)
        outputs = language_model(
            inputs_embeds=inputs_embeds[packing.kept][None],
            position_ids=packing.position_ids,
            use_cache=False,
            packing=packing,
        )
        states = outputs.last_hidden_state[0][packing.places(F.pad(learned, (0, 1)))]
    logits = model.lm_head(states).float()
    divisor = num_items if num_items is not None else learned.sum().clamp_min(1)
    return F.cross_entropy(logits, targets[learned], reduction="sum") / divisor
