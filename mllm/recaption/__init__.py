"""Recaptioning: pairs of image and web caption in, the same samples with a long caption out, of any number."""
