"""Mistral: the network of Llama, but with windows, and heads that need not divide the hidden size."""

from aquilamoe.checkpoint.families import llama
from aquilamoe.checkpoint.families.family import Family

FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    computes=lambda model: llama.is_plain(model) and not llama.FAMILY.computes(model),
    same_as="LlamaForCausalLM",
    windows="all",
    default_window=4096,
    default_tokens=(1, 2, None),
)
