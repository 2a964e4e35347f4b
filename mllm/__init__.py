"""The language side: LLaVA-style models on top of a vision encoder, their training, evaluation and chat."""
