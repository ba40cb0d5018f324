"""Stands in for transformers, of which a script imports pretrained models that it does not load."""


class GPT2LMHeadModel: ...
