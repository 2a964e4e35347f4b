"""Recaptioning: pairs of image and web caption become samples with a long caption."""
