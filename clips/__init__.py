"""CLIPS: vision–language pretraining with synthetic captions (arXiv 2411.16828)."""
