"""One calm look, light and dark: system fonts and one accent."""

from __future__ import annotations

from pathlib import Path

from gradio.themes import Base, colors, sizes

HERE = Path(__file__).parent
CSS = HERE / "look.css"


def script(name: str) -> str:
    """A script of this folder."""
    return (HERE / name).read_text(encoding="utf-8")


def theme() -> Base:
    """Gradio's plain theme in one accent; fonts are the system's, so that none is fetched."""
    return Base(
        primary_hue=colors.teal,
        secondary_hue=colors.teal,
        neutral_hue=colors.slate,
        radius_size=sizes.radius_md,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="#0f1418",
        background_fill_primary_dark="#161d22",
        background_fill_secondary_dark="#1b242a",
        block_background_fill_dark="#161d22",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        color_accent="*primary_700",
        checkbox_background_color_selected="*primary_700",
        checkbox_background_color_selected_dark="*primary_600",
        checkbox_border_color_selected="*primary_700",
        block_border_width="1px",
        block_label_text_color="*neutral_600",
        block_title_text_weight="500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
    )
