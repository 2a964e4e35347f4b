"""The web page's theme and style sheet."""

from __future__ import annotations

import gradio as gr

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.orange,
    secondary_hue=gr.themes.colors.stone,
    neutral_hue=gr.themes.colors.stone,
    radius_size=gr.themes.sizes.radius_lg,
    text_size=gr.themes.sizes.text_md,
    font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif"),
    font_mono=("ui-monospace", "Menlo", "Consolas", "Liberation Mono", "monospace"),
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    input_placeholder_color="*neutral_600",
    input_placeholder_color_dark="*neutral_300",
    block_border_width="1px",
    block_shadow="none",
    block_label_background_fill="transparent",
    block_label_background_fill_dark="transparent",
    block_label_border_width="0px",
    block_label_text_color="*neutral_600",
    block_label_text_color_dark="*neutral_400",
    button_primary_background_fill="*neutral_800",
    button_primary_background_fill_hover="*neutral_700",
    button_primary_text_color="white",
    button_primary_background_fill_dark="*neutral_200",
    button_primary_background_fill_hover_dark="white",
    button_primary_text_color_dark="*neutral_900",
)
CSS = """
.gradio-container { width: 100%; max-width: 1040px !important; margin: 0 auto; padding: 0 !important; }
.gradio-container .main { padding: 12px 20px 24px !important; max-width: 100%; }
.gradio-container main { padding: 0 !important; }
.title h1 { font-size: 1.1rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
.about, .about p, .remark, .remark p { font-size: 0.82rem; line-height: 1.45; }
.about *, .remark * { color: var(--body-text-color-subdued) !important; }
.remark { min-height: 1.3em; }
.chat { border: 1px solid var(--border-color-primary) !important; border-radius: 14px !important;
        background: var(--block-background-fill);
        height: calc(100dvh - 350px) !important; min-height: 300px !important; }
.chat .examples { gap: 8px; padding: 12px; width: 100%; }
.chat .example { padding: 10px 12px; min-width: 0; }
.chat .example-content { flex-direction: row; align-items: center; gap: 12px; }
.chat .example-text-content { margin: 0; }
.chat .example-image-container, .chat .example-image-container img { width: 96px !important; height: 96px !important;
        flex: none; }
.found .grid-wrap { max-height: none !important; min-height: 0 !important; }
.found .grid-container { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)) !important; }
.chat .message img { width: min(320px, 60vw) !important; height: auto !important; max-height: none !important; }
.side { padding: 24px 4px; }
.encoder .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.encoder .label, .encoder .output-class, .encoder .confidence-set, .encoder dl * { font-family: var(--font); }
/* The button below clears all columns together; nothing is shared with other sites. */
.chat button[aria-label="Clear"], .chat button[aria-label="Share"] { display: none; }
@media (max-width: 600px) {
  .tab-container button { padding: 0 9px !important; font-size: 0.9rem; }
  .gradio-container .main { padding: 8px 12px 16px !important; }
  .chat .examples { grid-template-columns: 1fr; }
  .chat .example { width: 100%; max-width: none; padding: 4px 10px; }
  .chat .example-image-container, .chat .example-image-container img { width: 56px !important;
          height: 56px !important; }
  .encoder .column { display: contents; } /* picture, word, map, labels, and only then further scenes */
  #scenes { order: 9; }
}
"""
